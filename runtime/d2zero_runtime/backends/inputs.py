"""The network's input: normalised images, or pixels that are normalised where torch runs the network.

As pixels, a quarter of the bytes cross to a GPU. The values are those of `Preprocessing.batch`, by the same operations
in the same order. torch is imported by the backend that asks for them; nothing here imports it.

Letters: B batch, H and W the padded sides, h and w an image's own.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from d2zero_runtime.images import Preprocessing, Size


@dataclass(frozen=True, eq=False)
class PixelBatch:
    """Resized and padded images of one padded size, not yet normalised; sliced like an array.

    Args:
        pixels_BHW3: uint8, anything outside an image's own pixels.
        sizes: (h, w) of each image, at the top left.
        preprocessing: How they are normalised.
    """

    pixels_BHW3: NDArray[np.uint8]
    sizes: tuple[Size, ...]
    preprocessing: Preprocessing

    @classmethod
    def of(cls, images: Sequence[NDArray[np.uint8]], padded: Size, preprocessing: Preprocessing) -> "PixelBatch":
        """Pad images, each (h, w, 3) uint8; one that fills the padded size is not copied."""
        sizes = tuple((image.shape[0], image.shape[1]) for image in images)
        if len(images) == 1 and sizes[0] == tuple(padded):
            return cls(images[0][None], sizes, preprocessing)
        pixels_BHW3 = np.zeros((len(images), *padded, 3), np.uint8)
        for row, image, (height, width) in zip(pixels_BHW3, images, sizes, strict=True):
            row[:height, :width] = image
        return cls(pixels_BHW3, sizes, preprocessing)

    @classmethod
    def joined(cls, batches: "Sequence[PixelBatch]") -> "PixelBatch":
        """One batch of several of the same padded size."""
        if len(batches) == 1:
            return batches[0]
        sizes = tuple(size for batch in batches for size in batch.sizes)
        return cls(np.concatenate([batch.pixels_BHW3 for batch in batches]), sizes, batches[0].preprocessing)

    def __len__(self) -> int:
        return len(self.sizes)

    def __getitem__(self, rows: slice) -> "PixelBatch":
        return replace(self, pixels_BHW3=self.pixels_BHW3[rows], sizes=self.sizes[rows])

    def filled_up(self, size: int) -> "PixelBatch":
        """A batch of so many, with empty images after these."""
        more = size - len(self)
        nothing = np.zeros((more, *self.pixels_BHW3.shape[1:]), np.uint8)
        return replace(
            self, pixels_BHW3=np.concatenate([self.pixels_BHW3, nothing]), sizes=(*self.sizes, *[(0, 0)] * more)
        )

    def normalised_on(self, device: Any, torch: Any, channels_last: bool = False) -> Any:
        """The network's input, a (B, 3, H, W) float32 tensor on a GPU.

        Args:
            device: A torch device.
            torch: The module.
            channels_last: Its memory format, which is the pixels' own; contiguous otherwise.
        """
        mean, std = _scale(self.preprocessing, device, torch.tensor)
        pixels = torch.empty(self.pixels_BHW3.shape, dtype=torch.uint8, pin_memory=True)
        pixels.numpy()[...] = self.pixels_BHW3
        images = pixels.to(device, non_blocking=True).permute(0, 3, 1, 2).float()
        images = images.sub_(mean).div_(std)
        for image, (height, width) in zip(images, self.sizes, strict=True):
            if height < image.shape[1]:
                image[:, height:] = 0
            if width < image.shape[2]:
                image[:, :, width:] = 0
        return images if channels_last else images.contiguous()


@lru_cache(maxsize=8)
def _scale(preprocessing: Preprocessing, device: Any, tensor: Any) -> tuple[Any, Any]:
    """Mean and standard deviation, (3, 1, 1) each, kept on a device: a copy waits for it."""
    columns = (preprocessing.mean, preprocessing.std)
    mean, std = (tensor(column, device=device)[:, None, None] for column in columns)
    return mean, std


Input = NDArray[np.float32] | PixelBatch  # (B, 3, H, W)


def input_of(images: Sequence[NDArray[np.uint8]], padded: Size, preprocessing: Preprocessing, as_uint8: bool) -> Input:
    """The network's input for images, each (h, w, 3) uint8 RGB.

    Args:
        images: The images, at network size.
        padded: The (H, W) that all of them are padded to.
        preprocessing: How they are normalised.
        as_uint8: Whether to leave that to where the network runs.
    """
    return PixelBatch.of(images, padded, preprocessing) if as_uint8 else preprocessing.batch(images, padded)


def shape_of(images: Input) -> tuple[int, int, int]:
    """B, H and W."""
    batch, height, width = (
        images.pixels_BHW3.shape[:3] if isinstance(images, PixelBatch) else (len(images), *images.shape[2:])
    )
    return batch, height, width


def joined(inputs: "Sequence[Input]") -> Input:
    """One input of several of the same padded size and kind; a single one is not copied."""
    first = inputs[0]
    if len(inputs) == 1:
        return first
    if isinstance(first, PixelBatch):
        return PixelBatch.joined([entry for entry in inputs if isinstance(entry, PixelBatch)])
    return np.concatenate([entry for entry in inputs if not isinstance(entry, PixelBatch)])


def filled_up(images: Input, size: int) -> Input:
    """A batch of `size`, with empty images after the given ones."""
    if isinstance(images, PixelBatch):
        return images.filled_up(size)
    missing = np.zeros((size - len(images), *images.shape[1:]), images.dtype)
    return np.concatenate([images, missing])
