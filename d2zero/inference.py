"""A checkpoint's model behind the same door as an exported one: a `Segmenter` whose network runs in torch."""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from d2zero.model import D2Zero
from d2zero_runtime import Segmenter
from d2zero_runtime.contract import ModelContract
from d2zero_runtime.device_images import PixelBatch
from d2zero_runtime.device_masks import DeviceLogits
from d2zero_runtime.segmenter import Raw


class TorchBackend:
    """A model's network, run by torch in its own precision on its own device.

    Args:
        model: put into evaluation mode.
        all_heads: classify at every head as training does, not at the last one alone: slower, equal.
    """

    def __init__(self, model: D2Zero, all_heads: bool = False) -> None:
        self.model, self._all_heads = model.eval(), all_heads
        self.name = f"torch {torch.__version__} ({model.class_embeddings.device})"

    @property
    def takes_pixels(self) -> bool:
        """Whether `run` takes a `PixelBatch`: on a GPU."""
        return self.model.class_embeddings.is_cuda

    @torch.inference_mode()
    def run(self, images_B3HW: NDArray[np.float32] | PixelBatch, embeddings_KD: NDArray[np.float32] | None) -> Raw:
        """Run the network; see `d2zero_runtime.segmenter.Backend`. On a GPU, mask logits stay there."""
        device = self.model.class_embeddings.device
        text = None if embeddings_KD is None else torch.tensor(embeddings_KD, device=device)
        if isinstance(images_B3HW, PixelBatch):
            images = images_B3HW.normalised_on(device, torch)
        else:
            images = torch.from_numpy(images_B3HW).to(device)
        out = self.model(images, text, all_heads=self._all_heads)[-1]
        masks = out.mask_logits.float()
        return out.class_logits.float().cpu().numpy(), DeviceLogits(masks) if masks.is_cuda else masks.numpy()


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
