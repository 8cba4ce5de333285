"""Masks as packed bits: eight pixels a byte, what a GPU hands over fastest.

Letters: N masks, H and W the image's sides.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from d2zero_runtime.errors import D2ZeroError
from d2zero_runtime.images import Size
from d2zero_runtime.masks import rle


@dataclass(frozen=True, eq=False)
class PackedMasks:
    """N masks, row by row, as `numpy.packbits(masks, axis=2)` packs them.

    Args:
        bits: (N, H, ceil(W / 8)) uint8, the leftmost pixel in the highest bit.
        size: (height, width).

    Raises:
        D2ZeroError: The two do not fit.
    """

    bits: NDArray[np.uint8]
    size: Size

    def __post_init__(self) -> None:
        expected = (self.size[0], -(-self.size[1] // 8))
        if self.bits.dtype != np.uint8 or self.bits.shape[1:] != expected:
            raise D2ZeroError(
                f"packed masks of {self.size[0]}x{self.size[1]} must be (N, {expected[0]}, {expected[1]}) uint8, got"
                f" {self.bits.shape} {self.bits.dtype}"
            )

    def __len__(self) -> int:
        return len(self.bits)

    def __getitem__(self, rows: "slice | NDArray[Any] | Sequence[int]") -> "PackedMasks":
        """Choose masks by a slice, indices or a boolean array."""
        return PackedMasks(self.bits[rows], self.size)

    @classmethod
    def of(cls, masks_NHW: NDArray[np.bool_]) -> "PackedMasks":
        """Pack bitmaps."""
        return cls(np.packbits(masks_NHW, axis=2), (masks_NHW.shape[1], masks_NHW.shape[2]))

    def bitmaps(self) -> NDArray[np.bool_]:
        """(N, H, W) bool."""
        return np.unpackbits(self.bits, axis=2, count=self.size[1]).view(bool)

    def encoded(self, row: int) -> rle.RLE:
        """One mask as COCO run lengths; unpacks only where there is something."""
        bits = self.bits[row]
        rows, columns = np.flatnonzero(bits.any(axis=1)), np.flatnonzero(bits.any(axis=0))
        if not len(rows):
            return rle.encode_window(np.zeros((0, 0), bool), 0, 0, *self.size)
        top, left = int(rows[0]), int(columns[0])
        window = bits[top : rows[-1] + 1, left : columns[-1] + 1]
        width = min(8 * window.shape[1], self.size[1] - 8 * left)
        pixels = np.unpackbits(window, axis=1, count=width).view(bool)
        return rle.encode_window(pixels, top, 8 * left, *self.size)
