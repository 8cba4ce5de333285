"""From a file or an array to the tensor that the network reads.

One implementation for training's evaluation, the exported models and the benchmarks, so that
preprocessing cannot differ between them. Layouts: `image_HWC` uint8 RGB 0..255; `images_B3HW` float32,
normalised, padded with zeros on the right and at the bottom.
"""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from d2zero_runtime.errors import D2ZeroError, listed

Size = tuple[int, int]  # height, width
PADDING_LOGIT = -1e4  # mask logit outside an image's own padded size, in the raw output of several


@dataclass(frozen=True)
class Preprocessing:
    """How images become network input; part of every checkpoint's contract.

    Args:
        shortest_edge: the shorter side is resized to this many pixels ...
        longest_edge: ... unless the longer side would exceed this many.
        mean: per channel, in grey levels, RGB.
        std: per channel, in grey levels, RGB.
        size_divisor: sides are padded to a multiple of this.
        canvas: (height, width) of a model of one fixed size: images are shrunk into it if they are larger and
            padded to it. Any size if left out.
    """

    shortest_edge: int = 800
    longest_edge: int = 1333
    mean: tuple[float, float, float] = (123.675, 116.28, 103.53)
    std: tuple[float, float, float] = (58.395, 57.12, 57.375)
    size_divisor: int = 32
    canvas: Size | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.shortest_edge <= self.longest_edge or self.size_divisor < 1:
            raise D2ZeroError(
                "preprocessing needs 1 <= shortest_edge <= longest_edge and a size_divisor of at least 1, got"
                f" {self.shortest_edge}, {self.longest_edge} and {self.size_divisor}"
            )
        if self.canvas and any(side < 1 or side % self.size_divisor for side in self.canvas):
            raise D2ZeroError(
                f"a fixed size must be multiples of {self.size_divisor}, got {self.canvas[0]}x{self.canvas[1]}"
            )

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Preprocessing":
        """Read what `dataclasses.asdict` made, JSON's lists included.

        Raises:
            D2ZeroError: a key is unknown (written by a newer version, most likely).
        """
        unknown = sorted(values.keys() - {entry.name for entry in fields(cls)})
        if unknown:
            raise D2ZeroError(f"unknown preprocessing {listed(unknown)}; was this written by a newer d2zero?")
        plain: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in values.items()}
        return cls(**plain)

    def network_size(self, size: Size) -> Size:
        """The size that an image of `size` (height, width) is resized to."""
        height, width = size
        scale = self.shortest_edge / min(height, width)
        scaled = [height * scale, width * scale]
        if max(scaled) > self.longest_edge:
            shrink = self.longest_edge / max(scaled)
            scaled = [side * shrink for side in scaled]
        if self.canvas:
            shrink = min(1.0, self.canvas[0] / scaled[0], self.canvas[1] / scaled[1])
            scaled = [side * shrink for side in scaled]
        return max(1, int(scaled[0] + 0.5)), max(1, int(scaled[1] + 0.5))

    def padded_size(self, size: Size) -> Size:
        """`size` (height, width) rounded up to multiples of `size_divisor`, or the fixed size.

        Raises:
            D2ZeroError: the model has a fixed size that `size` does not fit into.
        """
        if self.canvas:
            if size[0] > self.canvas[0] or size[1] > self.canvas[1]:
                raise D2ZeroError(
                    f"the model takes images of up to {self.canvas[0]}x{self.canvas[1]} (height x width), got"
                    f" {size[0]}x{size[1]}; resize them first (`preprocessing.resize`)"
                )
            return self.canvas
        divisor = self.size_divisor
        return -(-size[0] // divisor) * divisor, -(-size[1] // divisor) * divisor

    def resize(self, image_HWC: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Resize to `network_size` with Pillow's bilinear filter (antialiased, on uint8)."""
        height, width = self.network_size(image_HWC.shape[:2])
        if (height, width) == image_HWC.shape[:2]:
            return image_HWC
        resized = Image.fromarray(image_HWC).resize((width, height), Image.Resampling.BILINEAR)
        return np.asarray(resized)

    def padded_sizes(self, images: Sequence[NDArray[np.uint8]]) -> list[Size]:
        """`padded_size` of each image.

        Raises:
            D2ZeroError: an image has the wrong type or shape, or there is none.
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


def read_image(path: str | os.PathLike[str]) -> NDArray[np.uint8]:
    """Read an image file as (H, W, 3) uint8 RGB, upright (EXIF orientation applied).

    Grey, palette, alpha, CMYK and 16-bit files are converted; transparency is dropped.

    Raises:
        D2ZeroError: the file is absent, empty, damaged or no image.
    """
    path = Path(path)
    try:
        with Image.open(path) as image:
            return to_rgb(ImageOps.exif_transpose(image))
    except FileNotFoundError as error:
        raise D2ZeroError(f"image {path} does not exist") from error
    except UnidentifiedImageError as error:
        raise D2ZeroError(f"{path} is not an image that Pillow can read") from error
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise D2ZeroError(f"image {path} is damaged or cut short: {error}") from error


def to_rgb(image: Image.Image) -> NDArray[np.uint8]:
    """Any Pillow image as (H, W, 3) uint8 RGB."""
    if image.mode.startswith("I;16") or image.mode == "I":
        # Pillow would clip 16-bit greys at 255 instead of scaling them.
        grey = (np.asarray(image).astype(np.float32) / 257.0 + 0.5).clip(0, 255).astype(np.uint8)
        return np.repeat(grey[:, :, None], 3, axis=2)
    return np.asarray(image.convert("RGB"))


def as_image(image: object) -> NDArray[np.uint8]:
    """Check that `image` is a (H, W, 3) uint8 array and return it."""
    array = np.asarray(image)
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3 or 0 in array.shape:
        raise D2ZeroError(
            f"an image must be a (H, W, 3) uint8 RGB array, got shape {array.shape} and type {array.dtype}"
        )
    return array
