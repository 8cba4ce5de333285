"""From a query's mask logits to its mask at the output size: run lengths, box, and mean score.

Two bilinear resizes (to the padded input, and after cropping to the output) are linear and separable: they
are one matrix a side, with few numbers other than zero in a row. A mask is worked on only where it can be
positive, since interpolation of negative logits is never positive; in strips of columns that stay in the
processor's cache; and column by column, as run lengths count.

Letters: h and w the logits' sides, H and W those of the window worked on.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from d2zero_runtime import rle

STRIP = 1 << 16  # pixels worked on at a time
BLOCK = 64  # outputs of one small product
_EMPTY = np.zeros((0, 0), bool)


@dataclass(frozen=True, eq=False)
class Mask:
    """One query's mask at the output size.

    Args:
        rle: run lengths; None if they were not asked for.
        box: x1, y1, x2, y2 in pixels, x2 and y2 exclusive; zeros for an empty mask.
        quality: mean sigmoid inside the mask.
        bits: the mask packed (see `packed`), where it was made so.
    """

    rle: rle.RLE | None
    box: tuple[float, float, float, float]
    quality: float
    bits: NDArray[np.uint8] | None = None


@dataclass(frozen=True, eq=False)
class Axis:
    """One side's resize as a matrix (outputs, sources), and where its numbers are.

    Args:
        matrix: float32, rows sum to 1.
        first: of each output, the first source that it reads.
        last: and the last one.
        reached_from: of each source, the first output that reads it.
        reached_to: and the last one.
    """

    matrix: NDArray[np.float32]
    first: NDArray[np.int64]
    last: NDArray[np.int64]
    reached_from: NDArray[np.int64]
    reached_to: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.matrix)

    def reach(self, sources: NDArray[np.int64]) -> tuple[int, int]:
        """The range of outputs that read any of the sources."""
        return int(self.reached_from[sources].min()), int(self.reached_to[sources].max()) + 1

    def blocks(self, start: int, stop: int, size: int) -> Iterator[tuple[slice, slice]]:
        """Outputs from start to stop in parts, each with the sources that it reads."""
        for low in range(start, stop, size):
            high = min(low + size, stop)
            yield slice(low, high), slice(int(self.first[low:high].min()), int(self.last[low:high].max()) + 1)


@lru_cache(maxsize=64)
def resize_axis(source: int, padded: int, cropped: int, output: int) -> Axis:
    """Bilinear `source` → `padded`, crop to `cropped`, bilinear → `output`.

    Bilinear as torch's `interpolate(align_corners=False)`: pixel centres, no antialiasing.
    """
    matrix = np.asarray(_bilinear(cropped, output) @ _bilinear(source, padded)[:cropped], np.float32)
    matrix.setflags(write=False)
    used = matrix > 0
    return Axis(
        matrix,
        first=used.argmax(axis=1),
        last=source - 1 - used[:, ::-1].argmax(axis=1),
        reached_from=used.argmax(axis=0),  # a source that nothing reads counts for output 0, which does no harm
        reached_to=np.where(used.any(axis=0), output - 1 - used[::-1].argmax(axis=0), 0),
    )


def upsampled_mask(logits_hw: NDArray[np.float32], rows: Axis, columns: Axis, encode: bool = True) -> Mask:
    """Upsample one query's mask logits and keep what is positive.

    Args:
        logits_hw: (h, w) float32.
        rows: from h to the output's height.
        columns: from w to the output's width.
        encode: whether run lengths are wanted.
    """
    positive = logits_hw > 0
    used_rows, used_columns = np.flatnonzero(positive.any(axis=1)), np.flatnonzero(positive.any(axis=0))
    size = (len(rows), len(columns))
    if not len(used_rows):
        return _empty(size, encode)
    top, bottom = rows.reach(used_rows)
    left, right = columns.reach(used_columns)
    tall_wH = _resized_rows(logits_hw, rows, top, bottom)
    # A zero under each column keeps the runs of neighbouring columns apart.
    inside_WH = np.zeros((right - left, bottom - top + 1), bool)
    count, total = 0, 0.0
    strip = max(1, STRIP // (bottom - top))
    for outputs, sources in columns.blocks(left, right, strip):
        values = columns.matrix[outputs, sources] @ tall_wH[sources]
        inside = np.greater(values, 0, out=inside_WH[outputs.start - left : outputs.stop - left, :-1])
        chosen = values[inside]
        count += len(chosen)
        total += _sum_of_sigmoids(chosen)
    if not count:
        return _empty(size, encode)
    edges = rle.edges_of(inside_WH)
    box = (left + edges.columns[0], top + edges.rises.min(), left + edges.columns[-1] + 1, top + edges.falls.max())
    return Mask(
        rle=rle.from_edges(edges, top, left, *size) if encode else None,
        box=tuple(float(side) for side in box),  # type: ignore[arg-type]
        quality=total / (count + 1e-6),
    )


def _empty(size: tuple[int, int], encode: bool) -> Mask:
    return Mask(rle.encode_window(_EMPTY, 0, 0, *size) if encode else None, (0.0, 0.0, 0.0, 0.0), 0.0)


def _resized_rows(logits_hw: NDArray[np.float32], rows: Axis, top: int, bottom: int) -> NDArray[np.float32]:
    """The rows from top to bottom at the output's height, laid out (w, H)."""
    turned_wh = np.ascontiguousarray(logits_hw.T)
    tall_wH = np.empty((len(turned_wh), bottom - top), np.float32)
    for outputs, sources in rows.blocks(top, bottom, BLOCK):
        np.matmul(
            turned_wh[:, sources],
            rows.matrix[outputs, sources].T,
            out=tall_wH[:, outputs.start - top : outputs.stop - top],
        )
    return tall_wH


def _sum_of_sigmoids(values: NDArray[np.float32]) -> float:
    """Sum of 1 / (1 + exp(-value)); overwrites its argument."""
    np.negative(values, out=values)
    np.exp(values, out=values)
    values += 1
    np.reciprocal(values, out=values)
    return float(values.sum())


def _bilinear(source: int, target: int) -> NDArray[np.float64]:
    position = np.maximum((np.arange(target) + 0.5) * (source / target) - 0.5, 0)
    lower = np.minimum(position.astype(np.int64), source - 1)
    upper = np.minimum(lower + 1, source - 1)
    fraction = position - lower
    matrix = np.zeros((target, source))
    matrix[np.arange(target), lower] += 1 - fraction
    matrix[np.arange(target), upper] += fraction
    return matrix
