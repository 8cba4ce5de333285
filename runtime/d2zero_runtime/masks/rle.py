"""COCO run-length encoding of masks, in NumPy.

The format is pycocotools': pixels in column-major order, alternating runs of zeros and ones, each length
written as a little-endian base-32 number, from the third on as the difference to the length two before.
pycocotools itself is no dependency of the runtime; the tests compare this module with it. Its C code reads past
the end of run lengths that are cut short and loops forever on some that do not fill the mask: `problems` comes first.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, TypedDict

import numpy as np
from numpy.typing import NDArray

from d2zero_runtime.errors import D2ZeroError

MOST_DIGITS = 6  # of a run length: 29 bits and the sign


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
        D2ZeroError: The runs do not fill the mask.
    """
    height, width = rle["size"]
    runs = _runs(rle)
    values = np.arange(len(runs)) % 2 == 1
    return np.repeat(values, runs).reshape(width, height).T


def area(rle: RLE | dict[str, Any]) -> int:
    """Pixels inside the mask.

    Raises:
        D2ZeroError: The runs do not fill the mask.
    """
    return int(_runs(rle)[1::2].sum(dtype=np.int64))


def problems(counts: Sequence[str | bytes], sizes: Sequence[tuple[int, int]]) -> list[str]:
    """What is wrong with the run lengths of each mask, or an empty text: they must fill (height, width).

    Masks are checked together: a few hundred in the time of a dozen, one by one.
    """
    if not counts or not _problem(counts, sizes):
        return [""] * len(counts)
    return [_problem([text], [size]) for text, size in zip(counts, sizes, strict=True)]


def _runs(rle: RLE | dict[str, Any]) -> NDArray[np.int32]:
    """Of one mask; what is wrong is looked into only if the sum is."""
    text = rle["counts"]
    codes = np.frombuffer(text.encode("ascii", "replace") if isinstance(text, str) else text, np.uint8) - np.uint8(48)
    goes_on = codes & 0x20 != 0
    runs = None if not len(codes) or goes_on[-1] else _numbers(codes & np.uint8(0x1F), goes_on)
    if runs is not None:
        for first in (1, 2):
            runs[first::2] = np.cumsum(runs[first::2])
    if runs is None or runs.min() < 0 or runs.sum(dtype=np.int64) != rle["size"][0] * rle["size"][1]:
        raise D2ZeroError(f"a mask {_problem([text], [tuple(rle['size'])]) or 'cannot be read'}")
    return runs


def _problem(counts: Sequence[str | bytes], sizes: Sequence[tuple[int, int]]) -> str:
    """What is wrong with the run lengths of at least one of several masks, or nothing."""
    try:
        texts = [text.decode("ascii") if isinstance(text, bytes) else text for text in counts]
        joined = "".join(texts).encode("ascii")
    except (TypeError, UnicodeError):
        return "has run lengths that are no ASCII text"
    if not all(texts):
        return "has no run lengths"
    codes = np.frombuffer(joined, np.uint8) - np.uint8(48)
    ends = np.cumsum(list(map(len, texts)))
    if codes.max() > 63:
        return "has run lengths with characters that COCO's compressed form does not have"
    goes_on = codes > 31
    if goes_on[ends - 1].any():
        return "has run lengths that are cut short"
    runs = _numbers(codes, goes_on)
    if runs is None:
        return "has a run length of too many digits"
    counts_of_runs = np.add.reduceat(~goes_on, np.append(0, ends[:-1]), dtype=np.int64)
    stops = np.cumsum(counts_of_runs)
    starts = stops - counts_of_runs
    _add_differences(runs, starts)
    if runs.min() < 0:
        return f"has a run of {runs.min()} pixels"
    sums = np.add.reduceat(runs, starts, dtype=np.int64)
    pixels = [height * width for height, width in sizes]
    if sums.tolist() != pixels:
        height, width = sizes[0]
        return f"has run lengths that sum to {sums[0]}, expected height x width = {height} x {width} = {pixels[0]}"
    empty = runs == 0
    empty[starts] = empty[stops - 1] = False
    if empty.any():  # pycocotools ends a comparison there
        return "has a run of no pixels between others"
    return ""


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


def _numbers(codes: NDArray[np.uint8], goes_on: NDArray[np.bool_]) -> NDArray[np.int32] | None:
    """Little-endian base-32 numbers; the highest bit of the last digit is the sign.

    Args:
        codes: Digits, of which the last one does not go on.
        goes_on: Whether another digit of the same number follows.

    Returns None if one has more than `MOST_DIGITS`.
    """
    ends = ~goes_on
    numbers = ((codes[ends] ^ 0x10).view(np.int8) - np.int8(0x10)).astype(np.int32)
    is_long = np.zeros_like(goes_on)
    is_long[1:] = goes_on[:-1] & ends[1:]
    place, at = np.flatnonzero(is_long[ends]), np.flatnonzero(is_long)
    for _ in range(MOST_DIGITS):
        if not len(place):
            return numbers
        at = at - 1
        numbers[place] = numbers[place] << 5 | (codes[at] & 0x1F)
        more = goes_on[at - 1]  # before the first digit is the last one of all
        place, at = place[more], at[more]
    return None


def _add_differences(numbers: NDArray[np.int32], starts: NDArray[np.int64]) -> None:
    """Turn the numbers of consecutive masks into run lengths, in place.

    A length is that two before it plus a number: running sums of every other number, less what the sum was where the
    mask began. A mask's first length is absolute: the third does not build on it. Sums wrap as pycocotools' do.
    """
    first = numbers[starts]
    numbers[starts] = 0
    for parity in (0, 1):
        chain = numbers[parity::2]
        begins = (starts + 1 - parity) // 2
        sums = np.zeros(len(chain) + 1, np.int32)
        np.cumsum(chain, out=sums[1:])
        np.subtract(sums[1:], np.repeat(sums[begins], np.diff(begins, append=len(chain))), out=chain)
    numbers[starts] = first
