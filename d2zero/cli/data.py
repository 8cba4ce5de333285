"""`d2zero data`: zero-shot annotation files from COCO's own, and the drawn data set."""

from pathlib import Path
from typing import Annotated

import typer

from d2zero_runtime import D2ZeroError
from d2zero_runtime.errors import join_truncated
from d2zero_runtime.files import check_output

app = typer.Typer(help="Prepare data sets for zero-shot training and evaluation.", no_args_is_help=True)


@app.command()
def split(
    data: Annotated[
        Path, typer.Option("--data", help="COCO's folder, with annotations/instances_train20XX.json and …val….")
    ],
    split: Annotated[str, typer.Option("--split", help="coco-48-17 or coco-65-15.")],
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
    """Build the zero-shot training and test files from COCO's own annotations."""
    from d2zero.data.coco import read_coco
    from d2zero.data.splits import find_split
    from d2zero.data.zero_shot import write_split

    chosen = find_split(split)
    train = train_json or _source(data, "train")
    val = val_json or _source(data, "val")
    output = output or data / "annotations" / "ZSIS"
    check_output(output, folder=True)
    for part in write_split(read_coco(train), read_coco(val), chosen, output, force):
        print(f"{part.path}: {part.images} images, {part.annotations} instances")


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


def _source(data: Path, part: str) -> Path:
    folder = data / "annotations"
    if not folder.is_dir():
        raise D2ZeroError(f"{data} has no folder 'annotations'; --data takes COCO's folder")
    found = sorted(folder.glob(f"instances_{part}20??.json"))
    if len(found) == 1:
        return found[0]
    if not found:
        raise D2ZeroError(f"{folder} has no instances_{part}20XX.json; name the file with --{part}-json")
    raise D2ZeroError(f"{folder} has {join_truncated(p.name for p in found)}; choose with --{part}-json")
