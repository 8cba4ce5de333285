"""User-facing output: tables, log lines, and progress (a bar on a terminal, a line now and then elsewhere)."""

import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.text import Text

from d2zero_runtime.errors import printable

T = TypeVar("T")
SILENCE = 15.0  # seconds between lines where the output is no terminal


def plain(text: str) -> Text:
    """A text from a file, such as a class name, for a table: neither markup nor commands to the terminal."""
    return Text(printable(text))


def console() -> Console:
    """Standard output; wide enough for tables where it is no terminal."""
    return Console() if sys.stdout.isatty() else Console(width=120, highlight=False)


class _Lines(logging.Handler):
    """Records as lines on standard error, such as `warning: …`; above a progress bar, if there is one."""

    def emit(self, record: logging.LogRecord) -> None:
        print(f"{record.levelname.lower()}: {printable(record.getMessage())}", file=sys.stderr, flush=True)


@contextmanager
def logged() -> Iterator[None]:
    """Show the logger `d2zero` on standard error: warnings, unless its level is changed meanwhile."""
    logger, handler = logging.getLogger("d2zero"), _Lines()
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(logging.NOTSET)


def tracked(items: Iterator[T], length: int, label: str) -> Iterator[T]:
    """Yield the items and show how far they have come, on standard error."""
    screen = Console(file=sys.stderr)
    if not screen.is_terminal:
        yield from _in_lines(items, length, label)
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=screen) as progress:
        task = progress.add_task(label, total=length)
        for item in items:
            yield item
            progress.advance(task)


class BuildProgress:
    """Shows phases of a long job, each with its own steps: `progress(phase, done, total)`, from any thread."""

    def __init__(self) -> None:
        self._screen = Console(file=sys.stderr)
        self._progress = Progress(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), console=self._screen, transient=True
        )
        self._tasks: dict[str, TaskID] = {}
        self._spoken = time.perf_counter()

    def __enter__(self) -> "BuildProgress":
        if self._screen.is_terminal:
            self._progress.start()
        return self

    def __exit__(self, *reason: object) -> None:
        if self._screen.is_terminal:
            self._progress.stop()

    def __call__(self, phase: str, done: int, total: int) -> None:
        """Show how far a phase has come."""
        if self._screen.is_terminal:
            if phase not in self._tasks:
                self._tasks[phase] = self._progress.add_task(phase, total=total)
            self._progress.update(self._tasks[phase], completed=done, total=total)
        elif time.perf_counter() - self._spoken > SILENCE:
            print(f"{phase}: {done}/{total}", file=sys.stderr, flush=True)
            self._spoken = time.perf_counter()


def _in_lines(items: Iterator[T], length: int, label: str) -> Iterator[T]:
    started = spoken = time.perf_counter()
    for number, item in enumerate(items, 1):
        yield item
        now = time.perf_counter()
        if now - spoken > SILENCE and number < length:
            left = (now - started) / number * (length - number)
            print(f"{label}: {number}/{length}, {left:.0f} s left", file=sys.stderr, flush=True)
            spoken = now
