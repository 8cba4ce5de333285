"""COCO run-length encoding of masks, in NumPy.

The format is pycocotools': pixels in column-major order, runs of zeros and ones in turn, each length
written as a little-endian base-32 number, from the third on as the difference to the length two before.
pycocotools itself is no dependency of the runtime; the tests hold this module equal to it. Its C code reads past
the end of run lengths that are cut short and loops forever on some that do not fill the mask: `problems` comes first.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, TypedDict

import numpy as np
from numpy.typing import NDArray

from d2zero_runtime.errors import D2ZeroError

MOST_DIGITS = 7  # of a run length: 34 bits and the sign


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


def from_runs(runs: Sequence[int], height: int, width: int) -> RLE:
    """Encode run lengths that fill a mask of (height, width); runs of no pixels in between join their neighbours."""
    bounds = np.cumsum(np.asarray(runs, np.int64))
    kept, count = np.unique(bounds[:-1], return_counts=True)  # where a run of no pixels is, two bounds cancel
    kept = kept[(count % 2 == 1) & (kept < height * width)]
    return {"size": [height, width], "counts": _compress(np.diff(kept, prepend=0, append=height * width))}


def decode(rle: RLE | dict[str, Any]) -> NDArray[np.bool_]:
    """Decode to a (H, W) boolean mask.

    Raises:
        D2ZeroError: the runs do not fill the mask.
    """
    height, width = rle["size"]
    runs = _runs(rle)
    values = np.arange(len(runs)) % 2 == 1
    return np.repeat(values, runs).reshape(width, height).T


def area(rle: RLE | dict[str, Any]) -> int:
    """Pixels inside the mask.

    Raises:
        D2ZeroError: the runs do not fill the mask.
    """
    return int(_runs(rle)[1::2].sum())


def problems(counts: Sequence[str | bytes], sizes: Sequence[tuple[int, int]]) -> list[str]:
    """What is wrong with the run lengths of each mask, or an empty text: they must fill (height, width).

    Masks are checked together: a few hundred in the time of a dozen, one by one.
    """
    if not counts or not _parsed(counts, sizes).problem:
        return [""] * len(counts)
    return [_parsed([text], [size]).problem for text, size in zip(counts, sizes, strict=True)]


class _Parsed(NamedTuple):
    """Run lengths of several masks in one array, or what is wrong with at least one of them."""

    runs: NDArray[np.int64]
    problem: str = ""


def _runs(rle: RLE | dict[str, Any]) -> NDArray[np.int64]:
    """Of one mask; what is wrong is looked into only if the sum is."""
    text = rle["counts"]
    codes = np.frombuffer(text.encode("ascii", "replace") if isinstance(text, str) else text, np.uint8) - np.uint8(48)
    last = np.flatnonzero((codes & 0x20) == 0)
    runs = _numbers(codes, last, np.diff(last, prepend=-1)) if len(last) else np.zeros(0, np.int64)
    for first in (1, 2):
        runs[first::2] = np.cumsum(runs[first::2])
    if not len(runs) or runs.min() < 0 or runs.sum() != rle["size"][0] * rle["size"][1]:
        raise D2ZeroError(f"a mask {_parsed([text], [tuple(rle['size'])]).problem or 'cannot be read'}")
    return runs


def _parsed(counts: Sequence[str | bytes], sizes: Sequence[tuple[int, int]]) -> _Parsed:
    def bad(problem: str) -> _Parsed:
        return _Parsed(np.zeros(0, np.int64), problem)

    try:
        texts = [text.decode("ascii") if isinstance(text, bytes) else text for text in counts]
        joined = "".join(texts).encode("ascii")
    except (TypeError, UnicodeError):
        return bad("has run lengths that are no ASCII text")
    if not all(texts):
        return bad("has no run lengths")
    codes = np.frombuffer(joined, np.uint8) - np.uint8(48)
    ends = np.cumsum(list(map(len, texts)))
    if codes.max() > 63:
        return bad("has run lengths with characters that COCO's compressed form does not have")
    last = np.flatnonzero(codes < 32)  # of each number's digits
    if codes[ends - 1].max() > 31:
        return bad("has run lengths that are cut short")
    digits = np.diff(last, prepend=-1)
    if digits.max() > MOST_DIGITS:
        return bad("has a run length of too many digits")
    stops = np.searchsorted(last, ends)  # of each mask's numbers
    starts = np.concatenate([[0], stops[:-1]])
    runs = _without_differences(_numbers(codes, last, digits), starts, stops)
    pixels = np.array([height * width for height, width in sizes], np.int64)
    if runs.min() < 0:
        return bad(f"has a run of {runs.min()} pixels")
    sums = np.add.reduceat(runs, starts)
    if (sums != pixels).any():
        height, width = sizes[0]
        return bad(f"has run lengths that sum to {sums[0]}, expected height x width = {height} x {width} = {pixels[0]}")
    empty = runs == 0
    empty[starts] = empty[stops - 1] = False
    if empty.any():  # pycocotools ends a comparison there
        return bad("has a run of no pixels between others")
    return _Parsed(runs)


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


def _numbers(codes: NDArray[np.uint8], last: NDArray[np.int64], digits: NDArray[np.int64]) -> NDArray[np.int64]:
    """Little-endian base-32 numbers whose digits end at `last`; the highest bit of the last one is the sign."""
    numbers = (codes[last] & 0x1F).astype(np.int64)
    numbers -= (numbers & 0x10) << 1
    for place in range(1, min(MOST_DIGITS, int(digits.max()))):
        longer = np.flatnonzero(digits > place)
        numbers[longer] = numbers[longer] << 5 | (codes[last[longer] - place] & 0x1F)
    return numbers


def _without_differences(
    numbers: NDArray[np.int64], starts: NDArray[np.int64], stops: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Run lengths of masks that lie one after the other; a length is that two before it plus a number.

    Running sums of every other number, from which each mask takes what was there when it began. Its first length
    stands for itself: the third does not build on it.
    """
    lengths = stops - starts
    pairs = (lengths + 1) // 2
    first = np.cumsum(pairs) - pairs
    place = np.arange(2, len(numbers) + 2) + np.repeat(2 * first - starts, lengths)
    sums = np.zeros(2 * int(pairs.sum()) + 2, np.int64)  # two zeros, then each mask's numbers in pairs
    sums[place] = numbers
    sums[2 + 2 * first] = 0
    for parity in (0, 1):
        chain = np.cumsum(sums[parity::2])
        chain[1:] -= np.repeat(chain[first], pairs)
        sums[parity::2] = chain
    runs: NDArray[np.int64] = sums[place]
    runs[starts] = numbers[starts]
    return runs
