"""`d2zero train`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from d2zero_runtime import D2ZeroError
from d2zero_runtime.files import check_output

if TYPE_CHECKING:
    from d2zero.training.config import TrainConfig


def train(
    output: Annotated[
        Path, typer.Option("--output", "-o", help="The run's folder: checkpoints, logs, pictures, model.")
    ],
    vocabulary: Annotated[
        Path | None, typer.Option("--vocabulary", "-v", help="Seen and unseen classes (.npz); the data set's own.")
    ] = None,
    annotations: Annotated[
        Path | None, typer.Option("--annotations", help="The training annotations, a COCO file.")
    ] = None,
    images: Annotated[Path | None, typer.Option("--images", help="The folder of their images.")] = None,
    val_annotations: Annotated[
        Path | None, typer.Option("--val-annotations", help="What to evaluate on during training, a COCO file.")
    ] = None,
    val_images: Annotated[
        Path | None, typer.Option("--val-images", help="The folder of its images; --images if left out.")
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(
            "--data", help="Instead: a .yaml that names them all, or a folder with annotations/, as published."
        ),
    ] = None,
    split: Annotated[
        str | None, typer.Option("--split", help="Which classes are seen, a name or a file; as in the vocabulary.")
    ] = None,
    preset: Annotated[
        str | None,
        typer.Option(
            "--preset",
            help="The recipe: default (the published schedule, 100 epochs), coco-48-17, coco-65-15 or shapes.",
        ),
    ] = None,
    config_file: Annotated[
        Path | None, typer.Option("--config", help="The recipe from a file: config.json of another run.")
    ] = None,
    epochs: Annotated[
        float | None, typer.Option("--epochs", help="Passes over the data; the recipe's schedule is scaled.")
    ] = None,
    steps: Annotated[
        int | None, typer.Option("--steps", min=1, help="Steps instead of epochs; the recipe's schedule is scaled.")
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option("--batch-size", min=1, help="Images per step; the learning rate is scaled with it.")
    ] = None,
    eval_every: Annotated[
        int | None, typer.Option("--eval-every", min=1, help="Evaluate every so many steps and keep the best model.")
    ] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="Change a setting, such as optim.lr=2e-4; may be repeated.")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue from the run's last checkpoint, with its settings.")
    ] = False,
    init: Annotated[
        Path | None, typer.Option("--init", help="Start from a checkpoint's weights (.safetensors), or a run's.")
    ] = None,
    init_skip: Annotated[
        list[str] | None, typer.Option("--init-skip", help="A part that --init does not fill, such as classifier.")
    ] = None,
    backbone_weights: Annotated[
        Path | None, typer.Option("--backbone-weights", help="ImageNet weights: torchvision, timm or detectron2.")
    ] = None,
    device: Annotated[str, typer.Option("--device", help="auto, cpu or cuda:N.")] = "auto",
) -> None:
    """Train a model. Start it with `torchrun` to use several GPUs or machines."""
    check_output(output, folder=True)
    if init_skip and init is None:
        raise D2ZeroError("--init-skip is for --init")
    if epochs is not None and (steps is not None or epochs <= 0):
        raise D2ZeroError(f"give either --steps or a positive number of --epochs, got {epochs:g} epochs")
    from d2zero.data.dataset import Dataset
    from d2zero.data.splits import find_split
    from d2zero.training.config import with_batch_size, with_length, with_settings
    from d2zero.training.start import Inputs, next_command, start

    files = Dataset.of(data).with_train(annotations, images)
    files = files.with_val(val_annotations, val_images or (images if val_annotations else None))
    config = _recipe(preset, config_file, output if resume else None)
    if batch_size:
        config = with_batch_size(config, batch_size)
    if steps or epochs:
        config = with_length(config, steps or 0, epochs or 0.0)
    every = [f"eval_every={eval_every}"] if eval_every else []
    config = with_settings(config, [*every, *(settings or [])])
    chosen = find_split(split) if split else None
    inputs = Inputs(files, vocabulary, chosen, init, tuple(init_skip or ()), backbone_weights)
    model_file = start(config, inputs, output, resume=resume, device=device)
    if model_file is not None:
        print(f"{model_file}: finished; next: {next_command(output, inputs)}")


def _recipe(preset: str | None, file: Path | None, resumed: Path | None) -> "TrainConfig":
    """The settings to begin with: of the run that is resumed, of a file, or of a preset."""
    from d2zero.data.json_stream import read_json
    from d2zero.training.config import config_from_dict, find_preset
    from d2zero.training.loop import stored_config

    if preset and file:
        raise D2ZeroError("give either --preset or --config: both choose the recipe")
    if resumed and not preset and not file:
        return stored_config(resumed)
    if file is None:
        return find_preset(preset or "default")
    values = read_json(file)
    if not isinstance(values, dict):
        raise D2ZeroError(f"{file} must hold the settings of a run, as its config.json does")
    return config_from_dict(values, str(file))
