"""The tables of docs/benchmarks.md, from the reports in benchmarks/results/.

    python benchmarks/studies/speed_tables.py

The tables are between two lines `<!-- benchmark table -->`; what is between them is rewritten.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from d2zero_bench.environment import summary
from d2zero_bench.report import Report
from d2zero_bench.tables import COLUMNS, measurements
from d2zero_runtime import D2ZeroError
from d2zero_runtime.files import write_text
from studies.study import parser_of, run

MARKER = "<!-- benchmark table -->"
SHOWN = COLUMNS.keys() - {"decode", "prep", "inference", "post", "p99"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Rewrite the tables."""
    parser = parser_of(__doc__)
    parser.add_argument("--page", type=Path, default=Path("docs/benchmarks.md"))
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results"))
    return run(rewrite, parser, arguments)


def rewrite(given: argparse.Namespace) -> None:
    """Put the reports' numbers into a page.

    Raises:
        D2ZeroError: There are no reports, or the page has no place for them.
    """
    reports = [Report.read(path) for path in sorted(given.results.glob("*.json"))]
    if not reports:
        raise D2ZeroError(
            f"no reports (*.json) in {given.results}; make some with `make benchmark RESULTS={given.results}`"
        )
    parts = given.page.read_text(encoding="utf-8").split(MARKER)
    if len(parts) != 3:
        raise D2ZeroError(f"{given.page} must have two lines {MARKER!r} with the table between them")
    table = "\n\n".join(paragraph for report in reports for paragraph in paragraphs(report))
    write_text(given.page, f"{parts[0]}{MARKER}\n{table}\n{MARKER}{parts[2]}")


def paragraphs(report: Report) -> Iterator[str]:
    """A caption and a table for each case."""
    for case in report.cases:
        table = measurements(report, case).only(SHOWN)
        yield f"*{', '.join([report.title, *summary(report.environment)])}. {table.caption}.*"
        yield table.markdown()


if __name__ == "__main__":
    sys.exit(main())
