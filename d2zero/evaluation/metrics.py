"""Zero-shot accuracy: AP and recall of seen and unseen classes, and their harmonic means.

Matching is left to `d2zero.evaluation.matching`. Accumulation is done here, in a form whose memory grows with
only the number of detections: 16 bytes each, a score and flags.

Where images say which classes were looked for, as in LVIS, its rules hold: detections of a class count only in
images where it is annotated or verified to be absent; where not every instance is annotated, those that match
nothing do not count. LVIS itself keeps 300 detections per image, of all classes together; here it is
`MAX_DETECTIONS` per class and image, as in COCO.

AP and Recall@100 are averaged over the classes that have annotations, in percent. `ap` is COCO's
AP@[.5:.95].
"""

from array import array
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from d2zero.data.coco import CocoFile
from d2zero.data.coco_entries import ABSENT, INCOMPLETE
from d2zero.data.coco_values import Id, encoded
from d2zero.evaluation.matching import (
    IOU_THRESHOLDS,
    IOU_TYPES,
    LEVELS,
    MAX_DETECTIONS,
    Entries,
    Flags,
    Matcher,
    unmatched,
    without_unmatched,
)
from d2zero.evaluation.result_entries import by_image
from d2zero_runtime import D2ZeroError, Mode
from d2zero_runtime.errors import join_truncated

RECALL_LEVELS = np.linspace(0, 1, 101)


@dataclass(frozen=True)
class Metric:
    """How a metric of a summary is shown, and where.

    Args:
        label: The head of its column.
        unit: Its unit.
        modes: The modes that have it.
    """

    label: str
    unit: str = "%"
    modes: tuple[Mode, ...] = tuple(Mode)


_WITH_SEEN = (Mode.GZSIS, Mode.GZSIS_COPY_PASTE)
# By key of a summary; tables, `verify` and benchmarks show and compare these.
METRICS = {
    "seen_ap50": Metric("seen AP50", modes=_WITH_SEEN),
    "unseen_ap50": Metric("unseen AP50"),
    "hm_ap50": Metric("HM AP50", modes=_WITH_SEEN),
    "seen_recall50": Metric("seen R@100", modes=_WITH_SEEN),
    "unseen_recall40": Metric("unseen R@100 .4", modes=(Mode.ZSIS,)),
    "unseen_recall50": Metric("unseen R@100"),
    "unseen_recall60": Metric("unseen R@100 .6", modes=(Mode.ZSIS,)),
    "hm_recall50": Metric("HM R@100", modes=_WITH_SEEN),
    "ap": Metric("AP .5:.95"),
}


def metrics_of(mode: Mode) -> dict[str, Metric]:
    """The metrics of a mode, by key."""
    return {key: metric for key, metric in METRICS.items() if mode in metric.modes}


@dataclass
class _ClassRecord:
    """All that a class's curves need: a score and four flags a detection, image by image."""

    instances: int = 0  # annotations that count
    scores: "array[float]" = field(default_factory=lambda: array("d"))
    hits: "dict[str, array[int]]" = field(default_factory=lambda: {kind: array("H") for kind in IOU_TYPES})
    ignored: "dict[str, array[int]]" = field(default_factory=lambda: {kind: array("H") for kind in IOU_TYPES})

    def extend(self, kind: str, flags: Flags) -> None:
        self.hits[kind].frombytes(flags.hits.tobytes())
        self.ignored[kind].frombytes(flags.ignored.tobytes())

    def curves(self, kind: str) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Average precision and recall at each threshold, (T,) each, in 0..1."""
        average, recall = np.zeros(len(LEVELS)), np.zeros(len(LEVELS))
        if self.scores:
            order = np.argsort(-np.frombuffer(self.scores), kind="mergesort")
            hits = np.frombuffer(self.hits[kind], np.uint16)[order]
            ignored = np.frombuffer(self.ignored[kind], np.uint16)[order]
            for place, level in enumerate(LEVELS):
                counted = (ignored & level) == 0
                average[place], recall[place] = self._means((hits & level)[counted] > 0)
        return average, recall

    def _means(self, hits: NDArray[np.bool_]) -> tuple[float, float]:
        """Average precision and final recall of detections, best first."""
        true = np.cumsum(hits, dtype=np.float64)
        precision = true / (np.arange(1.0, len(true) + 1) + np.spacing(1))
        precision = np.maximum.accumulate(precision[::-1])[::-1]
        at = np.searchsorted(true / self.instances, RECALL_LEVELS, side="left")
        average = precision[at[at < len(precision)]].sum() / len(RECALL_LEVELS)
        return float(average), float(true[-1] / self.instances) if len(true) else 0.0


class ZeroShotScores:
    """Collects detections image by image and sums them up.

    Where scores are equal, what was added first counts as the better; COCO adds images by rising ids.

    Args:
        annotations: The ground truth.
        seen: Names of the seen classes.
    """

    def __init__(self, annotations: CocoFile, seen: Iterable[str]) -> None:
        self.annotations = annotations
        self.seen = frozenset(seen)
        self.records: dict[Id, _ClassRecord] = defaultdict(_ClassRecord)
        self.images = 0
        self.detections = 0
        self.unverified = 0  # detections of classes that nobody looked for in their images
        self._matchers = {kind: Matcher(kind) for kind in IOU_TYPES}
        self._categories = frozenset(annotations.categories.values())

    def add(self, image_id: Id, detections: Entries) -> None:
        """Add an image with all its detections (COCO result entries).

        Raises:
            D2ZeroError: A detection is of another image or an unknown category.
        """
        found = self._by_category(image_id, detections)
        truth: dict[Id, Entries] = defaultdict(list)
        for entry in self.annotations.annotations.get(image_id, ()):
            truth[entry["category_id"]].append(entry)
        self.images += 1
        self.detections += len(detections)
        for category, entries in truth.items():
            self.records[category].instances += sum(not entry.get("iscrowd") for entry in entries)
        image = self.annotations.images[image_id]
        absent, incomplete = image.get(ABSENT), image.get(INCOMPLETE, ())
        for category, entries in found.items():
            if absent is not None and category not in truth and category not in absent:
                self.unverified += len(entries)
                continue
            best = sorted(entries, key=lambda entry: -entry["score"])[:MAX_DETECTIONS]
            self._add(category, self._complete(truth.get(category, ())), best, category not in incomplete)

    def _add(self, category: Id, truth: Entries, detections: Entries, exhaustive: bool) -> None:
        record = self.records[category]
        record.scores.extend(entry["score"] for entry in detections)
        nothing = None if truth else unmatched(detections)  # in masks as in boxes
        for kind, matcher in self._matchers.items():
            flags = nothing or matcher.match(truth, detections)
            record.extend(kind, flags if exhaustive else without_unmatched(flags))

    def _complete(self, entries: Iterable[dict[str, Any]]) -> Entries:
        """Annotations with all that matching needs; box and area from the mask where they are missing."""
        from pycocotools import mask as coco_mask  # what imports evaluation and does not evaluate does without

        found = []
        for entry in entries:
            image = self.annotations.images[entry["image_id"]]
            mask = encoded(entry["segmentation"], (image["height"], image["width"]))  # read_coco has checked it
            found.append(
                {
                    "segmentation": mask,
                    "bbox": entry["bbox"] if "bbox" in entry else coco_mask.toBbox(mask).tolist(),
                    "area": entry["area"] if "area" in entry else int(coco_mask.area(mask)),
                    "iscrowd": entry.get("iscrowd", 0),
                }
            )
        return found

    def _by_category(self, image_id: Id, detections: Entries) -> dict[Id, Entries]:
        found: dict[Id, Entries] = defaultdict(list)
        for entry in detections:
            if entry["image_id"] != image_id:
                raise D2ZeroError(
                    f"detections of images that are not evaluated: ids {join_truncated([entry['image_id']])}"
                )
            found[entry["category_id"]].append(entry)
        strange = found.keys() - self._categories
        if strange:
            raise D2ZeroError(
                f"detections of categories that {self.annotations.path.name} does not have: ids"
                f" {join_truncated(strange)}"
            )
        return found

    def summary(self, mode: Mode) -> dict[str, Any]:
        """All metrics, in percent: `{"segm": …, "bbox": …, "images": …, "detections": …}`.

        ZSIS looks only at unseen classes, whether or not the file annotates seen ones too. Where the file has groups of
        classes, each kind has their means as `groups`; where images say which classes were looked for, `unverified`
        counts the detections of others.
        """
        metrics: dict[str, Any] = {kind: self._summary(kind, mode) for kind in IOU_TYPES}
        if self.annotations.is_federated:
            metrics["unverified"] = self.unverified
        return {
            "mode": str(mode),
            "images": self.images,
            "detections": self.detections,
            "annotations": sum(row["instances"] for row in metrics["segm"]["per_class"].values()),
            **metrics,
        }

    def _summary(self, kind: str, mode: Mode) -> dict[str, Any]:
        per_class: dict[str, dict[str, Any]] = {}
        for number, name in self.annotations.names.items():
            record = self.records.get(number)
            if record is None or not record.instances or (mode is Mode.ZSIS and name in self.seen):
                continue
            average, recall = record.curves(kind)
            per_class[name] = {
                "seen": name in self.seen,
                "instances": record.instances,
                "ap": 100 * float(average[1:].mean()),
                **{f"ap{_percent(t)}": 100 * float(average[_at(t)]) for t in (0.4, 0.5, 0.6)},
                **{f"recall{_percent(t)}": 100 * float(recall[_at(t)]) for t in (0.4, 0.5, 0.6)},
            }
        rows = list(per_class.values())
        metrics: dict[str, Any] = {
            key: _mean(rows, key) for key in ("ap", "ap40", "ap50", "ap60", "recall40", "recall50", "recall60")
        }
        unseen = [row for row in rows if not row["seen"]]
        for key in ("ap", "ap50", "recall40", "recall50", "recall60"):
            metrics[f"unseen_{key}"] = _mean(unseen, key)
        if mode is not Mode.ZSIS:
            seen = [row for row in rows if row["seen"]]
            for key in ("ap", "ap50", "recall50"):
                metrics[f"seen_{key}"] = _mean(seen, key)
                metrics[f"hm_{key}"] = harmonic_mean(metrics[f"seen_{key}"], metrics[f"unseen_{key}"])
        if self.annotations.groups:
            metrics["groups"] = self._groups(per_class)
        return {**metrics, "per_class": per_class}

    def _groups(self, per_class: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
        found = {}
        for group, names in self.annotations.groups.items():
            rows = [per_class[name] for name in names if name in per_class]
            found[group] = {"classes": len(rows), **{key: _mean(rows, key) for key in ("ap", "ap50", "recall50")}}
        return found


def harmonic_mean(seen: float | None, unseen: float | None) -> float | None:
    """2·s·u / (s + u); 0 if both are, None if one is missing."""
    if seen is None or unseen is None:
        return None
    return 2 * seen * unseen / (seen + unseen) if seen + unseen else 0.0


def in_order(ids: Iterable[Id]) -> list[Id]:
    """Ids of one kind, rising."""
    return sorted(ids, key=lambda number: (number, "") if isinstance(number, int) else (0, number))


def score(annotations: CocoFile, detections: Mapping[Id, Entries], seen: Iterable[str], mode: Mode) -> dict[str, Any]:
    """Evaluate COCO result entries by image id; images without any count too.

    Raises:
        D2ZeroError: Entries are of categories that the annotation file does not have.
    """
    scores = ZeroShotScores(annotations, seen)
    for number in in_order(annotations.images):
        scores.add(number, detections.get(number, []))
    return scores.summary(mode)


def score_detections(annotations: CocoFile, detections: Entries, seen: Iterable[str], mode: Mode) -> dict[str, Any]:
    """Evaluate a COCO result list, in any order.

    Raises:
        D2ZeroError: Entries are malformed, or refer to images or categories that the annotation file does not have.
    """
    return score(annotations, by_image(detections, annotations), seen, mode)


def _mean(rows: Sequence[Mapping[str, Any]], key: str) -> float | None:
    return float(np.mean([row[key] for row in rows])) if rows else None


def _at(threshold: float) -> int:
    return int(np.argmin(np.abs(IOU_THRESHOLDS - threshold)))


def _percent(threshold: float) -> int:
    return round(100 * threshold)
