"""What a segmenter asks of what runs its network.

Letters: B batch, Q queries, K classes, D text width, H and W the padded input's sides.
"""

from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from d2zero_runtime.backends.pixels import PixelBatch

Input = NDArray[np.float32] | PixelBatch  # images, (B, 3, H, W)
Raw = tuple[NDArray[np.float32], Any]  # class logits (B, Q, K + 1), mask logits (B, Q, H/4, W/4), array or DeviceLogits


class Backend(Protocol):
    """Runs a network; backends inherit from it for its defaults."""

    name: str
    """What it is and where it runs, for people."""

    precision: str | None = None
    """What it computes in, where that is not what the model's file says."""

    on_gpu: bool = False
    """Whether the network runs on a GPU, so that `run` copies its inputs and outputs."""

    takes_pixels: bool = False
    """Whether `run` takes a `PixelBatch` and normalises images where the network runs."""

    def run(self, images_B3HW: Any, embeddings_KD: NDArray[np.float32] | None) -> Raw:
        """Run the network on normalised, padded images; with its own class embeddings if none are given."""

    def resident(self, images_B3HW: Any, embeddings_KD: NDArray[np.float32] | None) -> Callable[[], None]:
        """Move inputs to where the network runs, to measure it without copies.

        Returns:
            Runs the network once on these inputs, leaves the outputs where they are, and waits until they are there.
        """

        def run_once() -> None:
            self.run(images_B3HW, embeddings_KD)

        return run_once
