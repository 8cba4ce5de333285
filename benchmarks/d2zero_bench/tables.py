"""A report's tables as data, for the terminal, for Markdown and for the page. To add a column, add it to `COLUMNS`."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from operator import attrgetter

from rich import box, table
from rich.text import Text

from d2zero.evaluation.metrics import METRICS, metrics_of
from d2zero_bench.cases import Case
from d2zero_bench.report import ARRAY, FILE, NETWORK, Equality, Report, Result, Spread
from d2zero_runtime import Mode

NOTHING = "–"


class Alarm(str):
    """A cell that says that something is wrong."""

    alarm = True


@dataclass(frozen=True)
class Table:
    """A table of text; its first column is to the left, the others to the right.

    Args:
        head: Names of the columns.
        rows: One cell per column.
        caption: What it shows.
    """

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str = ""

    def only(self, columns: Collection[str]) -> "Table":
        """The first column and some others."""
        kept = [place for place, name in enumerate(self.head) if place == 0 or name in columns]
        return Table([self.head[place] for place in kept], [[row[place] for place in kept] for row in self.rows],
                     self.caption)  # fmt: skip

    def filled(self) -> "Table":
        """Without columns in which there is nothing."""
        columns = zip(self.head, zip(*self.rows, strict=True), strict=True)
        return self.only([name for name, cells in columns if set(cells) - {NOTHING, ""}])

    def for_terminal(self) -> table.Table:
        """For rich."""
        shown = table.Table(
            title=self.caption, box=box.SIMPLE, title_justify="left", pad_edge=False, collapse_padding=True
        )
        for place, name in enumerate(self.head):
            shown.add_column(Text(name), justify="right" if place else "left", no_wrap=place > 0, overflow="fold")
        for row in self.rows:
            shown.add_row(*(Text(cell, "bold red" if isinstance(cell, Alarm) else "") for cell in row))
        return shown

    def markdown(self) -> str:
        """Without its caption."""
        rows = [[f"**{cell}**" if isinstance(cell, Alarm) else cell for cell in row] for row in self.rows]
        escaped = [[cell.replace("|", r"\|") for cell in row] for row in (self.head, *rows)]
        escaped.insert(1, ["---", *["---:"] * (len(self.head) - 1)])
        return "\n".join(f"| {' | '.join(row)} |" for row in escaped)


def tables(report: Report) -> list[Table]:
    """For the terminal: one per case, and one of accuracy if it was measured."""
    found = [measurements(report, case).only(TERMINAL) for case in report.cases]
    return [*found, accuracy(report)] if report.accuracy else found


def measurements(report: Report, case: Case) -> Table:
    """One row per candidate; only columns in which something was measured."""
    results = report.of_case(case)
    rounds = max(len(result.samples) for result in results)
    rows = [[result.candidate, *(cell(report, result) for cell in COLUMNS.values())] for result in results]
    caption = f"{case}: milliseconds, medians of {rounds} rounds; array and file → detections"
    return Table(["candidate", *COLUMNS], rows, caption).filled()


def accuracy(report: Report) -> Table:
    """One row per candidate that has an accuracy."""
    metrics = metrics_of(Mode.GZSIS)
    rows = [
        [entry.candidate, str(entry.images), *(fixed(entry.figures.get(key), 2) for key in metrics)]
        for entry in report.accuracy
    ]
    heads = [metric.label for metric in metrics.values()]
    return Table(["candidate", "images", *heads], rows, "accuracy of masks, GZSIS, percent")


def equality(report: Report) -> Table:
    """One row per comparison with the baseline."""
    rows = []
    for entry in report.equality:
        case = f"{entry.case.height}×{entry.case.width}"
        case += f", {entry.case.classes} classes" if entry.case.classes else ""
        logits = (entry.class_most, entry.class_logits, entry.mask_most, entry.mask_logits)
        verdict = Alarm("; ".join(entry.failures)) if entry.failures else "within the limits"
        rows.append([entry.candidate, case, *map(scientific, logits), verdict])
    return Table(["candidate", "case", "class logits", "largest", "mask logits", "largest", ""], rows)


def best_ratio(report: Report, result: Result) -> Spread | None:
    """Of file → detections where both have it, else of the networks."""
    return report.ratio(result) or report.ratio(result, NETWORK)


def milliseconds(value: float | None) -> str:
    """Three digits or so."""
    return fixed(value, 2 if value is None or value < 10 else 1 if value < 100 else 0)


def fixed(value: float | None, digits: int) -> str:
    """A number with so many decimals."""
    return NOTHING if value is None else f"{value:.{digits}f}"


def scientific(value: float | None) -> str:
    """One digit and the power of ten."""
    return NOTHING if value is None else f"{value:.0e}"


def ratio(spread: Spread | None) -> str:
    """The median and where 80 % of the rounds are."""
    return NOTHING if spread is None else f"{spread.p50:.2f} ({spread.p10:.2f}–{spread.p90:.2f})"


def difference(found: Equality) -> str:
    """The largest difference of logits, of nine queries in ten and, where it is more, of all."""
    of_most = scientific(_larger(found.class_most, found.mask_most))
    of_all = scientific(_larger(found.class_logits, found.mask_logits))
    return of_all if of_most in (NOTHING, of_all) else f"{of_most} ({of_all})"


def _larger(one: float | None, other: float | None) -> float | None:
    return None if one is None or other is None else max(one, other)


Cell = Callable[[Report, Result], str]


def _time(what: str, percentile: Callable[[Spread], float] = attrgetter("p50")) -> Cell:
    def cell(report: Report, result: Result) -> str:
        spread = result.spread(what)
        return milliseconds(percentile(spread) if spread else None)

    return cell


def _difference(report: Report, result: Result) -> str:
    if result.candidate == report.baseline:
        return "baseline"
    found = report.equality_of(result.candidate, result.case)
    if found is None:
        return NOTHING
    return Alarm(f"{difference(found)} DIFFERS") if found.failures else difference(found)


def _hm_ap50(report: Report, result: Result) -> str:
    found = report.accuracy_of(result.candidate)
    return fixed(found.figures.get("hm_ap50") if found else None, 2)


COLUMNS: dict[str, Cell] = {
    "network": _time(NETWORK),
    "decode": _time("decode"),
    "prep": _time("preprocess"),
    "inference": _time("inference"),
    "post": _time("postprocess"),
    "array": _time(ARRAY),
    "file": _time(FILE),
    "p90": _time(FILE, attrgetter("p90")),
    "p99": _time(FILE, attrgetter("p99")),
    "img/s": lambda report, result: fixed(result.images_per_second, 2),
    "× baseline": lambda report, result: ratio(best_ratio(report, result)),
    "MB": lambda report, result: fixed(result.host_mb, 0),
    "GPU MB": lambda report, result: fixed(result.gpu_mb, 0),
    "|Δ| (largest)": _difference,
    METRICS["hm_ap50"].label: _hm_ap50,
}
# Decoding is what file has more than array; accuracy has a table of its own.
TERMINAL = COLUMNS.keys() - {"decode", "p99", "GPU MB", METRICS["hm_ap50"].label}
