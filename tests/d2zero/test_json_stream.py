"""JSON read entry by entry equals JSON read whole, wherever a block ends; errors say where."""

import io
import json
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from properties import cases

from d2zero.data import json_stream
from d2zero.data.coco import open_coco, read_coco
from d2zero.data.json_stream import EntriesOnDisk, JsonStream, open_seekable, read_json
from d2zero_runtime import D2ZeroError

TEXT = st.text(st.characters(codec="utf-8"))
SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | TEXT
JSON = st.recursive(SCALARS, lambda inner: st.lists(inner) | st.dictionaries(TEXT, inner))
VALUES = [{"a": [1, -2.5e3, True, None], "b": 'q"\\{}[],'}, 123456, {}, [], "Säge 鋸", {"ö": "\u0000\n"}, 1e-3, [[[]]]]


@pytest.mark.parametrize("block", [1, 2, 7, 1 << 20])
@pytest.mark.parametrize("style", [{}, {"indent": 2}, {"separators": (",", ":")}, {"ensure_ascii": False}])
def test_elements_and_their_places(block: int, style: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_stream, "BLOCK", block)
    path = tmp_path / "list.json"
    path.write_text(f" {json.dumps(VALUES, **style)}\n ", encoding="utf-8")
    content = path.read_bytes()
    with path.open("rb") as stream:
        text = JsonStream(stream, path)
        found = list(text.elements())
        text.end()
    assert [value for value, *_ in found] == VALUES
    assert [json.loads(content[start:end]) for _, start, end in found] == VALUES
    assert read_json(path) == VALUES


@cases(15)
@given(
    values=st.lists(JSON, max_size=6),
    block=st.integers(1, 99),
    indent=st.none() | st.integers(0, 3),
    ascii_only=st.booleans(),
)
def test_any_list_wherever_blocks_end(values: list[object], block: int, indent: int | None, ascii_only: bool) -> None:
    content = json.dumps(values, indent=indent, ensure_ascii=ascii_only).encode()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_stream, "BLOCK", block)
        text = JsonStream(io.BytesIO(content), Path("list.json"))
        found = list(text.elements())
        text.end()
    assert [value for value, *_ in found] == values
    assert [json.loads(content[start:end]) for _, start, end in found] == values


def test_an_empty_list(tmp_path: Path) -> None:
    (tmp_path / "list.json").write_text("[ ]")
    with (tmp_path / "list.json").open("rb") as stream:
        assert not list(JsonStream(stream, tmp_path).elements())


@pytest.mark.parametrize("block", [1, 1 << 20])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "Expecting '\\[' at byte 0"),
        ('[{"a": 1}, {"a"', "Expecting ':' delimiter at byte 15"),
        ('[{"a": 1}, {"a": "x', "Unterminated string starting at at byte 17"),
        ("[1, 2", "Expecting ']' at byte 5"),
        ("[1 2]", "Expecting ']' at byte 3"),
        ("[1,]", "Expecting value at byte 3"),
        ("[1] x", "Extra data at byte 4"),
        (b'["\xe4"]', "no UTF-8"),
    ],
)
def test_damaged(
    content: str | bytes, message: str, block: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(json_stream, "BLOCK", block)
    path = tmp_path / "bad.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with (
        path.open("rb") as stream,
        pytest.raises(D2ZeroError, match=rf"bad.json is not JSON or is cut short: {message}"),
    ):
        text = JsonStream(stream, path)
        list(text.elements())
        text.end()


def test_entries_by_key_in_any_order(tmp_path: Path) -> None:
    entries = [{"image_id": key, "n": number} for number, key in enumerate([5, 5, 3, 5, 3, 3, 8])]
    path = tmp_path / "list.json"
    path.write_text(json.dumps(entries, indent=1))
    with path.open("rb") as stream:
        kept = EntriesOnDisk(stream)
        for entry, *place in JsonStream(stream, path).elements():
            kept.note(entry["image_id"], *place)
        expected = {key: [entry for entry in entries if entry["image_id"] == key] for key in (5, 3, 8)}
        assert dict(kept) == expected and 8 in kept and 4 not in kept
        assert kept.get(4, []) == []


def test_a_pipe_is_read_twice_too(tmp_path: Path) -> None:
    reading, writing = os.pipe()
    with os.fdopen(writing, "w") as pipe:
        pipe.write("[1]")
    with os.fdopen(reading), open_seekable(Path(f"/dev/fd/{reading}")) as stream:
        assert stream.read() == b"[1]"
        stream.seek(0)
        assert stream.read() == b"[1]"


def test_annotations_on_disk_equal_those_in_memory(shapes_data: Path, tmp_path: Path) -> None:
    content = json.loads((shapes_data / "annotations/instances_val_gzsi_shapes.json").read_text())
    content["categories"].append({"id": 99, "name": "Säge"})
    content["annotations"].reverse()
    path = tmp_path / "truth.json"
    path.write_text(json.dumps({"annotations": content.pop("annotations"), **content, "more": [1]}, ensure_ascii=False))
    whole = read_coco(path)
    with open_coco(path) as lazy:
        assert dict(lazy.annotations) == whole.annotations
        assert lazy.images == whole.images and lazy.categories == whole.categories and "Säge" in lazy.categories
