"""A checkpoint's network as the backend of a `Segmenter`, so that checkpoints and exported models share one path."""

from collections.abc import Callable
from contextlib import nullcontext

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from d2zero_runtime.backends.base import Backend, LatestUpload, Raw
from d2zero_runtime.backends.inputs import Input, PixelBatch
from d2zero_runtime.backends.torch_math import float32_math
from d2zero_runtime.masks.device import DeviceLogits


class TorchBackend(Backend[Input]):
    """A network, run by torch in its own precision on its own device.

    Args:
        model: The network, as `D2Zero.forward`; put into evaluation mode.
        all_heads: Classify at every head as training does, not only at the last one: slower, equal.
    """

    def __init__(self, model: nn.Module, all_heads: bool = False) -> None:
        self.model, self._all_heads = model.eval(), all_heads
        self._uploaded = LatestUpload(lambda array: torch.from_numpy(array.copy()).to(self._device))
        self.name = f"torch {torch.__version__} ({self._device})"

    @property
    def _device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def on_gpu(self) -> bool:  # type: ignore[override]
        """Whether the model is on a GPU now."""
        return self._device.type == "cuda"

    @property
    def accepts_uint8(self) -> bool:  # type: ignore[override]
        """Whether `run` takes a `PixelBatch`: on a GPU."""
        return self.on_gpu

    def run(self, images_B3HW: Input, embeddings_KD: NDArray[np.float32] | None) -> Raw:
        """Run the network; see `Backend`. On a GPU, mask logits stay there."""
        with torch.inference_mode():
            class_logits, mask_logits = self._network(*self._moved(images_B3HW, embeddings_KD))
            masks = mask_logits.float()
            return class_logits.float().cpu().numpy(), DeviceLogits(masks) if masks.is_cuda else masks.numpy()

    def resident(self, images_B3HW: Input, embeddings_KD: NDArray[np.float32] | None) -> Callable[[], None]:
        """See `Backend`."""
        with torch.inference_mode():
            images, text = self._moved(images_B3HW, embeddings_KD)

        def run_once() -> None:
            with torch.inference_mode():
                self._network(images, text)
            if images.is_cuda:
                torch.cuda.synchronize(images.device)

        return run_once

    def _moved(self, images_B3HW: Input, embeddings_KD: NDArray[np.float32] | None) -> tuple[Tensor, Tensor | None]:
        """Images and class embeddings on the model's device."""
        text = None if embeddings_KD is None else self._uploaded(embeddings_KD)
        if isinstance(images_B3HW, PixelBatch):
            return images_B3HW.normalised_on(self._device, torch), text
        return torch.from_numpy(images_B3HW).to(self._device), text

    def _network(self, images: Tensor, text: Tensor | None) -> tuple[Tensor, Tensor]:
        with float32_math(torch, tf32=False) if images.is_cuda else nullcontext():
            class_logits, mask_logits = self.model(images, text, all_heads=self._all_heads)[-1]
            return class_logits, mask_logits
