"""A checkpoint's model behind the same door as an exported one: a `Segmenter` whose network runs in torch."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from d2zero.model import D2Zero, HeadOutput
from d2zero_runtime import Segmenter
from d2zero_runtime.artifacts.contract import ModelContract
from d2zero_runtime.backends.base import Backend, Raw
from d2zero_runtime.backends.pixels import PixelBatch
from d2zero_runtime.backends.torch_math import float32_math
from d2zero_runtime.masks.device import DeviceLogits


class TorchBackend(Backend):
    """A model's network, run by torch in its own precision on its own device.

    Args:
        model: put into evaluation mode.
        all_heads: classify at every head as training does, not only at the last one: slower, equal.
    """

    def __init__(self, model: D2Zero, all_heads: bool = False) -> None:
        self.model, self._all_heads = model.eval(), all_heads
        self.name = f"torch {torch.__version__} ({model.class_embeddings.device})"

    @property
    def on_gpu(self) -> bool:  # type: ignore[override]
        """Whether the model is on a GPU now."""
        return self.model.class_embeddings.is_cuda

    @property
    def takes_pixels(self) -> bool:  # type: ignore[override]
        """Whether `run` takes a `PixelBatch`: on a GPU."""
        return self.on_gpu

    def run(self, images_B3HW: NDArray[np.float32] | PixelBatch, embeddings_KD: NDArray[np.float32] | None) -> Raw:
        """Run the network; see `Backend`. On a GPU, mask logits stay there."""
        with torch.inference_mode():
            out = self._network(*self._moved(images_B3HW, embeddings_KD))
            masks = out.mask_logits.float()
            return out.class_logits.float().cpu().numpy(), DeviceLogits(masks) if masks.is_cuda else masks.numpy()

    def resident(
        self, images_B3HW: NDArray[np.float32] | PixelBatch, embeddings_KD: NDArray[np.float32] | None
    ) -> Callable[[], None]:
        """See `Backend`."""
        with torch.inference_mode():
            images, text = self._moved(images_B3HW, embeddings_KD)

        def run_once() -> None:
            with torch.inference_mode():
                self._network(images, text)
            if images.is_cuda:
                torch.cuda.synchronize(images.device)

        return run_once

    def _moved(
        self, images_B3HW: NDArray[np.float32] | PixelBatch, embeddings_KD: NDArray[np.float32] | None
    ) -> tuple[Tensor, Tensor | None]:
        """Images and class embeddings on the model's device."""
        device = self.model.class_embeddings.device
        text = None if embeddings_KD is None else torch.tensor(embeddings_KD, device=device)
        if isinstance(images_B3HW, PixelBatch):
            return images_B3HW.normalised_on(device, torch), text
        return torch.from_numpy(images_B3HW).to(device), text

    def _network(self, images: Tensor, text: Tensor | None) -> HeadOutput:
        with float32_math(torch, tf32=False) if images.is_cuda else nullcontext():
            heads: list[HeadOutput] = self.model(images, text, all_heads=self._all_heads)
            return heads[-1]


def segmenter_of(model: D2Zero) -> Segmenter:
    """A model as a segmenter."""
    return Segmenter(TorchBackend(model), contract_of(model), model.vocabulary)


def contract_of(model: D2Zero, **fields: Any) -> ModelContract:
    """What inference needs to know of a model; `fields` of the contract are added or replaced."""
    words = model.vocabulary
    known: dict[str, Any] = {
        "class_names": words.names,
        "seen": tuple(words.seen.tolist()),
        "active": tuple(words.active.tolist()),
        "vocabulary_source": words.source,
        "synonyms": words.synonyms,
        "text_dim": model.config.text_dim,
        "num_queries": model.config.num_queries,
        "preprocessing": model.config.preprocessing,
        "softmax_temperature": model.config.softmax_temperature,
    }
    return ModelContract(**{**known, **fields})
