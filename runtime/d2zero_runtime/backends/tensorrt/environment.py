"""The doors to TensorRT and CUDA: imported when asked for, with one clear refusal where they are absent.

Neither is a dependency. Both may be installed without the libraries or the driver that they need, which
shows only when they are imported or called.
"""

import ctypes
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from d2zero_runtime.errors import D2ZeroError

OLDEST = (10, 14)  # the oldest TensorRT that this code was checked against
_EVERYWHERE = "an engine is built on the GPU where it runs, while the .onnx file runs everywhere"
_INSTALL = f"install it with `pip install 'd2zero[tensorrt]'` beside an NVIDIA driver; {_EVERYWHERE}"
_DRIVER = f"an NVIDIA driver of this machine's GPU is needed (`nvidia-smi` shows it); {_EVERYWHERE}"


class Cuda:
    """Calls functions of the CUDA runtime and raises what they return as errors.

    Args:
        runtime: the module `cuda.bindings.runtime`.
    """

    def __init__(self, runtime: Any) -> None:
        self.runtime = runtime

    def __call__(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """The value of `function(*arguments)`: None if it has none, a tuple if it has several.

        Raises:
            D2ZeroError: the call failed; the line names it and the error.
        """
        error, *values = function(*arguments)
        if error == self.runtime.cudaError_t.cudaSuccess:
            return values[0] if len(values) == 1 else tuple(values) or None
        _, name = self.runtime.cudaGetErrorName(error)
        _, text = self.runtime.cudaGetErrorString(error)
        remedy = ""
        if error == self.runtime.cudaError_t.cudaErrorMemoryAllocation:
            remedy = "; free memory of the GPU, or build an engine with a smaller --max"
        raise D2ZeroError(f"{function.__name__} failed with {_text(name)} ({_text(text)}){remedy}")


@dataclass(frozen=True)
class Gpu:
    """A GPU.

    Args:
        index: CUDA's number of it.
        name: such as `NVIDIA H200`.
        compute_capability: such as `9.0`.
    """

    index: int
    name: str
    compute_capability: str


@dataclass(frozen=True, eq=False)
class Environment:
    """TensorRT, CUDA and the GPU to use.

    Args:
        tensorrt: the module.
        cuda: calls the CUDA runtime.
        gpu: the current device of the calling thread.
    """

    tensorrt: Any
    cuda: Cuda
    gpu: Gpu

    @property
    def version(self) -> str:
        """TensorRT's version."""
        return str(self.tensorrt.__version__)

    def select(self) -> None:
        """Make the GPU the calling thread's current device: CUDA keeps one for every thread."""
        self.cuda(self.cuda.runtime.cudaSetDevice, self.gpu.index)


def require_tensorrt(device: int = 0) -> Environment:
    """TensorRT, CUDA and a GPU, or one line that says what is missing.

    Args:
        device: CUDA's number of the GPU.

    Raises:
        D2ZeroError: TensorRT or cuda-bindings is absent, too old or without its libraries, or there is no such GPU.
    """
    tensorrt = _imported("tensorrt", "TensorRT")
    if numbers(str(tensorrt.__version__))[:2] < OLDEST:
        raise D2ZeroError(
            f"TensorRT {'.'.join(map(str, OLDEST))} or newer is needed, {tensorrt.__version__} is installed;"
            " upgrade it with `pip install -U 'd2zero[tensorrt]'`"
        )
    runtime = _imported("cuda.bindings.runtime", "cuda-bindings")
    environment = Environment(tensorrt, Cuda(runtime), _gpu(runtime, device))
    environment.select()
    return environment


def driver_problem(cuda_major: int = 0) -> str:
    """Why no GPU can be used through this machine's NVIDIA driver; empty if none was found, and on other than Linux.

    Args:
        cuda_major: The major version of CUDA that the driver must support.
    """
    if sys.platform != "linux":
        return ""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return "the NVIDIA driver is missing: libcuda.so.1 cannot be loaded"
    status, text, version = driver.cuInit(0), ctypes.c_char_p(), ctypes.c_int()
    if status != 0:
        driver.cuGetErrorString(status, ctypes.byref(text))
        return f"the NVIDIA driver finds no GPU that it can use: {(text.value or b'unknown error').decode()} ({status})"
    driver.cuDriverGetVersion(ctypes.byref(version))
    major, minor = version.value // 1000, version.value % 1000 // 10  # 12040 is CUDA 12.4
    if major < cuda_major:
        return f"the NVIDIA driver is too old: it supports CUDA {major}.{minor}, CUDA {cuda_major} is needed; update it"
    return ""


def numbers(version: str) -> tuple[int, ...]:
    """The leading numbers of a version: `10.14.1.48.post1` gives (10, 14, 1, 48)."""
    found = []
    for part in version.split("."):
        if not part.isdecimal():
            break
        found.append(int(part))
    return tuple(found)


def collector(tensorrt: Any) -> Any:
    """A logger for TensorRT that prints nothing and keeps errors, in `errors`, for a message of ours."""

    class Collector(tensorrt.ILogger):
        def __init__(self) -> None:
            tensorrt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, msg: str) -> None:
            if severity in (tensorrt.ILogger.ERROR, tensorrt.ILogger.INTERNAL_ERROR):
                self.errors.append(" ".join(msg.split()))

    return Collector()


def _imported(module: str, name: str) -> Any:
    try:
        return import_module(module)
    except Exception as error:  # absent, or its libraries are: ImportError, OSError, RuntimeError, …
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise D2ZeroError(f"{name} cannot be used here ({reason}); {_INSTALL}") from error


def _gpu(runtime: Any, device: int) -> Gpu:
    try:
        error, count = runtime.cudaGetDeviceCount()
    except Exception as failure:  # the bindings raise where the driver's library is absent
        raise D2ZeroError(f"no NVIDIA GPU can be used here ({driver_problem() or failure}); {_DRIVER}") from failure
    if error != runtime.cudaError_t.cudaSuccess:
        # CUDA's name for a missing driver is that of one that is too old.
        reason = driver_problem() or _text(runtime.cudaGetErrorName(error)[1])
        raise D2ZeroError(f"no NVIDIA GPU can be used here ({reason}); {_DRIVER}")
    if not 0 <= device < count:
        raise D2ZeroError(f"there is no GPU {device}: this machine has {count}, numbered from 0; {_EVERYWHERE}")
    properties = Cuda(runtime)(runtime.cudaGetDeviceProperties, device)
    return Gpu(device, _text(properties.name).rstrip("\0"), f"{properties.major}.{properties.minor}")


def _text(value: Any) -> str:
    return value.decode(errors="replace") if isinstance(value, bytes) else str(value)
