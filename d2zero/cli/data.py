"""`d2zero data`: zero-shot annotation files from any COCO or LVIS file, and the drawn data set."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from d2zero.cli.check import check
from d2zero_runtime import D2ZeroError
from d2zero_runtime.errors import join_truncated
from d2zero_runtime.files import check_output

app = typer.Typer(help="Prepare data sets for zero-shot training and evaluation.", no_args_is_help=True)
app.command("check")(check)


@app.command()
def split(
    annotations: Annotated[
        Path | None,
        typer.Argument(help="One COCO file to make training and test files from; leave it out with --data."),
    ] = None,
    data: Annotated[
        Path | None, typer.Option("--data", help="COCO's folder, with annotations/instances_train20XX.json and …val….")
    ] = None,
    split: Annotated[
        str | None, typer.Option("--split", help="coco-48-17, coco-65-15 or a file (.yaml, .json) that names classes.")
    ] = None,
    unseen: Annotated[
        str | None,
        typer.Option(
            "--unseen",
            help="Instead of --split: unseen classes, 'a, b', or a .txt or .json file, which names with commas need."
            " All others are seen.",
        ),
    ] = None,
    unseen_frequency: Annotated[
        str | None,
        typer.Option(
            "--unseen-frequency",
            help="Instead of --split, of an LVIS file: rare, common or frequent classes are unseen.",
        ),
    ] = None,
    name: Annotated[str, typer.Option("--name", help="The split's name, with --unseen or --unseen-frequency.")] = "own",
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Where to write; DIR/annotations/ZSIS by default.")
    ] = None,
    train_json: Annotated[
        Path | None, typer.Option("--train-json", help="The training annotations, if not found by name.")
    ] = None,
    val_json: Annotated[
        Path | None, typer.Option("--val-json", help="The validation annotations, if not found by name.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace files that are there already.")] = False,
) -> None:
    """Build zero-shot training and test files: images with unseen instances are left out of training."""
    from d2zero.data.coco import read_coco
    from d2zero.data.splits import Split, find_split
    from d2zero.data.zero_shot import write_split
    from d2zero.text.arrays import read_names

    if sum(value is not None for value in (split, unseen, unseen_frequency)) != 1:
        raise D2ZeroError("give either --split NAME (or a file), --unseen 'a, b' or --unseen-frequency rare")
    if annotations is not None and any((data, train_json, val_json)):
        raise D2ZeroError("give one annotation file, or --data (--train-json, --val-json), not both")
    if annotations is None and data is None and not (train_json and val_json):
        raise D2ZeroError("give an annotation file, --data DIR, or --train-json and --val-json")
    chosen = find_split(split) if split is not None else None
    if output is None:
        if data is None:
            raise D2ZeroError("say where to write with --output DIR")
        output = data / "annotations" / "ZSIS"
    check_output(output, folder=True)
    if annotations is not None:
        train = val = read_coco(annotations)
    else:
        train, val = (
            read_coco(path or _source(data, part)) for path, part in ((train_json, "train"), (val_json, "val"))
        )
    if chosen is None:
        groups = {**val.groups, **train.groups}
        hidden = read_names(unseen) if unseen is not None else _of_frequency(groups, str(unseen_frequency), train.path)
        chosen = Split.without(name, list(dict.fromkeys([*train.categories, *val.categories])), hidden)
        chosen = replace(chosen, groups=groups)
    file = output / f"{chosen.name}.yaml"
    if split is None and file.exists() and not force:
        raise D2ZeroError(f"{file} exists already; replace it with --force, or choose another --name or --output")
    for part in write_split(train, val, chosen, output, force):
        print(f"{part.path}: {part.images} images, {part.annotations} instances")
    if split is None:
        print(f"{chosen.save(file)}: the split, for --split")


def _of_frequency(groups: Mapping[str, tuple[str, ...]], frequency: str, path: Path) -> tuple[str, ...]:
    """Classes of the frequency that an LVIS file says."""
    if not groups:
        raise D2ZeroError(f"{path} does not say how frequent its classes are, as LVIS does; use --unseen or --split")
    if frequency not in groups:
        raise D2ZeroError(f"--unseen-frequency must be one of {', '.join(groups)}, got {frequency!r}")
    return groups[frequency]


@app.command()
def shapes(
    output: Annotated[Path, typer.Option("--output", "-o", help="The folder to draw into.")],
    train_images: Annotated[int, typer.Option("--train-images", help="Training images, seen classes only.")] = 6000,
    val_images: Annotated[int, typer.Option("--val-images", help="Images of each of the two validation sets.")] = 600,
    size: Annotated[int, typer.Option("--size", help="Image side in pixels.")] = 96,
    seed: Annotated[int, typer.Option("--seed", help="Seed of the drawing.")] = 0,
) -> None:
    """Draw a zero-shot data set of coloured shapes, in COCO format, with its vocabulary."""
    from d2zero.cli.terminal import tracked
    from d2zero.data.shapes import SPLIT, ShapesConfig, write_dataset

    config = ShapesConfig(size=size, train_images=train_images, val_images=val_images, seed=seed)
    check_output(output, folder=True)
    write_dataset(output, config, tracked)
    print(
        f"{output}: {len(SPLIT.seen)} seen and {len(SPLIT.unseen)} unseen classes,"
        f" {train_images} + 2 x {val_images} images"
    )


def _source(data: Path | None, part: str) -> Path:
    if data is None:
        raise D2ZeroError(f"give --{part}-json, or --data DIR to find it in")
    folder = data / "annotations"
    if not folder.is_dir():
        raise D2ZeroError(f"{data} has no folder 'annotations'; --data takes COCO's folder")
    found = sorted(folder.glob(f"instances_{part}20??.json"))
    if len(found) == 1:
        return found[0]
    if not found:
        raise D2ZeroError(f"{folder} has no instances_{part}20XX.json; name the file with --{part}-json")
    raise D2ZeroError(f"{folder} has {join_truncated(p.name for p in found)}; choose with --{part}-json")
