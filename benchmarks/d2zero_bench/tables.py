"""A report for the terminal."""

from rich import box
from rich.table import Table
from rich.text import Text

from d2zero_bench.cases import Case
from d2zero_bench.report import ARRAY, FILE, NETWORK, STAGES, Equality, Report, Result, Spread

COLUMNS = (  # decoding is what file has more than array
    "network", "prep", "inference", "post", "array", "file", "p90", "img/s", "× baseline", "MB", "|Δ| (largest)",
)  # fmt: skip


def tables(report: Report) -> list[Table]:
    """One per case, and one of accuracy if it was measured."""
    found = [_case_table(report, case) for case in report.cases]
    return [*found, _accuracy_table(report)] if report.accuracy else found


def _case_table(report: Report, case: Case) -> Table:
    results = report.of_case(case)
    rounds = max(len(result.samples) for result in results)
    table = Table(
        title=f"{case}: milliseconds, {rounds} rounds; array and file → detections",
        box=box.SIMPLE,
        title_justify="left",
        pad_edge=False,
        collapse_padding=True,
    )
    table.add_column("candidate", overflow="fold")
    for column in COLUMNS:
        table.add_column(column, justify="right", no_wrap=True)
    for result in results:
        table.add_row(result.candidate, *_cells(report, result))
    return table


def _cells(report: Report, result: Result) -> list[str | Text]:
    total = result.spread(FILE)
    rate = result.images_per_second
    return [
        *(
            milliseconds(spread.p50 if spread else None)
            for spread in map(result.spread, (NETWORK, *STAGES[1:], ARRAY, FILE))
        ),
        milliseconds(total.p90 if total else None),
        "–" if rate is None else f"{rate:.2f}",
        ratio(best_ratio(report, result)),
        "–" if result.host_mb is None else f"{result.host_mb:.0f}",
        _difference(report, result),
    ]


def best_ratio(report: Report, result: Result) -> Spread | None:
    """Of file → detections where both have it, else of the networks."""
    return report.ratio(result) or report.ratio(result, NETWORK)


def milliseconds(value: float | None) -> str:
    """Three digits or so."""
    if value is None:
        return "–"
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def ratio(spread: Spread | None) -> str:
    """The median and where 80 % of the rounds are."""
    return "–" if spread is None else f"{spread.p50:.2f} ({spread.p10:.2f}–{spread.p90:.2f})"


def _difference(report: Report, result: Result) -> str | Text:
    found = report.equality_of(result.candidate, result.case)
    if result.candidate == report.baseline:
        return "baseline"
    if found is None:
        return "–"
    text = difference(found)
    return Text(f"{text} DIFFERS", style="bold red") if found.failures else text


def difference(found: Equality) -> str:
    """The largest difference of logits, of nine queries in ten and, where it is more, of all."""
    of_most = scientific(_larger(found.class_most, found.mask_most))
    of_all = scientific(_larger(found.class_logits, found.mask_logits))
    if found.class_most is None or of_most == of_all:
        return of_all
    return f"{of_most} ({of_all})"


def scientific(value: float | None) -> str:
    """One digit and the power of ten."""
    return "–" if value is None else f"{value:.0e}"


def _larger(one: float | None, other: float | None) -> float | None:
    return None if one is None or other is None else max(one, other)


ACCURACY_COLUMNS = {
    "seen AP50": "seen_ap50",
    "unseen AP50": "unseen_ap50",
    "HM AP50": "hm_ap50",
    "seen R@100": "seen_recall50",
    "unseen R@100": "unseen_recall50",
    "HM R@100": "hm_recall50",
    "AP": "ap",
}


def _accuracy_table(report: Report) -> Table:
    images = max(entry.images for entry in report.accuracy)
    table = Table(title=f"accuracy of masks, GZSIS, {images} images, percent", box=box.SIMPLE, title_justify="left")
    table.add_column("candidate", overflow="fold")
    for column in ACCURACY_COLUMNS:
        table.add_column(column, justify="right")
    for entry in report.accuracy:
        values = (entry.figures.get(metric) for metric in ACCURACY_COLUMNS.values())
        table.add_row(entry.candidate, *("–" if value is None else f"{value:.2f}" for value in values))
    return table
