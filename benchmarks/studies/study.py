"""What every study shares: its options, how it ends, its settings, its JSON."""

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from d2zero_bench.environment import environment
from d2zero_bench.report import write_json
from d2zero_runtime import D2ZeroError

FORMAT_VERSION = 1


def parser_of(about: str | None) -> argparse.ArgumentParser:
    """A parser whose help is the script's docstring."""
    return argparse.ArgumentParser(
        description=about, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )


def run(
    study: Callable[[argparse.Namespace], int | None],
    parser: argparse.ArgumentParser,
    arguments: Sequence[str] | None = None,
) -> int:
    """Parse and run: the study's own code, 2 with one line for what the user can fix, 130 when interrupted."""
    given = parser.parse_args(arguments)
    given.words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        return study(given) or 0
    except (D2ZeroError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def header(script: str, given: argparse.Namespace, **settings: Any) -> dict[str, Any]:
    """The head of a study's JSON: where and how it ran.

    Args:
        script: The `__file__` of the study.
        given: Its options.
        settings: What decides its results.
    """
    where = environment(given.words, None, f"python benchmarks/studies/{Path(script).name}")
    return {"format_version": FORMAT_VERSION, "environment": where, "settings": settings}


def write(path: Path | None, content: Mapping[str, Any]) -> None:
    """Write a study's JSON, if it has a file to go to."""
    if path:
        write_json(path, dict(content))
        print(f"all samples: {path}")
