"""ONNX Runtime's GPU providers: what is missing is named before a session is made, and float32 stays float32.

There is no GPU here: `onnxruntime`, the dynamic linker and the driver are recorders.
"""

import ctypes
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from d2zero_runtime import D2ZeroError
from d2zero_runtime.backends import onnxruntime_gpu as onnx_gpu
from d2zero_runtime.backends.onnxruntime import OnnxBackend, Provider
from d2zero_runtime.backends.onnxruntime_gpu import CUDA, TENSORRT, needed_libraries
from d2zero_runtime.backends.tensorrt.environment import require_tensorrt

CPU = "CPUExecutionProvider"
OVERRIDE = "NVIDIA_TF32_OVERRIDE"
NEEDED = {  # of onnxruntime-gpu 1.31
    "libonnxruntime_providers_cuda.so": ["libcublasLt.so.13", "libcudart.so.13", "libcuda.so.1"],
    "libonnxruntime_providers_tensorrt.so": ["libcublas.so.13", "libnvinfer.so.10", "libnvonnxparser.so.10"],
}


class Machine:
    """A machine with onnxruntime-gpu; what it lacks can be said."""

    def __init__(self, folder: Path) -> None:
        self.absent: set[str] = set()
        self.driver_status, self.driver_version = 0, 13000
        self.events: list[str] = []
        self.sessions: list[tuple[Any, dict[str, Any]]] = []
        (folder / "capi").mkdir()
        for name in NEEDED:
            (folder / "capi" / name).touch()
        self.onnxruntime = SimpleNamespace(
            __file__=str(folder / "__init__.py"),
            __version__="1.31.1",
            cuda_version="13.0",
            SessionOptions=SimpleNamespace,
            OrtValue=SimpleNamespace(ortvalue_from_numpy=None),
            InferenceSession=self.session,
            get_available_providers=lambda: [TENSORRT, CUDA, CPU],
            preload_dlls=self.preload,
        )

    def preload(self) -> None:
        self.events.append("preload")
        print("Failed to load")  # as it does where a library is missing

    def load(self, name: str) -> Any:
        self.events.append(name)
        if name in self.absent:
            raise OSError(f"{name}: cannot open shared object file: No such file or directory")
        return SimpleNamespace(
            cuInit=lambda _: self.driver_status, cuGetErrorString=self.text, cuDriverGetVersion=self.version
        )

    def text(self, status: int, text: Any) -> None:
        text._obj.value = b"no CUDA-capable device is detected"

    def version(self, version: Any) -> None:
        version._obj.value = self.driver_version

    def session(self, path: str, options: Any, providers: Any, **settings: Any) -> Any:
        self.sessions.append((providers, settings))
        return running([*(name for name, _ in providers), CPU])


def running(providers: list[str]) -> SimpleNamespace:
    """A session of an exported model."""
    images = SimpleNamespace(name="images", type="tensor(float)", shape=["batch", 3, "height", "width"])
    outputs = [SimpleNamespace(name=name, type="tensor(float)", shape=[]) for name in ("class_logits", "mask_logits")]
    return SimpleNamespace(get_providers=lambda: providers, get_inputs=lambda: [images], get_outputs=lambda: outputs)


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    machine = Machine(tmp_path)
    monkeypatch.setitem(sys.modules, "onnxruntime", machine.onnxruntime)
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    monkeypatch.setattr(ctypes, "CDLL", machine.load)
    monkeypatch.setenv(OVERRIDE, "")  # so that it is as it was after the test
    monkeypatch.delenv(OVERRIDE)
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(onnx_gpu, "needed_libraries", lambda path: NEEDED[path.name])
    return machine


@pytest.mark.parametrize(
    ("provider", "lacks", "message"),
    [
        ("cuda", {"absent": {"libcublasLt.so.13"}}, r"libcublasLt\.so\.13: cannot open.*`pip install 'd2zero\[gpu\]'`"),
        ("cuda", {"absent": {"libcudnn.so.9", "libcuda.so.1"}}, r"libcudnn\.so\.9: cannot open.*'d2zero\[gpu\]'"),
        (
            "tensorrt",
            {"absent": {"libnvinfer.so.10"}},
            r"^TensorrtExec.*libnvinfer\.so\.10: .*`pip install 'd2zero\[gpu,tensorrt\]' 'tensorrt==10\.\*'`",
        ),
        ("cuda", {"absent": {"libcuda.so.1"}}, r"driver is missing: libcuda\.so\.1 cannot be loaded; an NVIDIA GPU"),
        ("tensorrt", {"absent": {"libcuda.so.1"}}, "the NVIDIA driver is missing"),
        ("cuda", {"driver_status": 100}, r"driver finds no GPU that it can use: no CUDA-capable device .* \(100\)"),
        ("cuda", {"driver_version": 12040}, r"too old: it supports CUDA 12\.4, CUDA 13 is needed; update it"),
    ],
)
def test_what_is_missing_is_named_before_a_session_is_made(
    machine: Machine, provider: str, lacks: dict[str, Any], message: str, capfd: pytest.CaptureFixture[str]
) -> None:
    vars(machine).update(lacks)
    with pytest.raises(D2ZeroError, match=message) as caught:
        OnnxBackend(Path("m.onnx"), [provider])
    assert "\n" not in str(caught.value) and "ExecutionProvider cannot start: " in str(caught.value)
    assert machine.events[0] == "preload" and not machine.sessions
    assert capfd.readouterr() == ("", "")


def test_a_provider_that_fails_anyway_is_an_error_and_cpus_need_nothing(machine: Machine) -> None:
    machine.onnxruntime.InferenceSession = lambda *_, **__: running([CPU])
    with pytest.raises(D2ZeroError, match=f"could not start {CUDA}, only {CPU} would run"):
        OnnxBackend(Path("m.onnx"), ["cuda"])
    machine.events.clear()
    OnnxBackend(Path("m.onnx"), ["cpu"])
    assert not machine.events


@pytest.mark.parametrize(
    ("providers", "tf32", "passed", "override"),
    [
        (["cpu"], False, [(CPU, {})], None),
        (["cuda"], False, [(CUDA, {"use_tf32": 0})], None),
        ([("cuda", {"device_id": 1}), "cpu"], False, [(CUDA, {"use_tf32": 0, "device_id": 1}), (CPU, {})], None),
        ([("cuda", {"use_tf32": 1})], False, [(CUDA, {"use_tf32": 1})], None),
        (["cuda"], True, [(CUDA, {})], None),
        (["tensorrt", "cuda"], False, [(TENSORRT, {}), (CUDA, {"use_tf32": 0})], b"0"),
        (["tensorrt", "cuda"], True, [(TENSORRT, {}), (CUDA, {})], None),
    ],
)
def test_tf32_is_off_unless_it_is_allowed(
    machine: Machine, providers: list[Provider], tf32: bool, passed: list[Any], override: bytes | None
) -> None:
    OnnxBackend(Path("m.onnx"), providers, tf32=tf32)
    assert machine.sessions == [(passed, {"enable_fallback": 0})]  # with the fallback, a failure is only printed
    getenv = ctypes.PyDLL(None).getenv  # what libraries see
    getenv.restype = ctypes.c_char_p
    assert getenv(OVERRIDE.encode()) == override


def test_the_environment_of_the_user_is_kept(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(OVERRIDE, "1")
    OnnxBackend(Path("m.onnx"), ["tensorrt"])
    assert os.environ[OVERRIDE] == "1"


@pytest.mark.skipif(not shutil.which("gcc") or sys.platform != "linux", reason="needs gcc, for a library")
def test_needed_libraries_are_read_from_a_library_that_cannot_be_loaded(tmp_path: Path) -> None:
    source = tmp_path / "empty.c"
    source.touch()
    names = ["libcublas.so.13", "libother.so.2", "libnvinfer.so.10"]
    for name, needed in (*((name, ()) for name in names), ("libprovider.so", names)):
        paths = [str(tmp_path / file) for file in (name, source.name, *needed)]
        build = ["gcc", "-shared", f"-Wl,-soname,{name},--no-as-needed", "-o", *paths]
        subprocess.run(build, check=True, timeout=60)
    for name in names:
        (tmp_path / name).unlink()
    with pytest.raises(OSError, match="cannot open shared object"):
        ctypes.CDLL(str(tmp_path / "libprovider.so"))
    assert needed_libraries(tmp_path / "libprovider.so") == ["libcublas.so.13", "libnvinfer.so.10"]


def test_an_engine_names_the_missing_driver(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    error = SimpleNamespace(cudaSuccess=0)
    runtime = SimpleNamespace(
        cudaError_t=error,
        cudaGetDeviceCount=lambda: (35, None),  # of a missing driver and of an old one
        cudaGetErrorName=lambda _: (0, b"cudaErrorInsufficientDriver"),
    )
    monkeypatch.setitem(sys.modules, "tensorrt", SimpleNamespace(__version__="11.4.0.106"))
    for name, module in (("cuda", None), ("cuda.bindings", None), ("cuda.bindings.runtime", runtime)):
        monkeypatch.setitem(sys.modules, name, module or SimpleNamespace(__path__=[]))
    with pytest.raises(D2ZeroError, match=r"be used here \(cudaErrorInsufficientDriver\)"):
        require_tensorrt()
    machine.absent = {"libcuda.so.1"}
    with pytest.raises(D2ZeroError, match=r"be used here \(the NVIDIA driver is missing: libcuda\.so\.1"):
        require_tensorrt()
