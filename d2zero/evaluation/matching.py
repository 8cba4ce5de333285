"""Which detections of one class in one image are true, at each IoU threshold.

Overlaps and matching are pycocotools', asked only where there is something to match: most classes that are
detected in an image have no annotation there.
"""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

IOU_TYPES = ("segm", "bbox")
IOU_THRESHOLDS = np.concatenate([[0.4], np.linspace(0.5, 0.95, 10)])
MAX_DETECTIONS = 100  # of a class in an image
SIZES = [0, 1e10]  # pixels; detections of other sizes are ignored where they match nothing
LEVELS = np.uint16(1) << np.arange(len(IOU_THRESHOLDS), dtype=np.uint16)  # a bit a threshold
ALL_LEVELS = int(LEVELS.sum())

Entries = list[dict[str, Any]]


class Flags(NamedTuple):
    """A bit a threshold, of n detections: matches an annotation; does not count."""

    hits: NDArray[np.uint16]
    ignored: NDArray[np.uint16]


def unmatched(detections: Entries) -> Flags:
    """Flags of detections that match nothing."""
    sizes = [entry["bbox"][2] * entry["bbox"][3] for entry in detections]
    ignored = [0 if SIZES[0] <= size <= SIZES[1] else ALL_LEVELS for size in sizes]
    return Flags(np.zeros(len(sizes), np.uint16), np.array(ignored, np.uint16))


def without_unmatched(flags: Flags) -> Flags:
    """The same, but what matches nothing does not count: it may be an instance that nobody annotated."""
    return flags._replace(ignored=flags.ignored | (np.uint16(ALL_LEVELS) & ~flags.hits))


class Matcher:
    """Matches masks (`segm`) or boxes (`bbox`)."""

    def __init__(self, kind: str) -> None:
        from pycocotools.cocoeval import COCOeval  # what imports evaluation and does not evaluate does without

        self._evaluation = COCOeval(iouType=kind)
        self._evaluation.params.iouThrs = IOU_THRESHOLDS
        self._evaluation.params.maxDets = [MAX_DETECTIONS]

    def match(self, truth: Entries, detections: Entries) -> Flags:
        """Flags of at most `MAX_DETECTIONS` detections, best first, against annotations of their class and image.

        Both have `bbox` and compressed `segmentation`; annotations also `area` and `iscrowd`. There is at least one
        of each. Ids are counted: pycocotools takes an id of 0 for "no match", and ids given twice for one annotation.
        """
        key = (0, 0)  # the only image and class
        ours = [{**entry, "id": number, "ignore": entry["iscrowd"]} for number, entry in enumerate(truth, 1)]
        theirs = [
            {**entry, "id": number, "area": entry["bbox"][2] * entry["bbox"][3]}
            for number, entry in enumerate(detections, 1)
        ]
        self._evaluation._gts, self._evaluation._dts = {key: ours}, {key: theirs}
        self._evaluation.ious = {key: self._evaluation.computeIoU(*key)}
        result = self._evaluation.evaluateImg(*key, SIZES, MAX_DETECTIONS)
        return Flags(LEVELS @ (result["dtMatches"] > 0), LEVELS @ result["dtIgnore"])
