"""COCO run-length encoding of masks, in NumPy.

The format is pycocotools': pixels in column-major order, runs of zeros and ones in turn, each length
written as a little-endian base-32 number, from the third on as the difference to the length two before.
pycocotools itself is no dependency of the runtime; the tests hold this module equal to it.
"""

from typing import Any, NamedTuple, TypedDict

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
    columns = np.zeros((window_HW.shape[1], window_HW.shape[0] + 1), bool)
    columns[:, :-1] = window_HW.T
    return from_edges(edges_of(columns), top, left, height, width)


class Edges(NamedTuple):
    """Where the runs of a window's columns begin and end, in order."""

    columns: NDArray[np.int64]  # of each run
    rises: NDArray[np.int64]  # its first row
    falls: NDArray[np.int64]  # the row after its last


def edges_of(columns_WH: NDArray[np.bool_]) -> Edges:
    """Runs of a mask laid out column by column, each column followed by a zero."""
    flat = columns_WH.ravel()
    changes = np.flatnonzero(flat[1:] != flat[:-1]) + 1
    if flat.size and flat[0]:
        changes = np.concatenate([[0], changes])
    column, row = np.divmod(changes, max(1, columns_WH.shape[1]))
    return Edges(column[::2], row[::2], row[1::2])


def from_edges(edges: Edges, top: int, left: int, height: int, width: int) -> RLE:
    """Encode runs found in a window placed at (top, left) of a mask of (height, width)."""
    starts = (edges.columns + left) * height + top
    bounds = np.stack([starts + edges.rises, starts + edges.falls], axis=1).ravel()
    # Runs that touch across a column's end are one run: their bounds coincide and cancel.
    same = np.flatnonzero(bounds[1:-1:2] == bounds[2::2])
    if len(same):
        bounds = np.delete(bounds, np.concatenate([2 * same + 1, 2 * same + 2]))
    counts = np.diff(np.concatenate([[0], bounds, [height * width]]))
    if len(bounds) and counts[-1] == 0:  # pycocotools writes no run of no pixels at the end
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
