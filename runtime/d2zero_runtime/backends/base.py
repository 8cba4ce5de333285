"""What a segmenter needs of a backend, which runs a network.

Letters: B batch, Q queries, K classes, D text width, H and W the padded input's sides.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from d2zero_runtime.artifacts.profile import Profile
from d2zero_runtime.masks.device import MaskLogits

T = TypeVar("T")
InputT = TypeVar("InputT", contravariant=True)
Images = NDArray[np.float32]
Raw = tuple[NDArray[np.float32], MaskLogits]  # class logits (B, Q, K + 1) and mask logits (B, Q, H/4, W/4)


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
            Class logits (B, Q, K + 1) float32 and mask logits (B, Q, H/4, W/4), float32 or on a GPU.

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
