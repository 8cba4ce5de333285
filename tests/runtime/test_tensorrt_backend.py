"""Engines at run time: their sidecars, and runs against the real bindings of two versions."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tensorrt_surface import VERSIONS, run_inside
from tiny_engine import PLAN, sidecar, write_engine
from tiny_model import CLASSES, WIDTH, embeddings

from d2zero_runtime import D2ZeroError, Vocabulary
from d2zero_runtime.artifacts.engine import EngineMetadata, metadata_path, replace_engine_vocabulary
from d2zero_runtime.backends.tensorrt.backend import TensorrtBackend
from d2zero_runtime.backends.tensorrt.environment import numbers


@pytest.mark.parametrize("version", VERSIONS)
def test_running_against_the_real_bindings(version: str, tmp_path: Path) -> None:
    run_inside(Path(__file__).with_name("backend_scenarios.py"), version, tmp_path)


def test_without_tensorrt_there_is_one_clear_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    path = write_engine(tmp_path / "m.engine")
    with pytest.raises(D2ZeroError, match=r"TensorRT cannot be used here.*d2zero\[tensorrt\].*\.onnx file runs every"):
        TensorrtBackend(path, EngineMetadata.read(path))


def test_sidecar_is_read_as_it_was_written(tmp_path: Path) -> None:
    path = write_engine(tmp_path / "m.engine")
    found = EngineMetadata.read(path)
    assert metadata_path(path).name == "m.engine.json" and found.to_json() == sidecar().to_json()
    assert found.contract == sidecar().contract and found.profile == sidecar().profile
    np.testing.assert_array_equal(found.embeddings, embeddings())
    assert found.vocabulary.encoder == "word2vec" and found.require_plan(path) == PLAN


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, "follows version 2 of the description, this d2zero reads up to 1; upgrade"),
        ({"gpu": None, "profile": None}, "lacks gpu, profile; build the engine again"),
        ({"profile": {"min": "1x32x32x1"}}, r"is damaged: .*lack opt, max; build the engine again"),
        ({"embeddings": {"shape": [2, 2], "float32": "AAAA"}}, "is damaged"),
        ({"embeddings": {"shape": [2, 2], "float32": "?"}}, "is damaged"),
        ({"classifier": "?"}, r"m\.engine\.json is damaged: its classifier cannot be read"),
        ({"contract": []}, "is damaged"),
        ({"contract": {"version": 99}}, "version 99 of the model contract"),
        ({"contract": {"version": 1}}, "model contract lacks class_names"),
    ],
)
def test_bad_sidecars(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    path = write_engine(tmp_path / "m.engine")
    values = {**json.loads(metadata_path(path).read_text()), **change}
    metadata_path(path).write_text(json.dumps({key: value for key, value in values.items() if value is not None}))
    with pytest.raises(D2ZeroError, match=message):
        EngineMetadata.read(path)


def test_sidecars_that_are_none(tmp_path: Path) -> None:
    path = write_engine(tmp_path / "m.engine")
    for content, message in ((b"{", "not JSON"), (b"[1]", "expected a JSON object"), (b"\xff\xfe", "not JSON")):
        metadata_path(path).write_bytes(content)
        with pytest.raises(D2ZeroError, match=message):
            EngineMetadata.read(path)
    metadata_path(path).unlink()
    with pytest.raises(D2ZeroError, match=r"m\.engine\.json is missing; an engine and its \.json belong together"):
        EngineMetadata.read(path)


def test_vocabulary_is_replaced_beside_the_plan(tmp_path: Path) -> None:
    path = write_engine(tmp_path / "m.engine")
    before = path.stat().st_mtime_ns
    words = Vocabulary(
        ("cat", "dog"), np.ones((2, WIDTH), np.float32), seen=np.array([True, False]), source={"encoder": "word2vec"}
    )
    replace_engine_vocabulary(path, words)
    found = EngineMetadata.read(path)
    assert found.vocabulary.names == ("cat", "dog") and found.vocabulary.unseen_names == ("dog",)
    assert path.stat().st_mtime_ns == before and found.plan_sha256 == sidecar().plan_sha256
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["m.engine", "m.engine.json"]
    for wrong, message in (
        (Vocabulary(("cat",), np.ones((1, 3), np.float32)), f"width {WIDTH}, the vocabulary has 3"),
        (replace(words, source={"encoder": "clip"}), "do not mix"),
        (Vocabulary(tuple(map(str, range(41))), np.ones((41, WIDTH), np.float32)), "1 to 40 classes, got 41"),
    ):
        with pytest.raises(D2ZeroError, match=message):
            replace_engine_vocabulary(path, wrong)
    write_engine(path, baked=True)
    with pytest.raises(D2ZeroError, match="exported with --bake"):
        replace_engine_vocabulary(path, words)
    assert len(EngineMetadata.read(path).vocabulary) == CLASSES


def test_the_classifier_travels_with_the_metadata(tmp_path: Path) -> None:
    path, content = tmp_path / "m.engine", bytes(range(256))
    replace(sidecar(query_dim=6), classifier=content).write(path)
    path.write_bytes(PLAN)
    assert EngineMetadata.read(path).classifier == content and EngineMetadata.read(path).contract.query_dim == 6
    words = Vocabulary(("cat", "dog"), np.ones((2, WIDTH), np.float32), source={"encoder": "word2vec"})
    replace_engine_vocabulary(path, words)
    assert EngineMetadata.read(path).classifier == content and len(EngineMetadata.read(path).vocabulary) == 2
    older = json.loads(metadata_path(path).read_text())
    del older["classifier"]
    metadata_path(path).write_text(json.dumps(older))
    assert EngineMetadata.read(path).classifier == b""


def test_versions_are_numbers() -> None:
    assert numbers("10.14.1.48.post1") == (10, 14, 1, 48) and numbers("11.4") > numbers("10.14.1")
