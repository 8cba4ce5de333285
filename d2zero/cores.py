"""How many processor cores there are to use."""

import os


def usable_cores() -> int:
    """Cores that this process may use; Linux can give it fewer than the machine has."""
    usable = getattr(os, "sched_getaffinity", None)
    return len(usable(0)) if usable else os.cpu_count() or 1
