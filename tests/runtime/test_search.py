"""The best instances of some classes over an index: those of a plain search through all that it holds."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from weakref import WeakSet

import numpy as np
import pytest
from commands import Command
from numpy.typing import NDArray
from PIL import Image
from small_index import write_index

from d2zero_runtime import D2ZeroError, Detections, Vocabulary
from d2zero_runtime.draw import Instance, SheetCell, crop, crop_sheet
from d2zero_runtime.index.index import Index
from d2zero_runtime.index.search import Match, search
from d2zero_runtime.index.shards import IndexedImage
from d2zero_runtime.masks import rle
from d2zero_runtime.text.prompts import embed_names, normalised

pytest.importorskip("pyarrow")

IMAGES = 12


@pytest.fixture(scope="module")
def images(shapes_data: Path) -> list[Path]:
    return sorted((shapes_data / "val").iterdir())[:IMAGES]


@pytest.fixture(scope="module")
def folder(exported: Path, images: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Not to be changed."""
    return write_index(tmp_path_factory.mktemp("search") / "index", exported, images, rows=5)


@pytest.fixture
def index(folder: Path) -> Index:
    return Index(folder, threads=1)


def everything(index: Index, vocabulary: Vocabulary | None = None) -> list[tuple[str, Detections]]:
    """All queries of all images as all classes."""
    most = index.contract.num_queries * len(vocabulary or index.vocabulary)
    found = index.name(vocabulary, score_threshold=0, max_detections=most)
    return [(image.path, detections) for image, detections in found]


def place(match: Match) -> tuple[str, str, float, str]:
    return match.image.path, match.name, match.score, match.mask["counts"]


@pytest.mark.parametrize(("top", "score"), [(1, 0.0), (7, 0.0), (10_000, 0.0), (50, 0.2)])
def test_finds_what_a_plain_search_finds(top: int, score: float, index: Index) -> None:
    names = ("red ring", "blue star", "green circle")
    expected = []
    for path, found in everything(index):
        for name in names:
            kept = found.named([name]).above(score).without_duplicates()
            masks = cast("tuple[rle.RLE, ...]", kept.masks)
            expected += [(path, name, float(s), mask["counts"]) for s, mask in zip(kept.scores, masks, strict=True)]
    expected.sort(key=lambda entry: -entry[2])
    matches = search(index, names, top=top, score_threshold=score)
    assert [match.score for match in matches] == [entry[2] for entry in expected[:top]]
    assert {*map(place, matches)} <= {*expected} and len({*map(place, matches)}) == len(matches) > 0
    for match in matches:
        assert match.seen == (match.name in index.vocabulary.seen_names)


def test_only_some_classes_are_reported_and_all_compete(index: Index) -> None:
    name = index.vocabulary.unseen_names[0]
    asked = index.name(score_threshold=0, max_detections=index.contract.num_queries, only=[name])
    for (path, found), (image, only) in zip(everything(index), asked, strict=True):
        expected = found.named([name])
        assert image.path == path and set(only.names) == {name} and len(only) == len(expected)
        np.testing.assert_array_equal(only.scores, expected.scores)
    with pytest.raises(D2ZeroError, match="unicorn not in the vocabulary"):
        next(index.name(only=["unicorn"]))


def test_synonyms_and_inactive_classes_can_be_asked_for(index: Index) -> None:
    own = index.vocabulary
    other = own.with_synonyms({"red star": "red ring"})
    as_class, as_synonym = (search(index, [name], other, top=5) for name in ("red ring", "red star"))
    assert [place(m) for m in as_class] == [place(m) for m in as_synonym] and as_class[0].name == "red ring"
    without = replace(own, active=np.array([name != "red ring" for name in own.names]))
    assert [place(m) for m in search(index, ["red ring"], without, top=5)] == [
        place(m) for m in search(index, ["red ring"], top=5)
    ]


def test_wrong_requests(index: Index) -> None:
    with pytest.raises(D2ZeroError, match="top must be at least 1, got 0"):
        search(index, ["red ring"], top=0)
    with pytest.raises(D2ZeroError, match="unicorn not in the vocabulary"):
        search(index, ["unicorn"])
    narrow = Vocabulary(("a",), np.ones((1, 3), np.float32))
    with pytest.raises(D2ZeroError, match="width"):
        search(index, ["a"], narrow)


def test_classes_are_added_to_a_vocabulary() -> None:
    own = Vocabulary(
        ("cat", "dog", "hound"), np.eye(3, dtype=np.float32), np.array([True, False, False]),
        source={"encoder": "a"}, synonyms={"hound": "dog"},
    )  # fmt: skip
    more = Vocabulary(("mug", "cat"), np.full((2, 3), 2, np.float32), np.array([False, False]), source={"encoder": "a"})
    both = own.with_classes(more)
    assert both.names == ("cat", "dog", "hound", "mug") and both.synonyms == {"hound": "dog"}
    assert both.seen.tolist() == [True, False, False, False] and both.encoder == "a"
    np.testing.assert_array_equal(both.embeddings, [[2, 2, 2], [0, 1, 0], [0, 0, 1], [2, 2, 2]])
    assert own.with_classes(own.select(["dog", "hound"])).names == own.names
    with pytest.raises(D2ZeroError, match="do not mix"):
        own.with_classes(replace(more, source={"encoder": "b"}))
    with pytest.raises(D2ZeroError, match="width"):
        own.with_classes(Vocabulary(("mug",), np.ones((1, 4), np.float32)))


class DrawnIndex:
    """Images with four instances each; counts those that are in memory."""

    def __init__(self, count: int) -> None:
        self.count, self.contract = count, SimpleNamespace(num_queries=4)
        self.vocabulary = Vocabulary(("cat",), np.ones((1, 3), np.float32))
        self.kept, self.most = WeakSet[IndexedImage](), 0

    def __len__(self) -> int:
        return self.count

    def name(self, *_: Any, **__: Any) -> Iterator[tuple[IndexedImage, Detections]]:
        drawn = np.random.default_rng(0)
        places = np.arange(0, 40, 10)
        for number in range(self.count):
            image = IndexedImage(f"{number}.jpg", "", (4, 40))
            self.kept.add(image)
            self.most = max(self.most, len(self.kept))
            yield (
                image,
                Detections(
                    boxes=np.stack([places, 0 * places, places + 1, 0 * places + 1], axis=1).astype(np.float32),
                    scores=-np.sort(-drawn.random(4).astype(np.float32)),
                    class_ids=np.zeros(4, np.int64),
                    names=("cat",) * 4,
                    seen=np.ones(4, bool),
                    masks=tuple(
                        rle.encode_window(np.ones((1, 1), bool), 0, place, 4, 40) for place in range(0, 40, 10)
                    ),
                    image_size=(4, 40),
                ),
            )


def test_memory_holds_the_best_and_no_image_more() -> None:
    index = DrawnIndex(300)
    assert len(search(cast(Index, index), ["cat"], top=8)) == 8
    assert index.most <= 8 + 3  # what is being looked at


def test_crops_show_the_instance_with_its_outline() -> None:
    mask = np.zeros((300, 400), bool)
    mask[100:120, 200:230] = True
    image = np.zeros((300, 400, 3), np.uint8)
    image[mask] = (0, 90, 0)
    shown = np.asarray(crop(image, Instance((200, 100, 230, 120), "", 0, False, lambda: mask), 100))
    assert shown.shape == (100, 100, 3)
    assert (shown == 255).all(-1).any() and (shown == (0, 90, 0)).all(-1).any() and not shown[:10].any()
    boxed = np.asarray(crop(Image.fromarray(image), Instance((200, 100, 230, 120), "", 0, False), 100))
    np.testing.assert_array_equal(shown, boxed)
    for box in ((0, 0, 400, 300), (0, 0, 2, 2), (398, 0, 400, 300)):
        assert max(crop(image, Instance(box, "", 3, True), 100).size) == 100


def test_sheets_of_crops() -> None:
    cells = [SheetCell(Image.new("RGB", (100, 60), (9, 200, 9)), ("1. 0.90 cat", "x" * 300))] * 4
    cells.append(SheetCell("image is gone", ("5. 0.10 * 猫\n", "b.jpg")))
    sheet = np.asarray(crop_sheet(cells, columns=3, title="猫 " * 200, side=100))
    assert sheet.shape[1] == 3 * 110 + 10
    assert (sheet == (9, 200, 9)).all(-1).sum() == 4 * 6000 and (sheet == (84, 87, 92)).all(-1).sum() > 6000
    assert crop_sheet([]).height > 0


def test_command(folder: Path, images: list[Path], tmp_path: Path, command: Command) -> None:
    outcome = command("search", folder, "--names", "red ring, blue star", "--top", 25, "-o", tmp_path)
    assert outcome.code == 0, outcome.err
    matches = search(Index(folder), ["red ring", "blue star"], top=25)
    found = json.loads((tmp_path / "results.json").read_text())
    assert [(e["path"], e["name"], e["score"], e["segmentation"]["counts"]) for e in found] == [*map(place, matches)]
    assert [entry["rank"] for entry in found] == list(range(1, 26))
    assert all(entry["seen"] == (entry["name"] == "blue star") and len(entry["box"]) == 4 for entry in found)
    assert "unseen" in outcome.out and "and 5 more" in outcome.out and f"25 instances in {IMAGES} images" in outcome.out
    with Image.open(tmp_path / "sheet.jpg") as sheet:
        assert sheet.width == 8 * 230 + 10
    outcome = command("search", folder, "--names", "red ring", "--score", 1, "-o", tmp_path)
    assert outcome.code == 0 and "nothing found" in outcome.out
    assert json.loads((tmp_path / "results.json").read_text()) == []


def test_command_with_a_vocabulary(folder: Path, index: Index, tmp_path: Path, command: Command) -> None:
    other = index.vocabulary.select(["red ring", "blue star"]).save(tmp_path / "v.npz")
    outcome = command("search", folder, "--names", "red ring", "-v", other, "-o", tmp_path)
    assert outcome.code == 0, outcome.err
    expected = search(index, ["red ring"], Vocabulary.load(other))
    found = json.loads((tmp_path / "results.json").read_text())
    assert [entry["score"] for entry in found] == [match.score for match in expected]
    outcome = command("search", folder, "--names", "green circle", "-v", other, "-o", tmp_path)
    assert outcome.code == 2 and outcome.err.count("\n") == 1
    assert "green circle not among the 2 classes of" in outcome.err and "v.npz" in outcome.err


def test_images_that_cannot_be_shown_are_named_in_the_sheet(
    exported: Path, images: list[Path], tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    copies = [tmp_path / f"{number}.png" for number in range(3)]
    for source, copy in zip(images, copies, strict=False):
        copy.write_bytes(source.read_bytes())
    folder = write_index(tmp_path / "index", exported, copies)
    copies[0].unlink()
    copies[1].write_bytes(copies[2].read_bytes())
    cells: list[SheetCell] = []
    monkeypatch.setattr("d2zero_runtime.draw.crop_sheet", lambda given, **_: cells.extend(given) or crop_sheet(given))
    outcome = command("search", folder, "--names", "red ring", "-o", tmp_path / "out")
    assert outcome.code == 0 and "are gone, changed or unreadable" in outcome.err
    said = {cell.caption[1]: cell.picture for cell in cells}
    assert said["0.png"] == "image is gone" and said["1.png"] == "image has changed"
    assert isinstance(said["2.png"], Image.Image) and (tmp_path / "out/sheet.jpg").exists()


def test_a_damaged_shard_is_named_and_the_others_are_searched(
    exported: Path, images: list[Path], tmp_path: Path, command: Command
) -> None:
    folder = write_index(tmp_path / "index", exported, images[:6], rows=3)
    shard = sorted(folder.glob("shard-*"))[0]
    shard.write_bytes(shard.read_bytes()[:-100])
    outcome = command("search", folder, "--names", "red ring", "-o", tmp_path / "out")
    assert outcome.code == 2 and outcome.err.count("\n") == 2 and "1 of 2 shards could not be used" in outcome.err
    found = json.loads((tmp_path / "out/results.json").read_text())
    assert {entry["path"] for entry in found} <= {str(path) for path in images[3:6]} and found


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--names", "unicorn, red ring"), "unicorn not among the 36 classes of the index (red circle"),
        (("--names", "red ring|hoop"), "red ring|hoop not among the 36 classes"),
        (("--names", "red ring, red ring"), "red ring given more than once"),
        (("--names", " , "), "needs at least one class name"),
        (("--names", "none.txt"), "file of names none.txt does not exist"),
        (("--names", "red ring", "-v", "none.npz"), "vocabulary none.npz does not exist"),
        (("--names", "unicorn", "--text-encoder", "none.onnx"), "text encoder none.onnx does not exist"),
        (("--names", "red ring", "--top", 0), "--top"),
        ((), "--names"),
    ],
)
def test_wrong_flags(flags: tuple[object, ...], message: str, folder: Path, tmp_path: Path, command: Command) -> None:
    outcome = command("search", folder, "-o", tmp_path / "out", *flags)
    assert outcome.code == 2 and message in outcome.err and outcome.err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_no_index(tmp_path: Path, command: Command) -> None:
    outcome = command("search", tmp_path, "--names", "cat", "-o", tmp_path / "out")
    assert outcome.code == 2 and "is no index" in outcome.err and outcome.err.count("\n") == 1


def test_names_that_the_index_lacks_are_encoded(
    folder: Path, index: Index, tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They join the index's own classes as unseen ones; one with synonyms takes the place of its namesake."""
    own = index.vocabulary

    def encode(prompts: Sequence[str]) -> NDArray[np.float32]:
        rows = [np.random.default_rng(list(text.encode())).standard_normal(own.width) for text in prompts]
        return normalised(np.array(rows, np.float32))

    class Encoder:
        def __call__(self, names: list[str], **options: Any) -> Vocabulary:
            return embed_names(names, encode, own.encoder, **options)

    described = SimpleNamespace(width=own.width, encoder=own.encoder)
    monkeypatch.setattr("d2zero.cli.search.TextContract", SimpleNamespace(read=lambda _: described))
    monkeypatch.setattr("d2zero.cli.models.TextEncoder", SimpleNamespace(load=lambda *_, **__: Encoder()))
    typed = "red mug, red circle|disc, blue star"
    outcome = command("search", folder, "--names", typed, "--text-encoder", "t.onnx", "-o", tmp_path)
    assert outcome.code == 0, outcome.err
    classes = own.with_classes(Encoder()(["red mug", "red circle|disc"], seen=own.seen_names))
    assert classes.names == (*own.names, "red mug") and not classes.seen[-1] and classes.seen[0]
    assert not np.array_equal(classes.embeddings[0], own.embeddings[0])
    found = json.loads((tmp_path / "results.json").read_text())
    expected = search(index, ["red mug", "red circle", "blue star"], classes)
    assert [(e["path"], e["name"], e["score"], e["segmentation"]["counts"]) for e in found] == [*map(place, expected)]
    assert {entry["name"] for entry in found} == {"red mug", "red circle", "blue star"}
    described.width += 1
    outcome = command("search", folder, "--names", typed, "--text-encoder", "t.onnx", "-o", tmp_path)
    assert outcome.code == 2 and "the text encoder has 65" in outcome.err and outcome.err.count("\n") == 1
