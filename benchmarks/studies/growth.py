"""How time and memory grow with image size, classes, batch, queries and images.

    python benchmarks/studies/growth.py

One thing varies at a time. Each stage's exponent is next to what it should be, with a verdict (`growth_curves`). What
is measured is an ONNX file on the CPU: the demo's model, or the published architecture with random weights, or one
that is given. Each curve has a process of its own (its memory is not what another one left behind) and goes from small
to large. `pages.py` makes a page of the JSON.
"""

import argparse
import io
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stdout
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import TYPE_CHECKING

import numpy as np

from d2zero.cli.terminal import console, tracked
from d2zero_bench.candidates import drawn_vocabulary
from d2zero_bench.cases import Case, Photos, parse_counts
from d2zero_bench.memory import host_peak_mb, reset_host_peak
from d2zero_bench.plan import Plan
from d2zero_bench.report import NETWORK, Result
from d2zero_bench.session import Session
from d2zero_runtime import D2ZeroError, Vocabulary
from d2zero_runtime.errors import join_truncated
from d2zero_runtime.formats import read_exported
from studies.growth_curves import MEMORY, Curve, Point, table
from studies.study import header, parser_of, run, write

if TYPE_CHECKING:
    from d2zero.model import D2Zero

Work = dict[str, tuple[int, ...]]  # the points of each curve, ascending
DEMO: Work = {
    "sizes": (480, 640, 800, 1120, 1600),  # sides of square images
    "classes": (17, 65, 256, 1203, 4000, 10000),
    "batches": (1, 2, 4, 8),
    "queries": (50, 100, 200, 400),
    "images": (10, 20, 40, 80, 160),
}
PUBLISHED: Work = {**DEMO, "sizes": (480, 640, 800, 1120), "images": (5, 10, 20)}  # seconds per image
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


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and write."""
    parser = parser_of(__doc__)
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--model", type=Path, help="an exported model (.onnx); without the curve of queries")
    which.add_argument("--published", action="store_true", help="the published architecture, random weights")
    parser.add_argument("--only", help=f"some of {', '.join(DEMO)}, with commas")
    for name in DEMO:
        parser.add_argument(f"--{name}", help="as 10,20,40")
    parser.add_argument("--rounds", type=int, help="5 if left out, 3 for the published architecture")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/growth"), help="the folder for JSON")
    return run(measure, parser, arguments)


def measure(given: argparse.Namespace) -> None:
    """Print and write curves as they come: whatever ends the run, the curves before it are there.

    Raises:
        D2ZeroError: The options do not fit together, or something cannot be measured.
    """
    work, rounds = work_of(given), given.rounds or (3 if given.published else 5)
    only = chosen(given, work)
    with TemporaryDirectory() as folder:
        model = given.model or _exported(Path(folder), given.published, None)
        head = header(__file__, given, model=model.name, rounds=rounds, provider="cpu")
        content = {**head, "title": f"How cost grows: {model.name}", "curves": []}
        for curve in curves(model, work, only, rounds, Path(folder), given.published):
            content["curves"].append(curve.to_dict())
            console().print(table(curve).for_terminal())
            for reason in curve.explanations:
                print(reason)
            write(given.output / f"{model.stem}-cpu.json", content)


def work_of(given: argparse.Namespace) -> Work:
    """The points of all curves.

    Raises:
        D2ZeroError: An option is wrong.
    """
    if given.rounds is not None and given.rounds < 1:
        raise D2ZeroError(f"--rounds must be at least 1, got {given.rounds}")
    if given.model and (given.model.suffix != ".onnx" or not given.model.is_file()):
        raise D2ZeroError(f"--model must be an exported model (.onnx) that is there; got {given.model}")
    found = dict(PUBLISHED if given.published else DEMO)
    for name in found:
        if text := getattr(given, name):
            found[name] = tuple(parse_counts(f"--{name}", text))
        if len(found[name]) < 2 or list(found[name]) != sorted(set(found[name])):
            raise D2ZeroError(
                f"--{name} must be two ascending numbers or more, as 10,20,40; got {join_truncated(found[name])}"
            )
    if any(side % 32 for side in found["sizes"]):
        raise D2ZeroError(f"--sizes must be multiples of 32, as 480,640; got {join_truncated(found['sizes'])}")
    return found


def chosen(given: argparse.Namespace, work: Work) -> list[str]:
    """The curves to measure: all, except queries of a file that has its own number of them.

    Raises:
        D2ZeroError: Another one is asked for.
    """
    possible = [name for name in work if name != "queries" or given.model is None]
    found = [part.strip() for part in given.only.split(",")] if given.only else possible
    unknown = [name for name in found if name not in possible]
    if unknown:
        raise D2ZeroError(f"--only must be among {', '.join(possible)} here; got {unknown[0]!r}")
    return found


def curves(model: Path, work: Work, only: Sequence[str], rounds: int, folder: Path, published: bool) -> Iterator[Curve]:
    """Each curve as it is measured."""
    side = work["sizes"][0]
    plan = Plan((model,), providers=("cpu",), sizes=((side, side),), rounds=rounds, warmup=1)
    measures: dict[str, Callable[[tuple[int, ...]], Curve]] = {
        "sizes": lambda sides: against_size(plan, sides),
        "classes": lambda counts: against_classes(plan, counts, read_exported(model).contract.text_dim),
        "batches": lambda counts: against_batch(plan, counts),
        "queries": lambda counts: against_queries(plan, {n: _exported(folder, published, n) for n in counts}),
        "images": lambda counts: against_images(model, counts, rounds),
    }
    for name in only:
        yield measures[name](work[name])


def against_size(plan: Plan, sides: Sequence[int]) -> Curve:
    """Square images; the model's own classes."""
    points = _measured(replace(plan, sizes=tuple((side, side) for side in sides)), {f"{n}²": n**2 for n in sides})
    return Curve("image size", "pixels", "one image, the model's own classes", points, ALL_ONE, CACHES)


def against_classes(plan: Plan, counts: Sequence[int], width: int) -> Curve:
    """Drawn classes of a text width; beside the stages, what handling the vocabulary takes."""
    points = tuple(
        replace(point, samples={**point.samples, VOCABULARY: vocabulary_times(count, width, plan.rounds)})
        for point, count in zip(_measured(replace(plan, classes=tuple(counts)), _by_count(counts)), counts, strict=True)
    )
    reasons = {"network": ATTENTION.format("what takes time"), MEMORY: ATTENTION.format("what takes memory")}
    about = f"one image of {_size(plan)}; vocabulary: made, half of it selected, saved, loaded"
    return Curve("classes", "classes", about, points, {**OWN_LIMITS, VOCABULARY: 1.0}, reasons)


def against_batch(plan: Plan, batches: Sequence[int]) -> Curve:
    """Images per batch."""
    points = _measured(replace(plan, batches=tuple(batches)), _by_count(batches))
    return Curve("batch", "images", f"images of {_size(plan)}, times of a batch", points, ALL_ONE, CACHES)


def against_queries(plan: Plan, models: dict[int, Path]) -> Curve:
    """A model of random weights for each number of queries, interleaved."""
    points = _measured(replace(plan, models=tuple(models.values())), _by_count(models))
    about = f"one image of {_size(plan)}, random weights, 100 instances at most"
    return Curve("queries", "queries", about, points, OWN_LIMITS, {})


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
    points = tuple(
        Point(str(count), count, {"total": tuple(ms for ms, _ in found), MEMORY: tuple(mb for _, mb in found)})
        for count, found in samples.items()
    )
    about = f"photos of {PHOTO.height}×{PHOTO.width}, d2zero predict with pictures, opening the model included"
    return Curve("images in a folder", "images", about, points, {"total": 1.0, MEMORY: 0.0}, {})


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


def _measured(plan: Plan, work: Mapping[str, int]) -> tuple[Point, ...]:
    """Run a plan whose results are a curve's points, by label; every candidate must be measured."""
    report = Session(plan).run()
    if report.failures:
        raise D2ZeroError("; ".join(report.failures.values()))
    return tuple(
        Point(label, amount, _samples(result))
        for result, (label, amount) in zip(report.results, work.items(), strict=True)
    )


def _samples(result: Result) -> dict[str, tuple[float, ...]]:
    found = {stage: tuple(round(value, 4) for value in result.times(stage)) for stage in STAGES}
    return found if result.host_mb is None else {**found, MEMORY: (round(result.host_mb, 1),)}


def _by_count(counts: Iterable[int]) -> dict[str, int]:
    return {str(count): count for count in counts}


def _size(plan: Plan) -> str:
    return "{}×{}".format(*plan.sizes[0])


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
