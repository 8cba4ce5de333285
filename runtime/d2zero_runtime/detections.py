"""The result of segmenting one image, and its conversions.

Letters: N instances, H and W the output image's sides.
"""

from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from d2zero_runtime.errors import D2ZeroError, join_truncated, optional
from d2zero_runtime.masks import rle
from d2zero_runtime.masks.packed import PackedMasks

if TYPE_CHECKING:
    import pandas
    import supervision
    from PIL import Image

    from d2zero_runtime.draw import Instance
    from d2zero_runtime.vocabulary import Vocabulary


@dataclass(frozen=True, eq=False)
class _Region:
    """Where an instance is: a box, x2 and y2 exclusive, and the pixels in it if it has a mask."""

    x1: float
    y1: float
    x2: float
    y2: float
    inside: NDArray[np.bool_] | None

    def iou(self, other: "_Region") -> float:
        """The area that two share, as a share of what they cover."""
        shared = self._shared(other)
        union = self._shared(self) + other._shared(other) - shared
        return shared / union if union > 0 else 0.0

    def _shared(self, other: "_Region") -> float:
        x1, y1 = max(self.x1, other.x1), max(self.y1, other.y1)
        x2, y2 = min(self.x2, other.x2), min(self.y2, other.y2)
        if x2 <= x1 or y2 <= y1:
            return 0.0
        if self.inside is None or other.inside is None:
            return float((x2 - x1) * (y2 - y1))
        ours, theirs = (
            entry.inside[int(y1 - entry.y1) : int(y2 - entry.y1), int(x1 - entry.x1) : int(x2 - entry.x1)]
            for entry in (self, other)
            if entry.inside is not None
        )
        return float(np.count_nonzero(ours & theirs))


@dataclass(frozen=True, eq=False, repr=False)
class Detections:
    """The instances found in one image, best first.

    Args:
        boxes: (N, 4) float32, x1 y1 x2 y2 in pixels, x2 and y2 exclusive; zeros for an empty mask.
        scores: (N,) float32 in 0..1.
        class_ids: (N,) int64, indices into the vocabulary's names.
        names: N class names.
        seen: (N,) bool, False for instances of classes that training never saw.
        masks: N masks as COCO RLE, or as a (N, H, W) bool array, or packed, or None, as they were asked for.
        image_size: (height, width) of the image that boxes and masks refer to.

    Raises:
        D2ZeroError: The fields do not agree.
    """

    boxes: NDArray[np.float32]
    scores: NDArray[np.float32]
    class_ids: NDArray[np.int64]
    names: tuple[str, ...]
    seen: NDArray[np.bool_]
    masks: tuple[rle.RLE, ...] | NDArray[np.bool_] | PackedMasks | None
    image_size: tuple[int, int]

    def __post_init__(self) -> None:
        count = len(self.scores)
        expected = {"boxes": (count, 4), "scores": (count,), "class_ids": (count,), "seen": (count,)}
        for field, shape in expected.items():
            found = np.shape(getattr(self, field))
            if found != shape:
                raise D2ZeroError(f"{field} must have shape {shape}, got {found}")
        for field in ("names", "masks"):
            value = getattr(self, field)
            if value is not None and len(value) != count:
                raise D2ZeroError(f"{field} must have {count} entries, one an instance, got {len(value)}")
        if isinstance(self.masks, PackedMasks):
            wrong = [] if self.masks.size == tuple(self.image_size) else [list(self.masks.size)]
        elif isinstance(self.masks, np.ndarray):
            wrong = [] if self.masks.shape[1:] == tuple(self.image_size) else [list(self.masks.shape[1:])]
        else:
            wrong = [mask["size"] for mask in self.masks or () if tuple(mask["size"]) != tuple(self.image_size)]
        if wrong:
            raise D2ZeroError(f"masks must have the image's size {list(self.image_size)}, got {wrong[0]}")

    def __len__(self) -> int:
        return len(self.scores)

    def __repr__(self) -> str:
        names = join_truncated(dict.fromkeys(self.names)) or "nothing"
        height, width = self.image_size
        return f"<Detections: {len(self)} instances in {width}x{height} pixels ({names})>"

    def __getitem__(self, index: "slice | NDArray[Any] | Sequence[int]") -> "Detections":
        """Choose instances by a slice, indices or a boolean array."""
        rows = np.arange(len(self))[index]
        return Detections(
            boxes=self.boxes[rows],
            scores=self.scores[rows],
            class_ids=self.class_ids[rows],
            names=tuple(self.names[row] for row in rows),
            seen=self.seen[rows],
            masks=self.masks[rows] if isinstance(self.masks, (np.ndarray, PackedMasks)) else self._rles(rows),
            image_size=self.image_size,
        )

    def above(self, score: float) -> "Detections":
        """The instances with at least this score."""
        return self[self.scores >= score]

    def without_empty(self) -> "Detections":
        """The instances whose mask has a pixel."""
        kept = (self.boxes[:, 2] > self.boxes[:, 0]) & (self.boxes[:, 3] > self.boxes[:, 1])
        return self if kept.all() else self[kept]

    def named(self, names: Container[str]) -> "Detections":
        """The instances of these classes."""
        kept = np.array([name in names for name in self.names], bool)
        return self if kept.all() else self[kept]

    def without_duplicates(self, iou: float = 0.7) -> "Detections":
        """Leave out instances whose mask (or box, without masks) overlaps a better one's by more than `iou`.

        For pictures: several queries often find the same object. Accuracy is measured without it.
        """
        regions = [self._region(row) for row in range(len(self))]
        kept: list[int] = []
        for row in map(int, np.argsort(-self.scores, kind="stable")):
            if all(regions[row].iou(regions[other]) <= iou for other in kept):
                kept.append(row)
        return self[sorted(kept)]

    def _region(self, row: int) -> "_Region":
        if self.masks is None:
            x1, y1, x2, y2 = (float(side) for side in self.boxes[row])
            return _Region(x1, y1, x2, y2, None)
        mask_HW = self.bitmap(row)
        rows, columns = np.flatnonzero(mask_HW.any(axis=1)), np.flatnonzero(mask_HW.any(axis=0))
        if not len(rows):
            return _Region(0, 0, 0, 0, None)
        x1, y1, x2, y2 = int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1
        return _Region(x1, y1, x2, y2, mask_HW[y1:y2, x1:x2].copy())

    def bitmaps(self) -> NDArray[np.bool_]:
        """Masks as a (N, H, W) boolean array."""
        masks = self._present_masks()
        if isinstance(masks, np.ndarray):
            return masks
        if isinstance(masks, PackedMasks):
            return masks.bitmaps()
        return np.stack([rle.decode(mask) for mask in masks]) if masks else np.zeros((0, *self.image_size), bool)

    def bitmap(self, row: int) -> NDArray[np.bool_]:
        """One mask as a (H, W) boolean array."""
        masks = self._present_masks()
        if isinstance(masks, PackedMasks):
            only: NDArray[np.bool_] = masks[[row]].bitmaps()[0]
            return only
        mask = masks[row]
        decoded: NDArray[np.bool_] = mask if isinstance(mask, np.ndarray) else rle.decode(mask)
        return decoded

    def _present_masks(self) -> tuple[rle.RLE, ...] | NDArray[np.bool_] | PackedMasks:
        if self.masks is None:
            raise D2ZeroError("these detections carry no masks; ask for them with masks='rle'")
        return self.masks

    def _rles(self, rows: Iterable[int]) -> tuple[rle.RLE, ...] | None:
        if self.masks is None:
            return None
        if isinstance(self.masks, np.ndarray):
            return tuple(rle.encode(self.masks[row]) for row in rows)
        if isinstance(self.masks, PackedMasks):
            return tuple(self.masks.encoded(row) for row in rows)
        return tuple(self.masks[row] for row in rows)

    def to_coco(self, image_id: int | str, category_ids: Mapping[str, int | str]) -> list[dict[str, Any]]:
        """COCO result entries (`image_id, category_id, bbox xywh, score, segmentation`).

        `category_ids` maps class names to the ids of the annotation file in question.
        """
        unknown = sorted(set(self.names) - category_ids.keys())
        if unknown:
            raise D2ZeroError(f"no category id given for {', '.join(unknown)}")
        entries = []
        masks = self._rles(range(len(self)))
        for row in range(len(self)):
            x1, y1, x2, y2 = (float(side) for side in self.boxes[row])
            entry: dict[str, Any] = {
                "image_id": image_id,
                "category_id": category_ids[self.names[row]],
                "bbox": [x1, y1, x2 - x1, y2 - y1],
                "score": float(self.scores[row]),
            }
            if masks is not None:
                entry["segmentation"] = dict(masks[row])
            entries.append(entry)
        return entries

    @classmethod
    def from_coco(
        cls,
        entries: Sequence[Mapping[str, Any]],
        category_names: Mapping[Any, str],
        vocabulary: "Vocabulary",
        image_size: tuple[int, int],
    ) -> "Detections":
        """Read what `to_coco` wrote of one image.

        Args:
            entries: COCO results, with or without masks.
            category_names: Names by category id; each a name of the vocabulary.
            vocabulary: Gives class ids and seen flags.
            image_size: (height, width).
        """
        names = tuple(category_names[entry["category_id"]] for entry in entries)
        class_ids = np.array([vocabulary.names.index(name) for name in names], np.int64)
        boxes = np.array([entry["bbox"] for entry in entries], np.float32).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        return cls(
            boxes=boxes,
            scores=np.array([entry["score"] for entry in entries], np.float32),
            class_ids=class_ids,
            names=names,
            seen=vocabulary.seen[class_ids],
            masks=tuple(entry["segmentation"] for entry in entries)
            if all("segmentation" in e for e in entries)
            else None,
            image_size=image_size,
        )

    def to_supervision(self) -> "supervision.Detections":
        """As `supervision.Detections` (needs the `viz` extra)."""
        return optional("supervision").Detections(  # type: ignore[no-any-return]
            xyxy=self.boxes,
            confidence=self.scores,
            class_id=self.class_ids,
            mask=None if self.masks is None else self.bitmaps(),
            data={"class_name": np.array(self.names), "seen": self.seen},
        )

    def to_pandas(self) -> "pandas.DataFrame":
        """One row per instance: name, score, seen, x1, y1, x2, y2, area in pixels (needs `viz`)."""
        table: pandas.DataFrame = optional("pandas").DataFrame(
            {"name": list(self.names), "score": self.scores, "seen": self.seen}
        )
        table[["x1", "y1", "x2", "y2"]] = self.boxes
        if isinstance(self.masks, np.ndarray):
            table["area"] = self.masks.sum(axis=(1, 2))
        elif self.masks is not None:
            table["area"] = [rle.area(mask) for mask in self._rles(range(len(self))) or ()]
        return table

    def instances(self, with_scores: bool = True) -> "list[Instance]":
        """The instances, to draw; `*` marks classes that training never saw.

        Args:
            with_scores: Whether labels give scores.
        """
        from d2zero_runtime.draw import Instance

        labels = [f"{'' if seen else '* '}{name}" for name, seen in zip(self.names, self.seen, strict=True)]
        if with_scores:
            labels = [f"{label} {score:.2f}" for label, score in zip(labels, self.scores, strict=True)]
        return [
            Instance(
                tuple(self.boxes[row].tolist()),
                labels[row],
                int(self.class_ids[row]),
                bool(self.seen[row]),
                None if self.masks is None else partial(self.bitmap, row),
            )
            for row in range(len(self))
        ]

    def plot(self, image: "Image.Image | NDArray[np.uint8]", font: str | None = None) -> "Image.Image":
        """Draw masks, boxes, names and scores over an image.

        Args:
            image: The image that was segmented, RGB or (H, W, 3) uint8 RGB.
            font: A font file for labels; one that has their letters is looked for if left out.
        """
        from d2zero_runtime.draw import overlay

        return overlay(image, self.instances(), font=font)
