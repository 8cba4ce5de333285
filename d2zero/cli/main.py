"""The `d2zero` command: sub-commands, and errors as single lines.

Sub-commands import what they need when they run, so that those which need no torch work without it.
"""

import importlib.util
import io
import logging
import os
import signal
import sys
import threading
from importlib.metadata import entry_points
from typing import Annotated

import typer

from d2zero import __version__
from d2zero.cli import convert, data, demo, evaluate, index, predict, search, train, vocab
from d2zero.cli.terminal import logged
from d2zero_runtime import D2ZeroError
from d2zero_runtime.errors import missing_package, printable

app = typer.Typer(
    name="d2zero",
    help="Zero-shot instance segmentation: train, evaluate, and look at objects of classes never seen in training.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("demo")(demo.demo)
app.command("train")(train.train)
app.command("eval")(evaluate.evaluate)
app.command("predict")(predict.predict)
app.command("index")(index.index)
app.command("relabel")(index.relabel)
app.command("search")(search.search)
app.command("convert")(convert.convert)
app.add_typer(vocab.app, name="vocab")
app.add_typer(data.app, name="data")
for _entry in entry_points(group="d2zero.commands"):  # commands of the packages that build on this one
    app.command(_entry.name)(_entry.load())


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"d2zero {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", is_eager=True, callback=_print_version)
    ] = False,
    verbose: Annotated[bool, typer.Option("--verbose", help="Log what is loaded, and which library runs it.")] = False,
) -> None:
    """Zero-shot instance segmentation: train, evaluate, and look at objects of classes never seen in training."""
    if verbose:
        logging.getLogger("d2zero").setLevel(logging.INFO)


def main(arguments: list[str] | None = None) -> None:
    """Run the command and exit: 0 done, 2 for what the user can fix, 130 when interrupted."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a letter that the terminal does not have is replaced
            stream.reconfigure(errors="replace")
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _terminated)
    try:
        with logged():
            code = app(args=arguments, prog_name="d2zero", standalone_mode=False)
        if code == 130:  # typer gives the code of an interruption back instead of raising
            raise KeyboardInterrupt
    except D2ZeroError as error:
        code = _fail(str(error))
    except ModuleNotFoundError as error:
        code = _fail(_missing_package(error))
    except _Terminated:
        print("terminated", file=sys.stderr)
        code = 143
    except (KeyboardInterrupt, typer.Abort):
        print("interrupted", file=sys.stderr)
        code = 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    except PermissionError as error:
        code = _fail(f"no permission to use {error.filename}")
    except OSError as error:  # a folder where a file should be, a full disk
        code = _fail(f"cannot use {error.filename}: {error.strerror}" if error.filename else str(error))
    except Exception as error:
        # Usage errors of the command line parser, whichever click typer brings along.
        if not hasattr(error, "format_message"):
            raise
        context = getattr(error, "ctx", None)
        hint = f"; see `{context.command_path} --help`" if context is not None else ""
        message = str(error.format_message()).strip().rstrip(".")
        if not message:  # a bare command group has just printed its help
            sys.exit(int(getattr(error, "exit_code", 2)))
        code = _fail(f"{message}{hint}")
    sys.exit(code if isinstance(code, int) else 0)


class _Terminated(KeyboardInterrupt):
    """SIGTERM: what is done is kept, as at Ctrl-C."""


def _terminated(number: int, frame: object) -> None:
    raise _Terminated


def _fail(message: str) -> int:
    print(f"error: {printable(' '.join(message.split()))}", file=sys.stderr)
    return 2


def _missing_package(error: ModuleNotFoundError) -> str:
    name = error.name or ""
    if name.startswith("d2zero") and importlib.util.find_spec("torch") is not None:
        raise error  # a defect of ours
    return missing_package(name)


if __name__ == "__main__":
    main()
