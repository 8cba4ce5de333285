"""What the training benchmark found, as data, as JSON and as tables for the terminal."""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from d2zero.cli.terminal import console
from d2zero.training.step import PARTS
from d2zero_bench.figures import Spread, percentile, ratios, throughput
from d2zero_bench.report import Sample, write_json
from d2zero_bench.table import milliseconds, ratio
from d2zero_bench.training_steps import PUBLISHED, FirstStep

FORMAT_VERSION = 1


@dataclass(frozen=True)
class Limits:
    """How far a variant may be from the published form, relatively."""

    losses: float
    gradient_norms: float


# Float32 forms differ in the order of sums alone. Found on a CPU, seven draws of weights and images: losses up to
# 7e-6, norms up to 3e-4 (of the demo's backbone, whose batch norm takes statistics). bfloat16 keeps 8 bits, 0.4 % a
# rounding, and what it moves across an edge (attention masks, matches, points) moves a loss by a step: single losses
# up to 2e-2, norms up to 5e-2. The limits are a few times that; a wrong weight or a missing term is far beyond.
EXACT = Limits(losses=1e-3, gradient_norms=1e-2)
LOW_PRECISION = Limits(losses=5e-2, gradient_norms=2e-1)


@dataclass(frozen=True)
class Equality:
    """The first step against the published form's.

    Args:
        loss: the name of the loss that differs most.
        losses: by how much, relatively.
        gradient_norms: relative difference of the norm by part of the model.
        failures: what is beyond the limits; empty if the variant is right.
    """

    loss: str
    losses: float
    gradient_norms: dict[str, float]
    failures: tuple[str, ...] = ()


def compare(ours: FirstStep, published: FirstStep, limits: Limits) -> Equality:
    """Hold a variant's first step against the published form's; what is not finite fails."""
    losses = _differences(ours.losses, published.losses)
    norms = _differences(ours.gradient_norms, published.gradient_norms)
    found = [("losses", losses, limits.losses), ("gradient norms", norms, limits.gradient_norms)]
    failures = [
        f"{what}: {name} differs by {value:.1e}, at most {limit:.0e} is right"
        for what, differences, limit in found
        for name, value in differences.items()
        if not value <= limit
    ]
    worst = max(losses, key=lambda name: (losses[name] != losses[name], losses[name]))
    return Equality(worst, losses[worst], norms, tuple(failures))


def _differences(ours: dict[str, float], theirs: dict[str, float]) -> dict[str, float]:
    assert ours.keys() == theirs.keys(), f"{sorted(ours)} and {sorted(theirs)}"
    return {name: abs(ours[name] - value) / max(abs(value), 1e-12) for name, value in theirs.items()}


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
        """Milliseconds a step, a round each."""
        return [sum(sample.values()) for sample in self.samples]


@dataclass
class TrainingReport:
    """All findings, filled while they are made.

    Args:
        environment: where it ran.
        settings: what a step was.
        results: a variant each, in the order asked for.
        loading: images a second by number of workers, a round each.
        notes: why a variant, or the loading, was left out.
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
        rates = {count: percentile(found, 50) for count, found in self.loading.items()}
        what = f"{fastest.variant} takes {needed:.1f} images a second"
        enough = [count for count, rate in rates.items() if rate >= needed]
        if enough:
            return f"loading keeps up: {what}, {min(enough)} workers read {rates[min(enough)]:.1f}"
        best = max(rates, key=lambda count: rates[count])
        return f"loading does NOT keep up: {what}, the best, {best} workers, read {rates[best]:.1f}"

    def to_dict(self) -> dict[str, Any]:
        """Plain data, with the figures that follow from the samples."""
        content = {"format_version": FORMAT_VERSION, **asdict(self), "keeps_up": self.keeps_up()}
        for entry, result in zip(content["results"], self.results, strict=True):
            entry["figures"] = self._figures(result) if result.samples else None
        return content

    def _figures(self, result: Result) -> dict[str, Any]:
        spread = self.ratio(result)
        return {
            "milliseconds": {part: asdict(Spread.of([s[part] for s in result.samples])) for part in PARTS}
            | {"step": asdict(Spread.of(result.totals))},
            "images_per_second": self.images_per_second(result),
            "ratio": spread and asdict(spread),
        }

    def write(self, path: Path) -> None:
        """Write the JSON, atomically."""
        write_json(path, self.to_dict())


def show(report: TrainingReport, json_file: Path | None) -> None:
    """Print tables and notes, write the JSON."""
    screen = console()
    for table in tables(report):
        screen.print(table)
    sentence = report.keeps_up()
    if sentence:
        print(sentence)
    for name, note in report.notes.items():
        print(f"{name}: {note}")
    if json_file:
        report.write(json_file)
        print(f"all figures: {json_file}")


def tables(report: TrainingReport) -> list[Table]:
    """Steps, and loading if it was measured."""
    found = [_steps(report)] if report.results else []
    return [*found, _loading(report)] if report.loading else found


def _table(title: str, first: str, *columns: str) -> Table:
    table = Table(title=title, box=box.SIMPLE, title_justify="left", pad_edge=False, collapse_padding=True)
    table.add_column(first, no_wrap=True)
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def _steps(report: TrainingReport) -> Table:
    settings = report.settings
    rounds = max((len(result.samples) for result in report.results), default=0)
    title = f"a training step, {settings['size']}×{settings['size']}, batch {settings['batch']}: ms, {rounds} rounds"
    columns = ("precision", "first s", "fwd", "bwd", "opt", "step", "img/s", "× published", "MB", "Δ loss", "Δ grad")
    table = _table(title, "variant", *columns)
    for result in report.results:
        table.add_row(result.variant, result.precision, *_cells(report, result))
    return table


def _cells(report: TrainingReport, result: Result) -> list[str | Text]:
    parts = [percentile([sample[part] for sample in result.samples], 50) if result.samples else None for part in PARTS]
    return [
        "–" if result.first_step is None else f"{result.first_step.seconds:.1f}",
        *(milliseconds(value) for value in parts),
        milliseconds(percentile(result.totals, 50) if result.samples else None),
        f"{report.images_per_second(result):.2f}" if result.samples else "–",
        ratio(report.ratio(result)),
        "–" if result.peak_mb is None else f"{result.peak_mb:.0f}",
        *_differences_cells(result),
    ]


def _differences_cells(result: Result) -> tuple[str | Text, str | Text]:
    found = result.equality
    if found is None:
        return ("baseline", "") if result.variant == PUBLISHED else ("–", "–")
    style = "bold red" if found.failures else ""
    wrong = " WRONG" if found.failures else ""
    return Text(f"{found.losses:.0e}{wrong}", style), Text(f"{max(found.gradient_norms.values()):.0e}", style)


def _loading(report: TrainingReport) -> Table:
    table = _table("loading alone", "workers", "img/s p50", "p10", "p90")
    for count, rates in report.loading.items():
        spread = Spread.of(rates)
        table.add_row(str(count), f"{spread.p50:.1f}", f"{spread.p10:.1f}", f"{spread.p90:.1f}")
    return table
