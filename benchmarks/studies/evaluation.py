"""`d2zero eval --detections` against plain pycocotools, on drawn files.

    python benchmarks/studies/evaluation.py

Equality first: every class's AP and recall at IoU 0.5, and seen and unseen means, of masks and boxes. Then time and
memory at several numbers of images, each run in a process of its own, interleaved.

`pycocotools` evaluates what zero-shot metrics need (the same IoU thresholds, objects of any size, 100 detections);
`pycocotools-defaults` is what a user of it gets (no threshold 0.4, but four ranges of sizes). Both load each file once
for masks and boxes.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from itertools import product
from pathlib import Path
from statistics import mean, median
from tempfile import TemporaryDirectory
from typing import Any

from d2zero.cli.terminal import console, tracked
from d2zero.data.splits import find_split
from d2zero.evaluation.matching import IOU_THRESHOLDS, IOU_TYPES
from d2zero_bench.cases import parse_counts
from d2zero_bench.report import ratios
from d2zero_bench.rounds import Rounds
from d2zero_bench.tables import Table, fixed
from d2zero_runtime import D2ZeroError
from d2zero_runtime.errors import join_truncated
from studies.drawn_coco import write_drawn
from studies.study import header, parser_of, run, write

OURS, PLAIN, DEFAULTS = CANDIDATES = ("d2zero", "pycocotools", "pycocotools-defaults")
KEYS = ("ap50", "recall50")
LIMIT = 1e-6  # percentage points by which metrics may differ
QUANTITIES = {"wall_s": "seconds", "cpu_s": "processor s", "peak_mb": "peak MB"}
SEED = 0
HERE = Path(__file__).parent

Metrics = dict[tuple[str, str, str], float]  # by masks or boxes, key, class


@dataclass(frozen=True)
class Sample:
    """One run of one candidate on so many images, in a process of its own, from its start to its end.

    Seconds of wall and of processor time; the largest resident memory in 1e6 bytes.
    """

    candidate: str
    images: int
    wall_s: float
    cpu_s: float
    peak_mb: float


@dataclass
class EvaluationReport:
    """Findings, filled while it is measured.

    Args:
        baseline: The candidate that others are compared with.
        samples: In order; those of a round are paired.
        equality: The largest difference to the baseline in percentage points, by number of images.
        complete: Whether all that was asked for was measured.
    """

    baseline: str
    samples: list[Sample] = field(default_factory=list)
    equality: dict[int, float] = field(default_factory=dict)
    complete: bool = False

    def values(self, candidate: str, images: int, quantity: str) -> list[float]:
        """A quantity of each round."""
        return [getattr(s, quantity) for s in self.samples if (s.candidate, s.images) == (candidate, images)]

    def ratio(self, candidate: str, images: int, quantity: str) -> float:
        """To the baseline, the median of the rounds' ratios."""
        base = self.values(self.baseline, images, quantity)
        return ratios(self.values(candidate, images, quantity), base).p50

    def growth(self, candidate: str, quantity: str) -> float | None:
        """Per additional image, between the fewest and the most images; None if there is only one number."""
        counts = {sample.images for sample in self.samples}
        few, many = (median(self.values(candidate, count, quantity)) for count in (min(counts), max(counts)))
        return (many - few) / (max(counts) - min(counts)) if len(counts) > 1 else None

    def table(self) -> Table:
        """A row per candidate and number of images, and what an additional image costs."""
        rows = []
        for name in dict.fromkeys(sample.candidate for sample in self.samples):
            for count in sorted({sample.images for sample in self.samples}):
                row = [name, str(count)]
                for quantity in QUANTITIES:
                    row += [fixed(median(self.values(name, count, quantity)), 1)]
                    row += [fixed(self.ratio(name, count, quantity), 2)]
                rows.append(row)
            growth = [self.growth(name, quantity) for quantity in QUANTITIES]
            if None not in growth:
                rows.append([name, "each more", *(cell for value in growth for cell in (fixed(value, 4), ""))])
        head = ["", "images", *(cell for name in QUANTITIES.values() for cell in (name, "×"))]
        return Table(head, rows, f"evaluation, medians; × is to {self.baseline}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print and write."""
    parser = parser_of(__doc__)
    parser.add_argument("--images", default="500,1000,2000,5000", help="numbers of images")
    parser.add_argument("--detections", type=int, default=100, help="per image")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each, interleaved")
    parser.add_argument("--defaults", action="store_true", help="pycocotools with its own settings as well")
    parser.add_argument("--json", type=Path, help="write all samples")
    return run(measure_and_show, parser, arguments)


def measure_and_show(given: argparse.Namespace) -> None:
    """Measure; show and write what was measured before a failure, too."""
    images = sorted(parse_counts("--images", given.images))
    if given.detections < 1 or given.repeats < 1:
        raise D2ZeroError("--detections and --repeats must be at least 1")
    settings = {"detections an image": given.detections, "repeats": given.repeats, "seed": SEED}
    report = EvaluationReport(PLAIN)
    try:
        measure(report, images, CANDIDATES if given.defaults else (OURS, PLAIN), given)
    finally:
        if report.samples:
            console().print(report.table().for_terminal())
            if not report.complete:
                print("stopped before the end: this is what was measured")
            write(given.json, {"kind": "evaluation", **header(__file__, given, **settings), **asdict(report)})


def measure(
    report: EvaluationReport, images: Sequence[int], candidates: Sequence[str], given: argparse.Namespace
) -> None:
    """Draw, compare and measure, in a folder that is removed; whole rounds go into the report.

    Raises:
        D2ZeroError: A candidate fails, or metrics differ.
    """
    rounds = Rounds({}, SEED, tracked, noted=())
    with TemporaryDirectory() as folder:
        for count in images:
            files = Path(folder, f"annotations-{count}.json"), Path(folder, f"detections-{count}.json")
            write_drawn(*files, find_split("coco-48-17"), count, given.detections, SEED)

            def one(name: str, _: int, count: int = count, files: tuple[Path, Path] = files) -> tuple[Sample, Metrics]:
                return _run(name, files, count)

            for found in rounds.take(candidates, given.repeats, f"{count} images", one):
                report.equality[count] = _largest_difference({name: metrics for name, (_, metrics) in found.items()})
                report.samples += [sample for sample, _ in found.values()]
    report.complete = True


def _run(candidate: str, files: tuple[Path, Path], images: int) -> tuple[Sample, Metrics]:
    """One run: what it took, and what it found."""
    output = files[0].with_name("metrics.json")
    command = [sys.executable, str(HERE / "launch.py"), *_command(candidate, *files, output)]
    done = subprocess.run(command, capture_output=True, text=True)
    answer: dict[str, Any] = json.loads(done.stdout) if done.returncode == 0 else {"code": done.returncode}
    if answer["code"]:
        lines = done.stderr.splitlines() or ["it printed nothing"]
        raise D2ZeroError(f"{candidate} failed on {images} images with code {answer['code']}: {lines[-1]}")
    return Sample(candidate, images, **answer["taken"]), _seen_and_unseen(json.loads(output.read_text()))


def _command(candidate: str, annotations: Path, detections: Path, output: Path) -> list[str]:
    if candidate == OURS:
        files = ["--detections", str(detections), "--annotations", str(annotations), "--json", str(output)]
        return [sys.executable, "-m", "d2zero", "eval", "--split", "coco-48-17", "--mode", "gzsis", *files]
    plain = [sys.executable, str(HERE / "plain_evaluation.py"), str(annotations), str(detections), str(output)]
    return plain if candidate == DEFAULTS else [*plain, "--thresholds", *map(str, IOU_THRESHOLDS)]


def _seen_and_unseen(content: dict[str, Any]) -> Metrics:
    """From either side's JSON: metrics of each class, and means over seen and over unseen ones, in percent.

    The means of `d2zero` are those that it gives; pycocotools has none, they are made of its classes here.
    """
    found: Metrics = {}
    for kind, key in product(IOU_TYPES, KEYS):
        ours = "per_class" in content[kind]
        classes = content[kind]["per_class"] if ours else content[kind]
        found |= {(kind, key, name): row[key] for name, row in classes.items()}
        split = find_split("coco-48-17")
        for group, names in (("seen", split.seen), ("unseen", split.unseen)):
            rows = [row[key] for name, row in classes.items() if name in names]
            if rows:
                found[kind, key, f"all {group}"] = content[kind][f"{group}_{key}"] if ours else mean(rows)
    return found


def _largest_difference(metrics: dict[str, Metrics]) -> float:
    """Between pycocotools and each other candidate, in percentage points.

    Raises:
        D2ZeroError: It is more than rounding, or one has metrics that the other lacks.
    """
    plain, largest = metrics[PLAIN], 0.0
    for name, found in metrics.items():
        if found.keys() != plain.keys():
            raise D2ZeroError(
                f"{name} and {PLAIN} have metrics of other classes: {join_truncated(found.keys() ^ plain.keys())}"
            )
        worst = max(plain, key=lambda key: abs(found[key] - plain[key]))
        largest = max(largest, abs(found[worst] - plain[worst]))
        if largest > LIMIT:
            raise D2ZeroError(f"{worst}: {name} has {found[worst]}, {PLAIN} {plain[worst]}; speed does not matter then")
    return largest


if __name__ == "__main__":
    sys.exit(main())
