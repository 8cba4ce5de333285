"""Variants of a checkpoint: other ways to compute the same thing.

To add one: write a function from a checkpoint's path to a `Segmenter` (its `backend.run` is the network, its
`postprocess` the post-processing), and name it in `VARIANTS`. Import torch inside it: this module stays light.
"""

from collections.abc import Callable
from pathlib import Path

from d2zero_runtime import Segmenter

Variant = Callable[[Path, str], Segmenter]  # (checkpoint, device) -> what is measured


def model(checkpoint: Path, device: str) -> Segmenter:
    """The model as it is."""
    from d2zero.cli.models import open_segmenter

    return open_segmenter(checkpoint, device=device)


def published(checkpoint: Path, device: str) -> Segmenter:
    """The published form, with equal outputs."""
    from d2zero.checkpoints.files import load_model
    from d2zero.training.distributed import pick_device
    from d2zero_bench.published import PublishedSegmenter

    return PublishedSegmenter(load_model(checkpoint, pick_device(device)))


VARIANTS: dict[str, Variant] = {"model": model, "published": published}
