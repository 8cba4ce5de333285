"""How time and memory grow with image size, classes, batch, queries and images.

    python benchmarks/studies/growth.py

One thing varies at a time. Each stage's exponent is next to what it should be, with a verdict (`growth_curves`). What
is measured is an ONNX file on the CPU: the demo's model, or the published architecture with random weights, or one
that is given. Each curve has a process of its own (its memory is not what another one left behind) and goes from small
to large.
"""

import argparse
import io
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import TYPE_CHECKING, Any

import numpy as np

from d2zero.cli.terminal import console, tracked
from d2zero_bench.candidates import drawn_vocabulary
from d2zero_bench.cases import Case, Photos, parse_counts
from d2zero_bench.environment import environment
from d2zero_bench.memory import host_peak_mb, reset_host_peak
from d2zero_bench.plan import Plan
from d2zero_bench.report import NETWORK, Report, Result, write_json
from d2zero_bench.session import Session
from d2zero_runtime import D2ZeroError, Vocabulary
from d2zero_runtime.errors import join_truncated
from d2zero_runtime.files import write_text
from d2zero_runtime.formats import read_exported
from studies.command import exit_code
from studies.growth_curves import MEMORY, Curve, Point, page, terminal_table

if TYPE_CHECKING:
    from d2zero.model import D2Zero

FORMAT_VERSION = 1
CURVES = ("sizes", "classes", "batches", "queries", "images")
PHOTO = Case(480, 640)  # of a folder
STAGES = ("decode", "preprocess", NETWORK, "postprocess")  # on a CPU the network is the stage of inference
ALL_ONE = dict.fromkeys((*STAGES, MEMORY), 1.0)
VOCABULARY = "vocabulary"
OWN_LIMITS = {"network": 1.0, "postprocess": 1.0, MEMORY: 1.0}  # where decoding and preprocessing have no part
ATTENTION = (
    "every class attends to every other (the published adaptation): a product of K × K for each head, which is {} once"
    " it is larger than the rest of the network"
)
CACHES = {
    "preprocess": "small images stay in the processor's caches; what is larger goes through memory, which the system"
    " hands out again each time"
}


@dataclass(frozen=True)
class Work:
    """The points of each curve, ascending, and how often each is measured."""

    sizes: tuple[int, ...] = (480, 640, 800, 1120, 1600)  # sides of square images
    classes: tuple[int, ...] = (17, 65, 256, 1203, 4000, 10000)
    batches: tuple[int, ...] = (1, 2, 4, 8)
    queries: tuple[int, ...] = (50, 100, 200, 400)
    images: tuple[int, ...] = (10, 20, 40, 80, 160)
    rounds: int = 5

    def __post_init__(self) -> None:
        for name in CURVES:
            counts = getattr(self, name)
            if len(counts) < 2 or list(counts) != sorted(set(counts)):
                raise D2ZeroError(
                    f"--{name} must be two ascending numbers or more, as 10,20,40; got {join_truncated(counts)}"
                )
        if any(side % 32 for side in self.sizes):
            raise D2ZeroError(f"--sizes must be multiples of 32, as 480,640; got {join_truncated(self.sizes)}")
        if self.rounds < 1:
            raise D2ZeroError(f"--rounds must be at least 1, got {self.rounds}")


PUBLISHED = Work(sizes=(480, 640, 800, 1120), images=(5, 10, 20), rounds=3)  # seconds per image
QUICK = Work((64, 96), (17, 34), (1, 2), (5, 10), (2, 4), rounds=2)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and write; 2 for what the user can fix, 130 when interrupted."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    return exit_code(lambda: _measure(_parser().parse_args(words), words))


def _measure(given: argparse.Namespace, words: Sequence[str]) -> None:
    work, only = _work(given), _chosen(given)
    with TemporaryDirectory() as folder:
        model = given.model or _exported(Path(folder), given.published, None)
        _run(given, model, _curves(model, work, only, Path(folder), given.published), words, work)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--model", type=Path, help="an exported model (.onnx); without the curve of queries")
    which.add_argument("--published", action="store_true", help="the published architecture, random weights")
    parser.add_argument("--only", help=f"some of {', '.join(CURVES)}, with commas")
    for name in CURVES:
        parser.add_argument(f"--{name}", help="as 10,20,40")
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--quick", action="store_true", help="two tiny points per curve, to see that it runs")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/growth"), help="for JSON and HTML")
    return parser


def _work(given: argparse.Namespace) -> Work:
    preset = QUICK if given.quick else PUBLISHED if given.published else Work()
    changes: dict[str, Any] = {
        name: tuple(parse_counts(f"--{name}", getattr(given, name))) for name in CURVES if getattr(given, name)
    }
    return replace(preset, **changes, rounds=preset.rounds if given.rounds is None else given.rounds)


def _chosen(given: argparse.Namespace) -> list[str]:
    """The curves to measure: all, except queries of a file that has its own number of them."""
    possible = [name for name in CURVES if name != "queries" or given.model is None]
    if given.model and (given.model.suffix != ".onnx" or not given.model.is_file()):
        raise D2ZeroError(f"--model must be an exported model (.onnx) that is there; got {given.model}")
    chosen = possible if given.only is None else [part.strip() for part in given.only.split(",")]
    unknown = [name for name in chosen if name not in possible]
    if unknown:
        raise D2ZeroError(f"--only must be among {', '.join(possible)} here; got {unknown[0]!r}")
    return chosen


def _curves(model: Path, work: Work, only: Sequence[str], folder: Path, published: bool) -> Iterator[Curve]:
    """Each chosen curve as it is measured."""
    side = work.sizes[0]
    plan = Plan((model,), providers=("cpu",), sizes=((side, side),), rounds=work.rounds, warmup=1)
    measures: dict[str, Callable[[], Curve]] = {
        "sizes": lambda: against_size(plan, work.sizes),
        "classes": lambda: against_classes(plan, work.classes, read_exported(model).contract.text_dim),
        "batches": lambda: against_batch(plan, work.batches),
        "queries": lambda: against_queries(
            plan, {count: _exported(folder, published, count) for count in work.queries}
        ),
        "images": lambda: against_images(model, work.images, work.rounds),
    }
    for name in only:
        yield measures[name]()


def _run(given: argparse.Namespace, model: Path, curves: Iterator[Curve], words: Sequence[str], work: Work) -> None:
    """Print and write curves as they come: whatever ends the run, the curves before it are there."""
    path = given.output / f"{model.stem}-cpu"
    content: dict[str, Any] = {
        "format_version": FORMAT_VERSION,
        "title": f"How cost grows: {model.name}",
        "environment": environment(words, None, "python benchmarks/studies/growth.py"),
        "settings": {"model": model.name, "rounds": work.rounds, "provider": "cpu"},
        "curves": [],
    }
    for curve in curves:
        content["curves"].append(curve.to_dict())
        console().print(terminal_table(curve))
        for growth in curve.growths:
            if growth.worse and growth.why:
                print(f"{growth.quantity}: {growth.why}")
        write_json(path.with_name(f"{path.name}.json"), content)
        write_text(path.with_name(f"{path.name}.html"), page(content))
    print(f"written: {path}.json and .html")


def against_size(plan: Plan, sides: Sequence[int]) -> Curve:
    """Square images; the model's own classes."""
    report = _measured(replace(plan, sizes=tuple((side, side) for side in sides)))
    points = [_point(result, f"{result.case.height}²", result.case.height**2) for result in report.results]
    return Curve("image size", "pixels", "one image, the model's own classes", tuple(points), ALL_ONE, CACHES)


def against_classes(plan: Plan, counts: Sequence[int], width: int) -> Curve:
    """Drawn classes of a text width; beside the stages, what handling the vocabulary takes."""
    report = _measured(replace(plan, classes=tuple(counts)))
    points = []
    for result, count in zip(report.results, counts, strict=True):
        point = _point(result, str(count), count)
        handled = {VOCABULARY: vocabulary_times(count, width, plan.rounds)}
        points.append(replace(point, samples={**point.samples, **handled}))
    reasons = {"network": ATTENTION.format("what takes time"), MEMORY: ATTENTION.format("what takes memory")}
    about = f"one image of {_size(report)}; vocabulary: made, half of it selected, saved, loaded"
    return Curve("classes", "classes", about, tuple(points), {**OWN_LIMITS, VOCABULARY: 1.0}, reasons)


def against_batch(plan: Plan, batches: Sequence[int]) -> Curve:
    """Images per batch."""
    report = _measured(replace(plan, batches=tuple(batches)))
    points = [_point(result, str(result.case.batch), result.case.batch) for result in report.results]
    return Curve("batch", "images", f"images of {_size(report)}, times of a batch", tuple(points), ALL_ONE, CACHES)


def against_queries(plan: Plan, models: dict[int, Path]) -> Curve:
    """A model of random weights for each number of queries, interleaved."""
    report = _measured(replace(plan, models=tuple(models.values())))
    points = [_point(result, str(count), count) for result, count in zip(report.results, models, strict=True)]
    about = f"one image of {_size(report)}, random weights, 100 instances at most"
    return Curve("queries", "queries", about, tuple(points), OWN_LIMITS, {})


def against_images(model: Path, counts: Sequence[int], rounds: int) -> Curve:
    """`d2zero predict` on folders, each in a new process: the whole command after start-up, with pictures."""
    samples: dict[int, list[tuple[float, float]]] = {count: [] for count in counts}
    with TemporaryDirectory() as name:
        folder = Path(name)
        drawn = Photos.of(folder / "drawn", None, [PHOTO])
        for count in counts:
            (folder / str(count)).mkdir()
            for number, photo in enumerate(drawn.batch(replace(PHOTO, batch=count), 0)):
                shutil.copyfile(photo, folder / str(count) / f"{number:05d}.jpg")
        order = [count for _ in range(rounds) for count in counts]
        for count in tracked(iter(order), len(order), "folders"):
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:  # with nothing of this process
                found = pool.submit(predict_folder, model, folder / str(count), folder / "out")
                samples[count].append(found.result())
    points = [
        Point(str(count), count, {"total": tuple(ms for ms, _ in found), MEMORY: tuple(mb for _, mb in found)})
        for count, found in samples.items()
    ]
    about = f"photos of {PHOTO.height}×{PHOTO.width}, d2zero predict with pictures, opening the model included"
    return Curve("images in a folder", "images", about, tuple(points), {"total": 1.0, MEMORY: 0.0}, {})


def predict_folder(model: Path, images: Path, output: Path) -> tuple[float, float]:
    """Milliseconds and peak memory of this process for all images of a folder."""
    from d2zero.cli.predict import predict

    reset_host_peak()
    started = perf_counter()
    with redirect_stdout(io.StringIO()):
        predict(str(images), model, output)
    return 1000 * (perf_counter() - started), host_peak_mb() or 0.0


def vocabulary_times(count: int, width: int, rounds: int) -> tuple[float, ...]:
    """Milliseconds to make a vocabulary, select half of it, save and load it."""
    own = Vocabulary(("a class",), np.ones((1, width), np.float32))
    times = []
    with TemporaryDirectory() as folder:
        for _ in range(rounds):
            started = perf_counter()
            drawn = drawn_vocabulary(own, count)
            drawn.select(drawn.names[: (count + 1) // 2])
            Vocabulary.load(drawn.save(Path(folder) / "v.npz"))
            times.append(1000 * (perf_counter() - started))
    return tuple(times)


def _measured(plan: Plan) -> Report:
    """Run a plan in which every candidate must be measured."""
    report = Session(plan).run()
    if report.failures:
        raise D2ZeroError("; ".join(report.failures.values()))
    return report


def _point(result: Result, label: str, work: float) -> Point:
    samples = {stage: tuple(round(value, 4) for value in result.times(stage)) for stage in STAGES}
    return Point(label, work, samples if result.host_mb is None else {**samples, MEMORY: (round(result.host_mb, 1),)})


def _size(report: Report) -> str:
    case = report.cases[0]
    return f"{case.height}×{case.width}"


def _exported(folder: Path, published: bool, queries: int | None) -> Path:
    """The model as an ONNX file."""
    from d2zero_export.onnx_export import export_onnx
    from d2zero_export.options import OnnxOptions

    name = ("published" if published else "demo") + ("" if queries is None else f"-{queries}-queries")
    print(f"exporting {name}", file=sys.stderr)
    export_onnx(_model(published, queries), folder / f"{name}.onnx", OnnxOptions(verify=False))
    return folder / f"{name}.onnx"


def _model(published: bool, queries: int | None) -> "D2Zero":
    """The published architecture or the demo's model; with a number of queries, with random weights."""
    import torch

    from d2zero.checkpoints.files import load_model
    from d2zero.demo.run import packaged_checkpoint
    from d2zero.model import build
    from studies.standard import random_published

    torch.manual_seed(0)
    model = random_published() if published else load_model(packaged_checkpoint())
    if queries is not None:
        model = build(replace(model.config, num_queries=queries), model.vocabulary)
    return model.eval()


if __name__ == "__main__":
    sys.exit(main())
