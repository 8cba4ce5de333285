"""What TensorRT 10 and 11 are asked for, against their real bindings; run by `test_engine.py`, a process per version.

What parsing and building do is tried with TensorRT-RTX's real library (`test_tensorrt_rtx.py`).
"""

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_cuda import FakeCuda
from tensorrt_surface import Recorder, as_tensorrt, constructor
from tiny_model import CLASSES, WIDTH, write_model

from d2zero_export.engine import EngineOptions, Shape, build_engine
from d2zero_runtime.artifacts.engine import EngineMetadata
from d2zero_runtime.errors import D2ZeroError

PLAN = b"a plan"


class Setting:
    """A TensorRT that answers what the test wants, and what was called."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, names: tuple[str, ...]) -> None:
        self.tensorrt = as_tensorrt(monkeypatch)
        self.cuda = FakeCuda()
        monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", self.cuda)
        self.calls: list[tuple[Any, ...]] = []
        self.answers: dict[str, Any] = {
            "INetworkDefinition.num_inputs": len(names),
            "INetworkDefinition.get_input": self._input,
            "Builder.build_serialized_network": PLAN,
            "IBuilderConfig.add_optimization_profile": 0,
        }
        self.names = names
        for name in ("Builder", "OnnxParser"):
            monkeypatch.setattr(
                self.tensorrt, name, constructor(getattr(self.tensorrt, name), self.answers, self.calls)
            )

    def _input(self, network: Recorder, index: int) -> Recorder:
        return Recorder(self.tensorrt.ITensor, {"ITensor.name": self.names[index]}, self.calls)

    def called(self, name: str) -> list[tuple[Any, ...]]:
        return [call[1:] for call in self.calls if call[0] == name]


@pytest.fixture
def setting(monkeypatch: pytest.MonkeyPatch) -> Setting:
    return Setting(monkeypatch, ("images", "class_embeddings"))


def test_dynamic_model(setting: Setting, tmp_path: Path) -> None:
    model, output, stages = write_model(tmp_path / "m.onnx"), tmp_path / "out" / "m.engine", list[str]()
    config = EngineOptions(min=Shape(1, 64, 96, 1), opt=Shape(1, 64, 96, 5), max=Shape(2, 128, 128, 30), workspace_gb=2)
    sidecar = build_engine(model, output, config, stages.append)
    assert stages == ["read", "parse", "profile", "build", "contract"]
    assert setting.called("IOptimizationProfile.set_shape") == [
        ("images", (1, 3, 64, 96), (1, 3, 64, 96), (2, 3, 128, 128)),
        ("class_embeddings", (1, WIDTH), (5, WIDTH), (30, WIDTH)),
    ]
    flags = setting.tensorrt.NetworkDefinitionCreationFlag
    assert setting.called("Builder.create_network") == [(1 << int(flags.STRONGLY_TYPED),)]
    assert setting.called("IBuilderConfig.set_flag") == []
    assert setting.called("IBuilderConfig.clear_flag") == [(setting.tensorrt.BuilderFlag.TF32,)]
    assert setting.called("IBuilderConfig.set_memory_pool_limit") == [
        (setting.tensorrt.MemoryPoolType.WORKSPACE, 2 << 30)
    ]
    (content,) = setting.called("OnnxParser.parse")[0]
    assert content != model.read_bytes() and len(content) < model.stat().st_size
    assert output.read_bytes() == PLAN and EngineMetadata.read(output).to_json() == sidecar.to_json()
    written = json.loads((tmp_path / "out/m.engine.json").read_text())
    assert written["plan_sha256"] == hashlib.sha256(PLAN).hexdigest()
    assert written["onnx_sha256"] == hashlib.sha256(model.read_bytes()).hexdigest()
    assert written["profile"] == {"min": "1x64x96x1", "opt": "1x64x96x5", "max": "2x128x128x30"}
    assert (written["gpu"], written["compute_capability"]) == ("NVIDIA H200", "9.0")
    assert (
        written["tensorrt"] == setting.tensorrt.__version__ and not written["contract"]["baked"] and not written["tf32"]
    )
    assert sidecar.require_plan(output) == PLAN and len(sidecar.vocabulary) == CLASSES
    assert sorted(entry.name for entry in output.parent.iterdir()) == ["m.engine", "m.engine.json"]


def test_baked_model_keeps_its_embeddings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    setting = Setting(monkeypatch, ("images",))
    model = write_model(tmp_path / "m.onnx", baked=True)
    sidecar = build_engine(model, tmp_path / "m.engine", EngineOptions(tf32=True, optimization_level=0))
    assert sidecar.contract.baked and sidecar.tf32 and sidecar.profile.max.classes == CLASSES
    assert [call[0] for call in setting.called("IOptimizationProfile.set_shape")] == ["images"]
    assert setting.called("OnnxParser.parse") == [(model.read_bytes(),)]
    assert setting.called("IBuilderConfig.clear_flag") == []
    assert setting.called("IBuilderConfig.builder_optimization_level =") == [(0,)]


def test_the_classifier_goes_beside_the_plan(setting: Setting, tmp_path: Path) -> None:
    model = write_model(tmp_path / "m.onnx", classifier=b"a classifier")
    options = EngineOptions(min=Shape(1, 64, 96, 1), opt=Shape(1, 64, 96, 5))
    assert build_engine(model, tmp_path / "m.engine", options).classifier == b"a classifier"
    assert EngineMetadata.read(tmp_path / "m.engine").classifier == b"a classifier"


def test_tf32_is_what_the_model_allows(setting: Setting, tmp_path: Path) -> None:
    model = write_model(tmp_path / "m.onnx", tf32=True)
    sidecar = build_engine(
        model, tmp_path / "m.engine", EngineOptions(min=Shape(1, 64, 96, 1), opt=Shape(1, 64, 96, 5))
    )
    assert sidecar.tf32 and setting.called("IBuilderConfig.clear_flag") == []


def test_timing_cache_is_read_and_written(setting: Setting, tmp_path: Path) -> None:
    cache = tmp_path / "caches" / "t.cache"
    config = EngineOptions(timing_cache=cache)
    setting.answers["ITimingCache.serialize"] = b"measured"
    model = write_model(tmp_path / "m.onnx")
    build_engine(model, tmp_path / "m.engine", config)
    build_engine(model, tmp_path / "m.engine", config)
    assert setting.called("IBuilderConfig.create_timing_cache") == [(b"",), (b"measured",)]
    assert [call[1] for call in setting.called("IBuilderConfig.set_timing_cache")] == [False, False]
    assert cache.read_bytes() == b"measured" and len(list(cache.parent.iterdir())) == 1
    setting.answers["IBuilderConfig.set_timing_cache"] = False
    with pytest.raises(D2ZeroError, match=r"t\.cache is damaged, or of another GPU or TensorRT; delete it"):
        build_engine(model, tmp_path / "m.engine", config)


def test_no_builder_and_no_gpu(setting: Setting, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", setting.cuda)
    as_tensorrt(monkeypatch)
    with pytest.raises(D2ZeroError, match="cannot start here"):  # the stubs give no builder, as a broken driver does
        build_engine(write_model(tmp_path / "m.onnx"), tmp_path / "m.engine")
    setting.cuda.devices = 0
    with pytest.raises(D2ZeroError, match="no GPU 0: this machine has 0"):
        build_engine(tmp_path / "none.onnx", tmp_path / "m.engine")
    monkeypatch.setattr(sys.modules["tensorrt"], "__version__", "10.9.0.34")
    with pytest.raises(D2ZeroError, match=r"TensorRT 10\.14 or newer is needed, 10\.9\.0\.34"):
        build_engine(tmp_path / "none.onnx", tmp_path / "m.engine")


def test_recorders_refuse_what_is_not_there(setting: Setting) -> None:
    builder = setting.tensorrt.Builder(setting.tensorrt.Logger())
    config = builder.create_builder_config()
    for wrong in (
        lambda: builder.build_cuda_engine(1),  # gone since 10
        lambda: builder.create_network("flags"),
        lambda: config.set_flag(8),
        lambda: config.set_flag(),
        lambda: config.set_timing_cache(config, False),
        lambda: setattr(config, "num_optimization_profiles", 1),  # read-only
        lambda: setattr(config, "max_workspace_size", 1),  # gone since 10
        lambda: setting.tensorrt.OnnxParser(builder, setting.tensorrt.Logger()),
    ):
        with pytest.raises(AssertionError):
            wrong()
    fp16 = hasattr(setting.tensorrt.BuilderFlag, "FP16")
    assert fp16 == setting.tensorrt.__version__.startswith("10.")  # why no precision flag may be used
    np.testing.assert_equal(setting.called("IBuilderConfig.set_flag"), [])
