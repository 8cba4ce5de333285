"""A report as one HTML file: nothing is fetched; light and dark; wide and narrow.

`Section` and `render` know nothing of a benchmark's report; a study's page is made of them too.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader
from matplotlib.figure import Figure

from d2zero.evaluation.metrics import METRICS
from d2zero_bench import plots
from d2zero_bench.cases import Case
from d2zero_bench.environment import summary
from d2zero_bench.report import FILE, NETWORK, STAGE_NAMES, STAGES, Report, names
from d2zero_bench.tables import Table, accuracy, equality, measurements
from d2zero_runtime.files import write_text

TEMPLATE = Path(__file__).with_name("page.html.jinja")
POINTS = (
    "Each candidate runs in a process of its own; one runs at a time, interleaved, in a new order each round. Ratios"
    " are of pairs of one round: the median, and in brackets where 80 % of the rounds are.",
    "File → detections is the sum of a batch's four stages, one after the other: file to pixels, pixels to padded"
    " tensor, inference (the network, with the upload of its inputs and the download of what post-processing needs),"
    " raw output to detections. Array → detections is all except the first. Throughput follows from file → detections; "
    "Segmenter.stream overlaps stages and is faster where cores are free.",
    "Network is only the network: on a GPU it is measured separately in each round, with inputs on the device and"
    " outputs left there, until they are complete, after one run that is not timed. On a CPU nothing is copied, and it"
    " is the time of inference. Reports of earlier versions have the latter everywhere.",
    "Host memory is the high-water mark of the candidate's process, libraries included. GPU memory is what that"
    " process holds there, CUDA's context included.",
    "Peers have random weights: they show what a network costs, nothing else, and only their network is measured, as"
    " ours is.",
)
ACCURACY = "IoU 0.5, except AP, which is over 0.5 to 0.95."
EQUALITY = (
    "|Δ| of raw outputs to the baseline's, on the same photos: the largest of nine queries in ten, and of all. A bit of"
    " an attention mask that is nearer to its threshold than rounding errors falls to either side, and its query then"
    " looks at a pixel more or less."
)


@dataclass(frozen=True)
class Plot:
    """An inline SVG under its caption."""

    caption: str
    svg: str

    @classmethod
    def of(cls, caption: str, figure: Figure) -> "Plot":
        """Draw a figure."""
        return cls(caption, plots.inline_svg(figure, caption.partition(":")[0]))


@dataclass(frozen=True)
class Section:
    """A card of the page, with what it has of each kind; left out if that is nothing.

    Args:
        title: Its heading.
        notes: Paragraphs.
        plots: Plots.
        folded: Whether all plots except the first are folded.
        tables: Tables.
        points: A list of remarks.
        facts: Values by name.
    """

    title: str
    notes: Sequence[str] = ()
    plots: Sequence[Plot] = ()
    folded: bool = False
    tables: Sequence[Table] = ()
    points: Sequence[str] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.plots or self.tables or self.points or self.facts)


def render(title: str, environment: Mapping[str, Any], sections: Sequence[Section], complete: bool = True) -> str:
    """A page of sections under a header of title and environment; well-formed XML after its first line."""
    templates = Environment(loader=FileSystemLoader(TEMPLATE.parent), autoescape=True, trim_blocks=True)
    return templates.get_template(TEMPLATE.name).render(
        title=title,
        machine=summary(environment),
        complete=complete,
        sections=[section for section in sections if section],
        colours=plots.COLOURS,
    )


def conditions(points: Sequence[str], environment: Mapping[str, Any], settings: Mapping[str, Any]) -> Section:
    """How it was measured: remarks, then what decides the results."""
    where = dict(environment)
    versions = ", ".join(f"{name} {number}" for name, number in where.pop("versions", {}).items())
    facts = {{"memory_gb": "memory, GB"}.get(name, name): value for name, value in where.items()}
    return Section("How it was measured", points=points, facts={**facts, "versions": versions, **settings})


def write_html(report: Report, path: Path) -> None:
    """Write the report's page."""
    write_text(path, page(report))


def page(report: Report) -> str:
    """The page as text."""
    candidates = {
        info.name: f"{info.backend}, {info.precision}"
        + ("" if info.megabytes is None else f", file of {info.megabytes:.1f} MB")
        for info in report.candidates
    }
    sections = [
        _latency(report),
        _tradeoff(report),
        *(_sweep(report, what) for what in _SWEEPS),
        Section("All measurements", tables=[measurements(report, case) for case in report.cases]),
        Section("Accuracy", [ACCURACY], tables=[accuracy(report)] if report.accuracy else []),
        Section("Equality of outputs", [EQUALITY], tables=[equality(report)] if report.equality else []),
        Section("Left out", facts=report.failures),
        conditions(POINTS, report.environment, {**report.settings, **candidates}),
    ]
    return render(report.title, report.environment, sections, report.complete)


def _latency(report: Report) -> Section:
    """Bars of the first case, the other cases folded."""
    caption = "{}: milliseconds per batch, medians; thin line to p90"
    drawn = [Plot.of(caption.format(case), latency_figure(report, case)) for case in report.cases]
    return Section("Latency by stage", plots=drawn, folded=True)


def latency_figure(report: Report, case: Case) -> Figure:
    """A stacked bar per candidate; of a peer, its network."""
    rows = []
    for result in report.of_case(case):
        whole = result.spread(FILE) or result.spread(NETWORK)
        stages = STAGES if result.whole else (NETWORK,)
        parts = {stage: spread.p50 for stage in stages if (spread := result.spread(stage))}
        if whole:
            rows.append(plots.Bar(_label(report, result.candidate), parts, whole.p50, whole.p90))
    return plots.bars(rows, STAGE_NAMES, "milliseconds")


def _label(report: Report, name: str) -> str:
    return f"{name} (only the network)" if name in names(report, ("peer",)) else name


def _tradeoff(report: Report) -> Section:
    figure = tradeoff_figure(report)
    caption = f"{report.cases[0]}; accuracy at the model's own size. Up and left is better." if report.cases else ""
    return Section("Latency against accuracy", plots=[Plot.of(caption, figure)] if figure else [])


def tradeoff_figure(report: Report) -> Figure | None:
    """HM AP50 against latency, a point per model; None where either was not measured."""
    points, metric = [], METRICS["hm_ap50"]
    for number, name in enumerate(names(report)):
        measured = report.accuracy_of(name)
        result = report.find(name, report.cases[0]) if report.cases else None
        spread = result.spread(FILE) if result else None
        value = measured.figures.get("hm_ap50") if measured else None
        if value is not None and spread is not None:
            points.append(plots.Series(name, number, [spread.p50], [value]))
    return plots.scatter(points, f"milliseconds, {FILE}, median", f"{metric.label}, {metric.unit}") if points else None


@dataclass(frozen=True)
class _Sweep:
    """What varies between cases: its heading, its key, its label, its unit."""

    title: str
    key: Callable[[Case], object]
    label: Callable[[Case], str]
    unit: str


_SWEEPS = (
    _Sweep(
        "image size", lambda case: (case.height, case.width), lambda case: f"{case.height}×{case.width}",
        "height × width",
    ),
    _Sweep("batch", lambda case: case.batch, lambda case: str(case.batch), "images per batch"),
    _Sweep("number of classes", lambda case: case.classes, lambda case: str(case.classes or "own"), "classes"),
)  # fmt: skip


def _sweep(report: Report, what: _Sweep) -> Section:
    """A line per candidate over the cases that differ from the first in only one thing."""
    others = [sweep.key for sweep in _SWEEPS if sweep is not what]
    chosen = [case for case in report.cases if all(key(case) == key(report.cases[0]) for key in others)]
    chosen.sort(key=lambda case: (case.height * case.width, case.batch, case.classes or 0))
    drawn = [series for number in range(len(report.candidates)) if (series := _line(report, number, chosen))]
    title = f"Cost against {what.title}"
    if len(chosen) < 2 or not drawn:
        return Section(title)
    figure = plots.lines(drawn, [what.label(case) for case in chosen], what.unit, "milliseconds per image")
    return Section(title, plots=[Plot.of(f"Medians of {FILE}; broad strokes from p10 to p90.", figure)])


def _line(report: Report, number: int, cases: Sequence[Case]) -> plots.Series | None:
    name, found = report.candidates[number].name, []
    for place, case in enumerate(cases):
        result = report.find(name, case)
        spread = (result.spread(FILE) or result.spread(NETWORK)) if result else None
        if spread:
            found.append((place, *(value / case.batch for value in (spread.p50, spread.p10, spread.p90))))
    if len(found) < 2:
        return None
    return plots.Series(_label(report, name), number, *(list(values) for values in zip(*found, strict=True)))
