"""The first call on a GPU machine: is it right, and how fast is ours. Written to fit 450 s.

    python benchmarks/gpu/first.py --results $OUT
    python benchmarks/gpu/first.py --rehearsal --results runs/rehearsal     # on a CPU

Exports run in the background while tests run; stages that measure wait until nothing else runs. The exported files
stay in the work folder for `second.py`.
"""

import argparse
import sys

import call
from stages import ROOT, Stage

SECONDS = 430.0
EXPORTS = (  # in order of importance
    "float16.pt2", "float32.pt2", "float16-batch8.pt2", "float32.onnx", "float16.onnx", "bfloat16.pt2",
)  # fmt: skip


def plan(given: argparse.Namespace) -> dict[str, Stage]:
    """By name, in order."""
    work, dry = ("--work", str(given.work)), given.rehearsal
    tests = ("-n", "0", str(ROOT / "tests/d2zero/test_gpu.py")) if dry else ("-n", "4", str(ROOT / "tests"))
    measured = ("float16.pt2",) if dry else ("float16.pt2", "float32.pt2", "bfloat16.pt2")
    return {
        "machine": call.script("machine.py", rehearsal=dry, seconds=25),
        "exports": call.script("exports.py", *work, *(measured if dry else EXPORTS), rehearsal=dry, seconds=150,
                               background=True),
        "tests": call.script("run_tests.py", "-m", "gpu and not timed and not slow", *tests, seconds=120),
        "ours": call.script("inference.py", *work, "--variants", "published,model", "--floors",
                            *measured, rehearsal=dry, seconds=100, quiet=True),
        "kernels": call.script("top_kernels.py", *work, "float16.pt2", rehearsal=dry, seconds=35, quiet=True),
        "deformable": call.script("deformable.py", rehearsal=dry, seconds=30, quiet=True),
        "masked attention": call.script("masked.py", rehearsal=dry, seconds=30, quiet=True),
    }  # fmt: skip


if __name__ == "__main__":
    sys.exit(call.run("first", __doc__, plan, SECONDS))
