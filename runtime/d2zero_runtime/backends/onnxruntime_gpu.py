"""What ONNX Runtime's GPU providers need, loaded and checked before a session is made.

ONNX Runtime leaves out a provider whose libraries cannot be loaded, with lines on standard error, and computes on the
CPU; version 1.22 crashes where there is no GPU. Here the first thing that is missing becomes one error, which names
it and what to install: a library, the NVIDIA driver, or the GPU. Libraries are checked on Linux only.
"""

import contextlib
import ctypes
import io
import os
import re
import struct
import sys
from collections.abc import Iterable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from d2zero_runtime.backends.tensorrt.environment import driver_problem
from d2zero_runtime.errors import D2ZeroError

CUDA, TENSORRT = "CUDAExecutionProvider", "TensorrtExecutionProvider"
_LIBRARIES = {CUDA: "libonnxruntime_providers_cuda.so", TENSORRT: "libonnxruntime_providers_tensorrt.so"}
_CUDNN = "libcudnn.so.9"  # newer providers start without it and fail at the first convolution
_DRIVER = "libcuda.so.1"
_PT_LOAD, _PT_DYNAMIC, _DT_NEEDED, _DT_STRTAB, _DT_STRSZ = 1, 2, 1, 5, 10  # of ELF files
_HINT = (
    "an NVIDIA GPU with its driver is needed (`nvidia-smi` shows both; a container must be given the GPU); the provider"
    " cpu runs everywhere"
)


def forbid_tf32(providers: Iterable[tuple[str, dict[str, Any]]]) -> list[tuple[str, dict[str, Any]]]:
    """Switch TF32 off, before any library of CUDA is loaded.

    Args:
        providers: ONNX Runtime's names with their options. `use_tf32` of the CUDA provider is kept if it is there.

    Returns:
        The providers with the options that they need. The TensorRT provider has none (microsoft/onnxruntime#26029):
        the environment of the process, which NVIDIA's libraries read, is changed for it instead.
    """
    chosen = list(providers)
    if any(name == TENSORRT for name, _ in chosen):
        os.environ.setdefault("NVIDIA_TF32_OVERRIDE", "0")
    return [(name, {"use_tf32": 0, **options} if name == CUDA else options) for name, options in chosen]


def require_startable(onnxruntime: Any, names: Sequence[str]) -> None:
    """Load what the GPU providers among `names` need, or say what is missing.

    Raises:
        D2ZeroError: A library, the driver or a GPU is missing, or the driver is too old.
    """
    wanted = [name for name in names if name in _LIBRARIES]
    if not wanted:
        return
    _preload(onnxruntime, wanted)
    for name in wanted:
        provider = Path(onnxruntime.__file__).parent / "capi" / _LIBRARIES[name]
        needed = needed_libraries(provider) if sys.platform == "linux" and provider.is_file() else []
        for library in dict.fromkeys([*needed, _CUDNN] if needed else []):
            _require_library(name, library)
    major = int(str(onnxruntime.cuda_version or "0").split(".")[0])
    if problem := driver_problem(major):
        raise D2ZeroError(f"{wanted[0]} cannot start: {problem}; {_HINT}")


def needed_libraries(path: Path) -> list[str]:
    """The NVIDIA libraries that a 64-bit ELF file needs (`DT_NEEDED`), read without loading the file.

    Loading a provider of ONNX Runtime 1.22 crashes the process where there is no GPU.
    """
    with path.open("rb") as file:

        def read(offset: int, size: int) -> bytes:
            file.seek(offset)
            return file.read(size)

        offset, size, count = struct.unpack("<32xQ14xHH4x", read(0, 62))
        # type, flags, offset in the file, address, physical address, size in the file, size in memory, alignment
        segments = [struct.unpack("<IIQQQQQQ", read(offset + index * size, 56)) for index in range(count)]
        dynamic = next(segment for segment in segments if segment[0] == _PT_DYNAMIC)
        entries = list(struct.iter_unpack("<QQ", read(dynamic[2], dynamic[5])))
        address, length = (next(value for tag, value in entries if tag == wanted) for wanted in (_DT_STRTAB, _DT_STRSZ))
        start = next(s[2] + address - s[3] for s in segments if s[0] == _PT_LOAD and s[3] <= address < s[3] + s[5])
        strings = read(start, length)
    names = [strings[value : strings.index(b"\0", value)].decode() for tag, value in entries if tag == _DT_NEEDED]
    return [name for name in names if name.startswith(("libcu", "libnv"))]


def _preload(onnxruntime: Any, names: Sequence[str]) -> None:
    """Load the libraries that pip installed: the dynamic linker does not look where they are."""
    with contextlib.redirect_stdout(io.StringIO()):  # it prints what it cannot load; our own error names it
        onnxruntime.preload_dlls()
    if TENSORRT in names:
        with contextlib.suppress(Exception):  # absent, or without its libraries: those of the system may do
            import_module("tensorrt")


def _require_library(provider: str, library: str) -> None:
    try:
        ctypes.CDLL(library)
    except OSError as error:
        if str(error).startswith(_DRIVER):
            return  # pip installs no driver
        install = "'d2zero[gpu]'"
        if found := re.match(r"libnv(?:infer|onnxparser)\w*\.so\.(\d+)", library):
            install = f"'d2zero[gpu,tensorrt]' 'tensorrt=={found[1]}.*'"
        raise D2ZeroError(f"{provider} cannot start: {error}; install it with `pip install {install}`") from error
