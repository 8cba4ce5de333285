"""Engines of TensorRT-RTX at run time: its real library where that needs no GPU, else recorders of its classes."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_engine import Setting
from tensorrt_surface import as_tensorrt_rtx
from tiny_engine import expected, inputs, write_engine

from d2zero_runtime import D2ZeroError, load
from d2zero_runtime.artifacts.engine import EngineMetadata
from d2zero_runtime.backends.tensorrt.backend import TensorrtBackend
from d2zero_runtime.backends.tensorrt.environment import TENSORRT_RTX, collector, require_library
from d2zero_runtime.backends.tensorrt.rtx import why_invalid

KERNELS = b"compiled kernels"


@pytest.fixture
def setting(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Setting:
    found = Setting(monkeypatch, tmp_path, sdk="tensorrt-rtx")
    validity = found.tensorrt.EngineValidity
    found.answers["Runtime.get_engine_validity"] = (validity.VALID, 0)
    found.answers["IRuntimeCache.serialize"] = KERNELS
    return found


def called(setting: Setting, name: str) -> list[tuple[Any, ...]]:
    return [call[1:] for call in setting.calls if call[0] == name]


def run_and_compare(backend: TensorrtBackend, *shape: int) -> None:
    images, words = inputs(*shape)
    for found, wanted in zip(backend.run(images, words), expected(images, words), strict=True):
        np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize(("cuda_graphs", "strategy"), [(True, "WHOLE_GRAPH_CAPTURE"), (False, "DISABLED")])
def test_data_flows_and_the_library_captures_graphs(setting: Setting, cuda_graphs: bool, strategy: str) -> None:
    backend = setting.load(cuda_graphs=cuda_graphs)
    for shape in [(1, 32, 64, 5), (2, 64, 96, 20), (1, 32, 64, 5)] * 2:
        run_and_compare(backend, *shape)
    assert setting.cuda.count("cudaStreamBeginCapture") == 0 and setting.count("execute_async_v3") == 6
    rtx = setting.tensorrt
    assert called(setting, "IRuntimeConfig.cuda_graph_strategy =") == [(getattr(rtx.CudaGraphStrategy, strategy),)]
    assert called(setting, "IRuntimeConfig.set_execution_context_allocation_strategy") == [
        (rtx.ExecutionContextAllocationStrategy.USER_MANAGED,)
    ]
    assert called(setting, "IRuntimeConfig.dynamic_shapes_kernel_specialization_strategy =") == [
        (rtx.DynamicShapesKernelSpecializationStrategy.LAZY,)
    ]
    (config,) = {entry[0] for entry in called(setting, "ICudaEngine.create_execution_context")}
    assert config.real is rtx.IRuntimeConfig
    assert backend.name.startswith("tensorrt-rtx 1.") and backend.known_issues == ()


def test_compiled_kernels_are_kept_beside_the_engine(setting: Setting, caplog: pytest.LogCaptureFixture) -> None:
    kernels = setting.path.with_name("m.engine.kernels")
    backend = setting.load()
    run_and_compare(backend, 1, 32, 64, 5)
    assert kernels.read_bytes() == KERNELS  # written though nothing was closed
    setting.answers["IRuntimeCache.serialize"] = KERNELS * 2
    backend.close()
    assert kernels.read_bytes() == KERNELS * 2
    setting.load().close()
    assert called(setting, "IRuntimeCache.deserialize") == [(KERNELS * 2,)]
    setting.answers["IRuntimeCache.deserialize"] = False  # another GPU's
    setting.answers["IRuntimeCache.serialize"] = b"of this one"
    with caplog.at_level("INFO", "d2zero"):
        setting.load().close()
    assert "is for another GPU, driver or version" in caplog.text and kernels.read_bytes() == b"of this one"


def test_a_folder_that_cannot_be_written_costs_only_time(
    setting: Setting, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(path: Path) -> None:
        raise PermissionError(f"{path}: read-only")

    monkeypatch.setattr("d2zero_runtime.backends.tensorrt.rtx.atomic_write", refuse)
    run_and_compare(setting.load(), 1, 32, 64, 5)
    assert "compiled kernels cannot be kept" in caplog.text


def test_invalid_engines_in_words(setting: Setting) -> None:
    diagnostics = setting.tensorrt.EngineInvalidityDiagnostics
    for name, message in (
        ("UNSUPPORTED_CC", "cannot run .*m.engine on NVIDIA H200: it was not built for this GPU's compute capability"),
        ("OLD_CUDA_DRIVER", "the NVIDIA driver is too old for it; build the engine again"),
        (None, "TensorRT-RTX gave no reason"),
    ):
        flags = int(getattr(diagnostics, name)) if name else 0
        setting.answers["Runtime.get_engine_validity"] = (setting.tensorrt.EngineValidity.INVALID, flags)
        with pytest.raises(D2ZeroError, match=message):
            setting.load()
    metadata = replace(EngineMetadata.read(setting.path), tensorrt="1.6.0.1")
    with pytest.raises(D2ZeroError, match=r"built by TensorRT-RTX 1\.6\.0\.1, here is 1\..* --format tensorrt-rtx"):
        TensorrtBackend(setting.path, metadata)


def test_every_diagnostic_of_the_library_has_words(monkeypatch: pytest.MonkeyPatch) -> None:
    rtx = as_tensorrt_rtx(monkeypatch)
    runtime = rtx.Runtime(collector(rtx))
    assert why_invalid(rtx, runtime, b"no engine" * 200) == "it is damaged, or no engine of TensorRT-RTX"
    for name, flag in rtx.EngineInvalidityDiagnostics.__members__.items():

        class Answers:
            def get_engine_validity(self, plan: bytes, flag: Any = flag) -> tuple[Any, int]:
                return rtx.EngineValidity.INVALID, int(flag)

        assert why_invalid(rtx, Answers(), b"") not in ("", "TensorRT-RTX gave no reason"), name


def test_what_is_missing_is_said_in_one_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, hidden: Callable[[str], None]
) -> None:
    hidden("tensorrt_rtx_bindings")
    path = write_engine(tmp_path / "m.engine", "1.7.1.116", sdk="tensorrt-rtx")
    with pytest.raises(D2ZeroError, match=r"TensorRT-RTX cannot be used here .*pip install 'd2zero\[tensorrt-rtx\]'"):
        load(path)
    with pytest.raises(D2ZeroError, match="TensorRT-RTX cannot be used here"):
        require_library(TENSORRT_RTX)


@pytest.fixture
def hidden(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    import sys

    return lambda module: monkeypatch.setitem(sys.modules, module, None)
