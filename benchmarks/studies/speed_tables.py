"""The tables of docs/benchmarks.md, from the reports in benchmarks/results/.

    python benchmarks/studies/speed_tables.py

The table is between two lines `<!-- benchmark table -->`; what is between them is rewritten.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from d2zero_bench.report import ARRAY, FILE, NETWORK, Report
from d2zero_bench.tables import best_ratio, difference, milliseconds
from d2zero_runtime import D2ZeroError
from d2zero_runtime.files import write_text
from studies.command import exit_code

MARKER = "<!-- benchmark table -->"
HEAD = (
    "", "network ms", f"{ARRAY} ms", f"{FILE} ms (p90)", "× baseline", "images per second", "memory MB",
    "\\|Δ\\| (largest)", "HM AP50",
)  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """Rewrite the table; 2 for what the user can fix."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--page", type=Path, default=Path("docs/benchmarks.md"))
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results"))
    given = parser.parse_args(arguments)
    return exit_code(lambda: rewrite(given.page, given.results))


def rewrite(page: Path, results: Path) -> None:
    """Put the reports' numbers into a page.

    Raises:
        D2ZeroError: There are no reports, or the page has no place for them.
    """
    reports = [Report.read(path) for path in sorted(results.glob("*.json"))]
    if not reports:
        raise D2ZeroError(f"no reports (*.json) in {results}; make some with `make benchmark RESULTS={results}`")
    parts = page.read_text(encoding="utf-8").split(MARKER)
    if len(parts) != 3:
        raise D2ZeroError(f"{page} must have two lines {MARKER!r} with the table between them, has {len(parts) - 1}")
    table = "\n\n".join(_table(report) for report in reports)
    text = f"{parts[0]}{MARKER}\n{table}\n{MARKER}{parts[2]}"
    write_text(page, text)


def _table(report: Report) -> str:
    """Every case of a report, one row per candidate; columns that nothing fills are left out."""
    rows = [_row(report, case_number) for case_number in range(len(report.cases))]
    cells = [row for group in rows for row in group]
    kept = [place for place in range(len(HEAD)) if place == 0 or any(row[place] for row in cells)]
    lines = [[HEAD[place] for place in kept], ["---"] + ["---:"] * (len(kept) - 1)]
    lines += [[row[place] for place in kept] for row in cells]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return f"{_title(report)}\n\n{table}"


def _title(report: Report) -> str:
    where = report.environment
    facts = [
        report.title,
        where.get("gpu") or where.get("processor"),
        None if where.get("gpu") else where.get("instructions"),
        f"{where['threads']} threads" if str(where.get("threads")).isdecimal() else f"{where.get('cores')} cores",
        where.get("date"),
    ]
    return f"*{', '.join(str(fact) for fact in facts if fact)}; medians, {report.settings.get('rounds')} rounds.*"


def _row(report: Report, number: int) -> list[list[str]]:
    case, found = report.cases[number], []
    for result in report.of_case(case):
        network, array, total = (result.spread(what) for what in (NETWORK, ARRAY, FILE))
        times = best_ratio(report, result)
        equal, accuracy = report.equality_of(result.candidate, case), report.accuracy_of(result.candidate)
        hm = accuracy.figures.get("hm_ap50") if accuracy else None
        different = difference(equal) if equal else ""
        found.append(
            [
                f"{result.candidate}, {case}",
                milliseconds(network.p50) if network else "",
                milliseconds(array.p50) if array else "",
                f"{milliseconds(total.p50)} ({milliseconds(total.p90)})" if total else "",
                f"{times.p50:.2f}" if times else "",
                f"{result.images_per_second:.2f}" if result.images_per_second else "",
                f"{result.host_mb:.0f}" if result.host_mb is not None else "",
                f"{different} **differs**" if equal and equal.failures else different,
                f"{hm:.2f}" if hm is not None else "",
            ]
        )
    return found


if __name__ == "__main__":
    sys.exit(main())
