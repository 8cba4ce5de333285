"""`d2zero convert`: published checkpoints and backbone weights into our own format."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from d2zero_runtime import D2ZeroError, Vocabulary
from d2zero_runtime.errors import join_truncated
from d2zero_runtime.files import check_output

if TYPE_CHECKING:
    from torch import Tensor

    from d2zero.checkpoints.mask2former import Checkpoint
    from d2zero.model import D2Zero


def convert(
    file: Annotated[
        Path,
        typer.Argument(
            help="A published .pth or .pkl of D2Zero or Mask2Former, a transformers folder with a Mask2Former, or"
            " ResNet-50 weights of torchvision, timm or detectron2."
        ),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="The checkpoint to write (.safetensors).")],
    vocabulary: Annotated[
        Path | None, typer.Option("--vocabulary", "-v", help="The vocabulary that a D2Zero was trained with (.npz).")
    ] = None,
    names: Annotated[
        str | None,
        typer.Option(
            help="Class names of a Mask2Former that does not have COCO's, in the order of training: a .txt (one per"
            " line), a .json, or comma-separated."
        ),
    ] = None,
) -> None:
    """Turn a published checkpoint into a .safetensors one. Nothing pickled in it is executed."""
    from d2zero.checkpoints.files import save_model

    if output.suffix != ".safetensors":
        raise D2ZeroError(f"--output must end in .safetensors, got {output}")
    check_output(output)
    model, what, notes = _converted(file, vocabulary, names)
    save_model(model, output, {"converted_from": file.name, **({"notes": notes} if notes else {})})
    print("\n".join([f"{output}: {what}", *(f"note: {note}" for note in notes)]))


def _converted(file: Path, vocabulary: Path | None, names: str | None) -> "tuple[D2Zero, str, list[str]]":
    """The model in a file or folder, what was done, and what differs from what the file says."""
    from d2zero.checkpoints.mask2former import from_detectron2, is_mask2former
    from d2zero.checkpoints.published import read_arrays
    from d2zero.checkpoints.transformers_folder import CONFIG, read_folder

    if file.suffix == ".safetensors" and file.is_file():
        if (file.parent / CONFIG).is_file():
            raise D2ZeroError(f"{file} is one file of a checkpoint; give the folder that it is in, {file.parent}")
        raise D2ZeroError(
            f"{file} has no {CONFIG} beside it; convert takes a published .pth or .pkl, or a transformers folder with"
            f" {CONFIG} and its weights"
        )
    if file.is_dir():
        return _closed(read_folder(file), vocabulary, names)
    arrays = read_arrays(file)
    if is_mask2former(arrays):
        return _closed(from_detectron2(arrays), vocabulary, names)
    if names or not vocabulary:
        raise D2ZeroError(f"{file} is no Mask2Former; give --vocabulary, the classes that a D2Zero knows by their text")
    return _zero_shot(arrays, Vocabulary.load(vocabulary))


def _closed(checkpoint: "Checkpoint", vocabulary: Path | None, names: str | None) -> "tuple[D2Zero, str, list[str]]":
    from d2zero.checkpoints.mask2former import model_of, notes_on_names
    from d2zero.text.arrays import read_names

    if vocabulary:
        raise D2ZeroError("a Mask2Former has class names and no text embeddings; give --names in place of --vocabulary")
    model = model_of(checkpoint, read_names(names) if names else None)
    known = model.vocabulary.names
    what = f"a Mask2Former of {len(known)} classes ({join_truncated(known)}); every array is accounted for"
    return model, what, [*([] if names else notes_on_names(checkpoint, known)), *checkpoint.notes]


def _zero_shot(arrays: "dict[str, Tensor]", vocabulary: Vocabulary) -> "tuple[D2Zero, str, list[str]]":
    from d2zero.checkpoints.backbone import is_backbone_only, load_backbone
    from d2zero.checkpoints.published import load_published
    from d2zero.model import ModelConfig, build

    model = build(ModelConfig(text_dim=vocabulary.width), vocabulary)
    if is_backbone_only(arrays):
        count = load_backbone(model.backbone, arrays)
        what = f"{count} backbone arrays; the rest of the model is fresh and must be trained (d2zero train --init)"
        return model, what, []
    load_published(model, arrays)
    return model, f"{len(arrays)} arrays, all accounted for", []
