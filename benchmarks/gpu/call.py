"""What the two calls have in common: options, and how a call ends."""

import argparse
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import summary
from stages import HERE, Session, Stage, unusable

Plan = Callable[[argparse.Namespace], dict[str, Stage]]


def run(name: str, about: str | None, plan: Plan, seconds: float, arguments: Sequence[str] | None = None) -> int:
    """Run a call's stages and print the targets: 1 if one was not good, 2 if none can run, 130 when interrupted.

    Args:
        name: The call's name.
        about: Its script's docstring.
        plan: Makes the stages from the options.
        seconds: The time for all of them, on a GPU.
        arguments: The command line's arguments.
    """
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--results", type=Path, default=Path("runs/gpu"), help="folder for the JSON and the log")
    add("--work", type=Path, default=Path("/tmp/d2zero-gpu"), help="folder for exported files, kept for the next call")
    add("--only", help="some stages, with commas")
    add("--seconds", type=float, default=seconds, help=f"for all stages, {seconds:.0f} by default")
    add("--rehearsal", action="store_true", help="on a CPU: the demo's model, small, without a limit")
    add("--at-most", type=float, help="seconds of each stage, to rehearse interruptions")
    given = parser.parse_args(arguments)
    given.work = given.work.resolve()
    todo = plan(given)
    chosen = given.only.split(",") if given.only else list(todo)
    if unknown := [stage for stage in chosen if stage not in todo]:
        parser.error(f"--only takes some of {','.join(todo)}, got {unknown[0]!r}")
    if wrong := "" if given.rehearsal else unusable():
        print(f"error: {wrong}", file=sys.stderr)
        return 2
    try:
        session = Session(
            name, given.results.resolve(), given.work, None if given.rehearsal else given.seconds, given.at_most
        )
    except OSError as error:
        parser.error(f"--results and --work take folders: {error}")
    for number in (signal.SIGINT, signal.SIGTERM):  # a shell ignores the first for what it starts in the background
        signal.signal(number, signal.default_int_handler)
    try:
        found = session.run({stage: todo[stage] for stage in todo if stage in chosen})
    except KeyboardInterrupt:
        return 130
    print(summary.text(given.results))
    return int(any(outcome.code != 0 or outcome.interrupted for outcome in found.values()))


def script(name: str, *words: str, rehearsal: bool = False, **options: object) -> Stage:
    """A stage that is a script of this folder and takes `--json` and, maybe, `--rehearsal`."""
    more = ("--rehearsal",) if rehearsal else ()
    return Stage((str(HERE / name), "--json", "{json}", *words, *more), **options)  # type: ignore[arg-type]
