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


def main(arguments: Sequence[str] | None = None) -> int:
    """Write one page per file; 2 for what the user can fix."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="+")
    parser.add_argument("--output", type=Path, default=Path("runs/pages"), help="the folder for pages")
    given = parser.parse_args(arguments)
    try:
        for path in given.results:
            content = json.loads(path.read_text(encoding="utf-8"))
            text = growth_curves.page(content) if "curves" in content else page(Report.from_dict(content))
            target = given.output / ("growth" if "curves" in content else "") / f"{path.stem}.html"
            write_text(target, text)
            print(target)
    except (D2ZeroError, OSError, json.JSONDecodeError) as error:
        print(f"error: {path}: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
