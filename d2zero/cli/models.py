"""Opening what a command was given as its model: a checkpoint or an exported model."""

import sys
from collections.abc import Sequence
from pathlib import Path

from d2zero_runtime import D2ZeroError, Segmenter, Vocabulary, load
from d2zero_runtime.formats import EXPORTED_SUFFIXES, is_exported


def open_segmenter(
    path: Path, providers: Sequence[str] | None = None, device: str = "auto", vocabulary: Path | None = None
) -> Segmenter:
    """Open a checkpoint or an exported model; torch is imported for a checkpoint only.

    Args:
        path: `.safetensors`, or what `d2zero export` writes.
        providers: of an exported model, as `d2zero_runtime.load` takes them.
        device: of a checkpoint: auto, cpu or cuda:N.
        vocabulary: other classes to use.

    Raises:
        D2ZeroError: a file cannot be used, or an option is for the other kind of model.
    """
    if is_exported(path):
        if device != "auto":
            raise D2ZeroError(
                "--device is for checkpoints (.safetensors); an exported model runs where --provider says"
            )
        segmenter = load(path, providers)
    elif providers:
        raise D2ZeroError(f"--provider is for exported models ({', '.join(EXPORTED_SUFFIXES)})")
    else:
        from d2zero.checkpoints.files import load_model
        from d2zero.training.distributed import pick_device

        segmenter = load_model(path, pick_device(device)).segmenter()
    for issue in segmenter.backend.known_issues:
        print(f"warning: {issue}", file=sys.stderr)
    if vocabulary:
        segmenter.set_vocabulary(Vocabulary.load(vocabulary))
    return segmenter
