"""`make benchmark`: a table for this machine's processor in minutes, from what comes with the project.

Two reports: the demo's model, with its accuracy; and the published architecture with random weights, whose speed
is that of a trained one (but for post-processing, which depends on the masks).

Heavy imports are inside functions: a candidate's process imports this module anew, and its memory is measured.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from d2zero.cli.terminal import tracked
from d2zero_bench.cli import show
from d2zero_bench.measure import Settings
from d2zero_bench.session import Plan, Session
from d2zero_runtime import D2ZeroError, Vocabulary

ACCURACY_IMAGES = 60
CLASSES = 65


def providers() -> tuple[str, ...]:
    """What runs the exported files: bfloat16 only where the processor computes in it, elsewhere it is refused."""
    import openvino

    able = "BF16" in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    return ("cpu", "openvino", "openvino-bf16") if able else ("cpu", "openvino")


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and write; 2 for what a person can mend, 130 when interrupted."""
    parser = argparse.ArgumentParser(prog="python -m d2zero_bench.standard", description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("runs/benchmark"), help="the folder for JSON and HTML")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--only", choices=("demo", "published"), help="one of the two")
    parser.add_argument("--rounds", type=int, help="instead of 20 for the demo and 5 for the published architecture")
    given = parser.parse_args(arguments)
    try:
        with TemporaryDirectory() as folder:
            for plan, name in _plans(Path(folder), given.only):
                settings = replace(plan.settings, rounds=given.rounds or plan.settings.rounds)
                _run(replace(plan, threads=given.threads, settings=settings), given.output / name)
    except D2ZeroError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


def _plans(folder: Path, only: str | None) -> list[tuple[Plan, str]]:
    found = []
    if only != "published":
        found.append((_demo(folder), "demo-cpu"))
    if only != "demo":
        found.append((_published(folder), "published-800x1216-cpu"))
    return found


def _run(plan: Plan, output: Path) -> None:
    session = Session(plan, ["(make benchmark)"])
    try:
        session.run()
    finally:
        if session.report is not None and session.report.cases:
            show(session.report, output.with_suffix(".json"), output.with_suffix(".html"))
    if session.report is not None and session.report.failures:
        raise D2ZeroError("; ".join(session.report.failures.values()))


def _demo(folder: Path) -> Plan:
    """The demo's checkpoint, published form and ONNX file, at the demo's size, with accuracy."""
    from d2zero.checkpoints.files import load_model
    from d2zero.data.shapes import ShapesConfig, write_dataset
    from d2zero.demo.run import packaged_checkpoint
    from d2zero_export.onnx_export import ExportConfig, export_onnx

    write_dataset(folder / "data", ShapesConfig(train_images=0, val_images=ACCURACY_IMAGES), tracked)
    checkpoint = packaged_checkpoint()
    exported = folder / "shapes.onnx"
    export_onnx(load_model(checkpoint), exported, ExportConfig())
    return Plan(
        models=(checkpoint, exported),
        variants=("published", "model"),
        providers=providers(),
        sizes=((96, 96),),
        images=folder / "data/val",
        annotations=folder / "data/annotations/instances_val_gzsi_shapes.json",
        settings=Settings(rounds=20),
        title="The demo's model",
    )


def _published(folder: Path) -> Plan:
    """The published architecture, random weights, at 800x1216; a few rounds."""
    import torch

    from d2zero.checkpoints.files import load_model, save_model
    from d2zero.model import ModelConfig, build
    from d2zero_export.onnx_export import ExportConfig, export_onnx

    torch.manual_seed(0)
    rows = np.random.default_rng(0).standard_normal((CLASSES, 300)).astype(np.float32)
    words = Vocabulary(tuple(f"class {n}" for n in range(CLASSES)), rows, seen=np.arange(CLASSES) % 4 != 3)
    checkpoint, exported = folder / "resnet50.safetensors", folder / "resnet50.onnx"
    save_model(build(ModelConfig(), words).eval(), checkpoint)
    export_onnx(load_model(checkpoint), exported, ExportConfig(verify=False))
    return Plan(
        models=(checkpoint, exported),
        variants=("published", "model"),
        providers=providers(),
        peers="mask2former",
        sizes=((800, 1216),),
        settings=Settings(rounds=5, warmup=1),
        title="The published architecture, random weights",
    )


if __name__ == "__main__":
    sys.exit(main())
