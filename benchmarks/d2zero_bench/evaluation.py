"""`python -m d2zero_bench.evaluation`: `d2zero eval --detections` against plain pycocotools, on drawn files.

Equality first: every class's AP and recall at IoU 0.5, and seen and unseen means, of masks and boxes. Then time
and memory at several numbers of images, each run in a process of its own, in turns.

`pycocotools` evaluates what zero-shot figures need (the same IoU thresholds, objects of any size, 100 detections);
`pycocotools-defaults` is what a user of it gets (no threshold 0.4, but four ranges of sizes). Both load each file
once for masks and boxes.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from d2zero.cli.terminal import console, tracked
from d2zero.data.splits import COCO_48_17
from d2zero.evaluation.matching import IOU_THRESHOLDS, IOU_TYPES
from d2zero_bench import launch
from d2zero_bench.cases import parse_counts
from d2zero_bench.drawn_coco import write_drawn
from d2zero_bench.environment import environment
from d2zero_bench.evaluation_report import EvaluationReport, Sample, table
from d2zero_runtime import D2ZeroError
from d2zero_runtime.errors import listed

OURS, PLAIN, DEFAULTS = CANDIDATES = ("d2zero", "pycocotools", "pycocotools-defaults")
KEYS = ("ap50", "recall50")
LIMIT = 1e-6  # percentage points by which figures may differ

Figures = dict[tuple[str, str, str], float]  # by masks or boxes, key, class


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print and write; 2 for what a person can mend, 130 when interrupted."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    parser = argparse.ArgumentParser(
        prog="python -m d2zero_bench.evaluation", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--images", default="500,1000,2000,5000", help="numbers of images")
    parser.add_argument("--detections", default="100", help="of an image; at least 1")
    parser.add_argument("--repeats", default="3", help="runs of each, in turns")
    parser.add_argument("--defaults", action="store_true", help="pycocotools with its own settings as well")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write all samples and figures")
    given = parser.parse_args(words)
    try:
        plan = EvaluationPlan(
            tuple(sorted(parse_counts("--images", given.images))),
            _one("--detections", given.detections),
            _one("--repeats", given.repeats),
            CANDIDATES if given.defaults else (OURS, PLAIN),
            given.seed,
        )
        report = EvaluationReport(
            environment(words, None, "python -m d2zero_bench.evaluation"),
            {"detections an image": plan.detections, "repeats": plan.repeats, "seed": plan.seed},
            baseline=PLAIN,
        )
        try:
            measure(plan, report)
        finally:
            _show(report, given.json)
    except (D2ZeroError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


def _show(report: EvaluationReport, json_file: Path | None) -> None:
    """What was measured, if only a part."""
    if report.samples:
        console().print(table(report))
        if not report.complete:
            print("stopped before the end: this is what was measured")
        if json_file:
            report.write(json_file)
            print(f"all figures: {json_file}")


def _one(flag: str, text: str) -> int:
    numbers = parse_counts(flag, text)
    if len(numbers) > 1:
        raise D2ZeroError(f"{flag} takes one number, got {text!r}")
    return numbers[0]


@dataclass(frozen=True)
class EvaluationPlan:
    """What to measure.

    Args:
        images: numbers of images, rising.
        detections: of an image.
        repeats: of each number of images and candidate.
        candidates: what evaluates; `pycocotools` is compared with.
        seed: of the drawn files and of the order of runs.
    """

    images: tuple[int, ...]
    detections: int = 100
    repeats: int = 3
    candidates: tuple[str, ...] = (OURS, PLAIN)
    seed: int = 0


def measure(plan: EvaluationPlan, report: EvaluationReport) -> None:
    """Draw, compare and measure, in a folder that is removed; whole rounds go into the report.

    Raises:
        D2ZeroError: a candidate fails, or figures differ.
    """
    with TemporaryDirectory() as folder:
        steps = list(product(plan.images, range(plan.repeats)))
        for images, number in tracked(iter(steps), len(steps), "rounds"):
            annotations, detections = (Path(folder, f"{part}-{images}.json") for part in ("annotations", "detections"))
            if number == 0:
                write_drawn(annotations, detections, COCO_48_17, images, plan.detections, plan.seed)
            samples: list[Sample] = []
            figures: dict[str, Figures] = {}
            for name in Random(f"{plan.seed} {images} {number}").sample(plan.candidates, len(plan.candidates)):
                sample, figures[name] = _run(name, (annotations, detections), images)
                samples.append(sample)
            if number == 0:
                report.equality[images] = _largest_difference(figures)
            report.samples += samples
    report.complete = True


def _run(candidate: str, files: tuple[Path, Path], images: int) -> tuple[Sample, Figures]:
    """One run: what it took, and what it found."""
    output = files[0].with_name("figures.json")
    done = subprocess.run(
        [sys.executable, launch.__file__, *_command(candidate, *files, output)], capture_output=True, text=True
    )
    answer: dict[str, Any] = json.loads(done.stdout) if done.returncode == 0 else {"code": done.returncode}
    if answer["code"]:
        lines = done.stderr.splitlines() or ["it printed nothing"]
        raise D2ZeroError(f"{candidate} failed on {images} images with code {answer['code']}: {lines[-1]}")
    return Sample(candidate, images, **answer["taken"]), _seen_and_unseen(json.loads(output.read_text()))


def _command(candidate: str, annotations: Path, detections: Path, output: Path) -> list[str]:
    python = [sys.executable, "-m"]
    if candidate == OURS:
        files = ["--detections", str(detections), "--annotations", str(annotations), "--json", str(output)]
        return [*python, "d2zero", "eval", "--split", COCO_48_17.name, "--mode", "gzsis", *files]
    plain = [*python, "d2zero_bench.plain_evaluation", str(annotations), str(detections), str(output)]
    return plain if candidate == DEFAULTS else [*plain, "--thresholds", *map(str, IOU_THRESHOLDS)]


def _seen_and_unseen(content: dict[str, Any]) -> Figures:
    """From either side's JSON: figures of each class, and means over seen and over unseen ones, in percent.

    The means of `d2zero` are those that it gives; pycocotools has none, they are made of its classes here.
    """
    found: Figures = {}
    for kind, key in product(IOU_TYPES, KEYS):
        ours = "per_class" in content[kind]
        classes = content[kind]["per_class"] if ours else content[kind]
        found |= {(kind, key, name): row[key] for name, row in classes.items()}
        for group, names in (("seen", COCO_48_17.seen), ("unseen", COCO_48_17.unseen)):
            rows = [row[key] for name, row in classes.items() if name in names]
            if rows:
                found[kind, key, f"all {group}"] = content[kind][f"{group}_{key}"] if ours else float(np.mean(rows))
    return found


def _largest_difference(figures: dict[str, Figures]) -> float:
    """Between pycocotools and each other candidate, in percentage points.

    Raises:
        D2ZeroError: it is more than rounding, or one has figures that the other lacks.
    """
    plain, largest = figures[PLAIN], 0.0
    for name, found in figures.items():
        if found.keys() != plain.keys():
            raise D2ZeroError(
                f"{name} and {PLAIN} have figures of other classes: {listed(found.keys() ^ plain.keys())}"
            )
        worst = max(plain, key=lambda key: abs(found[key] - plain[key]))
        largest = max(largest, abs(found[worst] - plain[worst]))
        if largest > LIMIT:
            raise D2ZeroError(f"{worst}: {name} has {found[worst]}, {PLAIN} {plain[worst]}; speed does not matter then")
    return largest


if __name__ == "__main__":
    sys.exit(main())
