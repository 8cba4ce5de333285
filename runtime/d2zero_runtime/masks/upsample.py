"""From a query's mask logits to its mask at the output size: run lengths, box, and mean score.

Two bilinear resizes (to the padded input, and after cropping to the output) are linear and separable: on each
side an output is a sum of two or three neighbouring sources. A mask is worked on only where it can be positive,
since interpolation of negative logits is never positive; in strips of columns that stay in the processor's cache;
and column by column, as run lengths count. No matrix products: BLAS would start threads of its own in each of ours.

Letters: h and w the logits' sides, H and W those of the window worked on.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from d2zero_runtime.masks import rle

STRIP = 1 << 18  # pixels worked on at a time; with fewer, threads wait for each other between the steps
_EMPTY = np.zeros((0, 0), bool)


@dataclass(frozen=True, eq=False)
class Mask:
    """One query's mask at the output size.

    Args:
        rle: Run lengths; None if they were not asked for.
        box: x1, y1, x2, y2 in pixels, x2 and y2 exclusive; zeros for an empty mask.
        quality: Mean sigmoid inside the mask.
        bits: The mask packed (see `packed`), where it was made so.
    """

    rle: rle.RLE | None
    box: tuple[float, float, float, float]
    quality: float
    bits: NDArray[np.uint8] | None = None


@dataclass(frozen=True, eq=False)
class Axis:
    """One side's resize: output n is the sum over t of `weights[t, n]` times source `sources[t, n]`.

    Args:
        sources: (T, outputs) int64.
        weights: (T, outputs) float32; an output's weights sum to 1.
        reached_from: The first output that reads each source.
        reached_to: The last output that reads each source.
    """

    sources: NDArray[np.int64]
    weights: NDArray[np.float32]
    reached_from: NDArray[np.int64]
    reached_to: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.weights[0])

    def reach(self, sources: NDArray[np.int64]) -> tuple[int, int]:
        """The range of outputs that read any of the sources."""
        return int(self.reached_from[sources].min()), int(self.reached_to[sources].max()) + 1

    def resize(
        self,
        lines_SN: NDArray[np.float32],
        start: int,
        stop: int,
        out_WN: NDArray[np.float32],
        spare_WN: NDArray[np.float32],
    ) -> None:
        """Resize the first axis, for the outputs from start to stop.

        Args:
            lines_SN: A line each source.
            start: The first output.
            stop: The one after the last.
            out_WN: Filled with one line per output.
            spare_WN: Scratch memory of the same shape; overwritten.
        """
        for number, (sources, weights) in enumerate(zip(self.sources, self.weights, strict=True)):
            part = spare_WN if number else out_WN
            np.take(lines_SN, sources[start:stop], axis=0, out=part, mode="clip")  # "raise" would copy once more
            part *= weights[start:stop, None]
            if number:
                out_WN += part


@lru_cache(maxsize=64)
def resize_axis(source: int, padded: int, cropped: int, output: int) -> Axis:
    """Bilinear `source` → `padded`, crop to `cropped`, bilinear → `output`.

    Bilinear as torch's `interpolate(align_corners=False)`: pixel centres, no antialiasing.
    """
    (inner, inner_shares), (outer, outer_shares) = _bilinear(source, padded), _bilinear(cropped, output)
    read = inner[:, outer].reshape(4, output)
    parts = (inner_shares[:, outer] * outer_shares).reshape(4, output)
    used = parts > 0
    first = np.where(used, read, source).min(axis=0)
    place = np.where(used, read - first, 0)
    outputs = np.broadcast_to(np.arange(output), place.shape)
    weights = np.zeros((int(place.max()) + 1, output))
    np.add.at(weights, (place, outputs), parts)
    reached_from, reached_to = np.full(source, output), np.zeros(source, np.int64)
    np.minimum.at(reached_from, read[used], outputs[used])
    np.maximum.at(reached_to, read[used], outputs[used])
    reached_from[reached_from == output] = 0  # a source that nothing reads counts for output 0, which does no harm
    sources = np.minimum(first + np.arange(len(weights))[:, None], source - 1)  # past the end only with a share of 0
    return Axis(sources, weights.astype(np.float32), reached_from, reached_to)


def upsampled_mask(logits_hw: NDArray[np.float32], rows: Axis, columns: Axis, encode: bool = True) -> Mask:
    """Upsample one query's mask logits and keep what is positive.

    Args:
        logits_hw: (h, w) float32.
        rows: From h to the output's height.
        columns: From w to the output's width.
        encode: Whether run lengths are wanted.
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
    strip = min(right - left, max(1, STRIP // (bottom - top)))
    room_WH, spare_WH = np.empty((2, strip, bottom - top), np.float32)
    for start in range(left, right, strip):
        stop = min(start + strip, right)
        values = room_WH[: stop - start]
        columns.resize(tall_wH, start, stop, values, spare_WH[: stop - start])
        inside = np.greater(values, 0, out=inside_WH[start - left : stop - left, :-1])
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
    tall_Hw, spare_Hw = np.empty((2, bottom - top, logits_hw.shape[1]), np.float32)
    rows.resize(logits_hw, top, bottom, tall_Hw, spare_Hw)
    return np.ascontiguousarray(tall_Hw.T)


def _sum_of_sigmoids(values: NDArray[np.float32]) -> float:
    """Sum of 1 / (1 + exp(-value)); overwrites its argument."""
    np.negative(values, out=values)
    np.exp(values, out=values)
    values += 1
    np.reciprocal(values, out=values)
    return float(values.sum())


def _bilinear(source: int, target: int) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """The two sources that each target reads, and their weights: (2, target) each."""
    position = np.maximum((np.arange(target) + 0.5) * (source / target) - 0.5, 0)
    lower = np.minimum(position.astype(np.int64), source - 1)
    upper = np.minimum(lower + 1, source - 1)
    fraction = position - lower
    return np.stack([lower, upper]), np.stack([1 - fraction, fraction])
