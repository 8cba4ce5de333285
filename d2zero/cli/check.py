"""`d2zero data check`: what is in a data set, and what is wrong with it."""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from d2zero_runtime import D2ZeroError, Vocabulary
from d2zero_runtime.errors import printable
from d2zero_runtime.files import check_output, write_text

if TYPE_CHECKING:
    from rich.table import Table

    from d2zero.data.coco import CocoFile
    from d2zero.data.contents import Contents
    from d2zero.evaluation.data_check import DataReport

ROWS = 20  # of the table of classes
SIZES = 3  # of images that are named
PICTURES = 12  # images on the contact sheet
SEEN = {True: "seen", False: "unseen", None: "unknown"}


def check(
    annotations: Annotated[Path, typer.Argument(help="A COCO or LVIS annotation file.")],
    images: Annotated[Path, typer.Option("--images", help="The folder of its images.")],
    split: Annotated[
        str | None,
        typer.Option("--split", help="coco-48-17, coco-65-15 or a file (.yaml, .json); all classes are seen without."),
    ] = None,
    vocabulary: Annotated[
        Path | None, typer.Option("--vocabulary", "-v", help="Instead of --split: the classes to train with (.npz).")
    ] = None,
    purpose: Annotated[
        str, typer.Option("--for", help="training or evaluation: what would refuse the data.")
    ] = "training",
    json_file: Annotated[Path | None, typer.Option("--json", help="Write all that is found to this file.")] = None,
    sheet: Annotated[
        Path | None, typer.Option("--sheet", help=f"Draw {PICTURES} annotated images, chosen at random (.png or .jpg).")
    ] = None,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Seed of that choice.")] = 0,
    fast: Annotated[
        bool, typer.Option("--fast", help="Read only the sizes of images: finds no file that is cut short.")
    ] = False,
    threads: Annotated[int | None, typer.Option("--threads", min=1, help="Threads that read images.")] = None,
) -> None:
    """Look through a data set: what is in it, what is wrong with it; exits with 1 if training would refuse it."""
    from d2zero.cli.evaluate import PICTURE_SUFFIXES
    from d2zero.cli.terminal import console, tracked
    from d2zero.data.splits import find_split
    from d2zero.evaluation.data_check import Options, Purpose, check_data, open_data

    if split and vocabulary:
        raise D2ZeroError("give either --split or --vocabulary: both say which classes are seen")
    if purpose not in list(Purpose):
        raise D2ZeroError(f"--for must be {' or '.join(Purpose)}, got {purpose!r}")
    if not images.is_dir():
        raise D2ZeroError(f"image folder {images} does not exist")
    check_output(json_file, "--json")
    check_output(sheet, "--sheet")
    if sheet and sheet.suffix.lower() not in PICTURE_SUFFIXES:
        raise D2ZeroError(f"--sheet must end in {' or '.join(PICTURE_SUFFIXES)}, got {sheet.name!r}")
    classes = Vocabulary.load(vocabulary) if vocabulary else find_split(split).as_vocabulary() if split else None
    with open_data(annotations) as truth:
        report = check_data(truth, images, classes, Options(Purpose(purpose), not fast, threads), tracked)
        if sheet:
            _draw(truth, images, report, sheet, seed)
    if json_file:  # before anything is printed, which a terminal may refuse
        write_text(json_file, json.dumps(report.as_json(), indent=1, ensure_ascii=False))
    _print_contents(annotations, report)
    console().print(_class_table(report))
    for finding in report.findings:
        print(f"{finding.level}: {printable(finding.message)}")
    hint = "; for a test file, give --for evaluation" if report.is_refused and purpose == Purpose.TRAINING else ""
    print(f"{purpose} {'would refuse this' if report.is_refused else 'would take this'}{hint}")
    for label, path in (("everything that was found", json_file), ("pictures", sheet)):
        if path:
            print(f"{label}: {path}", file=sys.stderr)
    if report.is_refused:
        raise typer.Exit(1)


def _print_contents(path: Path, report: "DataReport") -> None:
    contents = report.contents
    used = [name for name, count in contents.classes.items() if count.instances]
    print(
        f"{path}: {contents.images} images, {contents.instances} instances of {len(used)} classes"
        f" (of {len(contents.classes)} listed)"
    )
    for flag, label in SEEN.items() if set(report.seen.values()) != {True} else ():
        counts = [contents.classes[name] for name in used if report.seen[name] is flag]
        print(f"{label}: {sum(count.instances for count in counts)} instances of {len(counts)} classes")
    print(_sizes(contents))
    print(
        f"masks: {contents.small} small (below 32x32 pixels), {contents.medium} medium, {contents.large} large (from"
        " 96x96 on)"
    )


def _sizes(contents: "Contents") -> str:
    """Image sizes in a line."""
    common = [f"{width}x{height} ({count})" for (height, width), count in contents.sizes.most_common(SIZES)]
    rest = len(contents.sizes) - len(common)
    sides = sorted((min(size), max(size)) for size in contents.sizes.elements())
    shorter, longer = [side for side, _ in sides], sorted(side for _, side in sides)
    middle = len(sides) // 2
    return (
        f"sizes (width x height): {', '.join(common)}{f' and {rest} others' if rest else ''}; shorter side"
        f" {shorter[0]} to {shorter[-1]}, median {shorter[middle]}; longer side {longer[0]} to {longer[-1]}, median"
        f" {longer[middle]}"
    )


def _class_table(report: "DataReport") -> "Table":
    """The classes with most instances."""
    from rich.table import Table

    from d2zero.cli.terminal import plain

    rows = sorted(report.contents.classes.items(), key=lambda item: -item[1].instances)
    table, flagged = Table(), set(report.seen.values()) != {True}
    for column in ("class", *([""] if flagged else [])):
        table.add_column(column)
    for column in ("instances", "images"):
        table.add_column(column, justify="right")
    for name, count in rows[:ROWS]:
        flag = [SEEN[report.seen[name]]] if flagged else []
        table.add_row(plain(name), *flag, str(count.instances), str(count.images))
    if len(rows) > ROWS:
        table.caption = f"and {len(rows) - ROWS} more; --json writes all"
    return table


def _draw(annotations: "CocoFile", images: Path, report: "DataReport", file: Path, seed: int) -> None:
    """Of the images that are there and have annotations, some at random."""
    import numpy as np

    from d2zero.data.coco import missing_images
    from d2zero.data.splits import Split, with_unseen
    from d2zero.evaluation.pictures import draw_annotations

    ids = list(annotations.annotations)
    absent = set(missing_images(annotations, images, ids))
    ids = [number for number in ids if number not in absent]
    chosen = np.random.default_rng(seed).permutation(len(ids))[:PICTURES]
    names = tuple(annotations.categories)
    unseen = [name for name in names if report.seen[name] is False]
    vocabulary = with_unseen(Split("sheet", names, ()).as_vocabulary(), unseen)
    title = f"{annotations.path.name}: {len(chosen)} of {len(ids)} images"
    picture = draw_annotations(annotations, images, vocabulary, [ids[place] for place in chosen], cell=420, title=title)
    file.parent.mkdir(parents=True, exist_ok=True)
    picture.save(file)
