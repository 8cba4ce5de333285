"""TensorRT, TensorRT-RTX and CUDA: imported when asked for, with one clear refusal where they are absent.

None is a dependency. All may be installed without the libraries or the driver that they need, which
shows only when they are imported or called.
"""

import ctypes
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from d2zero_runtime.errors import D2ZeroError

_EVERYWHERE = "an engine runs on NVIDIA GPUs only, while the .onnx file runs everywhere"
_DRIVER = f"`nvidia-smi` shows what the driver sees; {_EVERYWHERE}"


@dataclass(frozen=True)
class Sdk:
    """One of NVIDIA's two libraries that run engines, and what differs between them.

    Args:
        name: The name in flags and descriptions, and of the extra that installs it.
        label: The name in messages.
        modules: Where its Python bindings may be: the package's, and the one that NVIDIA's archive brings.
        oldest: The oldest version that this code was checked against.
        portable: Whether engines are built without a GPU, for many GPUs. Others run only where they were built.
    """

    name: str
    label: str
    modules: tuple[str, ...]
    oldest: tuple[int, int]
    portable: bool


TENSORRT = Sdk("tensorrt", "TensorRT", ("tensorrt",), (10, 14), portable=False)
TENSORRT_RTX = Sdk("tensorrt-rtx", "TensorRT-RTX", ("tensorrt_rtx_bindings", "tensorrt_rtx"), (1, 7), portable=True)
SDKS = {sdk.name: sdk for sdk in (TENSORRT, TENSORRT_RTX)}


@dataclass(frozen=True, eq=False)
class Library:
    """An SDK, imported.

    Args:
        sdk: Which.
        tensorrt: The module.
    """

    sdk: Sdk
    tensorrt: Any

    @property
    def version(self) -> str:
        """The library's version."""
        return str(self.tensorrt.__version__)

    def __str__(self) -> str:
        return f"{self.sdk.label} {self.version}"


class Cuda:
    """Calls functions of the CUDA runtime and raises what they return as errors.

    Args:
        runtime: The module `cuda.bindings.runtime`.
    """

    def __init__(self, runtime: Any) -> None:
        self.runtime = runtime

    def __call__(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """The value of `function(*arguments)`: None if it has none, a tuple if it has several.

        Raises:
            D2ZeroError: The call failed; the line names it and the error.
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
        name: Such as `NVIDIA H200`.
        compute_capability: Such as `9.0`.
    """

    index: int
    name: str
    compute_capability: str


@dataclass(frozen=True, eq=False)
class Environment:
    """What an engine needs to run.

    Args:
        library: TensorRT or TensorRT-RTX.
        cuda: Calls the CUDA runtime.
        gpu: The current device of the calling thread.
    """

    library: Library
    cuda: Cuda
    gpu: Gpu

    @property
    def sdk(self) -> Sdk:
        """The library's."""
        return self.library.sdk

    def select(self) -> None:
        """Make the GPU the calling thread's current device: CUDA keeps one for every thread."""
        self.cuda(self.cuda.runtime.cudaSetDevice, self.gpu.index)


def require_library(sdk: Sdk) -> Library:
    """TensorRT or TensorRT-RTX, which is all that building an engine of the latter needs.

    Raises:
        D2ZeroError: It is absent, too old or without its libraries.
    """
    library = Library(sdk, _imported(sdk.modules, sdk.label, sdk))
    if numbers(library.version)[:2] < sdk.oldest:
        raise D2ZeroError(
            f"{sdk.label} {'.'.join(map(str, sdk.oldest))} or newer is needed, {library.version} is installed;"
            f" upgrade it with `pip install -U 'd2zero[{sdk.name}]'`"
        )
    return library


def require_tensorrt(device: int = 0, sdk: Sdk = TENSORRT) -> Environment:
    """The library, CUDA and a GPU, or one line that says what is missing.

    Args:
        device: CUDA's number of the GPU.
        sdk: TensorRT or TensorRT-RTX.

    Raises:
        D2ZeroError: The library or cuda-bindings is absent, too old or without its libraries, or there is no such GPU.
    """
    library = require_library(sdk)
    runtime = _imported(("cuda.bindings.runtime",), "cuda-bindings", sdk)
    environment = Environment(library, Cuda(runtime), _gpu(runtime, device))
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
    """A logger for an SDK's module that prints nothing and keeps errors, in `errors`, for a message of ours."""

    class Collector(tensorrt.ILogger):
        def __init__(self) -> None:
            tensorrt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, msg: str) -> None:
            if severity in (tensorrt.ILogger.ERROR, tensorrt.ILogger.INTERNAL_ERROR):
                self.errors.append(" ".join(msg.split()))

    return Collector()


def _imported(modules: Sequence[str], name: str, sdk: Sdk) -> Any:
    """The first of the modules that is installed."""
    module = next((module for module in modules if _is_installed(module)), modules[0])
    try:
        return import_module(module)
    except Exception as error:  # absent, or its libraries are: ImportError, OSError, RuntimeError, …
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        beside = "" if sdk.portable else " beside an NVIDIA driver"
        raise D2ZeroError(
            f"{name} cannot be used here ({reason}); install it with `pip install 'd2zero[{sdk.name}]'`{beside};"
            f" {_EVERYWHERE}"
        ) from error


def _is_installed(module: str) -> bool:
    try:
        return module in sys.modules or find_spec(module) is not None
    except ModuleNotFoundError:  # the package around it is absent
        return False


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
