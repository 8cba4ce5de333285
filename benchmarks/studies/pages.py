"""Makes the HTML pages of committed results: those of `d2zero benchmark` and of `growth.py`.

python benchmarks/studies/pages.py benchmarks/results/*.json benchmarks/results/growth/*.json --output runs/pages
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from d2zero_bench.page import page
from d2zero_bench.report import Report
from d2zero_runtime import D2ZeroError
from d2zero_runtime.files import write_text
from studies import growth_curves
from studies.study import parser_of, run


def main(arguments: Sequence[str] | None = None) -> int:
    """Write one page per file."""
    parser = parser_of(__doc__)
    parser.add_argument("results", type=Path, nargs="+")
    parser.add_argument("--output", type=Path, default=Path("runs/pages"), help="the folder for pages")
    return run(write_pages, parser, arguments)


def write_pages(given: argparse.Namespace) -> None:
    """One page per file.

    Raises:
        D2ZeroError: A file has results of neither kind.
    """
    for path in given.results:
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except json.JSONDecodeError as error:
            raise D2ZeroError(f"{path} is no JSON: {error}") from error
        growth = "curves" in content
        target = given.output / ("growth" if growth else "") / f"{path.stem}.html"
        write_text(target, growth_curves.page(content) if growth else page(Report.read(path)))
        print(target)


if __name__ == "__main__":
    sys.exit(main())
