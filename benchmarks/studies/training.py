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
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich import box
from rich.table import Table
from rich.text import Text

from d2zero.cli.terminal import console, tracked
from d2zero.devices import pick_device
from d2zero.training.config import PRESETS, TrainConfig, config_to_dict, find_preset, with_settings
from d2zero.training.distributed import Processes
from d2zero.training.memory import keep_freed_memory
from d2zero.training.step import PARTS
from d2zero_bench.cases import parse_counts
from d2zero_bench.environment import environment, without_folders
from d2zero_bench.measure import round_order
from d2zero_bench.report import Sample, Spread, ratios, throughput, write_json
from d2zero_bench.tables import milliseconds, ratio
from d2zero_runtime import D2ZeroError
from studies.command import exit_code
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
WORKERS = "1,2,4"
LOADING_ROUNDS = 3


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
        environment: Where it ran.
        settings: What a step was.
        results: One per variant, in the order asked for.
        loading: Images per second by number of workers, one per round.
        notes: Why a variant, or the loading, was left out.
    """

    environment: dict[str, Any]
    settings: dict[str, Any]
    results: list[Result] = field(default_factory=list)
    loading: dict[int, list[float]] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)

    @property
    def timed(self) -> list[Result]:
        """Those with samples."""
        return [result for result in self.results if result.samples]

    def images_per_second(self, result: Result) -> float:
        """Of steps one after the other."""
        return throughput(result.totals, self.settings["batch"])

    def ratio(self, result: Result) -> Spread | None:
        """How many times the published form's time a step takes, round by round."""
        base = next((other for other in self.timed if other.variant == PUBLISHED), None)
        rounds = min(len(result.samples), len(base.samples)) if base else 0
        return ratios(result.totals[:rounds], base.totals[:rounds]) if base and rounds else None

    def keeps_up(self) -> str | None:
        """Whether loading is as fast as the fastest variant; None if either was not measured."""
        if not self.loading or not self.timed:
            return None
        fastest = max(self.timed, key=self.images_per_second)
        needed = self.images_per_second(fastest)
        rates = {count: median(found) for count, found in self.loading.items()}
        what = f"{fastest.variant} takes {needed:.1f} images per second"
        enough = [count for count, rate in rates.items() if rate >= needed]
        if enough:
            return f"loading keeps up: {what}, {min(enough)} workers read {rates[min(enough)]:.1f}"
        best = max(rates, key=lambda count: rates[count])
        return f"loading does NOT keep up: {what}, the best, {best} workers, read {rates[best]:.1f}"

    def to_dict(self) -> dict[str, Any]:
        """Plain data, with the statistics that follow from the samples."""
        content = {"format_version": 1, **asdict(self), "keeps_up": self.keeps_up()}
        for entry, result in zip(content["results"], self.results, strict=True):
            entry["figures"] = self._figures(result) if result.samples else None
        return content

    def _figures(self, result: Result) -> dict[str, Any]:
        spread = self.ratio(result)
        times = {part: [sample[part] for sample in result.samples] for part in PARTS} | {"step": result.totals}
        return {
            "milliseconds": {part: asdict(Spread.of(values)) for part, values in times.items()},
            "images_per_second": self.images_per_second(result),
            "ratio": spread and asdict(spread),
        }


class Steps:
    """The variants, from weights to samples in the report.

    Args:
        report: Filled; what was found so far is in it at any moment.
        config: The run's whose step it is; its batch is the batch, its `augment.size` the images' sides.
        names: The variants, `published` among them.
        given: The command's options.
    """

    def __init__(
        self, report: TrainingReport, config: TrainConfig, names: Sequence[str], given: argparse.Namespace
    ) -> None:
        self.report, self.config, self.names, self.given = report, config, names, given
        self.model = drawn_model(config, given.classes)
        if given.device.type == "cuda" and given.batch is None:
            self.config = replace(config, batch_size=self._fitting())
            report.settings["batch"] = self.config.batch_size
        self.batch = self._draw(self.config.batch_size)
        self.variants: dict[str, Variant] = {}
        self.results: dict[str, Result] = {}

    def run(self) -> None:
        """Compare first steps, then take rounds of what is right."""
        for name in sorted(self.names, key=lambda name: name != PUBLISHED):  # stable: the baseline first
            with self._noting_failure(name):
                self._open(name)
        self.report.results.sort(key=lambda result: self.names.index(result.variant))
        for variant in self.variants.values():
            with self._noting_failure(variant.name):
                for _ in range(self.given.warmup):
                    variant.run(self.batch)
        self._take_rounds()
        for name, variant in self._able():
            with self._noting_failure(name):
                self.results[name].peak_mb = variant.peak_mb(self.batch)

    def _draw(self, count: int) -> Any:
        config = replace(self.config, batch_size=count)
        return drawn_batch(config, self.given.classes, self.given.instances, self.given.device)

    def _fitting(self) -> int:
        """Judged by the published form, which needs most; it is thrown away."""
        return largest_batch(Variant(PUBLISHED, self.config, self.model, self.given.device), self._draw)

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

    def _take_rounds(self) -> None:
        rounds = self.given.rounds
        for number in tracked(iter(range(rounds)), rounds, "rounds"):
            names = [name for name, _ in self._able()]
            found = {}
            for name in round_order(names, "training step", number, self.config.seed):
                with self._noting_failure(name):
                    found[name] = self.variants[name].run(self.batch)
            for name, sample in found.items():  # a whole round or nothing: rounds are pairs
                self.results[name].samples.append(sample)

    def _able(self) -> list[tuple[str, Variant]]:
        return [(name, variant) for name, variant in self.variants.items() if name not in self.report.notes]

    @contextmanager
    def _noting_failure(self, name: str) -> Iterator[None]:
        """Note why a variant cannot go on; the others do."""
        try:
            yield
        except (D2ZeroError, RuntimeError, MemoryError) as error:  # torch's, CUDA's and compilers' are RuntimeErrors
            kind = "" if isinstance(error, D2ZeroError) else f"{type(error).__name__}: "
            self.report.notes[name] = without_folders(kind + " ".join(str(error).split())[:400])
            if self.given.device.type == "cuda":
                torch.cuda.empty_cache()


def load(report: TrainingReport, config: TrainConfig, given: argparse.Namespace) -> None:
    """Measure only data loading, at the recipe's image size."""
    config = replace(config, augment=replace(config.augment, size=given.size or LOADED_SIZE), steps=10**6)
    try:
        with training_set(config, given.data) as data:
            report.settings["images loaded"] = len(data)
            processes = Processes(0, 1, given.device)
            rates = loading_rates(data, config, processes, given.workers, LOADING_ROUNDS, given.seconds, tracked)
            report.loading.update(rates)
    except D2ZeroError as error:
        report.notes["loading"] = without_folders(str(error))


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and write; 1 if a variant was left out, 2 for what the user can fix, 130 when interrupted."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    return exit_code(lambda: _measure(_parser().parse_args(words), words))


def _measure(given: argparse.Namespace, words: Sequence[str]) -> int:
    config, names = _checked(given)
    where = environment(words, None, "python benchmarks/studies/training.py")
    report = TrainingReport(where, _settings(given, config))
    if given.device.type == "cuda":
        torch.cuda.set_device(given.device)
    keep_freed_memory()  # as training does
    try:
        if names:
            Steps(report, config, names, given).run()
        if given.only != "steps":
            load(report, config, given)
    finally:
        show(report, given.json)
    return 1 if report.notes else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--variants", help="with commas; published, model, or parts: kernel, amp, tf32, compiled, kernel+amp, …")
    add("--preset", default="coco-48-17", choices=tuple(PRESETS), help="the run whose step is measured")
    add("--set", dest="settings", action="append", default=[], metavar="KEY=VALUE", help="as for d2zero train")
    add("--device", default="auto", help="auto, cpu or cuda:N")
    add("--size", type=int, help="sides of the square images, a multiple of 32")
    add("--batch", type=int, help="images per step; on a GPU the largest that fits if left out")
    add("--queries", type=int, help="of the model")
    add("--instances", type=int, default=10, help="per image")
    add("--classes", type=int, default=48, help="seen classes")
    add("--rounds", type=int, default=5, help="each variant takes a step in each")
    add("--warmup", type=int, default=1, help="steps of each variant before the first round")
    add("--seed", type=int, default=0, help="of weights, images and orders")
    add("--only", choices=("steps", "loading"), help="one of the two")
    add("--data", type=Path, help="a COCO folder to load from; drawn images without it")
    add("--workers", default=WORKERS, help="processes that load, with commas; 0 is always measured")
    add("--seconds", type=float, default=3.0, help="of loading, for each number of workers and of three rounds")
    add("--json", type=Path, help="write all samples and statistics")
    return parser


def _checked(given: argparse.Namespace) -> tuple[TrainConfig, tuple[str, ...]]:
    """The run's configuration and the variants; options become what they name."""
    given.device = pick_device(given.device)
    for name, least in (("instances", 1), ("classes", 1), ("rounds", 1), ("warmup", 0), ("batch", 1)):
        value = getattr(given, name)
        if value is not None and value < least:
            raise D2ZeroError(f"--{name} must be at least {least}, got {value}")
    size = given.size or SIZES[given.device.type]
    changes = [f"augment.size={size}", f"seed={given.seed}", f"batch_size={given.batch or 1}"]
    changes += [] if given.queries is None else [f"model.num_queries={given.queries}"]
    config = with_settings(find_preset(given.preset), [*changes, "model.adaptation_dropout=0.0", *given.settings])
    given.workers = tuple(dict.fromkeys([0, *parse_counts("--workers", given.workers)]))
    if given.only == "loading":
        return config, ()
    names = [name.strip() for name in (given.variants or VARIANTS[given.device.type]).split(",")]
    for name in names:
        variant_config(name, config)  # refuses before any work
    return config, tuple(dict.fromkeys(names if PUBLISHED in names else [PUBLISHED, *names]))


def _settings(given: argparse.Namespace, config: TrainConfig) -> dict[str, object]:
    loading = given.only != "steps"
    return {
        "device": str(given.device),
        "threads": torch.get_num_threads(),
        "size": config.augment.size,
        "batch": config.batch_size,
        "queries": config.model.num_queries,
        "instances": given.instances,
        "classes": given.classes,
        "rounds": given.rounds,
        "warm-up steps": given.warmup,
        "seed": config.seed,
        "loaded size": (given.size or LOADED_SIZE) if loading else None,
        "loaded from": None if not loading else "drawn images" if given.data is None else given.data.name,
        "training": config_to_dict(config),
    }


def show(report: TrainingReport, json_file: Path | None) -> None:
    """Print tables and notes, write the JSON."""
    screen = console()
    if report.results:
        screen.print(_steps_table(report))
    if report.loading:
        screen.print(_loading_table(report))
    sentence = report.keeps_up()
    if sentence:
        print(sentence)
    for name, note in report.notes.items():
        print(f"{name}: {note}")
    if json_file:
        write_json(json_file, report.to_dict())
        print(f"all figures: {json_file}")


def _table(title: str, first: str, *columns: str) -> Table:
    table = Table(title=title, box=box.SIMPLE, title_justify="left", pad_edge=False, collapse_padding=True)
    table.add_column(first, no_wrap=True)
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def _steps_table(report: TrainingReport) -> Table:
    settings = report.settings
    rounds = max((len(result.samples) for result in report.results), default=0)
    title = f"a training step, {settings['size']}×{settings['size']}, batch {settings['batch']}: ms, {rounds} rounds"
    columns = ("precision", "first s", "fwd", "bwd", "opt", "step", "img/s", "× published", "MB", "Δ loss", "Δ grad")
    table = _table(title, "variant", *columns)
    for result in report.results:
        timed = bool(result.samples)
        parts = [median(sample[part] for sample in result.samples) if timed else None for part in PARTS]
        table.add_row(
            result.variant,
            result.precision,
            "–" if result.first_step is None else f"{result.first_step.seconds:.1f}",
            *(milliseconds(value) for value in (*parts, median(result.totals) if timed else None)),
            f"{report.images_per_second(result):.2f}" if timed else "–",
            ratio(report.ratio(result)),
            "–" if result.peak_mb is None else f"{result.peak_mb:.0f}",
            *_differences(result),
        )
    return table


def _differences(result: Result) -> tuple[str | Text, str | Text]:
    found = result.equality
    if found is None:
        return ("baseline", "") if result.variant == PUBLISHED else ("–", "–")
    style, wrong = ("bold red", " WRONG") if found.failures else ("", "")
    return Text(f"{found.losses:.0e}{wrong}", style), Text(f"{max(found.gradient_norms.values()):.0e}", style)


def _loading_table(report: TrainingReport) -> Table:
    table = _table("only loading", "workers", "img/s p50", "p10", "p90")
    for count, rates in report.loading.items():
        spread = Spread.of(rates)
        table.add_row(str(count), f"{spread.p50:.1f}", f"{spread.p10:.1f}", f"{spread.p90:.1f}")
    return table


if __name__ == "__main__":
    sys.exit(main())
