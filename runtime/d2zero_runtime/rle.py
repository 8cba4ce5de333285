"""COCO run-length encoding of masks, in NumPy.

The format is pycocotools': pixels in column-major order, runs of zeros and ones in turn, each length
written as a little-endian base-32 number, from the third on as the difference to the length two before.
pycocotools itself is no dependency of the runtime; the tests hold this module equal to it.
"""

from typing import Any, TypedDict

import numpy as np
from numpy.typing import NDArray


class RLE(TypedDict):
    """One mask: `size` is [height, width], `counts` the compressed runs as ASCII text."""

    size: list[int]
    counts: str


def encode(mask_HW: NDArray[np.bool_]) -> RLE:
    """Encode one (H, W) boolean mask."""
    height, width = mask_HW.shape
    return encode_window(mask_HW, 0, 0, height, width)


def encode_window(window_HW: NDArray[np.bool_], top: int, left: int, height: int, width: int) -> RLE:
    """Encode a mask of (height, width) that is empty outside a window placed at (top, left)."""
    # A zero above and below each column turns every run into one rise and one fall.
    columns = np.zeros((window_HW.shape[1], window_HW.shape[0] + 2), np.int8)
    columns[:, 1:-1] = window_HW.T
    steps = np.diff(columns, axis=1)
    column, row = np.nonzero(steps)
    edges = (column + left) * height + row + top
    # Runs that touch across a column's end are one run: their edges coincide and cancel.
    if len(edges):
        same = np.flatnonzero(edges[1:-1:2] == edges[2::2])
        edges = np.delete(edges, np.concatenate([2 * same + 1, 2 * same + 2]))
    counts = np.diff(np.concatenate([[0], edges, [height * width]]))
    if len(edges) and counts[-1] == 0:  # pycocotools writes no run of no pixels at the end
        counts = counts[:-1]
    return {"size": [height, width], "counts": _compress(counts)}


def decode(rle: RLE | dict[str, Any]) -> NDArray[np.bool_]:
    """Decode to a (H, W) boolean mask."""
    height, width = rle["size"]
    counts = _decompress(rle["counts"])
    values = np.arange(len(counts)) % 2 == 1
    return np.repeat(values, counts).reshape(width, height).T


def area(rle: RLE | dict[str, Any]) -> int:
    """Pixels inside the mask."""
    return int(_decompress(rle["counts"])[1::2].sum())


def _compress(counts: NDArray[np.int64]) -> str:
    values = counts.astype(np.int64)
    values[3:] -= counts[1:-2]
    groups, written = [], []
    open_ = np.ones(len(values), bool)
    while open_.any():
        low = values & 0x1F
        values = values >> 5
        more = np.where(low & 0x10, values != -1, values != 0)
        groups.append(low + 0x20 * more + 48)
        written.append(open_)
        open_ = open_ & more
    text = np.stack(groups, axis=1)[np.stack(written, axis=1)]
    return bytes(text.astype(np.uint8).tobytes()).decode("ascii")


def _decompress(text: str | bytes) -> NDArray[np.int64]:
    raw = text.encode("ascii") if isinstance(text, str) else text
    codes = np.frombuffer(raw, np.uint8).astype(np.int64) - 48
    last = np.flatnonzero((codes & 0x20) == 0)
    starts = np.concatenate([[0], last[:-1] + 1]) if len(last) else last
    position = np.arange(len(codes)) - np.repeat(starts, np.diff(np.append(starts, len(codes))))
    shift = 5 * position
    values = np.add.reduceat((codes & 0x1F) << shift, starts) if len(starts) else codes
    negative = (codes[last] & 0x10) != 0
    values = np.where(negative, values - (np.int64(1) << (shift[last] + 5)), values)
    # Undo the differences: two interleaved running sums, the first length standing alone.
    counts = values.copy()
    counts[1::2] = np.cumsum(values[1::2])
    counts[2::2] = np.cumsum(values[2::2])
    return counts
