"""What the values of a COCO file may be: ids, sizes, flags, boxes, masks.

Annotations and results are checked here, by one set of functions, before anything else uses them. What has one
meaning is put right: box and area are the mask's where they are missing or no numbers, an `iscrowd` of null or
"0" is 0, a whole number may be written 3.0. Anything else is named by a text for the caller to refuse or to count.

pycocotools' C code crashes, hangs or takes all memory on values that it does not expect (cocoapi#380, cvat#9460):
it sees only what `form_problem` and `WaitingMasks` have passed.
"""

import math
import reprlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from d2zero.data.polygons import MAX_COORDINATE, measured
from d2zero_runtime.masks import rle

MAX_PIXELS = 1 << 28  # of an image, such as 16384 x 16384
MAX_OUTLINE = 1 << 22  # of an annotation's polygons, in pixels: pycocotools takes 40 bytes for each

LEAST_POINTS = 3  # of a polygon
TOGETHER = 128  # masks that are checked at a time

Id = int | str
Size = tuple[int, int]  # height, width
_Polygons = tuple[Any, list[list[float]], Size]  # what they belong to, they, their image's size

NO_PIXEL = "has a mask of no pixel"
NUMBERS = frozenset((int, float))
FLAGS = {None: 0, "": 0, "0": 0, "1": 1, "false": 0, "true": 1, 0: 0, 1: 1}  # 0.0, 1.0 and booleans are 0 and 1

_short = reprlib.Repr()
_short.maxstring = _short.maxlong = _short.maxother = 40


def shown(value: Any) -> str:
    """A value for an error line: short, whatever it is."""
    return "null" if value is None else _short.repr(value)


def as_whole(value: Any) -> int | None:
    """A whole number, also if it is written 3.0; None for anything else."""
    if type(value) is float and value.is_integer():
        return int(value)
    return value if type(value) is int else None


def as_id(value: Any) -> Id | None:
    """A whole number or a text; None for anything else."""
    return value if type(value) is int or (isinstance(value, str) and value) else as_whole(value)


def as_box(value: Any) -> list[float] | None:
    """Four finite numbers x, y, width, height; None for anything else."""
    if type(value) is not list or len(value) != 4 or not NUMBERS.issuperset(map(type, value)):
        return None
    x, y, width, height = value
    low, high = -MAX_COORDINATE, MAX_COORDINATE  # no number is what NaN is
    fits = low <= x <= high and low <= y <= high and low <= width <= high and low <= height <= high
    return value if fits else None


def text_problem(value: Any) -> str:
    """What is wrong with a name, or nothing."""
    if not isinstance(value, str) or not value.strip():
        return f"{shown(value)}, expected text"
    if "\0" in value or any("\ud800" <= letter <= "\udfff" for letter in value):
        return f"{shown(value)}, which holds a character that no name can have"
    return ""


def size_problem(entry: Mapping[str, Any]) -> str:
    """What is wrong with an image's size, or nothing."""
    sides = [as_whole(entry[key]) for key in ("height", "width")]
    if not all(side and side > 0 for side in sides):
        return f"{shown(entry['height'])} x {shown(entry['width'])}, expected positive whole numbers"
    if math.prod(side for side in sides if side) > MAX_PIXELS:
        return f"{shown(entry['height'])} x {shown(entry['width'])}, more than {MAX_PIXELS} pixels"
    return ""


def foreign(value: Id, listed: Mapping[Id, Any], file: str) -> str:
    """Says that an id is not among those that a file lists, or is there as the other type."""
    other: Id | None = str(value) if isinstance(value, int) else None
    if isinstance(value, str) and len(value) < 40 and value.removeprefix("-").isdecimal():
        other = int(value)
    if other not in listed:
        return f"{shown(value)}, which {file} does not list"
    kinds = ("number", "text") if isinstance(value, int) else ("text", "number")
    return f"{shown(value)} (a {kinds[0]}), which {file} lists as a {kinds[1]}"


def tidy(entry: dict[str, Any]) -> str:
    """Put an annotation's ids, flag, box and area right, in place; returns what cannot be, or nothing.

    A box or an area that is unusable is taken out: who needs it takes the mask's.
    """
    for key in ("image_id", "category_id"):
        if type(entry[key]) is not int:
            number = as_id(entry[key])
            if number is None:
                return f"has the {key} {shown(entry[key])}, expected a whole number or text"
            entry[key] = number
    crowd = entry.get("iscrowd")
    if type(crowd) is not int or not 0 <= crowd <= 1:
        try:
            entry["iscrowd"] = FLAGS[crowd.lower() if isinstance(crowd, str) else crowd]
        except (KeyError, TypeError):
            return f"has iscrowd {shown(crowd)}, expected 0 or 1"
    if "bbox" in entry and as_box(entry["bbox"]) is None:
        del entry["bbox"]
    if "area" in entry and not (type(entry["area"]) in NUMBERS and 0 <= entry["area"] <= MAX_PIXELS):
        del entry["area"]
    return ""


class WaitingMasks:
    """Masks whose form is right, to check many together.

    Args:
        report: Called with what a mask belongs to and what is wrong with it; `NO_PIXEL` may be no mistake.
    """

    def __init__(self, report: Callable[[Any, str], None]) -> None:
        self._report = report
        self._runs: list[tuple[Any, str | bytes, Size]] = []
        self._polygons: list[_Polygons] = []

    def add(self, owner: Any, mask: Any, size: Size) -> None:
        """Note a mask; uncompressed run lengths have been checked with the form."""
        if type(mask) is list:
            self._polygons.append((owner, enclosing(mask), size))
        elif type(mask["counts"]) is not list:
            self._runs.append((owner, mask["counts"], size))
        elif not sum(mask["counts"][1::2]):
            self._report(owner, NO_PIXEL)
        if max(len(self._runs), len(self._polygons)) >= TOGETHER:
            self.check()

    def check(self) -> None:
        """Check what waits."""
        for (owner, text, size), problem in zip(self._runs, rle.problems(*self._columns()), strict=True):
            if problem:
                self._report(owner, problem)
            elif len(text) <= 2 * rle.MOST_DIGITS and not rle.area({"size": [*size], "counts": text}):
                self._report(owner, NO_PIXEL)  # one run, and perhaps a second of 0
        for owner, problem in _polygon_problems(self._polygons):
            self._report(owner, problem)
        self._runs, self._polygons = [], []

    def _columns(self) -> tuple[list[str | bytes], list[Size]]:
        return [text for _, text, _ in self._runs], [size for *_, size in self._runs]


def _polygon_problems(masks: list[_Polygons]) -> Iterator[tuple[Any, str]]:
    """Of each mask that has one: what it belongs to, and its problem."""
    if not masks:
        return
    found = measured(
        [polygon for _, polygons, _ in masks for polygon in polygons],
        [size for _, polygons, size in masks for _ in polygons],
    )
    if found is None and len(masks) == 1:
        yield masks[0][0], f"has a polygon with coordinates that are not finite, or beyond {MAX_COORDINATE} pixels"
    elif found is None:
        for mask in masks:
            yield from _polygon_problems([mask])
    else:
        counts = np.array([len(polygons) for _, polygons, _ in masks])
        first = np.cumsum(counts) - counts
        outlines = np.add.reduceat(found.outline, first).tolist()
        broad = np.add.reduceat(found.broad, first, dtype=np.int64).tolist()
        for (owner, polygons, size), outline, is_broad in zip(masks, outlines, broad, strict=True):
            if outline > MAX_OUTLINE:
                yield owner, f"has polygons with an outline of more than {MAX_OUTLINE} pixels"
            elif not is_broad and not _has_pixel(polygons, size):
                yield owner, NO_PIXEL


def _has_pixel(polygons: list[list[float]], size: Size) -> bool:
    try:
        from pycocotools import mask as coco_mask
    except ModuleNotFoundError:  # what draws no mask needs none of it, and can do without knowing
        return True
    return bool(coco_mask.area(encoded(polygons, size)))


def form_problem(mask: Any, size: Size) -> str:
    """What is wrong with a mask (`segmentation`) for an image of that size, or nothing.

    Numbers in compressed run lengths and in polygons are left to `WaitingMasks`, which checks many at a time.
    """
    if not mask:
        return "has no mask ('segmentation')"
    if isinstance(mask, list):
        return _list_problem(mask)
    if not isinstance(mask, dict) or "counts" not in mask:
        return f"has a mask of {shown(mask)}, expected polygons or {{'size', 'counts'}}"
    if mask.get("size") != [*size]:  # 96.0 is 96 here
        return f"has a mask of size {shown(mask.get('size'))}, its image has [height, width] {[*size]}"
    counts = mask["counts"]
    if isinstance(counts, list):
        return _runs_problem(counts, size)
    return "" if isinstance(counts, (str, bytes)) else f"has run lengths of {shown(counts)}, expected a text or a list"


def _runs_problem(runs: list[Any], size: Size) -> str:
    whole = [as_whole(run) for run in runs]
    bad = [run for run, number in zip(runs, whole, strict=True) if number is None or number < 0]
    if bad:
        return f"has a run length of {shown(bad[0])}, expected whole numbers from 0 on"
    total = sum(run for run in whole if run)
    height, width = size
    expected = f"expected height x width = {height} x {width} = {height * width}"
    return "" if total == height * width else f"has run lengths that sum to {shown(total)}, {expected}"


def _list_problem(polygons: list[Any]) -> str:
    """Of polygons, except for how large their numbers are."""
    for polygon in polygons:
        if type(polygon) is not list:
            return f"has polygons with {shown(polygon)}, expected lists [x, y, x, y, …] in a list"
        if not NUMBERS.issuperset(map(type, polygon)):
            strange = next(value for value in polygon if type(value) not in NUMBERS)
            return f"has a polygon with {shown(strange)}, expected numbers"
        if len(polygon) % 2:
            return f"has a polygon of {len(polygon)} coordinates, expected an even number"
    if not enclosing(polygons):
        points = max(map(len, polygons)) // 2
        return f"has a polygon of {points} points, expected at least {LEAST_POINTS}"
    return ""


def enclosing(polygons: list[list[float]]) -> list[list[float]]:
    """Those that can enclose something: a stray point or line beside them is part of no mask."""
    return [polygon for polygon in polygons if len(polygon) >= 2 * LEAST_POINTS]


def encoded(mask: Any, size: Size) -> dict[str, Any]:
    """A mask that has no problem as compressed run lengths."""
    height, width = size
    if isinstance(mask, dict) and not isinstance(mask["counts"], list):
        return {"size": [height, width], "counts": mask["counts"]}
    if isinstance(mask, dict):
        return {**rle.from_runs([int(run) for run in mask["counts"]], height, width)}
    from pycocotools import mask as coco_mask  # what trains on drawn masks does without

    merged: dict[str, Any] = coco_mask.merge(coco_mask.frPyObjects(enclosing(mask), height, width))
    return merged


def decoded(mask: Any, size: Size) -> NDArray[np.bool_]:
    """A mask that has no problem as (H, W) bool."""
    from pycocotools import mask as coco_mask

    bitmap: NDArray[np.bool_] = coco_mask.decode(encoded(mask, size)).astype(bool)
    return bitmap
