"""The training step's variants side by side, and only data loading.

    python benchmarks/studies/training.py

First every variant takes a step from the same weights on the same batch with the same seed: its losses and the
gradient's norms must be the published form's, or it is not timed. float32 is exact, convolutions too, except in
variants with the part tf32 (torch 1.9, which the published code was written for, used TF32 wherever a GPU had it).
Then the variants take one step each, round by round, in a new order each round. There is no dropout: its random
numbers are others in compiled code.

Without options: on a GPU the published model at 960x960, with the largest power of two of images that the published
form's memory allows; on a CPU the same model at 128x128, one image.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch

from d2zero.cli.terminal import console, tracked
from d2zero.data.splits import PACKAGED
from d2zero.devices import pick_device
from d2zero.processes import Processes
from d2zero.training.config import PRESETS, TrainConfig, config_to_dict, find_preset, with_settings
from d2zero.training.memory import keep_freed_memory
from d2zero.training.step import PARTS
from d2zero_bench.cases import parse_counts
from d2zero_bench.report import Sample, Spread, ratios, throughput
from d2zero_bench.rounds import Rounds
from d2zero_bench.tables import NOTHING, Alarm, Table, fixed, milliseconds, ratio, scientific
from d2zero_runtime import D2ZeroError
from studies.study import header, parser_of, run, write
from studies.training_data import loading_rates, training_set
from studies.training_steps import (
    EXACT,
    LOW_PRECISION,
    PUBLISHED,
    Equality,
    FirstStep,
    Variant,
    compare,
    drawn_batch,
    drawn_model,
    largest_batch,
    variant_config,
)

VARIANTS = {
    "cuda": "published,model,kernel,amp,compiled,kernel+amp,kernel+amp+compiled",
    "cpu": "published,model",  # bfloat16 and compilation take minutes per step on some
}
SIZES = {"cuda": 960, "cpu": 128}
LOADED_SIZE = 960  # loading is measured at the recipe's size on every machine
NOTED = (D2ZeroError, RuntimeError, MemoryError)  # torch's, CUDA's and compilers' are RuntimeErrors


@dataclass
class Result:
    """One variant: its samples are paired with those of all others, round by round."""

    variant: str
    precision: str
    first_step: FirstStep | None = None
    equality: Equality | None = None
    samples: list[Sample] = field(default_factory=list)
    peak_mb: float | None = None

    @property
    def totals(self) -> list[float]:
        """Milliseconds per step, one per round."""
        return [sum(sample.values()) for sample in self.samples]


@dataclass
class TrainingReport:
    """All findings, filled while they are made.

    Args:
        batch: Images per step.
        results: One per variant, in the order asked for.
        loading: Images per second by number of workers, one per round.
        notes: Why a variant, or the loading, was left out.
    """

    batch: int
    results: list[Result] = field(default_factory=list)
    loading: dict[int, list[float]] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)

    def images_per_second(self, result: Result) -> float | None:
        """Of steps one after the other."""
        return throughput(result.totals, self.batch) if result.samples else None

    def ratio(self, result: Result) -> Spread | None:
        """How many times the published form's time a step takes, round by round."""
        base = next((other for other in self.results if other.variant == PUBLISHED), None)
        rounds = min(len(result.samples), len(base.samples)) if base else 0
        return ratios(result.totals[:rounds], base.totals[:rounds]) if base and rounds else None

    def keeps_up(self) -> str | None:
        """Whether loading is as fast as the fastest variant; None if either was not measured."""
        speeds = {r.variant: speed for r in self.results if (speed := self.images_per_second(r)) is not None}
        if not self.loading or not speeds:
            return None
        fastest = max(speeds, key=speeds.__getitem__)
        rates = {count: median(found) for count, found in self.loading.items()}
        what = f"{fastest} takes {speeds[fastest]:.1f} images per second"
        enough = [count for count, rate in rates.items() if rate >= speeds[fastest]]
        if enough:
            return f"loading keeps up: {what}, {min(enough)} workers read {rates[min(enough)]:.1f}"
        best = max(rates, key=rates.__getitem__)
        return f"loading does NOT keep up: {what}, the best, {best} workers, read {rates[best]:.1f}"

    def to_dict(self) -> dict[str, Any]:
        """Plain data, with the statistics that follow from the samples."""
        content = {**asdict(self), "keeps_up": self.keeps_up()}
        for entry, result in zip(content["results"], self.results, strict=True):
            spread = self.ratio(result)
            entry["figures"] = {
                "images_per_second": self.images_per_second(result), "ratio": spread and asdict(spread)
            }  # fmt: skip
        return content

    def tables(self) -> Iterator[Table]:
        """One of steps, one of loading; what was not measured is left out."""
        if self.results:
            rounds = max(len(result.samples) for result in self.results)
            head = ("variant", "precision", "first s", *PARTS, "step", "img/s", "× published", "MB", "Δ loss", "Δ grad")
            caption = f"a training step, batch {self.batch}: milliseconds, medians of {rounds} rounds"
            yield Table(head, [self._row(result) for result in self.results], caption)
        if self.loading:
            spreads = {str(count): Spread.of(rates) for count, rates in self.loading.items()}
            rows = [[count, *(fixed(value, 1) for value in (s.p50, s.p10, s.p90))] for count, s in spreads.items()]
            yield Table(("workers", "img/s p50", "p10", "p90"), rows, "only loading")

    def _row(self, result: Result) -> list[str]:
        steps = [[sample[part] for sample in result.samples] for part in PARTS] + [result.totals]
        equal = result.equality
        loss = scientific(equal.losses) if equal else "baseline" if result.variant == PUBLISHED else NOTHING
        return [
            result.variant,
            result.precision,
            fixed(result.first_step.seconds if result.first_step else None, 1),
            *(milliseconds(median(times) if times else None) for times in steps),
            fixed(self.images_per_second(result), 2),
            ratio(self.ratio(result)),
            fixed(result.peak_mb, 0),
            Alarm(f"{loss} WRONG") if equal and equal.failures else loss,
            scientific(max(equal.gradient_norms.values()) if equal else None),
        ]


class Steps:
    """The variants, from weights to samples in the report.

    Args:
        report: Filled; what was found so far is in it at any moment.
        config: The run's whose step it is; its batch is the batch, its `augment.size` the images' sides.
        given: The command's options.
    """

    def __init__(self, report: TrainingReport, config: TrainConfig, given: argparse.Namespace) -> None:
        self.report, self.config, self.given = report, config, given
        self.rounds = Rounds(report.notes, config.seed, tracked, NOTED)
        self.model = drawn_model(config, given.classes)
        if given.device.type == "cuda" and given.batch is None:  # judged by the published form, which needs most
            report.batch = largest_batch(Variant(PUBLISHED, config, self.model, given.device), self._draw)
            self.config = replace(config, batch_size=report.batch)
        self.batch = self._draw(report.batch)
        self.variants: dict[str, Variant] = {}
        self.results: dict[str, Result] = {}

    def run(self) -> None:
        """Compare first steps, then take rounds of what is right."""
        names: list[str] = self.given.variants
        for name in sorted(names, key=lambda name: name != PUBLISHED):  # stable: the baseline first
            with self.rounds.noting_failure(name):
                self._open(name)
        self.report.results.sort(key=lambda result: names.index(result.variant))
        for name, variant in self.variants.items():
            with self.rounds.noting_failure(name):
                for _ in range(self.given.warmup):
                    variant.run(self.batch)

        def step(name: str, _: int) -> Sample:
            return self.variants[name].run(self.batch)

        for found in self.rounds.take(list(self.variants), self.given.rounds, "rounds", step):
            for name, sample in found.items():
                self.results[name].samples.append(sample)
        for name, variant in self.variants.items():
            if name not in self.report.notes:
                with self.rounds.noting_failure(name):
                    self.results[name].peak_mb = variant.peak_mb(self.batch)

    def _draw(self, count: int) -> Any:
        config = replace(self.config, batch_size=count)
        return drawn_batch(config, self.given.classes, self.given.instances, self.given.device)

    def _open(self, name: str) -> None:
        """Take the first step; only what is right is kept to be timed."""
        variant = Variant(name, self.config, self.model, self.given.device)
        result = Result(name, str(variant.step.precision or torch.float32).removeprefix("torch."))
        self.report.results.append(result)
        self.results[name] = result
        result.first_step = variant.first_step(self.batch)
        if name != PUBLISHED:
            base = self.results[PUBLISHED].first_step
            if base is None:
                raise D2ZeroError(f"there is nothing to compare it with: {self.report.notes[PUBLISHED]}")
            result.equality = compare(result.first_step, base, LOW_PRECISION if variant.low_precision else EXACT)
            if result.equality.failures:
                raise D2ZeroError("not the published step, not timed: " + "; ".join(result.equality.failures))
        self.variants[name] = variant


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and write; 1 if a variant was left out."""
    parser = parser_of(__doc__)
    add = parser.add_argument
    add("--variants", help="with commas; published, model, or parts: kernel, amp, tf32, compiled, kernel+amp, …")
    add("--preset", default="coco-48-17", choices=tuple(PRESETS), help="the run whose step is measured")
    add("--set", dest="settings", action="append", default=[], metavar="KEY=VALUE", help="as for d2zero train")
    add("--device", default="auto", help="auto, cpu or cuda:N")
    add("--size", type=int, help="sides of the square images, a multiple of 32")
    add("--batch", type=int, help="images per step; on a GPU the largest that fits if left out")
    add("--instances", type=int, default=10, help="per image")
    add("--classes", type=int, default=48, help="seen classes")
    add("--rounds", type=int, default=5, help="each variant takes a step in each")
    add("--warmup", type=int, default=1, help="steps of each variant before the first round")
    add("--only", choices=("steps", "loading"), help="one of the two")
    add("--data", type=Path, help="a COCO folder to load from; drawn images without it")
    add("--workers", default="1,2,4", help="processes that load, with commas; 0 is always measured")
    add("--seconds", type=float, default=3.0, help="of loading, for each number of workers and of three rounds")
    add("--json", type=Path, help="write all samples and statistics")
    return run(measure, parser, arguments)


def measure(given: argparse.Namespace) -> int:
    """Measure, show and write; what was found before an interruption, too."""
    config = checked(given)
    report = TrainingReport(config.batch_size)
    if given.device.type == "cuda":
        torch.cuda.set_device(given.device)
    keep_freed_memory()  # as training does
    options = {name: value for name, value in vars(given).items() if name not in ("words", "json", "data", "device")}
    where = {"device": str(given.device), "threads": torch.get_num_threads()}
    head = header(__file__, given, **where, **options, training=config_to_dict(config))
    try:
        if given.only != "loading":
            Steps(report, config, given).run()
        if given.only != "steps":
            with Rounds(report.notes, config.seed, tracked).noting_failure("loading"):
                report.loading = load(config, given)
    finally:
        for table in report.tables():
            console().print(table.for_terminal())
        for line in (report.keeps_up(), *(f"{name}: {note}" for name, note in report.notes.items())):
            if line:
                print(line)
        write(given.json, head | report.to_dict())
    return 1 if report.notes else 0


def load(config: TrainConfig, given: argparse.Namespace) -> dict[int, list[float]]:
    """Measure only data loading, at the recipe's image size."""
    config = replace(config, augment=replace(config.augment, size=given.size or LOADED_SIZE), steps=10**6)
    with training_set(config, given.preset if given.preset in PACKAGED else PACKAGED[0], given.data) as data:
        return loading_rates(data, config, Processes(0, 1, given.device), given.workers, given.seconds)


def checked(given: argparse.Namespace) -> TrainConfig:
    """The run's configuration; options become what they name.

    Raises:
        D2ZeroError: An option is wrong.
    """
    given.device = pick_device(given.device)
    for name, least in (("instances", 1), ("classes", 1), ("rounds", 1), ("warmup", 0), ("batch", 1)):
        value = getattr(given, name)
        if value is not None and value < least:
            raise D2ZeroError(f"--{name} must be at least {least}, got {value}")
    changes = [f"augment.size={given.size or SIZES[given.device.type]}", f"batch_size={given.batch or 1}"]
    config = with_settings(find_preset(given.preset), [*changes, "model.adaptation_dropout=0.0", *given.settings])
    given.workers = tuple(dict.fromkeys([0, *parse_counts("--workers", given.workers)]))
    names = [name.strip() for name in (given.variants or VARIANTS[given.device.type]).split(",")]
    for name in names:
        variant_config(name, config)  # refuses before any work
    given.variants = list(dict.fromkeys(names if PUBLISHED in names else [PUBLISHED, *names]))
    return config


if __name__ == "__main__":
    sys.exit(main())
