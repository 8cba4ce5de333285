"""COCO result entries, from a file or a list: checked, and by image."""

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from d2zero.data.coco import CocoFile
from d2zero.data.json_stream import EntriesOnDisk, JsonStream, open_seekable
from d2zero.evaluation.matching import Entries
from d2zero_runtime import D2ZeroError

KEYS = ("image_id", "category_id", "score", "bbox", "segmentation")


@contextmanager
def open_results(path: Path, annotations: CocoFile) -> Iterator[Mapping[int, Entries]]:
    """Entries of a result file by image id; they stay on disk until an image's are asked for, in any order.

    Raises:
        D2ZeroError: the file is absent, no JSON, cut short or no list; an entry is malformed or of an image that
            the annotation file does not list.
    """
    with open_seekable(path) as stream:
        text, found, check = JsonStream(stream, path), EntriesOnDisk(stream), Check(annotations)
        if text.next() != "[":
            raise D2ZeroError(f"{path} must be a list of COCO results, got a {type(text.value()).__name__}")
        for entry, start, end in text.elements():
            check(entry)
            found.note(entry["image_id"], start, end)
        text.end()
        yield found


def by_image(entries: Iterable[Any], annotations: CocoFile) -> dict[int, Entries]:
    """Entries by image id.

    Raises:
        D2ZeroError: one is malformed or of an image that the annotation file does not list.
    """
    found, check = defaultdict(list), Check(annotations)
    for entry in entries:
        check(entry)
        found[entry["image_id"]].append(entry)
    return dict(found)


class Check:
    """Checks entries one after the other."""

    def __init__(self, annotations: CocoFile) -> None:
        self._annotations, self._count = annotations, 0
        self._sizes = {number: [image["height"], image["width"]] for number, image in annotations.images.items()}

    def __call__(self, entry: Any) -> None:
        """Check the next entry.

        Raises:
            D2ZeroError: it is malformed, or of an image that the annotation file does not list.
        """
        problem = self._problem(entry)
        if problem:
            raise D2ZeroError(f"detection number {self._count} {problem}")
        self._count += 1

    def _problem(self, entry: Any) -> str:
        """What is wrong with it, or nothing."""
        if not isinstance(entry, dict):
            return f"is {entry!r}; expected COCO result entries"
        missing = [key for key in KEYS if key not in entry]
        if missing:
            return f"lacks {', '.join(sorted(missing))}; expected COCO result entries with masks"
        image, box, mask = entry["image_id"], entry["bbox"], entry["segmentation"]
        size = self._sizes.get(image)
        if size is None:
            return f"is of image {image}, which {self._annotations.path.name} does not list"
        numbers = (entry["score"], *box) if isinstance(box, list) and len(box) == 4 else (None,)
        if not all(map(_finite, numbers)):
            return f"needs a finite score and bbox [x, y, width, height], got {entry['score']!r}, {box!r}"
        if not isinstance(mask, dict) or mask.get("size") != size or not _is_text(mask.get("counts")):
            found = mask.get("size") if isinstance(mask, dict) else type(mask).__name__
            return f"needs a compressed RLE mask of its image's size {size}, got {found}"
        return ""


def _finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _is_text(counts: Any) -> bool:
    return isinstance(counts, (str, bytes)) and counts.isascii()
