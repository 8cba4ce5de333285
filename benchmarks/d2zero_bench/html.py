"""A report as one HTML file: nothing is fetched; light and dark; wide and narrow."""

from collections.abc import Callable, Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any

from d2zero_bench import svg
from d2zero_bench.cases import Case
from d2zero_bench.report import ARRAY, FILE, NETWORK, STAGE_NAMES, STAGES, Report, Result, names
from d2zero_bench.table import ACCURACY_COLUMNS, best_ratio, milliseconds, ratio, scientific
from d2zero_runtime.files import write_text

STYLE = Path(__file__).with_name("report.css")

NOTES = (
    "Each candidate runs in a process of its own; one runs at a time, in turns, in a new order each round. Ratios are"
    " of pairs of one round: the median, and in brackets where 80 % of the rounds are.",
    "File → detections is the sum of a batch's four stages, one after the other: file to pixels, pixels to padded"
    " tensor, inference (the network, with the upload of its inputs and the download of what post-processing needs),"
    " raw output to detections. Array → detections is all but the first. Throughput follows from file → detections; "
    "<code>Segmenter.stream</code> overlaps stages and is faster where cores are free.",
    "Network is only the network: on a GPU it is measured separately in each round, with inputs on the device and"
    " outputs left there, until they are complete, after one run that is not timed. On a CPU nothing is copied, and it"
    " is the time of inference. Reports of earlier versions have the latter everywhere.",
    "Host memory is the high-water mark of the candidate's process, libraries included. GPU memory is what that"
    " process holds there, CUDA's context included.",
    "Peers have random weights: they show what a network costs, nothing else, and only their network is measured, as"
    " ours is.",
)


def write_html(report: Report, path: Path) -> None:
    """Write the report's page."""
    write_text(path, page(report))


def page(report: Report) -> str:
    """The page as text."""
    sections = [
        section("Latency by stage", _latency(report)),
        section("Latency against accuracy", _tradeoff(report)),
        section("Cost against image size", _sweep(report, "size")),
        section("Cost against batch", _sweep(report, "batch")),
        section("Cost against number of classes", _sweep(report, "classes")),
        section("All figures", "".join(_figures(report, case) for case in report.cases)),
        section("Accuracy", _accuracy(report)),
        section("Equality of outputs", _equality(report)),
        section("Left out", _failures(report)),
        section("How it was measured", _environment(report)),
    ]
    return document(report.title, report.environment, report.complete, sections)


def document(title: str, where: dict[str, Any], complete: bool, sections: Sequence[str]) -> str:
    """A page of sections under a header of title and environment; well-formed XML after its first line."""
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"/>'
        '<meta name="viewport" content="width=device-width, initial-scale=1"/>'
        '<meta name="color-scheme" content="light dark"/>'
        f"<title>{escape(title)}</title><style>{STYLE.read_text(encoding='utf-8')}</style></head>"
        f"<body>{_header(title, where, complete)}<main>{''.join(sections)}</main></body></html>\n"
    )


def _header(title: str, where: dict[str, Any], complete: bool) -> str:
    facts = [
        where.get("processor"),
        where.get("instructions"),
        f"{where['cores']} cores" if where.get("cores") else None,
        where.get("gpu"),
        where.get("date"),
    ]
    line = " · ".join(escape(str(fact)) for fact in facts if fact)
    stopped = "" if complete else '<p class="warning">Stopped before the end: this is what was measured.</p>'
    return f"<header><h1>{escape(title)}</h1><p>{line}</p>{stopped}</header>"


def section(title: str, content: str) -> str:
    """A card of the page; nothing without content."""
    return f"<section><h2>{title}</h2>{content}</section>" if content else ""


def _latency(report: Report) -> str:
    """Bars of the first case, the other cases folded."""
    plots = [(case, _stacked(report, case)) for case in report.cases]
    if not plots:
        return ""
    used = {stage for result in report.results if result.samples for stage in _parts(result)}
    shown = legend((stage, STAGE_NAMES[stage]) for stage in STAGE_NAMES if stage in used)
    first = figure(f"{plots[0][0]}: milliseconds a batch, medians; thin line to p90", plots[0][1])
    others = "".join(f"<details><summary>{case}</summary><figure>{plot}</figure></details>" for case, plot in plots[1:])
    return f"{shown}{first}{others}"


def _parts(result: Result) -> tuple[str, ...]:
    """What a bar is made of; of a peer, its network."""
    return STAGES if result.whole else (NETWORK,)


def _stacked(report: Report, case: Case) -> str:
    rows = []
    for result in report.of_case(case):
        medians = {stage: spread for stage in _parts(result) if (spread := result.spread(stage))}
        total = result.spread(FILE) or result.spread(NETWORK)
        parts = tuple((stage, STAGE_NAMES[stage], spread.p50) for stage, spread in medians.items())
        note = "" if result.whole else " (only the network)"
        if total:
            rows.append(svg.Bar(result.candidate + note, parts, total.p50, total.p90))
    return svg.bars(rows, "milliseconds")


def _tradeoff(report: Report) -> str:
    points: dict[str, svg.Point] = {}
    for name in names(report, ("d2zero",)):
        measured = report.accuracy_of(name)
        result = report.find(name, report.cases[0]) if report.cases else None
        spread = result.spread(FILE) if result else None
        value = measured.figures.get("hm_ap50") if measured else None
        if value is not None and spread is not None:
            points[name] = svg.Point(spread.p50, value, f"{name}: {milliseconds(spread.p50)} ms, {value:.2f} %")
    if not points:
        return ""
    plot = svg.scatter(list(points.values()), f"milliseconds, {FILE}, median", "HM AP50, %")
    note = f"{report.cases[0]}; accuracy at the model's own size. Up and left is better."
    return _legend(report, list(enumerate(points))) + figure(note, plot)


_Key = Callable[[Case], object]
_KEYS: dict[str, _Key] = {
    "size": lambda case: (case.height, case.width),
    "batch": lambda case: case.batch,
    "classes": lambda case: case.classes,
}
_UNITS = {"size": "height × width", "batch": "images a batch", "classes": "classes"}


def _sweep(report: Report, what: str) -> str:
    """A line a candidate over the cases that differ from the first in one thing alone."""
    cases = report.cases
    others = [key for name, key in _KEYS.items() if name != what]
    chosen = [case for case in cases if all(key(case) == key(cases[0]) for key in others)]
    if len(chosen) < 2:
        return ""
    chosen.sort(key=lambda case: (case.height * case.width, case.batch, case.classes or 0))
    drawn = [
        svg.Line(number, points)
        for number, name in enumerate(names(report))
        if (points := _sweep_points(report, name, chosen))
    ]
    plot = svg.lines(drawn, [_label(case, what) for case in chosen], _UNITS[what], "milliseconds an image")
    shown = [(line.colour, names(report)[line.colour]) for line in drawn]
    return _legend(report, shown) + figure(f"Medians of {FILE}; broad strokes from p10 to p90.", plot)


def figure(caption: str, plot: str) -> str:
    """A plot under its caption."""
    return f"<figure><figcaption>{escape(caption)}</figcaption>{plot}</figure>"


def _sweep_points(report: Report, name: str, cases: Sequence[Case]) -> tuple[svg.Point, ...]:
    points = []
    for place, case in enumerate(cases):
        result = report.find(name, case)
        spread = (result.spread(FILE) or result.spread(NETWORK)) if result else None
        if spread:
            low, middle, high = (value / case.batch for value in (spread.p10, spread.p50, spread.p90))
            points.append(svg.Point(place, middle, f"{name}: {milliseconds(middle)} ms", low, high))
    return tuple(points) if len(points) > 1 else ()


def _legend(report: Report, shown: Sequence[tuple[int, str]]) -> str:
    peers = names(report, ("peer",))
    texts = {name: f"{name} (only the network)" for name in peers}
    return legend((f"c{colour % svg.COLOURS}", texts.get(name, name)) for colour, name in shown)


def legend(entries: Iterable[tuple[str, str]]) -> str:
    """Swatches of colour classes with their texts."""
    spans = (f'<span><i class="swatch {colour}"></i>{escape(text)}</span>' for colour, text in entries)
    return f'<p class="legend">{"".join(spans)}</p>'


def _label(case: Case, what: str) -> str:
    if what == "size":
        return f"{case.height}×{case.width}"
    return str(case.batch if what == "batch" else case.classes or "own")


def _figures(report: Report, case: Case) -> str:
    results = report.of_case(case)
    gpu = any(result.gpu_mb is not None for result in results)
    head = ["candidate", *STAGE_NAMES.values(), ARRAY, FILE, "p90", "p99", "images/s", "× baseline", "host MB"]
    rows = [_row(report, result, gpu) for result in results]
    rounds = max(len(result.samples) for result in results)
    caption = f"{case}: milliseconds a batch, medians of {rounds} rounds"
    return f"<h3>{caption}</h3>{table([*head, *(['GPU MB'] if gpu else [])], rows)}"


def _row(report: Report, result: Result, gpu: bool) -> list[str]:
    total = result.spread(FILE)
    cells = [escape(result.candidate)]
    shown = map(result.spread, (*STAGE_NAMES, ARRAY, FILE))
    cells += [milliseconds(spread.p50 if spread else None) for spread in shown]
    cells += [milliseconds(value) for value in ((total.p90, total.p99) if total else (None,) * 2)]
    rate = result.images_per_second
    cells += ["–" if rate is None else f"{rate:.2f}", ratio(best_ratio(report, result)), _megabytes(result.host_mb)]
    return [*cells, _megabytes(result.gpu_mb)] if gpu else cells


def _megabytes(value: float | None) -> str:
    return "–" if value is None else f"{value:.0f}"


def _accuracy(report: Report) -> str:
    if not report.accuracy:
        return ""
    rows = [
        [
            escape(entry.candidate),
            str(entry.images),
            *(_percent(entry.figures.get(key)) for key in ACCURACY_COLUMNS.values()),
        ]
        for entry in report.accuracy
    ]
    note = "<p>Masks, GZSIS, percent; IoU 0.5 but for AP, which is over 0.5 to 0.95.</p>"
    return note + table(["candidate", "images", *ACCURACY_COLUMNS], rows)


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def _equality(report: Report) -> str:
    rows = []
    for entry in report.equality:
        case = f"{entry.case.height}×{entry.case.width}" + (
            f", {entry.case.classes} classes" if entry.case.classes else ""
        )
        logits = [
            scientific(value) for value in (entry.class_most, entry.class_logits, entry.mask_most, entry.mask_logits)
        ]
        verdict = "within the limits"
        if entry.failures:
            verdict = f'<strong class="warning">{escape("; ".join(entry.failures))}</strong>'
        rows.append([escape(entry.candidate), case, *logits, verdict])
    if not rows:
        return ""
    head = ["candidate", "case", "class logits", "largest", "mask logits", "largest", ""]
    note = (
        f"<p>|Δ| of raw outputs against <b>{escape(report.baseline)}</b>, on the same photos: the largest of nine"
        " queries in ten, and of all. A bit of an attention mask that is nearer to its threshold than rounding errors"
        " falls to either side, and its query then looks at a pixel more or less.</p>"
    )
    return f"{note}{table(head, rows)}"


def _failures(report: Report) -> str:
    rows = [[escape(name), escape(why)] for name, why in report.failures.items()]
    return table(["candidate", "why"], rows) if rows else ""


def _environment(report: Report) -> str:
    candidates = {info.name: _about(info.backend, info.precision, info.megabytes) for info in report.candidates}
    return conditions(NOTES, report.environment, {**report.settings, **candidates})


def conditions(notes: Sequence[str], environment: dict[str, Any], settings: dict[str, Any]) -> str:
    """How it was measured: notes (HTML), then what decides the figures."""
    where = dict(environment)
    versions = ", ".join(f"{name} {number}" for name, number in where.pop("versions", {}).items())
    facts = {**where, "versions": versions, **settings}
    rows = "".join(f"<dt>{escape(_title(name))}</dt><dd>{escape(str(value))}</dd>" for name, value in facts.items())
    return f"<ul>{''.join(f'<li>{note}</li>' for note in notes)}</ul><dl>{rows}</dl>"


def _title(name: str) -> str:
    return {"memory_gb": "memory, GB"}.get(name, name)


def _about(backend: str, precision: str, megabytes: float | None) -> str:
    size = "" if megabytes is None else f", file of {megabytes:.1f} MB"
    return f"{backend}, {precision}{size}"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table that scrolls sideways where it is too wide; cells are HTML."""
    top = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'
