"""Contact sheets: annotations beside predictions."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
from PIL import Image

from d2zero.data.coco import CocoFile, image_path
from d2zero.data.coco_values import Id, decoded
from d2zero.model import D2Zero
from d2zero_runtime import D2ZeroError, Detections, Mode, Vocabulary, read_image
from d2zero_runtime.draw import SheetRow, contact_sheet
from d2zero_runtime.masks import rle
from d2zero_runtime.segmenter import SCORE_THRESHOLD


def ground_truth(annotations: CocoFile, image_id: Id, vocabulary: Vocabulary) -> Detections:
    """An image's annotations as a result with scores of 1, leaving out crowds and foreign classes."""
    entry = annotations.images[image_id]
    size = (entry["height"], entry["width"])
    names = annotations.names
    kept = [
        a
        for a in annotations.annotations.get(image_id, [])
        if names[a["category_id"]] in vocabulary.names and not a.get("iscrowd")
    ]
    class_ids = np.array([vocabulary.names.index(names[a["category_id"]]) for a in kept], np.int64)
    masks = [decoded(a["segmentation"], size) for a in kept]
    return Detections(
        boxes=np.array([_box(mask) for mask in masks], np.float32).reshape(-1, 4),
        scores=np.ones(len(kept), np.float32),
        class_ids=class_ids,
        names=tuple(vocabulary.names[index] for index in class_ids),
        seen=vocabulary.seen[class_ids],
        masks=tuple(rle.encode(mask) for mask in masks),
        image_size=size,
    )


def predictions(
    model: D2Zero, annotations: CocoFile, images: Path, image_ids: Sequence[Id], mode: Mode = Mode.GZSIS
) -> dict[Id, Detections]:
    """What a model finds in some images, by image id; files that cannot be read are left out."""
    found = {}
    for image_id in image_ids:
        with suppress(D2ZeroError):
            image = read_image(image_path(images, annotations.images[image_id]))
            found[image_id] = model.predict([image], mode, score_threshold=SCORE_THRESHOLD)[0]
    return found


def draw_predictions(
    annotations: CocoFile,
    images: Path,
    vocabulary: Vocabulary,
    found: Mapping[Id, Detections],
    *,
    columns: int = 3,
    cell: int = 300,
    title: str = "",
) -> Image.Image:
    """A contact sheet: of each image the annotations beside what was found above `SCORE_THRESHOLD`."""
    rows = []
    for image_id, detections in found.items():
        with suppress(D2ZeroError):  # a file that cannot be read; the evaluation has named it
            image = read_image(image_path(images, annotations.images[image_id]))
            shown = detections.above(SCORE_THRESHOLD).without_duplicates()
            truth = ground_truth(annotations, image_id, vocabulary)
            rows.append(SheetRow(image, truth.instances(with_scores=False), shown.instances()))
    return contact_sheet(rows, columns, title, cell)


def draw_annotations(
    annotations: CocoFile, images: Path, vocabulary: Vocabulary, image_ids: Sequence[Id], *, cell: int, title: str = ""
) -> Image.Image:
    """A contact sheet: each image beside its annotations; files that cannot be read are left out."""
    rows = []
    for image_id in image_ids:
        with suppress(D2ZeroError):
            image = read_image(image_path(images, annotations.images[image_id]))
            rows.append(SheetRow(image, (), ground_truth(annotations, image_id, vocabulary).instances(False)))
    return contact_sheet(rows, title=title, cell=cell, sides="left: image, right: annotations")


def _box(mask: "np.ndarray[tuple[int, int], np.dtype[np.bool_]]") -> tuple[int, int, int, int]:
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    if not len(rows):
        return (0, 0, 0, 0)
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1
