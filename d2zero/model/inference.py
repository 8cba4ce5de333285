"""A checkpoint's network as the backend of a `Segmenter`, so that checkpoints and exported models share one path."""

from collections.abc import Callable
from contextlib import nullcontext
from importlib.metadata import entry_points
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from d2zero_runtime import D2ZeroError
from d2zero_runtime.backends.base import Backend, Classifier, LatestUpload, Raw
from d2zero_runtime.backends.inputs import Input, PixelBatch
from d2zero_runtime.backends.torch_math import float32_math
from d2zero_runtime.errors import optional
from d2zero_runtime.masks.device import DeviceLogits

EXPORTERS = "d2zero.exporters"  # entry points: functions that make files of parts of a model


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
            found = self._network(*self._moved(images_B3HW, embeddings_KD))
            masks = found.mask_logits.float()
            rest = (part.float().cpu().numpy() for part in (found.class_logits, found.queries, found.background))
            class_logits, queries, background = rest
            return Raw(class_logits, DeviceLogits(masks) if masks.is_cuda else masks.numpy(), queries, background)

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

    def _network(self, images: Tensor, text: Tensor | None) -> Any:
        with float32_math(torch, tf32=False) if images.is_cuda else nullcontext():
            return self.model(images, text, all_heads=self._all_heads)[-1]


class TorchClassifier(Classifier):
    """The classifier of a network, run by torch on its device.

    Args:
        model: The network, a `D2Zero`.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model, self._uploaded = model, LatestUpload(self._moved)

    def run(
        self, queries_BQC: NDArray[np.float32], background_BC: NDArray[np.float32], embeddings_KD: NDArray[np.float32]
    ) -> NDArray[np.float32]:
        """See `Classifier`."""
        classifier: Any = self._model.classifier
        with torch.inference_mode():
            features = self._moved(queries_BQC), self._moved(background_BC)
            with float32_math(torch, tf32=False) if features[0].is_cuda else nullcontext():
                class_logits_BQK: Tensor = classifier(*features, self._uploaded(embeddings_KD))
            return class_logits_BQK.float().cpu().numpy()

    def to_onnx(self) -> bytes:
        """See `Classifier`.

        Raises:
            D2ZeroError: The package that exports is not installed.
        """
        optional("onnx")
        entry = next(iter(entry_points(group=EXPORTERS, name="classifier")), None)
        if entry is None:
            raise D2ZeroError("this installation of d2zero has no exporter; install it again, such as 'd2zero[export]'")
        content: bytes = entry.load()(self._model)
        return content

    def _moved(self, array: NDArray[np.float32]) -> Tensor:
        return torch.from_numpy(np.array(array)).to(next(self._model.parameters()).device)
