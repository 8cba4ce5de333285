"""Peers: other people's models of the same kind, to see what a network of this size costs elsewhere.

Random weights made from a configuration: nothing is downloaded, and no accuracy is claimed. Only the network
is measured, on the same sizes and with as many queries.
"""

from dataclasses import dataclass
from importlib import import_module
from typing import Any

import numpy as np
from numpy.typing import NDArray

from d2zero_runtime import D2ZeroError


@dataclass(frozen=True)
class PeerForm:
    """How a peer runs: eagerly or by torch.compile, in float32 or under torch's mixed precision in float16."""

    compiled: bool = False
    half: bool = False


PEERS = {
    "mask2former": PeerForm(),
    "mask2former-compiled": PeerForm(compiled=True),
    "mask2former-float16": PeerForm(half=True),  # for GPUs
    "mask2former-float16-compiled": PeerForm(compiled=True, half=True),
}


class PeerNetwork:
    """A network of transformers, run by torch.

    Args:
        config: a `Mask2FormerConfig`.
        form: how it runs; compiled, each size is compiled at its first run.
        device: auto, cpu or cuda:N.
    """

    def __init__(self, config: Any, form: PeerForm, device: str = "cpu") -> None:
        import torch
        from transformers import Mask2FormerForUniversalSegmentation

        from d2zero.training.distributed import pick_device

        torch.manual_seed(0)
        self._device = pick_device(device)
        network = Mask2FormerForUniversalSegmentation(config).eval().to(self._device)
        self._network = torch.compile(network, dynamic=False) if form.compiled else network
        self._half = form.half
        how = f"{', float16' if form.half else ''}{', compiled' if form.compiled else ''}"
        self.name = f"transformers {_version()}, torch {torch.__version__} ({self._device}{how})"

    def run(self, images_B3HW: NDArray[np.float32]) -> None:
        """Run the network; outputs go to the host, as ours do."""
        import torch

        with torch.inference_mode(), torch.autocast(self._device.type, torch.float16, enabled=self._half):
            out = self._network(pixel_values=torch.from_numpy(images_B3HW).to(self._device))
            out.class_queries_logits.float().cpu(), out.masks_queries_logits.float().cpu()


def mask2former_config(queries: int, labels: int, **changes: Any) -> Any:
    """Mask2Former with a ResNet-50, as published; `changes` are fields of its configuration.

    Raises:
        D2ZeroError: transformers is not installed.
    """
    try:
        transformers: Any = import_module("transformers")  # partly typed, and not to our use
    except ImportError as error:
        raise D2ZeroError("--peers needs transformers; install it with: pip install 'd2zero[bench]'") from error
    backbone = changes.pop("backbone_config", None) or transformers.ResNetConfig(
        out_features=["stage1", "stage2", "stage3", "stage4"]
    )
    return transformers.Mask2FormerConfig(backbone_config=backbone, num_queries=queries, num_labels=labels, **changes)


def parse_peers(text: str) -> list[str]:
    """Read `mask2former,mask2former-compiled`, or `all` (those in float32, which run anywhere).

    Raises:
        D2ZeroError: there is no such peer, or transformers is not installed.
    """
    everywhere = [name for name, form in PEERS.items() if not form.half]
    chosen = everywhere if text.strip() == "all" else [name.strip() for name in text.split(",")]
    strangers = [name for name in chosen if name not in PEERS]
    if strangers:
        raise D2ZeroError(f"--peers must be all, or some of {', '.join(PEERS)}; got {strangers[0]!r}")
    _version()
    return chosen


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("transformers")
    except PackageNotFoundError as error:
        raise D2ZeroError("--peers needs transformers; install it with: pip install 'd2zero[bench]'") from error
