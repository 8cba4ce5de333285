"""Peak memory of this process, and of the GPU.

Host: the high-water mark of resident memory. Linux lets a process reset its own (`/proc/self/clear_refs`), so
that each case has one; what allocators keep from earlier cases counts. Elsewhere the mark is of the process's
whole life.

GPU: what nvidia-smi says that this process holds; CUDA's context is in it. Other candidates, which are open at the
same time, are not. Caching allocators keep what they once needed, so what is held after a run is the peak of it.
Where nvidia-smi does not see the process (containers renumber them), it is only the peak of torch's allocator.
"""

import os
import sys
from pathlib import Path
from typing import Any

from d2zero_bench.environment import output_of

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")


def reset_host_peak() -> None:
    """Reset the high-water mark, where that can be done."""
    try:
        _CLEAR.write_text("5")
    except OSError:
        return


def host_peak_mb() -> float | None:
    """The high-water mark in 1e6 bytes."""
    if _STATUS.exists():
        lines = (line.split() for line in _STATUS.read_text().splitlines() if line.startswith("VmHWM:"))
        return next((int(line[1]) * 1024 / 1e6 for line in lines), None)
    if sys.platform == "win32":
        import psutil

        return float(psutil.Process().memory_info().peak_wset) / 1e6
    import resource

    mark = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return mark / 1e6 if sys.platform == "darwin" else mark * 1024 / 1e6


def reset_gpu_peak() -> None:
    """Give back what torch's allocator keeps; other libraries keep theirs."""
    cuda = _torch_cuda()
    if cuda is not None:
        cuda.empty_cache()
        cuda.reset_peak_memory_stats()


def gpu_peak_mb() -> float | None:
    """What this process holds on GPUs in 1e6 bytes; None if it holds nothing there that could be seen."""
    listed = output_of("nvidia-smi", "--query-compute-apps=pid,used_memory", "--format=csv,noheader,nounits")
    pairs = [line.replace(" ", "").partition(",") for line in listed.splitlines()]
    own = [float(used) for process, _, used in pairs if process == str(os.getpid()) and used.isdigit()]
    if own:
        return sum(own) * 2**20 / 1e6
    cuda = _torch_cuda()
    return None if cuda is None else float(cuda.max_memory_reserved()) / 1e6


def _torch_cuda() -> Any:
    """torch.cuda where this process uses it, on the current GPU; a process without torch stays without."""
    torch = sys.modules.get("torch")
    return torch.cuda if torch is not None and torch.cuda.is_initialized() else None
