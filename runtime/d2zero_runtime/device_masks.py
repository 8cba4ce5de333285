"""Mask logits that stay where torch computed them, and their post-processing there, down to packed bits.

The same function as `upsample`: bilinear to the padded size, cropped, bilinear to the output size, > 0, with the mean
sigmoid inside and the tight box. Only bits, boxes and means come to the host: a hundredth of the logits' upsampled
size. torch is imported by whoever makes a `DeviceLogits`; nothing here imports it.

Letters: B batch, Q queries, h and w the logits' sides, N masks, H and W the output's sides.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from d2zero_runtime.images import Size
from d2zero_runtime.packed import PackedMasks
from d2zero_runtime.upsample import Mask

CHUNK_BYTES = 1 << 29  # upsampled at a time


class DeviceLogits:
    """Mask logits on a device; indexed and sliced like an array, and turned into one where that is asked for.

    Args:
        tensor: a torch tensor.
    """

    def __init__(self, tensor: Any) -> None:
        self.tensor = tensor

    @property
    def shape(self) -> tuple[int, ...]:
        """As of an array."""
        return tuple(self.tensor.shape)

    def __len__(self) -> int:
        return int(self.tensor.shape[0])

    def __getitem__(self, index: Any) -> "DeviceLogits":
        return DeviceLogits(self.tensor[index])

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        array: NDArray[Any] = self.tensor.float().cpu().numpy()
        return array if dtype is None else array.astype(dtype)

    def upsampled(self, queries: Sequence[int], sizes: "Sizes", kind: str, threads: int) -> list[Mask]:
        """Masks of some queries of one image; `self` is (Q, h, w).

        Args:
            queries: rows of `self`.
            sizes: of the way to the output.
            kind: of the masks, as of `postprocess`; `none` for boxes and qualities alone.
            threads: that encode run lengths.
        """
        if not len(queries):
            return []
        chosen = self.tensor[list(queries)]
        step = max(1, CHUNK_BYTES // (4 * max(_area(sizes.padded), _area(sizes.output))))
        found: list[Mask] = []
        for logits in chosen.split(step):
            found += _masks(logits, sizes, kind, threads)
        return found


@dataclass(frozen=True)
class Sizes:
    """(height, width) on the way from mask logits to masks.

    Args:
        padded: of the network's input.
        used: of the image in it.
        output: of the masks.
    """

    padded: Size
    used: Size
    output: Size


def _area(size: Size) -> int:
    return size[0] * size[1]


def _masks(logits_Nhw: Any, sizes: Sizes, kind: str, threads: int) -> list[Mask]:
    maps = _resized(_resized(logits_Nhw.float(), sizes.padded)[:, : sizes.used[0], : sizes.used[1]], sizes.output)
    inside = maps > 0
    area = inside.sum((1, 2))
    quality = (maps.sigmoid_() * inside).sum((1, 2)) / (area + 1e-6)
    figures = _stacked([quality, *_box(inside)])
    boxes = figures[:, 1:]
    if kind == "none":
        return [_mask(figure, box) for figure, box in zip(figures, boxes, strict=True)]
    packed = PackedMasks(_packed(inside).cpu().numpy(), sizes.output)
    if kind == "rle":
        with ThreadPoolExecutor(threads) as pool:
            encoded = list(pool.map(packed.encoded, range(len(packed))))
        return [_mask(figure, box, rle=code) for figure, box, code in zip(figures, boxes, encoded, strict=True)]
    return [_mask(figure, box, bits=bits) for figure, box, bits in zip(figures, boxes, packed.bits, strict=True)]


def _mask(figures: NDArray[np.float32], box: NDArray[np.float32], **parts: Any) -> Mask:
    x1, y1, x2, y2 = (float(side) for side in box)
    return Mask(parts.get("rle"), (x1, y1, x2, y2), float(figures[0]), parts.get("bits"))


def _resized(maps_NHW: Any, size: Size) -> Any:
    if tuple(maps_NHW.shape[1:]) == tuple(size):
        return maps_NHW
    from torch.nn.functional import interpolate

    return interpolate(maps_NHW[None], size, mode="bilinear", align_corners=False)[0]


def _box(inside_NHW: Any) -> list[Any]:
    """x1, y1, x2, y2 of each mask, x2 and y2 exclusive; zeros for an empty one."""
    sides = []
    for used in (inside_NHW.any(1), inside_NHW.any(2)):  # columns, rows
        flags = used.int()
        sides.append((flags.argmax(1), (used.shape[1] - flags.flip(1).argmax(1)) * flags.amax(1)))
    (x1, x2), (y1, y2) = sides
    return [x1, y1, x2, y2]


def _stacked(columns: Sequence[Any]) -> NDArray[np.float32]:
    """Columns of numbers as one array on the host: one copy, one wait."""
    first = columns[0]
    table = first.new_empty((len(first), len(columns)))
    for place, column in enumerate(columns):
        table[:, place] = column
    array: NDArray[np.float32] = table.cpu().numpy()
    return array


def _packed(inside_NHW: Any) -> Any:
    """Eight pixels of a row in a byte, as `numpy.packbits` has them."""
    from torch.nn.functional import pad

    width = inside_NHW.shape[2]
    whole = pad(inside_NHW, (0, -width % 8)).unflatten(2, (-1, 8))
    packed = whole[..., 0].byte() << 7
    for bit in range(1, 8):
        packed |= whole[..., bit].byte() << (7 - bit)
    return packed
