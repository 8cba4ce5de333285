"""What a person sees: tables, and progress for what lasts (a bar on a terminal, a line now and then elsewhere)."""

import sys
import time
from collections.abc import Iterator
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

T = TypeVar("T")
SILENCE = 15.0  # seconds between lines where the output is no terminal


def console() -> Console:
    """Standard output; wide enough for tables where it is no terminal."""
    return Console() if sys.stdout.isatty() else Console(width=120, highlight=False)


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


def _in_lines(items: Iterator[T], length: int, label: str) -> Iterator[T]:
    started = spoken = time.perf_counter()
    for number, item in enumerate(items, 1):
        yield item
        now = time.perf_counter()
        if now - spoken > SILENCE and number < length:
            left = (now - started) / number * (length - number)
            print(f"{label}: {number}/{length}, {left:.0f} s left", file=sys.stderr, flush=True)
            spoken = now
