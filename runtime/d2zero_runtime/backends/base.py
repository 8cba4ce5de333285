"""What a segmenter needs of a backend, which runs a network.

Letters: B batch, Q queries, K classes, D text width, H and W the padded input's sides.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from d2zero_runtime.artifacts.profile import Profile
from d2zero_runtime.masks.device import MaskLogits, concatenated

T = TypeVar("T")
InputT = TypeVar("InputT", contravariant=True)
Images = NDArray[np.float32]


class Raw(NamedTuple):
    """What a network hands over for a batch."""

    class_logits: NDArray[np.float32]  # (B, Q, K + 1), the background last
    mask_logits: MaskLogits  # (B, Q, H/4, W/4)
    queries: NDArray[np.float32]  # (B, Q, C); C is 0 where the network hands over none
    background: NDArray[np.float32]  # (B, C), the mean mask feature of what no query claims, L2-normalised

    @classmethod
    def of(cls, class_logits: NDArray[np.float32], mask_logits: MaskLogits, *features: NDArray[np.float32]) -> "Raw":
        """Outputs in the order of `ModelContract.outputs`, with or without features."""
        if not features:
            features = np.zeros((*class_logits.shape[:2], 0), np.float32), np.zeros((len(class_logits), 0), np.float32)
        return cls(class_logits, mask_logits, *features)

    def first(self, count: int) -> "Raw":
        """Those of the first images."""
        rows = slice(count)
        return Raw(self.class_logits[rows], self.mask_logits[rows], self.queries[rows], self.background[rows])

    @classmethod
    def joined(cls, parts: "Sequence[Raw]") -> "Raw":
        """Those of several batches with inputs of one size; of a single one, nothing is copied."""
        if len(parts) == 1:
            return parts[0]
        class_logits, mask_logits, queries, background = zip(*parts, strict=True)
        return cls(
            np.concatenate(class_logits), concatenated(mask_logits), np.concatenate(queries), np.concatenate(background)
        )


class Backend(ABC, Generic[InputT]):
    """Runs a network. Its methods may be called from several threads.

    `InputT` is what `run` takes: `Images`, normalised and padded, or `Input` where it takes a `PixelBatch` as well.
    """

    name: str
    """The library, its version and where it runs, for users."""

    precision: str | None = None
    """What it computes in, where that is not what the model's file says."""

    on_gpu: bool = False
    """Whether the network runs on a GPU, so that `run` copies its inputs and outputs."""

    is_reference: bool = False
    """Whether it is ONNX Runtime on a CPU alone, which verification asks for values inside the network."""

    accepts_uint8: bool = False
    """Whether `run` takes a `PixelBatch`, to normalise images where the network runs."""

    profile: Profile | None = None
    """The shapes that it runs; any if there is none."""

    known_issues: tuple[str, ...] = ()
    """Known defects of what runs the network that concern this model, one sentence each."""

    @abstractmethod
    def run(self, images_B3HW: InputT, embeddings_KD: NDArray[np.float32] | None) -> Raw:
        """Run the network.

        Args:
            images_B3HW: Normalised and padded images, float32; or a `PixelBatch`.
            embeddings_KD: Class embeddings, float32; None where they are constants of the network.

        Returns:
            Float32 outputs; mask logits may be on a GPU.

        Raises:
            D2ZeroError: The network cannot run such inputs.
        """

    def resident(self, images_B3HW: InputT, embeddings_KD: NDArray[np.float32] | None) -> Callable[[], None]:
        """Move inputs to where the network runs, to measure it without copies.

        Returns:
            Runs the network once on these inputs, leaves the outputs where they are, and waits until they are there.
        """

        def run_once() -> None:
            self.run(images_B3HW, embeddings_KD)

        return run_once

    def close(self) -> None:
        """Release what the backend holds; by default Python does, when nothing refers to it any more."""


class Classifier(ABC):
    """Compares images' features with any classes, apart from the network. May be called from several threads."""

    @abstractmethod
    def run(
        self, queries_BQC: NDArray[np.float32], background_BC: NDArray[np.float32], embeddings_KD: NDArray[np.float32]
    ) -> NDArray[np.float32]:
        """Class logits (B, Q, K + 1), float32, the background last.

        Args:
            queries_BQC: As the network hands them over.
            background_BC: As the network hands it over.
            embeddings_KD: Class embeddings.
        """

    @abstractmethod
    def to_onnx(self) -> bytes:
        """The classifier as an ONNX file, of which `OnnxClassifier` makes an equal one."""


class LatestUpload(Generic[T]):
    """The latest class embeddings where the network runs: they are uploaded once per vocabulary.

    Args:
        upload: Copies an array to where the network runs.
    """

    def __init__(self, upload: Callable[[NDArray[Any]], T]) -> None:
        self._upload = upload
        self._latest: tuple[NDArray[Any], T] | None = None

    def __call__(self, array: NDArray[Any]) -> T:
        """The array's copy, which is made if the array is not the same object as last time."""
        latest = self._latest  # read once: another thread may replace it
        if latest is None or latest[0] is not array:
            latest = self._latest = array, self._upload(array)
        return latest[1]
