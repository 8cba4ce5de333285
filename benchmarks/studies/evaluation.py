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
from random import Random
from statistics import mean, median
from tempfile import TemporaryDirectory
from typing import Any

from rich.table import Table

from d2zero.cli.terminal import console, tracked
from d2zero.data.splits import COCO_48_17
from d2zero.evaluation.matching import IOU_THRESHOLDS, IOU_TYPES
from d2zero_bench.cases import parse_counts
from d2zero_bench.environment import environment
from d2zero_bench.report import ratios, write_json
from d2zero_runtime import D2ZeroError
from d2zero_runtime.errors import join_truncated
from studies.command import exit_code
from studies.drawn_coco import write_drawn

OURS, PLAIN, DEFAULTS = CANDIDATES = ("d2zero", "pycocotools", "pycocotools-defaults")
KEYS = ("ap50", "recall50")
LIMIT = 1e-6  # percentage points by which metrics may differ
QUANTITIES = ("wall_s", "cpu_s", "peak_mb")
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
        environment: Where it ran.
        settings: How it ran.
        baseline: The candidate that others are compared with.
        samples: In order; those of a round are paired.
        equality: The largest difference to the baseline in percentage points, by number of images.
        complete: Whether all that was asked for was measured.
    """

    environment: dict[str, Any]
    settings: dict[str, Any]
    baseline: str
    samples: list[Sample] = field(default_factory=list)
    equality: dict[int, float] = field(default_factory=dict)
    complete: bool = False

    @property
    def candidates(self) -> list[str]:
        """Those with samples, the baseline last."""
        found = dict.fromkeys(sample.candidate for sample in self.samples)
        return sorted(found, key=lambda name: (name == self.baseline, name))

    @property
    def images(self) -> list[int]:
        """Numbers of images, rising."""
        return sorted({sample.images for sample in self.samples})

    def values(self, candidate: str, images: int, quantity: str) -> list[float]:
        """A quantity of each round."""
        return [getattr(s, quantity) for s in self.samples if (s.candidate, s.images) == (candidate, images)]

    def median(self, candidate: str, images: int, quantity: str) -> float:
        """Over the rounds."""
        return median(self.values(candidate, images, quantity))

    def ratio(self, candidate: str, images: int, quantity: str) -> float:
        """To the baseline, the median of the rounds' ratios."""
        base = self.values(self.baseline, images, quantity)
        return ratios(self.values(candidate, images, quantity), base).p50

    def growth(self, candidate: str, quantity: str) -> float | None:
        """Per additional image, between the fewest and the most images; None if there is only one number."""
        few, many = self.images[0], self.images[-1]
        if few == many:
            return None
        return (self.median(candidate, many, quantity) - self.median(candidate, few, quantity)) / (many - few)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, with the statistics that follow from the samples."""
        figures = {
            name: {
                "growth_an_image": {quantity: self.growth(name, quantity) for quantity in QUANTITIES},
                "images": {
                    str(count): {
                        quantity: {
                            "median": self.median(name, count, quantity),
                            "ratio": round(self.ratio(name, count, quantity), 4),
                        }
                        for quantity in QUANTITIES
                    }
                    for count in self.images
                },
            }
            for name in self.candidates
        }
        return {"kind": "evaluation", "format_version": 1, **asdict(self), "figures": figures}


def table(report: EvaluationReport) -> Table:
    """A row per candidate and number of images, and one for what an additional image costs."""
    drawn = Table(title=f"evaluation, medians of {report.settings.get('repeats')} runs; × is to {report.baseline}")
    for head in ("", "images", "seconds", "×", "processor s", "×", "peak MB", "×"):
        drawn.add_column(head, justify="right" if head else "left")
    for name in report.candidates:
        for count in report.images:
            cells = [str(count)]
            for quantity in QUANTITIES:
                cells += [f"{report.median(name, count, quantity):.1f}", f"{report.ratio(name, count, quantity):.2f}"]
            drawn.add_row(name, *cells)
        growth = [report.growth(name, quantity) for quantity in QUANTITIES]
        if None not in growth:
            drawn.add_row("", "each more", *(c for value in growth for c in (f"{value:.4f}", "")), end_section=True)
    return drawn


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print and write; 2 for what the user can fix, 130 when interrupted."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--images", default="500,1000,2000,5000", help="numbers of images")
    parser.add_argument("--detections", default="100", help="per image; minimum 1")
    parser.add_argument("--repeats", default="3", help="runs of each, interleaved")
    parser.add_argument("--defaults", action="store_true", help="pycocotools with its own settings as well")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write all samples and statistics")
    given = parser.parse_args(words)
    return exit_code(lambda: _measure_and_show(given, words))


def _measure_and_show(given: argparse.Namespace, words: Sequence[str]) -> None:
    images = sorted(parse_counts("--images", given.images))
    detections, repeats = _one("--detections", given.detections), _one("--repeats", given.repeats)
    settings = {"detections an image": detections, "repeats": repeats, "seed": given.seed}
    where = environment(words, None, "python benchmarks/studies/evaluation.py")
    report = EvaluationReport(where, settings, baseline=PLAIN)
    try:
        measure(report, images, CANDIDATES if given.defaults else (OURS, PLAIN))
    finally:
        _show(report, given.json)


def _show(report: EvaluationReport, json_file: Path | None) -> None:
    """What was measured, even if that is only a part."""
    if report.samples:
        console().print(table(report))
        if not report.complete:
            print("stopped before the end: this is what was measured")
        if json_file:
            write_json(json_file, report.to_dict())
            print(f"all figures: {json_file}")


def _one(flag: str, text: str) -> int:
    numbers = parse_counts(flag, text)
    if len(numbers) > 1:
        raise D2ZeroError(f"{flag} takes one number, got {text!r}")
    return numbers[0]


def measure(report: EvaluationReport, images: Sequence[int], candidates: Sequence[str]) -> None:
    """Draw, compare and measure, in a folder that is removed; whole rounds go into the report.

    Raises:
        D2ZeroError: A candidate fails, or metrics differ.
    """
    detections, repeats, seed = report.settings.values()
    with TemporaryDirectory() as folder:
        steps = list(product(images, range(repeats)))
        for count, number in tracked(iter(steps), len(steps), "rounds"):
            annotations, results = (Path(folder, f"{part}-{count}.json") for part in ("annotations", "detections"))
            if number == 0:
                write_drawn(annotations, results, COCO_48_17, count, detections, seed)
            samples: list[Sample] = []
            metrics: dict[str, Metrics] = {}
            for name in Random(f"{seed} {count} {number}").sample(candidates, len(candidates)):
                sample, metrics[name] = _run(name, (annotations, results), count)
                samples.append(sample)
            if number == 0:
                report.equality[count] = _largest_difference(metrics)
            report.samples += samples
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
        return [sys.executable, "-m", "d2zero", "eval", "--split", COCO_48_17.name, "--mode", "gzsis", *files]
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
        for group, names in (("seen", COCO_48_17.seen), ("unseen", COCO_48_17.unseen)):
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
                f"{name} and {PLAIN} have figures of other classes: {join_truncated(found.keys() ^ plain.keys())}"
            )
        worst = max(plain, key=lambda key: abs(found[key] - plain[key]))
        largest = max(largest, abs(found[worst] - plain[worst]))
        if largest > LIMIT:
            raise D2ZeroError(f"{worst}: {name} has {found[worst]}, {PLAIN} {plain[worst]}; speed does not matter then")
    return largest


if __name__ == "__main__":
    sys.exit(main())
