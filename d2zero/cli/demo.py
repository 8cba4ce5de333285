"""`d2zero demo`."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from d2zero_runtime import D2ZeroError
from d2zero_runtime.files import check_output, write_text


def demo(
    output: Annotated[Path, typer.Option("--output", "-o", help="The folder for data, metrics and pictures.")] = Path(
        "demo-output"
    ),
    train: Annotated[bool, typer.Option("--train", help="Train the demo's model from scratch first.")] = False,
    images: Annotated[int, typer.Option("--images", min=1, help="Validation images of each set.")] = 600,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="With --train: change a setting, such as steps=500.")
    ] = None,
) -> None:
    """Segment a drawn data set whose unseen classes the model was never shown, with metrics and pictures."""
    from d2zero.cli.terminal import console, tracked
    from d2zero.demo.run import results_table, run_demo

    if settings and not train:
        raise D2ZeroError("--set changes the training; give --train with it")
    check_output(output, folder=True)
    result = run_demo(output, images, tracked, train, settings)
    console().print(results_table(result.rows))
    metrics = output / "results.json"
    write_text(metrics, json.dumps([asdict(row) for row in result.rows], indent=1))
    print(f"model: {result.checkpoint}", f"pictures: {result.pictures}", f"metrics: {metrics}", sep="\n")
