"""Polygons of annotations, many measured together: per polygon, NumPy's calls would take longer than reading it.

Letters: N polygons, P points of all of them.
"""

from collections.abc import Sequence
from itertools import chain
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

MAX_COORDINATE = 1 << 17  # in pixels


class Measures(NamedTuple):
    """What is known of N polygons.

    Args:
        outline: (N,) float64, steps from pixel to pixel, straight or diagonal.
        broad: (N,) bool, whether a polygon is inside its image and encloses too much for no pixel's centre to be
            in it.
    """

    outline: NDArray[np.float64]
    broad: NDArray[np.bool_]


def measured(polygons: Sequence[Sequence[float]], sizes: Sequence[tuple[int, int]]) -> Measures | None:
    """Measure polygons x, y, x, y … of at least a point, in images of (height, width).

    Returns None if a coordinate is not finite or beyond `MAX_COORDINATE`.
    """
    lengths = np.array(list(map(len, polygons))) // 2
    try:
        points_P2 = np.fromiter(chain.from_iterable(polygons), np.float64, 2 * lengths.sum()).reshape(-1, 2)
    except OverflowError:  # a whole number too large for a float
        return None
    if not np.abs(points_P2).max() <= MAX_COORDINATE:
        return None
    first = np.cumsum(lengths) - lengths
    following = np.arange(1, len(points_P2) + 1)
    following[first + lengths - 1] = first
    steps_P2 = points_P2[following] - points_P2
    turns = points_P2[:, 0] * steps_P2[:, 1] - points_P2[:, 1] * steps_P2[:, 0]
    enclosed = np.abs(np.add.reduceat(turns, first)) / 2
    low_N2, high_N2 = np.minimum.reduceat(points_P2, first), np.maximum.reduceat(points_P2, first)
    inside = (low_N2 >= 0).all(axis=1) & (high_N2 <= np.array(sizes)[:, ::-1]).all(axis=1)
    return Measures(
        outline=np.add.reduceat(np.abs(steps_P2).max(axis=1), first),
        broad=inside & (enclosed > 4 * (high_N2 - low_N2).sum(axis=1)),
    )
