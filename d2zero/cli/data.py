"""`d2zero data`: zero-shot annotation files from any COCO file, and the drawn data set."""

from pathlib import Path
from typing import Annotated

import typer

from d2zero_runtime import D2ZeroError
from d2zero_runtime.errors import join_truncated
from d2zero_runtime.files import check_output

app = typer.Typer(help="Prepare data sets for zero-shot training and evaluation.", no_args_is_help=True)


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
        typer.Option("--unseen", help="Instead of --split: unseen classes, 'a, b' or a file; all others are seen."),
    ] = None,
    name: Annotated[str, typer.Option("--name", help="The split's name, with --unseen.")] = "own",
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

    if (split is None) == (unseen is None):
        raise D2ZeroError("give either --split NAME (or a file), or --unseen 'a, b'")
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
        chosen = Split.without(name, list(dict.fromkeys([*train.categories, *val.categories])), read_names(str(unseen)))
    for part in write_split(train, val, chosen, output, force):
        print(f"{part.path}: {part.images} images, {part.annotations} instances")
    if unseen is not None:
        print(f"{chosen.save(output / f'{chosen.name}.yaml')}: the split, for --split")


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
