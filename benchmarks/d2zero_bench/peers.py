"""Peers: other people's models of the same kind, to see what a network of this size costs elsewhere.

Random weights made from a configuration: nothing is downloaded, and no accuracy is claimed. Only the network
is measured, on the same sizes and with as many queries.
"""

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import numpy as np
from numpy.typing import NDArray

from d2zero_runtime import D2ZeroError
from d2zero_runtime.backends.torch_math import float32_math


@dataclass(frozen=True)
class PeerForm:
    """How a peer runs.

    Args:
        compiled: By torch.compile; eagerly otherwise.
        precision: float32, tf32 (what GPUs make of float32 where that is allowed), or float16, weights and
            images as ours.
    """

    compiled: bool = False
    precision: str = "float32"


PEERS = {
    "mask2former": PeerForm(),
    "mask2former-compiled": PeerForm(compiled=True),
    "mask2former-tf32": PeerForm(precision="tf32"),  # this and the next ones for GPUs
    "mask2former-float16": PeerForm(precision="float16"),
    "mask2former-float16-compiled": PeerForm(compiled=True, precision="float16"),
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
        if form.precision == "float16":
            network = network.half()
        self._network = torch.compile(network, dynamic=False) if form.compiled else network
        self._precision = form.precision
        self.on_gpu = self._device.type == "cuda"
        how = f", {form.precision}{', compiled' if form.compiled else ''}"
        self.name = f"transformers {_version()}, torch {torch.__version__} ({self._device}{how})"

    def resident(self, images_B3HW: NDArray[np.float32]) -> Callable[[], None]:
        """Move the input to the device, as `d2zero_runtime.backends.base.Backend.resident` does.

        Returns:
            Runs the network once, leaves the outputs where they are, and waits until they are there.
        """
        import torch

        dtype = torch.float16 if self._precision == "float16" else torch.float32
        images = torch.from_numpy(images_B3HW).to(self._device, dtype)

        def run_once() -> None:
            with torch.inference_mode(), float32_math(torch, self._precision == "tf32"):
                self._network(pixel_values=images)
            if self.on_gpu:
                torch.cuda.synchronize(self._device)

        return run_once


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
    everywhere = [name for name, form in PEERS.items() if form.precision == "float32"]
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
