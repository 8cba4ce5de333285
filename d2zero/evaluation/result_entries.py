"""COCO result entries, from a file or a list: checked, and by image.

The checks are those of annotations (`d2zero.data.coco_values`). Masks may be in any form; a box is the mask's where
it is missing, as in COCO's own results.
"""

import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from d2zero.data.coco import CocoFile
from d2zero.data.coco_entries import lacking
from d2zero.data.coco_values import (
    NO_PIXEL,
    NUMBERS,
    Id,
    WaitingMasks,
    as_box,
    as_id,
    encoded,
    foreign,
    form_problem,
    shown,
)
from d2zero.data.json_stream import EntriesOnDisk, JsonStream, open_seekable
from d2zero.evaluation.matching import Entries
from d2zero_runtime import D2ZeroError

LARGEST = sys.float_info.max
KEYS = frozenset(("image_id", "category_id", "score", "segmentation"))


@contextmanager
def open_results(path: Path, annotations: CocoFile) -> Iterator[Mapping[Id, Entries]]:
    """Entries of a result file by image id; they stay on disk until an image's are asked for, in any order.

    Raises:
        D2ZeroError: The file is absent, no JSON, cut short or no list; an entry is malformed or of an image or a
            category that the annotation file does not list.
    """
    check = Check(annotations, f"{path}: ")
    with open_seekable(path) as stream:
        text, found = JsonStream(stream, path), EntriesOnDisk(stream, check.completed)
        if text.next() != "[":
            value = text.value()
            hint = ""
            if isinstance(value, dict) and "annotations" in value:
                hint = "; `d2zero predict --results-for ANNOTATIONS` writes one"
            raise D2ZeroError(f"{path} must be a list of COCO results, got a {type(value).__name__}{hint}")
        for entry, start, end in check(text.elements()):
            found.note(entry["image_id"], start, end)  # 3.0 finds what 3 does
        text.end()
        yield found


def by_image(entries: Iterable[Any], annotations: CocoFile) -> dict[Id, Entries]:
    """Entries by image id.

    Raises:
        D2ZeroError: One is malformed, or of an image or a category that the annotation file does not list.
    """
    found, check = defaultdict(list), Check(annotations)
    for entry, *_ in check((entry, 0, 0) for entry in entries):
        found[entry["image_id"]].append(entry)
    return {number: list(map(check.completed, entries)) for number, entries in found.items()}


class Check:
    """Checks entries for one annotation file.

    Args:
        annotations: The images and categories that detections must refer to.
        where: The beginning of messages.
    """

    def __init__(self, annotations: CocoFile, where: str = "") -> None:
        self._where = where
        self._name, self._categories = annotations.path.name, annotations.names
        self._sizes = {number: (image["height"], image["width"]) for number, image in annotations.images.items()}

    def __call__(self, elements: Iterable[tuple[Any, int, int]]) -> Iterator[tuple[dict[str, Any], int, int]]:
        """Yield entries with their places again. All have been checked when there are no more, not before.

        Raises:
            D2ZeroError: One is malformed, which is named by its number from 0 on.
        """
        waiting = WaitingMasks(self._refuse)
        for number, element in enumerate(elements):
            entry = element[0]
            problem = self._problem(entry)
            if problem:
                self._refuse(number, problem)
            waiting.add(number, entry["segmentation"], self._sizes[entry["image_id"]])
            yield element
        waiting.check()

    def _refuse(self, number: int, problem: str) -> None:
        if problem != NO_PIXEL:  # a query that found nothing
            raise D2ZeroError(f"{self._where}detection number {number} {problem}")

    def completed(self, entry: dict[str, Any]) -> dict[str, Any]:
        """An entry that has passed, with what scoring needs: a compressed mask and a box."""
        mask, box = encoded(entry["segmentation"], self._sizes[entry["image_id"]]), entry.get("bbox")
        if not box:
            from pycocotools import mask as coco_mask  # what imports evaluation and does not evaluate does without

            box = coco_mask.toBbox(mask).tolist()
        return {**entry, "segmentation": mask, "bbox": box}

    def _problem(self, entry: Any) -> str:
        """What is wrong with it except in the numbers of its mask, or nothing."""
        problem = lacking(entry, KEYS)
        if problem:
            return f"{problem}; expected COCO result entries with masks"
        box = entry.get("bbox")
        if box and as_box(box) is None:
            return f"needs a bbox [x, y, width, height] of finite numbers, or none, got {shown(box)}"
        score = entry["score"]
        if type(score) not in NUMBERS or not -LARGEST <= score <= LARGEST:
            return f"needs a finite score, got {shown(score)}"
        image, category = entry["image_id"], entry["category_id"]
        if type(image) is not int or image not in self._sizes:
            problem = self._id_problem("image", image, self._sizes)
        if type(category) is not int or category not in self._categories:
            problem = problem or self._id_problem("category", category, self._categories)
        return problem or form_problem(entry["segmentation"], self._sizes[image])

    def _id_problem(self, kind: str, value: Any, known: Mapping[Id, Any]) -> str:
        number = as_id(value)
        if number in known:
            return ""
        if number is None:
            return f"has the {kind}_id {shown(value)}, expected a whole number or text"
        return f"is of {kind} {foreign(number, known, self._name)}"
