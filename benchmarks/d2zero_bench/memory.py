"""Peak memory of this process, and of the GPU.

Host: the high-water mark of resident memory. Linux lets a process reset its own (`/proc/self/clear_refs`), so
that each case has one; what allocators keep from earlier cases counts. Elsewhere the mark is of the process's
whole life.

GPU: growth of the used memory of all GPUs since before the model was opened, as nvidia-smi tells it: CUDA's
context is in it. Caching allocators keep what they once needed, so the growth after a run is the peak of it.
Other programs on the same GPU would disturb it.
"""

import sys
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
    if _STATUS.exists():
        for line in _STATUS.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024 / 1e6
    if sys.platform == "win32":
        import psutil

        return float(psutil.Process().memory_info().peak_wset) / 1e6
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e6 if sys.platform == "darwin" else peak * 1024 / 1e6


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
