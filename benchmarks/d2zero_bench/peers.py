"""Peers: other people's networks of the same kind, to see what a network of this size costs elsewhere.

Random weights made from a configuration: nothing is downloaded, and no accuracy is claimed. Only the network is
measured, on images of noise: what its preprocessing would make, at the same sizes and with as many queries.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from d2zero_bench.candidates import Outcome, Spec, elapsed_ms, limit_torch_threads, resident_ms
from d2zero_bench.cases import Case
from d2zero_bench.report import NETWORK, Accuracy, CandidateInfo
from d2zero_runtime import D2ZeroError
from d2zero_runtime.backends.torch_math import float32_math


@dataclass(frozen=True)
class PeerForm:
    """How a peer runs.

    Args:
        compiled: Whether torch.compile compiles it, at each size's first run; eagerly otherwise.
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


class Peer:
    """A network of transformers, run by torch; measured as a `Candidate` is, but only its network.

    Args:
        spec: How to open it.
        changes: Fields of its configuration.

    Raises:
        D2ZeroError: The package transformers is not installed.
    """

    def __init__(self, spec: Spec, **changes: Any) -> None:
        if spec.threads:
            limit_torch_threads(spec.threads)
        import torch

        from d2zero.devices import pick_device

        self._form, self._device = PEERS[spec.peer], pick_device(spec.device)
        torch.manual_seed(0)
        network = _mask2former(spec.queries, spec.classes, **changes).eval().to(self._device)
        if self._form.precision == "float16":
            network = network.half()
        self.network = torch.compile(network, dynamic=False) if self._form.compiled else network
        how = f"{self._form.precision}{', compiled' if self._form.compiled else ''}"
        backend = f"transformers {transformers_version('--peers')}, torch {torch.__version__} ({self._device}, {how})"
        self.info = CandidateInfo(
            spec.name, "peer", backend, self._form.precision, queries=spec.queries, classes=spec.classes
        )
        self._run_once: Callable[[], None] = lambda: None

    def prepare(self, case: Case) -> None:
        """Draw a case's input and move it to the device."""
        height, width = (-(-side // 32) * 32 for side in (case.height, case.width))
        batch = np.random.default_rng(0).standard_normal((case.batch, 3, height, width)).astype(np.float32)
        self._run_once = self._resident(batch)

    def run(self, case: Case, paths: Sequence[Path], with_logits: bool = False) -> Outcome:
        """Milliseconds of the network; never logits, which would be another model's."""
        on_gpu = self._device.type == "cuda"
        return Outcome({NETWORK: resident_ms(self._run_once) if on_gpu else elapsed_ms(self._run_once)})

    def evaluate(self, annotations: Path, images: Path, limit: int | None) -> Accuracy | None:
        """None: its weights are random."""
        return None

    def _resident(self, images_B3HW: NDArray[np.float32]) -> Callable[[], None]:
        """Move the input to the device; returns what `resident_run` does."""
        import torch

        dtype = torch.float16 if self._form.precision == "float16" else torch.float32
        images = torch.from_numpy(images_B3HW).to(self._device, dtype)
        return resident_run(self.network, images, self._form.precision == "tf32")


def resident_run(network: Any, images: Any, tf32: bool = False) -> Callable[[], None]:
    """What runs a network of transformers once and waits until outputs are there.

    Args:
        network: The network.
        images: Its input, a tensor on its device.
        tf32: Whether GPUs may round factors of float32 to TF32.
    """
    import torch

    def run_once() -> None:
        with torch.inference_mode(), float32_math(torch, tf32):
            network(pixel_values=images)
        if images.is_cuda:
            torch.cuda.synchronize(images.device)

    return run_once


def _mask2former(queries: int, labels: int, **changes: Any) -> Any:
    """Mask2Former with a ResNet-50, as published, and random weights."""
    transformers_version("--peers")
    transformers: Any = import_module("transformers")  # partly typed, and not to our use
    backbone = changes.pop("backbone_config", None) or transformers.ResNetConfig(
        out_features=["stage1", "stage2", "stage3", "stage4"]
    )
    config = transformers.Mask2FormerConfig(backbone_config=backbone, num_queries=queries, num_labels=labels, **changes)
    return transformers.Mask2FormerForUniversalSegmentation(config)


def known_peers(chosen: Sequence[str]) -> tuple[str, ...]:
    """Peers by name; `all` are those in float32, which run anywhere.

    Raises:
        D2ZeroError: There is no such peer, or transformers is not installed.
    """
    if not chosen:
        return ()
    if tuple(chosen) == ("all",):
        chosen = [name for name, form in PEERS.items() if form.precision == "float32"]
    unknown = [name for name in chosen if name not in PEERS]
    if unknown:
        raise D2ZeroError(f"--peers must be all, or some of {', '.join(PEERS)}; got {unknown[0]!r}")
    transformers_version("--peers")
    return tuple(chosen)


def transformers_version(what: str) -> str:
    """The version of the package transformers.

    Args:
        what: What needs it, for the message.

    Raises:
        D2ZeroError: It is not installed.
    """
    try:
        return metadata.version("transformers")
    except metadata.PackageNotFoundError as error:
        raise D2ZeroError(f"{what} needs transformers; install it with: pip install 'd2zero[bench]'") from error
