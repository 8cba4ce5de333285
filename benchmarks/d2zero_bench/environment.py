"""Where a benchmark ran: what decides the results, and nothing that tells who ran it."""

import os
import platform
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from d2zero.processes import usable_cores

PACKAGES = (
    "d2zero", "numpy", "torch", "triton", "onnxruntime", "onnxruntime-gpu", "onnx", "openvino", "transformers",
    "tensorrt", "pillow", "pycocotools",
)  # fmt: skip
CPUINFO = Path("/proc/cpuinfo")
INSTRUCTIONS = ("avx2", "avx512f", "avx_vnni", "avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16", "i8mm", "bf16")


def environment(command: Sequence[str], threads: int | None, program: str = "d2zero benchmark") -> dict[str, Any]:
    """Processor, memory, GPU, versions, threads, command line, date, commit."""
    cpuinfo = CPUINFO.read_text() if CPUINFO.exists() else ""
    found = {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "processor": _processor(cpuinfo),
        "instructions": instructions(cpuinfo),
        "cores": usable_cores(),
        "memory_gb": _memory_gb(),
        "gpu": _gpu(),
        "system": f"{platform.system()} {platform.machine()}",
        "threads": threads or os.environ.get("OMP_NUM_THREADS") or "each library's own choice",
        "versions": {"python": platform.python_version(), **_versions()},
        "commit": _commit(Path(__file__)),
        "command": " ".join([program, *(without_folders(word) for word in command)]),
    }
    return {name: value for name, value in found.items() if value is not None}


def summary(found: Mapping[str, Any]) -> list[str]:
    """The few facts of an environment that head a report."""
    cores = f"{found['cores']} cores" if found.get("cores") else None
    facts = (found.get("processor"), found.get("instructions"), cores, found.get("gpu"), found.get("date"))
    return [str(fact) for fact in facts if fact]


def without_folders(text: str) -> str:
    """A text with only the last part of each path."""
    return re.sub(r"(?:[A-Za-z]:)?[^\s=,'\"()]*[/\\]([^\s=,'\"()/\\]*)", r"\1", text)


def _processor(cpuinfo: str) -> str:
    found = re.search(r"^model name\s*:\s*(.+)$", cpuinfo, re.MULTILINE)
    if found:
        return " ".join(found[1].split())
    if sys.platform == "darwin":
        return output_of("sysctl", "-n", "machdep.cpu.brand_string") or platform.machine()
    return platform.processor() or platform.machine()


def instructions(cpuinfo: str) -> str | None:
    """Those of the first processor in Linux's list that decide what lower precision is worth; its name may not tell."""
    found = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", cpuinfo, re.MULTILINE)
    known = found[1].split() if found else []
    return ", ".join(name for name in INSTRUCTIONS if name in known) or None


def _memory_gb() -> float | None:
    try:
        import psutil
    except ImportError:
        return None
    return round(float(psutil.virtual_memory().total) / 1e9, 1)


def _gpu() -> str | None:
    lines = output_of("nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader").splitlines()
    return ", driver ".join(part.strip() for part in lines[0].split(",")) if lines else None


def _versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _commit(file: Path) -> str | None:
    """Of the checkout that this file is tracked in, if it is in one."""
    where = ("git", "-C", str(file.parent))
    if not output_of(*where, "ls-files", file.name):
        return None
    changed = " with changes" if output_of(*where, "status", "--porcelain", "--untracked-files=no") else ""
    return output_of(*where, "rev-parse", "--short=12", "HEAD") + changed


def output_of(*command: str) -> str:
    """What a program prints; nothing if it is absent or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()
