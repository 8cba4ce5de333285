"""The second call on a GPU machine: what ours is compared with, batches, training. Written to fit 250 s.

    python benchmarks/gpu/second.py --results $OUT
    python benchmarks/gpu/second.py --rehearsal --results runs/rehearsal     # on a CPU

On the machine of the first call, while it is still held, its exported files are used; on another one they are exported
again first. ONNX Runtime's CUDA provider comes from `.carried/onnxruntime.tar.xz` (see README.md).
"""

import argparse
import sys
import tarfile
from pathlib import Path

import call
from stages import CARRIED, ROOT, Stage

SECONDS = 235.0
EXPORTS = ("float16.pt2", "float16-batch8.pt2", "float16.onnx", "float32.onnx")
TRAINED = "published,model,kernel+amp,kernel+tf32,kernel+amp+tf32"


def plan(given: argparse.Namespace) -> dict[str, Stage]:
    """By name, in order."""
    work, dry = ("--work", str(given.work)), given.rehearsal
    with_cuda = {"PYTHONPATH": str(given.work / "onnxruntime")}
    size = (
        ("--device", "cpu", "--size", "64", "--set", "model.num_queries=10")
        if dry
        else ("--device", "cuda", "--size", "960")
    )
    rounds = ("--batch", "1", "--rounds", "1", "--warmup", "0") if dry else ("--batch", "2", "--rounds", "3")
    trained = "published,model" if dry else TRAINED
    return {
        "exports": call.script("exports.py", *work, *EXPORTS, rehearsal=dry, seconds=100, background=True),
        "peers": call.script("inference.py", *work, "--peers", "mask2former,mask2former-tf32", "float16.pt2",
                             rehearsal=dry, seconds=45, quiet=True),
        "batch 8": call.script("inference.py", *work, "--batch", "8", "float16-batch8.pt2", rehearsal=dry, seconds=20,
                               quiet=True),
        "onnxruntime": call.script("onnx_cuda.py", *work, "float32.onnx", "float16.onnx", rehearsal=dry, seconds=45,
                                   quiet=True, environment=with_cuda),
        "onnxruntime tests": call.script("run_tests.py", "-m", "gpu and not timed",
                                         str(ROOT / "tests/export/test_gpu_export.py"), seconds=20,
                                         environment=with_cuda),
        "training": Stage((str(ROOT / "benchmarks/studies/training.py"), "--only", "steps", *size, *rounds,
                           "--variants", trained, "--json", "{json}"), seconds=45),
        "compiled peer": call.script("inference.py", *work, "--peers", "mask2former-float16-compiled", "--rounds", "10",
                                     "float16.pt2", rehearsal=dry, seconds=60),
    }  # fmt: skip


def unpack(archive: Path, folder: Path) -> None:
    """ONNX Runtime with its CUDA provider, beside the one that is installed; a note where it was not carried."""
    if not archive.is_file():
        print(f"note: there is no {archive.name} in {archive.parent.name}, so ONNX Runtime's CUDA provider is absent")
    elif not folder.is_dir():
        with tarfile.open(archive) as packed:
            packed.extractall(folder, filter="data")


def planned(given: argparse.Namespace) -> dict[str, Stage]:
    """The plan, once ONNX Runtime is there."""
    unpack(CARRIED / "onnxruntime.tar.xz", given.work / "onnxruntime")
    return plan(given)


if __name__ == "__main__":
    sys.exit(call.run("second", __doc__, planned, SECONDS))
