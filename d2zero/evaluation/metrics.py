"""Zero-shot accuracy: AP and recall of seen and unseen classes, and their harmonic means.

Matching of detections to annotations is pycocotools'. Accumulation is done here, in a form whose memory
grows with the number of detections alone: a score and a row of flags each.

AP and Recall@100 are averaged over the classes that have annotations, in percent. `ap` is COCO's
AP@[.5:.95].
"""

import contextlib
import io
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from d2zero.data.coco import CocoFile, decode_mask
from d2zero_runtime import D2ZeroError, Mode, rle
from d2zero_runtime.errors import listed

IOU_TYPES = ("segm", "bbox")
IOU_THRESHOLDS = np.concatenate([[0.4], np.linspace(0.5, 0.95, 10)])
MAX_DETECTIONS = 100
RECALL_LEVELS = np.linspace(0, 1, 101)
CHUNK = 64  # images matched at a time

Entries = list[dict[str, Any]]


@dataclass
class _ClassRecord:
    """All that a class's curves need: T thresholds, n detections."""

    instances: int = 0  # annotations that count
    scores: list[NDArray[np.float64]] = field(default_factory=list)  # (n,)
    hits: list[NDArray[np.bool_]] = field(default_factory=list)  # (T, n)
    ignored: list[NDArray[np.bool_]] = field(default_factory=list)  # (T, n)

    def extend(self, results: Entries) -> None:
        """Take in pycocotools' matching of some images, as one array each: thousands of small ones cost more."""
        self.instances += sum(int((np.asarray(result["gtIgnore"]) == 0).sum()) for result in results)
        found = [result for result in results if result["dtScores"]]
        if found:
            self.scores.append(np.concatenate([np.asarray(result["dtScores"], np.float64) for result in found]))
            self.hits.append(np.concatenate([np.asarray(result["dtMatches"]) > 0 for result in found], axis=1))
            self.ignored.append(
                np.concatenate([np.asarray(result["dtIgnore"]).astype(bool) for result in found], axis=1)
            )

    def curves(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Average precision and recall at each threshold, (T,) each, in 0..1."""
        levels = len(IOU_THRESHOLDS)
        if not self.scores:
            return np.zeros(levels), np.zeros(levels)
        order = np.argsort(-np.concatenate(self.scores), kind="mergesort")
        hits = np.concatenate(self.hits, axis=1)[:, order]
        counted = ~np.concatenate(self.ignored, axis=1)[:, order]
        true = np.cumsum(hits & counted, axis=1, dtype=np.float64)
        false = np.cumsum(~hits & counted, axis=1, dtype=np.float64)
        recall = true / self.instances
        precision = true / (true + false + np.spacing(1))
        precision = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
        average = np.zeros(levels)
        for level in range(levels):
            at = np.searchsorted(recall[level], RECALL_LEVELS, side="left")
            average[level] = precision[level, at[at < recall.shape[1]]].sum() / len(RECALL_LEVELS)
        return average, recall[:, -1]


class ZeroShotScores:
    """Collects detections image by image and sums them up.

    Args:
        annotations: the ground truth.
        seen: names of the seen classes.
    """

    def __init__(self, annotations: CocoFile, seen: Iterable[str]) -> None:
        self.annotations = annotations
        self.seen = frozenset(seen)
        self.records: dict[str, dict[int, _ClassRecord]] = {kind: defaultdict(_ClassRecord) for kind in IOU_TYPES}
        self.images = 0
        self.detections = 0

    def add(self, image_ids: Sequence[int], detections: Entries) -> None:
        """Add images with all their detections (COCO result entries).

        Raises:
            D2ZeroError: a detection is of another image or an unknown category.
        """
        self._check(set(image_ids), detections)
        entries = [entry for number in image_ids for entry in self.annotations.annotations.get(number, [])]
        # pycocotools takes an id of 0 for "no match", and ids given twice for one annotation.
        truth = [{**self._complete(entry), "id": number} for number, entry in enumerate(entries, 1)]
        self.images += len(image_ids)
        self.detections += len(detections)
        for kind in IOU_TYPES:
            self._add(kind, image_ids, truth, detections)

    def _complete(self, entry: dict[str, Any]) -> dict[str, Any]:
        """An annotation with the box and area that matching needs, from its mask where they are missing."""
        if "bbox" in entry and "area" in entry:
            return entry
        image = self.annotations.images[entry["image_id"]]
        encoded = rle.encode(decode_mask(entry, image["height"], image["width"]))
        return {"bbox": coco_mask.toBbox(encoded).tolist(), "area": rle.area(encoded), **entry}

    def _add(self, kind: str, image_ids: Sequence[int], truth: Entries, detections: Entries) -> None:
        with contextlib.redirect_stdout(io.StringIO()):
            ground = COCO()
            ground.dataset = {
                "info": {},
                "images": [self.annotations.images[number] for number in image_ids],
                "annotations": truth,
                "categories": [{"id": n, "name": name} for name, n in self.annotations.categories.items()],
            }
            ground.createIndex()
            found = ground.loadRes([dict(entry) for entry in detections]) if detections else COCO()
            matching = COCOeval(ground, found, kind)
            matching.params.iouThrs = IOU_THRESHOLDS
            matching.params.maxDets = [MAX_DETECTIONS]
            matching.params.areaRng = [[0, 1e10]]
            matching.params.areaRngLbl = ["all"]
            matching.params.imgIds = list(image_ids)
            matching.params.catIds = list(self.annotations.categories.values())
            matching.evaluate()
        of_class: dict[int, list[dict[str, Any]]] = defaultdict(list)
        for result in matching.evalImgs:
            if result is not None:
                of_class[result["category_id"]].append(result)
        for number, results in of_class.items():
            self.records[kind][number].extend(results)

    def _check(self, image_ids: set[int], detections: Entries) -> None:
        known = set(self.annotations.categories.values())
        strange = sorted({entry["category_id"] for entry in detections} - known)
        if strange:
            raise D2ZeroError(
                f"detections of categories that {self.annotations.path.name} does not have: ids {listed(strange)}"
            )
        elsewhere = sorted({entry["image_id"] for entry in detections} - image_ids)
        if elsewhere:
            raise D2ZeroError(f"detections of images that are not evaluated: ids {listed(elsewhere)}")

    def summary(self, mode: Mode) -> dict[str, Any]:
        """All figures, in percent: `{"segm": …, "bbox": …, "images": …, "detections": …}`.

        ZSIS looks at unseen classes alone, whether or not the file annotates seen ones too.
        """
        figures: dict[str, Any] = {kind: self._summary(kind, mode) for kind in IOU_TYPES}
        return {
            "mode": str(mode),
            "images": self.images,
            "detections": self.detections,
            "annotations": sum(row["instances"] for row in figures["segm"]["per_class"].values()),
            **figures,
        }

    def _summary(self, kind: str, mode: Mode) -> dict[str, Any]:
        per_class: dict[str, dict[str, Any]] = {}
        for number, name in self.annotations.names.items():
            record = self.records[kind].get(number)
            if record is None or not record.instances or (mode is Mode.ZSIS and name in self.seen):
                continue
            average, recall = record.curves()
            per_class[name] = {
                "seen": name in self.seen,
                "instances": record.instances,
                "ap": 100 * float(average[1:].mean()),
                **{f"ap{_percent(t)}": 100 * float(average[_at(t)]) for t in (0.4, 0.5, 0.6)},
                **{f"recall{_percent(t)}": 100 * float(recall[_at(t)]) for t in (0.4, 0.5, 0.6)},
            }
        rows = list(per_class.values())
        figures = {key: _mean(rows, key) for key in ("ap", "ap40", "ap50", "ap60", "recall40", "recall50", "recall60")}
        unseen = [row for row in rows if not row["seen"]]
        for key in ("ap", "ap50", "recall40", "recall50", "recall60"):
            figures[f"unseen_{key}"] = _mean(unseen, key)
        if mode is not Mode.ZSIS:
            seen = [row for row in rows if row["seen"]]
            for key in ("ap", "ap50", "recall50"):
                figures[f"seen_{key}"] = _mean(seen, key)
                figures[f"hm_{key}"] = harmonic_mean(figures[f"seen_{key}"], figures[f"unseen_{key}"])
        return {**figures, "per_class": per_class}


def harmonic_mean(seen: float | None, unseen: float | None) -> float | None:
    """2·s·u / (s + u); 0 if both are, None if one is missing."""
    if seen is None or unseen is None:
        return None
    return 2 * seen * unseen / (seen + unseen) if seen + unseen else 0.0


def score_detections(annotations: CocoFile, detections: Entries, seen: Iterable[str], mode: Mode) -> dict[str, Any]:
    """Evaluate a COCO result list against an annotation file.

    Raises:
        D2ZeroError: entries are malformed, or refer to images or categories that the file does not have.
    """
    by_image = _grouped(detections, annotations)
    scores = ZeroShotScores(annotations, seen)
    ids = list(annotations.images)
    for start in range(0, len(ids), CHUNK):
        chunk = ids[start : start + CHUNK]
        scores.add(chunk, [entry for number in chunk for entry in by_image.get(number, [])])
    return scores.summary(mode)


def _grouped(detections: Entries, annotations: CocoFile) -> dict[int, Entries]:
    by_image: dict[int, Entries] = defaultdict(list)
    for place, entry in enumerate(detections):
        problem = _problem(entry, annotations)
        if problem:
            raise D2ZeroError(f"detection number {place} {problem}")
        by_image[entry["image_id"]].append(entry)
    return by_image


def _problem(entry: Any, annotations: CocoFile) -> str:
    """What is wrong with a COCO result entry, or nothing."""
    if not isinstance(entry, dict):
        return f"is {entry!r}; expected COCO result entries"
    missing = {"image_id", "category_id", "score", "bbox", "segmentation"} - entry.keys()
    if missing:
        return f"lacks {', '.join(sorted(missing))}; expected COCO result entries with masks"
    if entry["image_id"] not in annotations.images:
        return f"is of image {entry['image_id']}, which {annotations.path.name} does not list"
    numbers = entry["bbox"] if isinstance(entry["bbox"], list) and len(entry["bbox"]) == 4 else [None]
    for value in (entry["score"], *numbers):
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            return f"needs a finite score and bbox [x, y, width, height], got {entry['score']!r}, {entry['bbox']!r}"
    image, mask = annotations.images[entry["image_id"]], entry["segmentation"]
    size = [image["height"], image["width"]]
    if not isinstance(mask, dict) or mask.get("size") != size or not isinstance(mask.get("counts"), (str, bytes)):
        found = mask.get("size") if isinstance(mask, dict) else type(mask).__name__
        return f"needs a compressed RLE mask of its image's size {size}, got {found}"
    return ""


def _mean(rows: Sequence[Mapping[str, Any]], key: str) -> float | None:
    return float(np.mean([row[key] for row in rows])) if rows else None


def _at(threshold: float) -> int:
    return int(np.argmin(np.abs(IOU_THRESHOLDS - threshold)))


def _percent(threshold: float) -> int:
    return round(100 * threshold)
