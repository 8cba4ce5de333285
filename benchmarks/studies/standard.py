"""`make benchmark`: a table for this machine's processor in minutes, from what comes with the project.

    python benchmarks/studies/standard.py

Two reports: the demo's model, also in eight bits, with its accuracy; and the published architecture with random
weights, whose speed is that of a trained one (except post-processing, which depends on the masks), also with
static shapes, and that in eight bits.

Heavy imports are inside functions: a candidate's process imports this module again, and its memory is measured.
"""

import argparse
import signal
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import numpy as np

from d2zero.cli.terminal import tracked
from d2zero_bench.candidates import drawn_vocabulary
from d2zero_bench.cases import Case, Photos, make_cases
from d2zero_bench.cli import require_packages, run_and_show
from d2zero_bench.plan import Plan
from d2zero_runtime import D2ZeroError, Vocabulary
from studies.study import parser_of, run

if TYPE_CHECKING:
    from d2zero.model import D2Zero
    from d2zero_export.options import OnnxOptions

ACCURACY_IMAGES = 60
CALIBRATION_IMAGES = 32
CALIBRATION_DRAWN = 1  # of the random model, whose accuracy is nobody's concern
CLASSES = 65
SIZE = (800, 1216)


def providers() -> tuple[str, ...]:
    """Backends of the exported files: bfloat16 only where the processor computes in it, elsewhere it is refused."""
    import openvino

    from d2zero_runtime.backends.openvino.backend import computes_in_bfloat16

    able = computes_in_bfloat16(openvino.Core())
    return ("cpu", "openvino", "openvino-bf16") if able else ("cpu", "openvino")


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and write."""
    parser = parser_of(__doc__)
    parser.add_argument("--output", type=Path, default=Path("runs/benchmark"), help="the folder for JSON and HTML")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--only", choices=("demo", "published"), help="one of the two")
    parser.add_argument("--rounds", type=int, help="instead of 20 for the demo and 3 for the published architecture")
    return run(_measure, parser, arguments)


def _measure(given: argparse.Namespace) -> None:
    require_packages("make benchmark", "jinja2", "matplotlib")
    with TemporaryDirectory() as folder:
        for plan, name in _plans(Path(folder), given.only):
            _run(replace(plan, threads=given.threads, rounds=given.rounds or plan.rounds), given.output / name)


def _plans(folder: Path, only: str | None) -> list[tuple[Plan, str]]:
    """What to measure; all files are exported before, the longest work first, two at a time: each takes one core."""
    found = []
    exports: list[Export] = []
    if only != "published":
        found.append(_demo(folder, exports))
    if only != "demo":
        found.append(_published(folder, exports))
    with _processes(2) as pool:
        for _ in tracked(pool.map(_export, exports[::-1]), len(exports), "exporting"):
            pass
    return found


def _processes(count: int) -> ProcessPoolExecutor:
    """Processes that end at Ctrl-C, without a traceback."""
    return ProcessPoolExecutor(count, get_context("spawn"), signal.signal, (signal.SIGINT, signal.SIG_DFL))


Export = tuple[Path, dict[Path, "OnnxOptions"]]  # checkpoint; files of one graph, and how each is made of it


def _export(job: Export) -> int:
    from d2zero.checkpoints.files import load_model
    from d2zero_export.onnx_export import export_onnx, graph_of

    checkpoint, files = job
    model = load_model(checkpoint)
    traced = graph_of(model, next(iter(files.values())))
    for exported, config in files.items():
        export_onnx(model, exported, config, traced=traced)
    return 1


def _run(plan: Plan, output: Path) -> None:
    json_file, html_file = output.with_suffix(".json"), output.with_suffix(".html")
    report = run_and_show(plan, ["(make benchmark)"], json_file, html_file, floors(plan))
    if report.failures:
        raise D2ZeroError("; ".join(f"{name}: {why}" for name, why in report.failures.items()))


def _demo(folder: Path, exports: list[Export]) -> tuple[Plan, str]:
    """The demo's checkpoint, published form and ONNX files, at the demo's size, with accuracy."""
    from d2zero.data.shapes import ShapesConfig, write_dataset
    from d2zero.demo.run import packaged_checkpoint
    from d2zero_export.options import OnnxOptions

    drawn = ShapesConfig(train_images=CALIBRATION_IMAGES, val_images=ACCURACY_IMAGES)
    write_dataset(folder / "data", drawn, tracked)
    checkpoint = packaged_checkpoint()
    exported, eight_bits = folder / "shapes.onnx", folder / "shapes-int8.onnx"
    calibrated = OnnxOptions(precision="int8", verify=False, calibration=folder / "data/train")
    exports.append((checkpoint, {exported: OnnxOptions(verify=False), eight_bits: calibrated}))
    plan = Plan(
        models=(checkpoint, exported, eight_bits),
        variants=("published", "model"),
        providers=providers(),
        providers_of={eight_bits: ("cpu", "openvino")},
        sizes=((96, 96),),
        images=folder / "data/val",
        annotations=folder / "data/annotations/instances_val_gzsi_shapes.json",
        compared=16,  # of one photo, a query that looks elsewhere is a large share
        title="The demo's model",
    )
    return plan, "demo-cpu"


def floors(plan: Plan, precisions: Sequence[str] = ("float32",)) -> dict[str, str]:
    """The hardware's lower bounds for each case of the first checkpoint: lines for the report's settings.

    Args:
        plan: What is measured, where.
        precisions: What is computed in, of `studies.roofline.TYPES`.
    """
    from studies.roofline import described, measured_rates, work_of

    on_gpu = plan.device.startswith("cuda")
    found = {}
    for precision in precisions:
        rates = measured_rates("cuda", precision, 8192) if on_gpu else measured_rates("cpu", precision, 2048, 256)
        for case in make_cases(plan.sizes, plan.batches, plan.classes):
            found[f"floor, {precision}, {case}"] = described(work_of(plan.models[0], case, precision), rates)
    return found


def random_published() -> "D2Zero":
    """The published architecture with random weights and drawn classes of the published text width."""
    import torch

    from d2zero.model import ModelConfig, build

    torch.manual_seed(0)
    width_of = Vocabulary(("a class",), np.ones((1, ModelConfig().text_dim), np.float32))
    return build(ModelConfig(), drawn_vocabulary(width_of, CLASSES)).eval()


def random_checkpoint(folder: Path) -> Path:
    """A checkpoint of `random_published`."""
    from d2zero.checkpoints.files import save_model

    checkpoint = folder / "resnet50.safetensors"
    save_model(random_published(), checkpoint)
    return checkpoint


def _published(folder: Path, exports: list[Export]) -> tuple[Plan, str]:
    """The published architecture, random weights, at 800x1216; a few rounds."""
    from d2zero_export.options import OnnxOptions

    checkpoint = random_checkpoint(folder)
    exported, static, eight_bits = (folder / f"resnet50{name}.onnx" for name in ("", "-fixed", "-fixed-int8"))
    case = Case(*SIZE)
    photos = Photos.of(folder / "drawn", None, [case]).batch(case, 0)[0].parent
    static_shape = OnnxOptions(deform_attn="gather", size=SIZE, batch=1, verify=False)
    calibrated = replace(static_shape, precision="int8", calibration=photos, calibration_images=CALIBRATION_DRAWN)
    exports.append((checkpoint, {exported: OnnxOptions(verify=False)}))
    exports.append((checkpoint, {static: static_shape, eight_bits: calibrated}))
    plan = Plan(
        models=(checkpoint, exported, static, eight_bits),
        variants=("published", "model"),
        providers=providers(),
        providers_of={static: tuple(name for name in providers() if name != "cpu"), eight_bits: ("openvino",)},
        peers=("mask2former",),
        sizes=(SIZE,),
        rounds=3,
        warmup=0,  # outputs are compared first: a run of each that warms up
        title="The published architecture, random weights",
    )
    return plan, "published-800x1216-cpu"


if __name__ == "__main__":
    sys.exit(main())
