"""Runs a command and prints what it took, as JSON. POSIX.

A process of its own, and a small one: the peak memory that the system tells of a child includes what its parent
held when it started it. Hence only the standard library, and nothing of ours.
"""

import json
import os
import subprocess
import sys
import time


def main() -> None:
    """Wall and processor seconds, peak resident memory in 1e6 bytes, exit code."""
    started = time.perf_counter()
    child = subprocess.Popen(sys.argv[1:], stdout=subprocess.DEVNULL)
    _, status, used = os.wait4(child.pid, 0)
    taken = {
        "wall_s": round(time.perf_counter() - started, 3),
        "cpu_s": round(used.ru_utime + used.ru_stime, 3),
        "peak_mb": used.ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e6,
    }
    print(json.dumps({"code": os.waitstatus_to_exitcode(status), "taken": taken}))


if __name__ == "__main__":
    main()
