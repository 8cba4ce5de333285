"""Damaged and hostile files of every kind that is read: a correct result or one line of ours, never anything else.

What crashes or hangs ends the run. The cases are drawn by Hypothesis; a failing one is shown in its smallest form.
"""

import gzip
import io
import json
import os
import pickle
import struct
from collections.abc import Callable
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from tiny_model import contract, write_model

from d2zero.checkpoints.files import load_model
from d2zero.checkpoints.published import read_arrays
from d2zero.demo.run import packaged_checkpoint
from d2zero.text.vectors import read_vectors
from d2zero_runtime import D2ZeroError, Vocabulary, read_image
from d2zero_runtime.artifacts.contract import ModelContract
from d2zero_runtime.artifacts.onnx import graph_inputs, read_contract, without_default_embeddings
from d2zero_runtime.artifacts.text_encoder import TextContract

# A short slice with the other tests; `make fuzz` tries many more, and others each time.
CASES = int(os.environ.get("FUZZ_CASES", "60"))
settings.register_profile(
    "cases", max_examples=CASES, derandomize=CASES == 60, deadline=None, suppress_health_check=list(HealthCheck),
    database=None,
)  # fmt: skip
settings.load_profile("cases")

ODD = st.one_of(
    st.none(), st.booleans(), st.integers(-(2**70), 2**70), st.floats(), st.text(max_size=5),
    st.just([]), st.just({}), st.just([None]), st.just(["a", 1]), st.just({"a": {}}),
)  # fmt: skip


@st.composite
def damaged(draw: st.DrawFn, whole: bytes) -> bytes:
    """Bytes with a few of them changed, left out, put in, or the end cut off."""
    content = bytearray(whole)
    for _ in range(draw(st.integers(1, 4))):
        place = draw(st.integers(0, max(0, len(content) - 1)))
        kind = draw(st.sampled_from(["change", "flip", "leave out", "put in", "cut"]))
        if kind == "change" and content:
            content[place] = draw(st.integers(0, 255))
        elif kind == "flip" and content:
            content[place] ^= 1 << draw(st.integers(0, 7))
        elif kind == "leave out":
            del content[place : place + draw(st.integers(1, 16))]
        elif kind == "put in":
            content[place:place] = draw(st.binary(min_size=1, max_size=16))
        else:
            del content[place:]
    return bytes(content)


@st.composite
def with_odd_value(draw: st.DrawFn, whole: Any) -> Any:
    """JSON with a value somewhere in it exchanged for another, or left out."""
    changed = deepcopy(whole)
    place = changed
    while True:
        keys = list(place) if isinstance(place, dict) else list(range(min(len(place), 3)))
        key = draw(st.sampled_from(keys))
        inner = place[key]
        if not (isinstance(inner, (dict, list)) and inner) or draw(st.booleans()):
            break
        place = inner
    if draw(st.booleans()) or not isinstance(place, dict):
        place[key] = draw(ODD)
    else:
        del place[key]
    return changed


def assert_result_or_one_line(read: Callable[[], Any]) -> None:
    try:
        read()
    except D2ZeroError as error:
        assert "\n" not in str(error).strip()


def image_bytes(kind: str) -> bytes:
    pixels = np.random.default_rng(0).integers(0, 256, (24, 32, 3), np.uint8)
    stream, turned = io.BytesIO(), Image.Exif()
    turned[0x0112] = 6
    Image.fromarray(pixels).save(stream, kind, **({"exif": turned} if kind in ("JPEG", "PNG", "WEBP") else {}))
    return stream.getvalue()


IMAGES = {kind: image_bytes(kind) for kind in ("JPEG", "PNG", "WEBP", "TIFF", "GIF", "BMP")}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


@given(st.sampled_from(sorted(IMAGES)).flatmap(lambda kind: damaged(IMAGES[kind])))
@pytest.mark.filterwarnings("ignore")
def test_images(folder: Path, content: bytes) -> None:
    (folder / "image").write_bytes(content)
    assert_result_or_one_line(lambda: read_image(folder / "image"))


def vocabulary_bytes(folder: Path) -> bytes:
    words = Vocabulary(("cat", "dog"), np.ones((2, 3), np.float32), source={"encoder": "word2vec"})
    return words.save(folder / "whole.npz").read_bytes()


@given(st.data())
@pytest.mark.filterwarnings("ignore")
def test_vocabularies(folder: Path, data: st.DataObject) -> None:
    (folder / "v.npz").write_bytes(data.draw(damaged(vocabulary_bytes(folder))))
    assert_result_or_one_line(lambda: Vocabulary.load(folder / "v.npz"))


PICKLE = pickle.dumps({"model": {"a": np.arange(6, dtype=np.float32), "b": np.float64(1), "c": np.eye(2)}}, 2)


@given(damaged(PICKLE))
@pytest.mark.filterwarnings("ignore")
def test_pickles(folder: Path, content: bytes) -> None:
    (folder / "m.pkl").write_bytes(content)
    assert_result_or_one_line(lambda: read_arrays(folder / "m.pkl"))


@given(with_odd_value(json.loads(contract().to_json())))
def test_contracts(values: Any) -> None:
    assert_result_or_one_line(lambda: ModelContract.from_json(json.dumps(values), "m.onnx"))


@given(st.data())
def test_onnx_files(folder: Path, data: st.DataObject) -> None:
    whole = write_model(folder / "whole.onnx").read_bytes()
    (folder / "m.onnx").write_bytes(data.draw(damaged(whole)))
    for read in (read_contract, graph_inputs, without_default_embeddings):
        assert_result_or_one_line(partial(read, folder / "m.onnx"))


TEXT_CONTRACT = TextContract("clip:tiny", ("a {}",), 77, 8, "{}", tools={"torch": "2"})


@given(with_odd_value(json.loads(TEXT_CONTRACT.to_json())))
def test_descriptions_of_text_encoders(values: Any) -> None:
    assert_result_or_one_line(lambda: TextContract.from_json(json.dumps(values), "text.onnx"))


LINES = b"cat 0.5 1 -2e-3\ndog 1 2 3\n"
PACKED = b"".join(word + b" " + struct.pack("<3f", 0.5, 1, 2) for word in (b"cat", b"dog"))
VECTORS = {"glove": LINES, "word2vec": b"2 3\n" + LINES, "binary": b"2 3\n" + PACKED}
VECTORS |= {f"{name}, compressed": gzip.compress(content, mtime=0) for name, content in VECTORS.items()}


@given(st.sampled_from(sorted(VECTORS)).flatmap(lambda name: damaged(VECTORS[name])))
def test_word_vectors(folder: Path, content: bytes) -> None:
    (folder / "vectors").write_bytes(content)
    assert_result_or_one_line(lambda: read_vectors(folder / "vectors", ["dog"]))


RAW = packaged_checkpoint().read_bytes()
(HEADER_BYTES,) = struct.unpack("<Q", RAW[:8])
HEADER = json.loads(RAW[8 : 8 + HEADER_BYTES])


@given(with_odd_value(json.loads(HEADER["__metadata__"]["d2zero"])))
@settings(max_examples=25)
def test_checkpoints(folder: Path, description: Any) -> None:
    header = json.dumps({**HEADER, "__metadata__": {"d2zero": json.dumps(description)}}).encode()
    header += b" " * (-len(header) % 8)
    (folder / "m.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + RAW[8 + HEADER_BYTES :])
    assert_result_or_one_line(lambda: load_model(folder / "m.safetensors"))
