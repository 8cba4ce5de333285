"""`python -m d2zero_bench.growth`: how time and memory grow with image size, classes, batch, queries and images.

One thing varies at a time. Each stage's exponent stands next to what it should be, with a verdict (`growth_curves`).
What is measured is an ONNX file on the CPU: the demo's model, or the published architecture with random weights, or
one that is given. `growth_measure` measures, `growth_page` shows.
"""

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from d2zero.cli.terminal import console
from d2zero_bench import growth_measure as measure
from d2zero_bench.cases import parse_counts
from d2zero_bench.environment import environment
from d2zero_bench.growth_curves import Curve
from d2zero_bench.growth_page import page, terminal_table
from d2zero_bench.measure import Settings
from d2zero_bench.report import write_json
from d2zero_bench.session import Plan
from d2zero_runtime import D2ZeroError
from d2zero_runtime.errors import listed
from d2zero_runtime.files import write_text
from d2zero_runtime.formats import read_exported

if TYPE_CHECKING:
    from d2zero.model import D2Zero

FORMAT_VERSION = 1
CURVES = ("sizes", "classes", "batches", "queries", "images")


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
                raise D2ZeroError(f"--{name} must be two ascending numbers at least, as 10,20,40; got {listed(counts)}")
        if any(side % 32 for side in self.sizes):
            raise D2ZeroError(f"--sizes must be multiples of 32, as 480,640; got {listed(self.sizes)}")
        if self.rounds < 1:
            raise D2ZeroError(f"--rounds must be at least 1, got {self.rounds}")


PUBLISHED = Work(sizes=(480, 640, 800, 1120), images=(5, 10, 20), rounds=3)  # seconds an image
QUICK = Work((64, 96), (17, 34), (1, 2), (5, 10), (2, 4), rounds=2)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and write; 2 for what a person can mend, 130 when interrupted."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        given = _parser().parse_args(words)
        work, only = _work(given), _chosen(given)
        with TemporaryDirectory() as folder:
            model = given.model or _exported(Path(folder), given.published, None)
            _run(given, model, _curves(model, work, only, Path(folder), given.published), words, work)
    except D2ZeroError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m d2zero_bench.growth", description=__doc__)
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--model", type=Path, help="an exported model (.onnx); without the curve of queries")
    which.add_argument("--published", action="store_true", help="the published architecture, random weights")
    parser.add_argument("--only", help=f"some of {', '.join(CURVES)}, with commas")
    for name in CURVES:
        parser.add_argument(f"--{name}", help="as 10,20,40")
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--quick", action="store_true", help="two tiny points a curve, to see that it runs")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/growth"), help="for JSON and HTML")
    return parser


def _work(given: argparse.Namespace) -> Work:
    preset = QUICK if given.quick else PUBLISHED if given.published else Work()
    changes: dict[str, Any] = {
        name: tuple(parse_counts(f"--{name}", getattr(given, name))) for name in CURVES if getattr(given, name)
    }
    return replace(preset, **changes, rounds=preset.rounds if given.rounds is None else given.rounds)


def _chosen(given: argparse.Namespace) -> list[str]:
    """The curves to measure: all, but for queries of a file that has its own number of them."""
    possible = [name for name in CURVES if name != "queries" or given.model is None]
    if given.model and (given.model.suffix != ".onnx" or not given.model.is_file()):
        raise D2ZeroError(f"--model must be an exported model (.onnx) that is there; got {given.model}")
    if given.only is None:
        return possible
    chosen = [part.strip() for part in given.only.split(",")]
    strangers = [name for name in chosen if name not in possible]
    if strangers:
        raise D2ZeroError(f"--only must be among {', '.join(possible)} here; got {strangers[0]!r}")
    return chosen


def _curves(model: Path, work: Work, only: Sequence[str], folder: Path, published: bool) -> Iterator[Curve]:
    """Each chosen curve as it is measured."""
    side = work.sizes[0]
    plan = Plan((model,), providers=("cpu",), sizes=((side, side),), settings=Settings(rounds=work.rounds, warmup=1))
    width = read_exported(model)[0].text_dim

    def queries() -> Curve:
        models = {count: _exported(folder, published, count) for count in work.queries}
        return measure.against_queries(plan, models)

    measures: dict[str, Callable[[], Curve]] = {
        "sizes": lambda: measure.against_size(plan, work.sizes),
        "classes": lambda: measure.against_classes(plan, work.classes, width),
        "batches": lambda: measure.against_batch(plan, work.batches),
        "queries": queries,
        "images": lambda: measure.against_images(model, work.images, work.rounds),
    }
    for name in only:
        yield measures[name]()


def _run(given: argparse.Namespace, model: Path, curves: Iterator[Curve], words: Sequence[str], work: Work) -> None:
    """Print and write curves as they come: whatever ends the run, the curves before it are there."""
    found: list[Curve] = []
    where = environment(["(python -m d2zero_bench.growth)", *words], None)
    settings = {"model": model.name, "rounds": work.rounds, "provider": "cpu"}
    for curve in curves:
        found.append(curve)
        console().print(terminal_table(curve))
        for growth in curve.growths:
            if growth.worse and growth.why:
                print(f"{growth.quantity}: {growth.why}")
        _write(given.output / f"{model.stem}-cpu", where, settings, found)
    print(f"written: {given.output / model.stem}-cpu.json and .html")


def _write(path: Path, where: dict[str, Any], settings: dict[str, Any], curves: Sequence[Curve]) -> None:
    title = f"How cost grows: {settings['model']}"
    content = {"format_version": FORMAT_VERSION, "title": title, "environment": where, "settings": settings,
               "curves": [curve.to_dict() for curve in curves]}  # fmt: skip
    write_json(path.with_name(f"{path.name}.json"), content)
    write_text(path.with_name(f"{path.name}.html"), page(title, where, settings, curves))


def _exported(folder: Path, published: bool, queries: int | None) -> Path:
    """The model as an ONNX file."""
    from d2zero_export.onnx_export import export_onnx
    from d2zero_export.options import OnnxOptions

    name = ("published" if published else "demo") + ("" if queries is None else f"-{queries}-queries")
    print(f"exporting {name}", file=sys.stderr)
    export_onnx(_model(published, queries), folder / f"{name}.onnx", OnnxOptions(verify=False))
    return folder / f"{name}.onnx"


def _model(published: bool, queries: int | None) -> "D2Zero":
    """The published architecture or the demo's model; with a number of queries, of random weights."""
    import torch

    from d2zero.checkpoints.files import load_model
    from d2zero.demo.run import packaged_checkpoint
    from d2zero.model import build
    from d2zero_bench.standard import random_published

    torch.manual_seed(0)
    model = random_published() if published else load_model(packaged_checkpoint())
    if queries is not None:
        model = build(replace(model.config, num_queries=queries), model.vocabulary)
    return model.eval()


if __name__ == "__main__":
    sys.exit(main())
