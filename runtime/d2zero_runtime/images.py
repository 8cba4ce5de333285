"""From an image to the tensor that the network reads.

One implementation for training's evaluation, the exported models and the benchmarks, so that
preprocessing cannot differ between them. Layouts: `image_HWC` uint8 RGB 0..255; `images_B3HW` float32,
normalised, padded with zeros on the right and at the bottom.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from d2zero_runtime.checked_json import require_finite
from d2zero_runtime.errors import D2ZeroError

Size = tuple[int, int]  # height, width
LARGEST_SIDE = 8192  # of the network's input
PADDING_LOGIT = -1e4  # mask logit outside an image's own padded size, in the raw output of several


@dataclass(frozen=True)
class Preprocessing:
    """How images become network input; part of every checkpoint's contract.

    Args:
        shortest_edge: The shorter side is resized to this many pixels ...
        longest_edge: ... unless the longer side would exceed this many.
        mean: Per channel, in grey levels, RGB.
        std: Per channel, in grey levels, RGB.
        size_divisor: Sides are padded to a multiple of this.
        static_size: (height, width) of a model of static shape: images are shrunk into it if they are larger and
            padded to it. Any size if left out.
    """

    shortest_edge: int = 800
    longest_edge: int = 1333
    mean: tuple[float, float, float] = (123.675, 116.28, 103.53)
    std: tuple[float, float, float] = (58.395, 57.12, 57.375)
    size_divisor: int = 32
    static_size: Size | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.shortest_edge <= self.longest_edge <= LARGEST_SIDE:
            raise D2ZeroError(
                f"preprocessing needs 1 <= shortest_edge <= longest_edge <= {LARGEST_SIDE}, got {self.shortest_edge}"
                f" and {self.longest_edge}"
            )
        if self.size_divisor % 32 or not 32 <= self.size_divisor <= LARGEST_SIDE:
            raise D2ZeroError(f"size_divisor must be a multiple of 32, at most {LARGEST_SIDE}, got {self.size_divisor}")
        for name, above in (("mean", -math.inf), ("std", 0.0)):
            if len(getattr(self, name)) != 3:
                raise D2ZeroError(f"{name} must have three values, got {getattr(self, name)}")
            for value in getattr(self, name):
                require_finite(name, value, above)
        sides = self.static_size or ()
        if any(not 1 <= side <= LARGEST_SIDE or side % self.size_divisor for side in sides):
            raise D2ZeroError(
                f"a static size must be multiples of {self.size_divisor}, got {'x'.join(map(str, sides))}"
            )

    @property
    def canvas(self) -> Size | None:
        """`static_size` by its name before 2026-11-28."""
        return self.static_size

    def network_size(self, size: Size) -> Size:
        """The size that an image of `size` (height, width) is resized to."""
        height, width = size
        scale = self.shortest_edge / min(height, width)
        scaled = [height * scale, width * scale]
        if max(scaled) > self.longest_edge:
            shrink = self.longest_edge / max(scaled)
            scaled = [side * shrink for side in scaled]
        if self.static_size:
            shrink = min(1.0, self.static_size[0] / scaled[0], self.static_size[1] / scaled[1])
            scaled = [side * shrink for side in scaled]
        return max(1, int(scaled[0] + 0.5)), max(1, int(scaled[1] + 0.5))

    def padded_size(self, size: Size) -> Size:
        """`size` (height, width) rounded up to multiples of `size_divisor`, or the fixed size.

        Raises:
            D2ZeroError: The model has a fixed size that `size` does not fit into.
        """
        if self.static_size:
            if size[0] > self.static_size[0] or size[1] > self.static_size[1]:
                raise D2ZeroError(
                    f"the model takes images of up to {self.static_size[0]}x{self.static_size[1]} (height x width), got"
                    f" {size[0]}x{size[1]}; resize them first (`preprocessing.resize`)"
                )
            return self.static_size
        divisor = self.size_divisor
        return -(-size[0] // divisor) * divisor, -(-size[1] // divisor) * divisor

    def resize(self, image: NDArray[np.uint8] | Image.Image) -> NDArray[np.uint8]:
        """Resize to `network_size` with Pillow's bilinear filter (antialiased, on uint8).

        Args:
            image: (H, W, 3) uint8 RGB, or Pillow's image in RGB, of which no copy is made in the original size.
        """
        size = size_of(image)
        height, width = self.network_size(size)
        if (height, width) != size:
            picture = Image.fromarray(image) if isinstance(image, np.ndarray) else image
            image = picture.resize((width, height), Image.Resampling.BILINEAR)
        return np.asarray(image)

    def padded_sizes(self, images: Sequence[NDArray[np.uint8]]) -> list[Size]:
        """`padded_size` of each image.

        Raises:
            D2ZeroError: An image has the wrong type or shape, or there is none.
        """
        if not len(images):
            raise D2ZeroError("expected at least one image, got an empty list")
        return [self.padded_size(as_image(image).shape[:2]) for image in images]

    def groups(self, images: Sequence[NDArray[np.uint8]]) -> Iterator[tuple[Size, list[int]]]:
        """Images of one padded size each: the size, and their places in the list.

        What is padded alike runs together; an image's output never depends on what else is in the list.
        """
        sizes = self.padded_sizes(images)
        for size in sorted(set(sizes)):
            yield size, [row for row, other in enumerate(sizes) if other == size]

    def batch(self, images: Sequence[NDArray[np.uint8]], padded: Size) -> NDArray[np.float32]:
        """Normalise images and pad each with zeros to `padded`; (B, 3, H, W) float32."""
        images_B3HW = np.zeros((len(images), 3, *padded), np.float32)
        mean, std = np.asarray(self.mean, np.float32), np.asarray(self.std, np.float32)
        for row, image_HWC in zip(images_B3HW, images, strict=True):
            height, width = image_HWC.shape[:2]
            for channel, plane in enumerate(row[:, :height, :width]):  # in place: a seventh of whole images' time
                np.subtract(image_HWC[..., channel], mean[channel], out=plane)
                plane /= std[channel]
        return images_B3HW


def with_new_names(values: dict[str, Any]) -> dict[str, Any]:
    """The fields of `Preprocessing` in a file by the names of today: until 2026-11-28, `static_size` was `canvas`."""
    return {"static_size" if name == "canvas" else name: value for name, value in values.items()}


def size_of(image: NDArray[np.uint8] | Image.Image) -> Size:
    """(height, width) of an array (H, W, 3) or of Pillow's image."""
    return (image.shape[0], image.shape[1]) if isinstance(image, np.ndarray) else (image.height, image.width)


def as_image(image: object) -> NDArray[np.uint8]:
    """Check that `image` is a (H, W, 3) uint8 array and return it."""
    array = np.asarray(image)
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3 or 0 in array.shape:
        raise D2ZeroError(
            f"an image must be a (H, W, 3) uint8 RGB array, got shape {array.shape} and type {array.dtype}"
        )
    return array
