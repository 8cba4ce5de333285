"""Runs the stages of a session on a GPU machine, each in its own process with its own share of the time.

A stage that fails or runs out of time does not keep the others from running. Each stage writes its findings to a JSON
file in the work folder as soon as it has some; they are joined into one file in the results folder while it runs, so
that whatever ends the session leaves what was found. Output goes to a log, its first lines of each stage also to the
terminal. Nothing but the standard library is needed here.
"""

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

ROOT = Path(__file__).parents[2]
HERE = Path(__file__).parent
ROOMS = (".", "runtime", "export", "benchmarks")
CARRIED = ROOT / ".carried"  # what travels beside the repository, see README.md
PACKAGES = f".carried/python{sys.version_info[0]}.{sys.version_info[1]}"  # those that a machine with this Python lacks
GRACE_S = 15.0  # to write what was measured, after an interruption
POLL_S = 1.0
SHOWN_LINES, SHOWN_WIDTH = 30, 150  # of a stage's output on the terminal


@dataclass(frozen=True)
class Stage:
    """A command and its share of the time.

    Args:
        command: What follows `python`; `{json}` in it becomes the file for findings.
        seconds: Its share where time is limited; what earlier stages leave of theirs comes on top.
        background: Runs beside the next stages, for its share, and longer while the others' shares allow it.
        quiet: Waits until nothing runs in the background.
        environment: More variables.
    """

    command: tuple[str, ...]
    seconds: float = 0.0
    background: bool = False
    quiet: bool = False
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Outcome:
    """How a stage ended: its exit code, None where no time was left for it."""

    code: int | None
    seconds: float = 0.0
    interrupted: bool = False

    def __str__(self) -> str:
        if self.code is None:
            return "not begun, no time was left"
        how = "good" if self.code == 0 else f"exit code {self.code}"
        return f"{self.seconds:.0f} s, {'out of time' if self.interrupted else how}"


class Session:
    """Stages of one call, in order.

    Args:
        name: The call's name; results are `<name>.json` and `<name>.log`.
        results: Folder for them.
        work: Folder for exported files and for each stage's own JSON.
        seconds: The time for all stages together; without a limit if left out.
        at_most: The time for each stage, to rehearse interruptions.
    """

    def __init__(
        self, name: str, results: Path, work: Path, seconds: float | None = None, at_most: float | None = None
    ) -> None:
        self._joined, self._log = results / f"{name}.json", results / f"{name}.log"
        self._found, self._seconds, self._at_most = work / name, seconds, at_most
        for folder in (results, self._found):
            folder.mkdir(parents=True, exist_ok=True)
        for left in self._found.glob("*.json"):
            left.unlink()
        self._log.unlink(missing_ok=True)
        self._begin = time.monotonic()
        self._beside: dict[str, _Running] = {}
        self.outcomes: dict[str, Outcome] = {}

    def run(self, stages: Mapping[str, Stage]) -> dict[str, Outcome]:
        """Run all; an interruption of this program ends those that run, and is raised again."""
        later = sum(stage.seconds for stage in stages.values() if not stage.background)
        try:
            for name, stage in stages.items():
                if stage.background:
                    self._beside[name] = self._started(name, stage)
                    continue
                if stage.quiet:
                    self._settle(later)
                later -= stage.seconds
                self._run(name, stage, later)
            self._settle(0)
        finally:
            self._settle(float("inf"))
            self._join()  # what an interrupted stage has written since
        return self.outcomes

    def _run(self, name: str, stage: Stage, later: float) -> None:
        left = self._left()
        limit = float("inf") if left is None else min(left, max(stage.seconds, left - later)) - GRACE_S
        limit = min(limit, self._at_most or limit)
        if limit <= 0:
            self._note(name, Outcome(None))
            return
        running = self._started(name, stage)
        self._note(name, running.ended(limit, self._join))

    def _settle(self, later: float) -> None:
        """Let what runs in the background use its share, and more while `later` seconds are left for the rest."""
        for name in list(self._beside):
            running, left = self._beside.pop(name), self._left()
            limit = 0.0
            if later != float("inf"):
                limit = float("inf") if left is None else max(running.share_left(), left - later) - GRACE_S
                limit = min(limit, self._at_most or limit)
            self._note(name, running.ended(limit, self._join))

    def _left(self) -> float | None:
        return None if self._seconds is None else self._seconds - (time.monotonic() - self._begin)

    def _started(self, name: str, stage: Stage) -> "_Running":
        print(f"== {name}, {time.monotonic() - self._begin:.0f} s after the start", flush=True)
        command = [word.replace("{json}", str(self._found / f"{name}.json")) for word in stage.command]
        return _Running(name, stage.seconds, [sys.executable, *command], environment(stage.environment), self._log)

    def _note(self, name: str, outcome: Outcome) -> None:
        self.outcomes[name] = outcome
        print(f"-- {name}: {outcome}", flush=True)
        self._join()

    def _join(self) -> None:
        """Write one file of all findings; one that is being written is left for the next time."""
        content: dict[str, Any] = {}
        for path in sorted(self._found.glob("*.json")):
            try:
                content[path.stem] = {"found": json.loads(path.read_text(encoding="utf-8"))}
            except ValueError:
                continue
        for name, outcome in self.outcomes.items():
            content.setdefault(name, {})["outcome"] = asdict(outcome)
        write_json(self._joined, content)


class _Running:
    """A process, with its output copied to the log."""

    def __init__(self, name: str, share: float, command: list[str], environment: Mapping[str, str], log: Path) -> None:
        self._name, self._share, self._begin = name, share, time.monotonic()
        self._child = subprocess.Popen(
            command, env=dict(environment), start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True, errors="replace",
        )  # fmt: skip
        assert self._child.stdout is not None
        self._reader = threading.Thread(target=self._copy, args=(self._child.stdout, log), daemon=True)
        self._reader.start()

    def _copy(self, lines: IO[str], log: Path) -> None:
        with log.open("a", encoding="utf-8") as file:
            for number, line in enumerate(lines):
                file.write(f"[{self._name}] {line}")
                file.flush()
                if number < SHOWN_LINES:
                    print(line.rstrip()[:SHOWN_WIDTH], flush=True)

    def share_left(self) -> float:
        """Seconds of its share."""
        return self._share - (time.monotonic() - self._begin)

    def ended(self, limit: float, meanwhile: Callable[[], None]) -> Outcome:
        """Wait, at most so many seconds from now, and interrupt it then."""
        until, interrupted = time.monotonic() + limit, False
        try:
            while self._child.poll() is None and not interrupted:
                left = until - time.monotonic()
                try:
                    self._child.wait(max(0.0, min(POLL_S, left)))
                except subprocess.TimeoutExpired:
                    interrupted = left <= POLL_S
                    meanwhile()
        finally:  # of an interruption of this program, too
            if self._child.poll() is None:
                self._stop()
            self._reader.join(1)  # what the process left behind may hold its output open
        return Outcome(self._child.returncode, time.monotonic() - self._begin, interrupted)

    def _stop(self) -> None:
        """Interrupt the process with all that it started, and end what goes on."""
        os.killpg(self._child.pid, signal.SIGINT)
        try:
            self._child.wait(GRACE_S)
        except subprocess.TimeoutExpired:
            os.killpg(self._child.pid, signal.SIGKILL)
            self._child.wait()


def parser_of(about: str | None, work: bool = False) -> argparse.ArgumentParser:
    """What the scripts of stages have in common.

    Args:
        about: A script's docstring.
        work: Whether it reads or writes exported files.
    """
    parser = argparse.ArgumentParser(
        description=about, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--json", type=Path, required=True, help="file for findings")
    parser.add_argument("--rehearsal", action="store_true", help="small, on a CPU")
    if work:
        parser.add_argument("--work", type=Path, required=True, help="folder of exported files")
    return parser


def exit_code(script: Callable[[], int]) -> int:
    """Run a stage's script: its own code, or 130 when interrupted."""
    try:
        return script()
    except KeyboardInterrupt:
        return 130


def told(error: Exception) -> str:
    """The kind of an error, and the beginning of what it says."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:600]}"


def write_json(path: Path, content: Any) -> None:
    """Write plain data, atomically; the scripts of stages use it too."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(content, indent=1, default=str) + "\n", encoding="utf-8")
    partial.replace(path)


def environment(more: Mapping[str, str]) -> dict[str, str]:
    """This program's variables for a stage: with the project, what was carried, and some of its own."""
    paths = [more.get("PYTHONPATH", ""), *(str(ROOT / room) for room in ROOMS), str(ROOT / PACKAGES)]
    return {
        **os.environ,
        "PYTHONUNBUFFERED": "1",
        "PYTHONDONTWRITEBYTECODE": "",  # where it is set, each process compiles torch's sources again
        **({"D2ZERO_SHARED": str(CARRIED / "shared")} if (CARRIED / "shared").is_dir() else {}),
        **more,
        "PYTHONPATH": os.pathsep.join(filter(None, [*paths, os.environ.get("PYTHONPATH")])),
    }


NEEDED = ("d2zero.training.loop", "d2zero_export.pt2_export", "d2zero_export.onnx_export", "d2zero_bench.cli")


def unusable() -> str:
    """Why this Python cannot run the stages, if it cannot; found out by another process, which imports them."""
    seen = "import sys, torch; torch.cuda.is_available() or sys.exit('torch sees no CUDA device here')"
    done = subprocess.run(
        [sys.executable, "-c", f"{seen}; import {', '.join(NEEDED)}"],
        capture_output=True,
        text=True,
        check=False,
        env=environment({}),
    )
    if not done.returncode:
        return ""
    last = (done.stderr.strip().splitlines() or ["it ended without a word"])[-1]
    missing = re.search(r"No module named '([^'.]+)", last)
    if missing and missing[1] != "torch":
        return f"{last}; carry that package in {PACKAGES} (benchmarks/gpu/README.md)"
    return f"{last}; use a Python with torch for CUDA on a machine with a GPU, or --rehearsal"
