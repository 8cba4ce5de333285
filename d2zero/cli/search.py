"""`d2zero search`: the best instances of some classes over an index, as a contact sheet, JSON and a table."""

import json
import logging
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from PIL import Image
from rich.table import Table

from d2zero.cli.index import opened_index
from d2zero.cli.models import ClassifierThreadsOption, ScoreOption, TypedNames
from d2zero.cli.terminal import console, plain, tracked
from d2zero_runtime import D2ZeroError, Vocabulary
from d2zero_runtime.artifacts.text_encoder import TextContract
from d2zero_runtime.errors import join_truncated
from d2zero_runtime.files import atomic_write, check_output, write_text
from d2zero_runtime.masks import rle
from d2zero_runtime.sources import open_rgb

if TYPE_CHECKING:
    from d2zero_runtime.index import Index, Match

logger = logging.getLogger("d2zero")

SIDE = 220  # pixels of a cell
LARGEST_SHEET = 400  # instances; results.json has all
ROWS = 20  # of the table


def search(
    folder: Annotated[Path, typer.Argument(metavar="INDEX", help="A folder that `d2zero index` made.")],
    names: Annotated[str, typer.Option("--names", help="The classes to look for: 'red mug, cat|kitty'.")],
    top: Annotated[
        int, typer.Option("--top", min=1, help="At most this many instances, of all classes together.")
    ] = 50,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="A folder for sheet.jpg and results.json; only a table without it."),
    ] = None,
    text_encoder: Annotated[
        Path | None,
        typer.Option(
            "--text-encoder",
            help="For names that the vocabulary lacks: a text encoder (.onnx), made by `d2zero export-text`.",
        ),
    ] = None,
    vocabulary: Annotated[
        Path | None,
        typer.Option("--vocabulary", "-v", help="The classes that compete (.npz); the model's own if left out."),
    ] = None,
    score: ScoreOption = 0,
    threads: ClassifierThreadsOption = None,
) -> None:
    """Find the best instances of some classes over a whole index, without its network.

    All classes of the vocabulary compete. Names that it lacks join it as unseen classes, with --text-encoder.
    """
    from d2zero_runtime.index import search as best_matches

    check_output(output, folder=True)
    with opened_index(folder, threads) as index:
        classes, asked = _classes(index, names, vocabulary, text_encoder, threads)
        started = time.perf_counter()
        found = best_matches(index, asked, classes, top=top, score_threshold=score, progress=tracked)
        seconds = time.perf_counter() - started
        if output:
            content = json.dumps([_entry(*ranked) for ranked in enumerate(found, 1)], indent=1)
            write_text(output / "results.json", content)
            shown = found[:LARGEST_SHEET]
            title = f"{', '.join(asked)}: best {len(shown)} in {len(index)} images"
            _draw(shown, classes, title, output / "sheet.jpg")
        _print_table(found)
        rate, where = len(index) / max(seconds, 1e-9), f"{output}: " if output else ""
        print(f"{where}{len(found)} instances in {len(index)} images, {seconds:.1f} s ({rate:.2f} per second)")


def _classes(
    index: "Index", typed: str, vocabulary: Path | None, text_encoder: Path | None, threads: int | None
) -> tuple[Vocabulary, tuple[str, ...]]:
    """The classes that compete, and the names of those that are asked for.

    Raises:
        D2ZeroError: Classes are asked for that neither the vocabulary has nor a text encoder gives.
    """
    from d2zero.text.arrays import read_names
    from d2zero_runtime.text.prompts import class_names

    context = Vocabulary.load(vocabulary) if vocabulary else index.vocabulary
    names = read_names(typed)
    asked = class_names(names)
    lacking = [name for name in names if name not in context.names]
    if lacking and text_encoder is None:
        raise D2ZeroError(
            f"{join_truncated(lacking)} not among the {len(context)} classes of {vocabulary or 'the index'}"
            f" ({join_truncated(context.names)}); give --text-encoder FILE, made by `d2zero export-text`, or a"
            " --vocabulary FILE that has them"
        )
    if lacking:
        assert text_encoder
        more = TypedNames(lacking, text_encoder, TextContract.read(text_encoder))
        context = context.with_classes(more.encoded(index.contract, index.vocabulary, threads))
    return context, asked


def _entry(rank: int, match: "Match") -> dict[str, Any]:
    return {
        "rank": rank,
        "path": match.image.path,
        "name": match.name,
        "score": match.score,
        "box": match.box,
        "segmentation": match.mask,
        "seen": match.seen,
    }


def _draw(found: "Sequence[Match]", classes: Vocabulary, title: str, file: Path) -> None:
    """A sheet of instances; images that cannot be shown are named in their cells."""
    from d2zero_runtime.draw import SheetCell, crop_sheet

    cells = []
    for rank, match in enumerate(found, 1):
        label = f"{rank}. {match.score:.2f} {'' if match.seen else '* '}{match.name}"
        cells.append(SheetCell(_picture(match, classes), (label, Path(match.image.path).name)))
    lost = sum(isinstance(cell.picture, str) for cell in cells)
    if lost:
        logger.warning(
            "%d of %d instances are not drawn: their images are gone, changed or unreadable", lost, len(cells)
        )
    sheet = crop_sheet(cells, title=title, side=SIDE)
    with atomic_write(file) as partial:
        sheet.save(partial, "JPEG", quality=90)


def _picture(match: "Match", classes: Vocabulary) -> Image.Image | str:
    """The instance with what is around it, or why it cannot be shown."""
    from d2zero_runtime.draw import Instance, crop

    if problem := match.image.problem:
        return problem
    try:
        image = open_rgb(match.image.path)
    except D2ZeroError:
        return "image cannot be read"
    number = classes.names.index(match.name)
    return crop(image, Instance(match.box, "", number, match.seen, partial(rle.decode, match.mask)), SIDE)


def _print_table(found: "Sequence[Match]") -> None:
    table = Table("", "score", "class", "", "image", box=None)
    for rank, match in enumerate(found[:ROWS], 1):
        table.add_row(
            str(rank), f"{match.score:.3f}", plain(match.name), "" if match.seen else "unseen", plain(match.image.path)
        )
    screen = console()
    screen.print(table if found else "nothing found above the score")
    if len(found) > ROWS:
        screen.print(f"and {len(found) - ROWS} more")
