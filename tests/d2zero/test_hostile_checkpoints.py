"""Checkpoints from strangers: nothing is executed, nothing fetched, no memory taken that the file does not fill."""

import http.server
import io
import json
import pickle
import struct
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from d2zero.checkpoints.files import load_model
from d2zero.checkpoints.published import read_arrays
from d2zero.demo.run import packaged_checkpoint
from d2zero_runtime import D2ZeroError

RAW = packaged_checkpoint().read_bytes()
HEADER_BYTES = struct.unpack("<Q", RAW[:8])[0]
HEADER = json.loads(RAW[8 : 8 + HEADER_BYTES])
DESCRIPTION = json.loads(HEADER["__metadata__"]["d2zero"])


def checkpoint(path: Path, **config: Any) -> Path:
    """The demo's, with other settings of the model."""
    description = {**DESCRIPTION, "config": {**DESCRIPTION["config"], **config}}
    header = json.dumps({**HEADER, "__metadata__": {"d2zero": json.dumps(description)}}).encode()
    header += b" " * (-len(header) % 8)
    path.write_bytes(struct.pack("<Q", len(header)) + header + RAW[8 + HEADER_BYTES :])
    return path


@pytest.fixture
def server() -> Iterator[tuple[str, list[str]]]:
    """An address, and what was asked of it."""
    asked: list[str] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_error(404)

        def log_message(self, *given: object) -> None: ...

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}/weights.pth", asked
        running.shutdown()


class Runs:
    """Makes a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return Path.touch, (self.marker,)


def test_backbone_options_open_and_fetch_nothing(tmp_path: Path, server: tuple[str, list[str]]) -> None:
    marker, weights = tmp_path / "executed", tmp_path / "weights.pth"
    weights.write_bytes(pickle.dumps({"state_dict": Runs(marker)}))
    for options in (
        {"checkpoint_path": str(weights)},
        {"pretrained": True},
        {"pretrained_cfg": {"file": str(weights), "architecture": "test_resnet"}},
        {"pretrained_cfg_overlay": {"url": server[0]}},
        {"cache_dir": str(tmp_path)},
        {"act_layer": "os.system"},
        {"channels": "x"},
        {"channels": [10**6] * 4},
        {"layers": [10**6] * 4},
    ):
        with pytest.raises(D2ZeroError, match="backbone_options"):
            load_model(checkpoint(tmp_path / "m.safetensors", backbone_options=options))
    for name in ("hf-hub:timm/resnet18.a1_in1k", f"local-dir:{tmp_path}", "../test_resnet"):
        with pytest.raises(D2ZeroError, match="timm has no backbone"):
            load_model(checkpoint(tmp_path / "m.safetensors", backbone=name))
    assert not marker.exists() and not server[1]


@pytest.mark.parametrize(
    "config",
    [
        {"num_queries": 2**31},
        {"decoder_layers": 10**6},
        {"encoder_points": 10**6},
        {"decoder_ffn_dim": 10**8},
        {"hidden_dim": 128_000},
        {"text_dim": 10**8},
        {"backbone": "vit_giant_patch14_clip_224", "backbone_options": {}},
    ],
    ids=str,
)
def test_a_description_larger_than_its_arrays_is_refused_at_once(tmp_path: Path, config: dict[str, Any]) -> None:
    with pytest.raises(D2ZeroError, match=r"m\.safetensors"):
        load_model(checkpoint(tmp_path / "m.safetensors", **config))


def glob(module: bytes, name: bytes) -> bytes:
    return b"c" + module + b"\n" + name + b"\n"


def text(value: bytes) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value


DTYPE = glob(b"numpy", b"dtype") + text(b"%s") + b"\x89\x88\x87R"
MADE = glob(b"numpy.core.multiarray", b"_reconstruct") + glob(b"numpy", b"ndarray") + b"K\0\x85C\x01b\x87R"
HOSTILE = {
    "named": glob(b"os", b"system") + text(b"true") + b"\x85R",
    "object array": glob(b"numpy", b"ndarray") + b"(K\x01\x85" + DTYPE % b"O8" + b"C\x08AAAAAAAAtR",
    "object scalar": glob(b"numpy.core.multiarray", b"scalar") + DTYPE % b"O8" + b"C\x08AAAAAAAA\x86R",
    "short content": MADE + b"(K\x01J\x40\x42\x0f\x00\x85" + DTYPE % b"f4" + b"\x89C\x04\0\0\0\0tb",
    "structured": MADE + b"(K\x01K\x01\x85" + DTYPE % b"V8" + b"\x89C\x08AAAAAAAAtb",
    "text": MADE + b"(K\x01K\x01\x85" + DTYPE % b"U100" + b"\x89C\x01Atb",
    "without content": glob(b"numpy", b"ndarray") + b"\x8a\x05\0\0\0\0\x01\x85\x85R",
    "negative": MADE + b"(K\x01J\xfb\xff\xff\xff\x85" + DTYPE % b"f4" + b"\x89C\x04\0\0\0\0tb",
    "memo": b"]r\xff\xff\xff\x7f",
    "other codec": glob(b"_codecs", b"encode") + text(b"abc") + text(b"bz2") + b"\x86R",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_pickles_are_refused(tmp_path: Path, name: str) -> None:
    path = tmp_path / "m.pkl"
    path.write_bytes(b"\x80\x03}" + text(b"a") + HOSTILE[name] + b"s.")
    with pytest.raises(D2ZeroError, match=r"m\.pkl (is damaged|holds no arrays)"):
        read_arrays(path)


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
def test_plain_pickles_are_read(tmp_path: Path, protocol: int) -> None:
    path = tmp_path / "m.pkl"
    arrays = {
        "floats": np.arange(6, dtype=np.float32).reshape(2, 3),
        "columns": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        "big-endian": np.arange(3, dtype=">i4"),
        "flag": np.array([True, False]),
        "one": np.float64(2.5),
        "none": np.zeros((0, 3), np.float16),
    }
    path.write_bytes(pickle.dumps({"model": arrays, "note": "kept out"}, protocol))
    found = read_arrays(path)
    assert list(found) == list(arrays)
    for name, array in arrays.items():
        np.testing.assert_array_equal(found[name].numpy(), array)


def test_a_compressed_archive_is_refused(tmp_path: Path) -> None:
    stream, path = io.BytesIO(), tmp_path / "m.pth"
    torch.save({"model": {"a": torch.zeros(1 << 20)}}, stream)
    with zipfile.ZipFile(stream) as stored, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as packed:
        for entry in stored.namelist():
            packed.writestr(entry, stored.read(entry))
    with pytest.raises(D2ZeroError, match="compressed entries"):
        read_arrays(path)


def test_a_view_larger_than_its_storage_is_refused(tmp_path: Path) -> None:
    torch.save({"model": {"a": torch.zeros(1).expand(10**9)}}, tmp_path / "m.pth")
    with pytest.raises(D2ZeroError, match="a is no plain array"):
        read_arrays(tmp_path / "m.pth")
