"""Runs pytest and writes the outcome of each test as soon as it is there.

python benchmarks/gpu/run_tests.py --json tests.json -m "gpu and not timed" tests
"""

import sys
from pathlib import Path
from typing import Any

import pytest
from stages import ROOT, write_json

SHOWN = 2000  # characters of a failure


class Notes:
    """A plugin that keeps a file of what has passed, failed and been skipped."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.found: dict[str, Any] = {"passed": 0, "failed": {}, "skipped": {}, "seconds": {}}
        write_json(path, self.found)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Take note of one phase of one test."""
        if report.failed:
            self.found["failed"][f"{report.nodeid} ({report.when})"] = report.longreprtext[-SHOWN:]
            print(f"FAILED {report.nodeid}: {report.longreprtext.strip().splitlines()[-1][:200]}", flush=True)
        elif report.skipped:
            reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
            self.found["skipped"][reason] = self.found["skipped"].get(reason, 0) + 1
        elif report.when == "call":
            self.found["passed"] += 1
            self.found["seconds"][report.nodeid.split("/")[-1]] = round(report.duration, 2)
        write_json(self.path, self.found)


def main() -> int:
    """Everything after `--json FILE` goes to pytest."""
    path = Path(sys.argv[sys.argv.index("--json") + 1])
    words = [word for word in sys.argv[1:] if word not in ("--json", str(path))]
    notes = Notes(path)
    code = pytest.main(["--rootdir", str(ROOT), "-c", str(ROOT / "pyproject.toml"), "--tb=short", *words], [notes])
    print(f"{notes.found['passed']} passed, {len(notes.found['failed'])} failed, skipped: {notes.found['skipped']}")
    return int(code)


if __name__ == "__main__":
    sys.exit(main())
