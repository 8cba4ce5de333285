"""`d2zero convert`: published checkpoints and backbone weights into our own format."""

from pathlib import Path
from typing import Annotated

import typer

from d2zero_runtime import D2ZeroError, Vocabulary
from d2zero_runtime.files import check_output


def convert(
    file: Annotated[
        Path, typer.Argument(help="A published .pth or .pkl, or ResNet-50 weights of torchvision, timm or detectron2.")
    ],
    vocabulary: Annotated[Path, typer.Option("--vocabulary", "-v", help="The vocabulary it was trained with (.npz).")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The checkpoint to write (.safetensors).")],
) -> None:
    """Turn a published checkpoint into a .safetensors one. Nothing pickled in it is executed."""
    from d2zero.checkpoints.backbone import is_backbone_only, load_backbone
    from d2zero.checkpoints.files import save_model
    from d2zero.checkpoints.published import load_published, read_arrays
    from d2zero.model import ModelConfig, build

    if output.suffix != ".safetensors":
        raise D2ZeroError(f"--output must end in .safetensors, got {output}")
    check_output(output)
    chosen = Vocabulary.load(vocabulary)
    arrays = read_arrays(file)
    model = build(ModelConfig(text_dim=chosen.width), chosen)
    if is_backbone_only(arrays):
        count = load_backbone(model.backbone, arrays)
        what = f"{count} backbone arrays; the rest of the model is fresh and must be trained (d2zero train --init)"
    else:
        load_published(model, arrays)
        what = f"{len(arrays)} arrays, all accounted for"
    save_model(model, output, {"converted_from": file.name})
    print(f"{output}: {what}")
