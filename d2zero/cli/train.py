"""`d2zero train`."""

from pathlib import Path
from typing import Annotated

import typer

from d2zero_runtime.files import check_output


def train(
    preset: Annotated[str, typer.Option("--preset", help="coco-48-17, coco-65-15 or shapes.")],
    data: Annotated[Path, typer.Option("--data", help="The data folder: annotations/ and image folders.")],
    vocabulary: Annotated[Path, typer.Option("--vocabulary", "-v", help="Seen and unseen classes (.npz).")],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="The run's folder: checkpoints, logs, pictures, model.")
    ],
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="Change a setting, such as optim.lr=2e-4; may be repeated.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue from the run's last checkpoint.")] = False,
    init: Annotated[
        Path | None, typer.Option("--init", help="Start from a checkpoint's weights (.safetensors).")
    ] = None,
    backbone_weights: Annotated[
        Path | None, typer.Option("--backbone-weights", help="ImageNet weights: torchvision, timm or detectron2.")
    ] = None,
    annotations: Annotated[
        Path | None, typer.Option("--annotations", help="The training file, if not in DIR/annotations.")
    ] = None,
    images: Annotated[Path | None, typer.Option("--images", help="The folder of its images, if not in DIR.")] = None,
    device: Annotated[str, typer.Option("--device", help="auto, cpu or cuda:N.")] = "auto",
) -> None:
    """Train a model. Start it with `torchrun` to use several GPUs or machines."""
    from d2zero.training.config import find_preset, with_settings
    from d2zero.training.start import Inputs, start

    check_output(output, folder=True)
    config = with_settings(find_preset(preset), settings or [])
    inputs = Inputs(data, vocabulary, annotations, images, init, backbone_weights)
    model_file = start(config, inputs, output, resume=resume, device=device)
    if model_file is not None:
        print(f"{model_file}: finished; evaluate it with `d2zero eval {model_file} --data {data}`")
