"""Memory of a training process on a CPU."""

import ctypes
from contextlib import suppress


def keep_freed_memory() -> None:
    """Let glibc keep what is freed: a step's tensors then reuse it instead of asking the kernel for pages."""
    with suppress(OSError, AttributeError):  # not glibc
        libc = ctypes.CDLL(None)
        for parameter, value in ((-4, 0), (-1, 1 << 30), (-2, 1 << 28)):  # MMAP_MAX, TRIM_THRESHOLD, TOP_PAD
            libc.mallopt(parameter, value)
