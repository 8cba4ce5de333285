"""Exports the published architecture with random weights, several files simultaneously, what matters most first.

    python benchmarks/gpu/exports.py --json exports.json --work FOLDER float16.pt2 float16-batch8.pt2 float32.onnx

A file's name says how it is made: precision, batch, format. All have a static shape, 800×1216. Files that are there
are kept. They are not verified here: the stages that measure compare raw outputs.
"""

import re
import signal
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from stages import exit_code, parser_of, told, write_json

AT_ONCE = 3  # processes on a GPU machine; each starts more to compile kernels
CHECKPOINT = "resnet50.safetensors"
SIZE, SMALL = (800, 1216), (96, 128)
NAME = re.compile(r"(float32|float16|bfloat16)(?:-batch(\d+))?\.(pt2|onnx)")


def export(name: str, work: Path, rehearsal: bool) -> float:
    """Make one file; returns seconds."""
    from d2zero.checkpoints.files import load_model
    from d2zero_export.onnx_export import export_onnx
    from d2zero_export.options import OnnxOptions, Pt2Options
    from d2zero_export.pt2_export import export_pt2

    begin = time.perf_counter()
    found = NAME.fullmatch(name)
    assert found, name
    precision = "float32" if rehearsal else found[1]  # a CPU compiles no float16
    graph: dict[str, Any] = {"precision": precision, "size": SMALL if rehearsal else SIZE, "verify": False}
    graph["batch"] = int(found[2] or 1)
    model = load_model(work / CHECKPOINT)
    if found[3] == "pt2":
        export_pt2(model, work / name, Pt2Options(device="cpu" if rehearsal else "cuda", **graph))
    else:
        export_onnx(model, work / name, OnnxOptions(**graph))
    return time.perf_counter() - begin


def make_checkpoint(work: Path, rehearsal: bool) -> None:
    """Random weights of the published architecture, or the demo's model; written whole or not at all."""
    if (work / CHECKPOINT).is_file():
        return
    import shutil

    from d2zero.demo.run import packaged_checkpoint
    from studies.standard import random_checkpoint

    if rehearsal:
        shutil.copyfile(packaged_checkpoint(), work / CHECKPOINT)
    else:
        random_checkpoint(work)


def export_all(names: list[str], work: Path, rehearsal: bool, note: Callable[[str, dict[str, Any]], None]) -> None:
    """Export in processes; one that fails does not keep the others from it."""
    make_checkpoint(work, rehearsal)
    ignore_nothing = (signal.SIGINT, signal.SIG_DFL)  # they end with this process, without a traceback
    with ProcessPoolExecutor(1 if rehearsal else AT_ONCE, get_context("spawn"), signal.signal, ignore_nothing) as pool:
        futures = {pool.submit(export, name, work, rehearsal): name for name in names}
        for future in as_completed(futures):
            name = futures[future]
            try:
                seconds = future.result()
                note(name, {"seconds": round(seconds, 1), "megabytes": (work / name).stat().st_size / 1e6})
            except Exception as error:  # the compiler's, of many kinds, CUDA's, and a killed process's
                note(name, {"error": told(error)})


def main() -> int:
    """Export what is not there; 1 if something could not be made."""
    parser = parser_of(__doc__, work=True)
    parser.add_argument("names", nargs="+")
    given = parser.parse_args()
    findings: dict[str, dict[str, Any]] = {}

    def note(name: str, finding: dict[str, Any]) -> None:
        findings[name] = finding
        write_json(given.json, findings)
        print(f"{name}: {finding}", flush=True)

    for name in given.names:
        note(name, {"kept": True} if (given.work / name).is_file() else {"begun": time.strftime("%H:%M:%S")})
    missing = [name for name, finding in findings.items() if "begun" in finding]
    if missing:
        export_all(missing, given.work, given.rehearsal, note)
    return int(any("error" in finding for finding in findings.values()))


if __name__ == "__main__":
    sys.exit(exit_code(main))
