"""Peak memory of this process, and of the GPU.

Host: the high-water mark of resident memory. Linux lets a process reset its own (`/proc/self/clear_refs`), so
that each case has one; what allocators keep from earlier cases counts. Elsewhere the mark is of the process's
whole life.

GPU: growth of the used memory of all GPUs since before the model was opened, as nvidia-smi tells it: CUDA's
context is in it. Caching allocators keep what they once needed, so the growth after a run is the peak of it.
Other programs on the same GPU would disturb it.
"""

import ctypes
import gc
import sys
from contextlib import suppress
from pathlib import Path

from d2zero_bench.environment import output_of

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")


def reset_host_peak() -> None:
    """Start the high-water mark anew, where that can be done."""
    try:
        _CLEAR.write_text("5")
    except OSError:
        return


def host_peak_mb() -> float | None:
    """The high-water mark in 1e6 bytes."""
    peak = _status_mb("VmHWM")
    if peak is not None:
        return peak
    if sys.platform == "win32":
        import psutil

        return float(psutil.Process().memory_info().peak_wset) / 1e6
    import resource

    mark = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return mark / 1e6 if sys.platform == "darwin" else mark * 1024 / 1e6


def host_resident_mb() -> float | None:
    """What is resident now, in 1e6 bytes; None where Linux does not tell."""
    return _status_mb("VmRSS")


def return_freed_memory() -> None:
    """Have glibc give what is free back to the system, so that the mark does not start from earlier peaks."""
    gc.collect()
    with suppress(OSError, AttributeError):  # not glibc
        ctypes.CDLL(None).malloc_trim(0)


def _status_mb(name: str) -> float | None:
    if not _STATUS.exists():
        return None
    lines = (line.split() for line in _STATUS.read_text().splitlines() if line.startswith(f"{name}:"))
    return next((int(line[1]) * 1024 / 1e6 for line in lines), None)


class GpuMemory:
    """Used memory of the GPUs, against what it was at the start."""

    def __init__(self) -> None:
        self._start = _used_mb()

    def growth_mb(self) -> float | None:
        """In 1e6 bytes; None without a GPU that nvidia-smi sees."""
        now = _used_mb()
        return None if self._start is None or now is None else now - self._start


def _used_mb() -> float | None:
    lines = output_of("nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits").split()
    return sum(float(line) for line in lines) * 2**20 / 1e6 if lines and all(map(str.isdigit, lines)) else None
