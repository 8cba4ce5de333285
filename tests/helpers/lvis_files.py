"""Files in LVIS's form, and its rules of evaluation in the plainest form, independent of ours."""

import json
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as coco_mask

Entry = dict[str, Any]
IOU = np.linspace(0.5, 0.95, 10)
LETTERS = {"rare": "r", "common": "c", "frequent": "f"}


def lvis_form(source: Path, images: int) -> Entry:
    """Some images of a COCO file as LVIS would have them.

    No `file_name` and no crowds; names with parentheses and underscores; per image a few classes verified to be
    absent, and some of which not every instance is annotated.
    """
    random, content = Random(0), json.loads(source.read_text())
    kept = [entry for entry in content["images"] if not random.random() < 0.1][:images]
    ids = {entry["id"] for entry in kept}
    annotations = [entry for entry in content["annotations"] if entry["image_id"] in ids and not entry["iscrowd"]]
    present: dict[int, set[int]] = {number: set() for number in ids}
    for entry in annotations:
        del entry["iscrowd"]
        present[entry["image_id"]].add(entry["category_id"])
    categories = [entry["id"] for entry in content["categories"]]
    for entry in kept:
        del entry["file_name"]
        here = sorted(present[entry["id"]])
        entry["not_exhaustive_category_ids"] = random.sample(here, len(here) // 3)
        entry["neg_category_ids"] = random.sample([number for number in categories if number not in here], 12)
    for place, entry in enumerate(content["categories"]):
        name = entry["name"].replace(" ", "_")
        entry |= {"frequency": "fcr"[place % 3], "synset": f"{name}.n.01", "synonyms": [name], "def": "a thing"}
        entry["name"] = f"{name}_(thing)"
    return {"images": kept, "annotations": annotations, "categories": content["categories"]}


def guesses(content: Entry) -> list[Entry]:
    """Detections: annotations moved a little, some twice, some called something else."""
    random, sizes = Random(1), {entry["id"]: (entry["height"], entry["width"]) for entry in content["images"]}
    categories = [entry["id"] for entry in content["categories"]]
    found = []
    for entry in content["annotations"]:
        height, width = sizes[entry["image_id"]]
        bitmap = coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects(entry["segmentation"], height, width)))
        for _ in range(random.choice([0, 1, 1, 2])):
            moved = np.roll(bitmap, (random.randint(-3, 3), random.randint(-3, 3)), (0, 1))
            mask = coco_mask.encode(np.asfortranarray(moved))
            other = random.random() < 0.3
            found.append(
                {
                    "image_id": entry["image_id"],
                    "category_id": random.choice(categories) if other else entry["category_id"],
                    "score": random.random(),
                    "segmentation": {"size": [height, width], "counts": mask["counts"].decode()},
                    "bbox": coco_mask.toBbox(mask).tolist(),
                }
            )
    return found


def plain_lvis(content: Entry, found: list[Entry], kind: str) -> dict[int, list[float]]:
    """Average precision in percent at each IoU of 0.5 to 0.95, by category, as LVIS defines it, step by step."""
    result = {}
    for category in (entry["id"] for entry in content["categories"]):
        judged: list[tuple[float, list[str]]] = []  # score; true, false or ignored at each IoU
        total = 0
        for image in sorted(content["images"], key=lambda entry: entry["id"]):
            truth = [e for e in content["annotations"] if (e["image_id"], e["category_id"]) == (image["id"], category)]
            total += len(truth)
            if truth or category in image["neg_category_ids"]:
                ours = [e for e in found if (e["image_id"], e["category_id"]) == (image["id"], category)]
                ours.sort(key=lambda entry: -entry["score"])
                unmatched = "ignored" if category in image["not_exhaustive_category_ids"] else "false"
                overlaps = [[_overlap(one, other, image, kind) for other in truth] for one in ours]
                at_each = [_matched(overlaps, threshold, unmatched) for threshold in IOU]
                judged += [(one["score"], [at[place] for at in at_each]) for place, one in enumerate(ours)]
        if total:
            judged.sort(key=lambda one: -one[0])
            result[category] = [_average([at[place] for _, at in judged], total) for place in range(len(IOU))]
    return result


def _matched(overlaps: list[list[float]], threshold: float, unmatched: str) -> list[str]:
    taken: set[int] = set()
    answers = []
    for row in overlaps:
        free = [(overlap, place) for place, overlap in enumerate(row) if place not in taken and overlap >= threshold]
        if free:
            taken.add(max(free)[1])
        answers.append("true" if free else unmatched)
    return answers


def _overlap(one: Entry, other: Entry, image: Entry, kind: str) -> float:
    if kind == "bbox":
        (x, y, width, height), (left, top, across, down) = one["bbox"], other["bbox"]
        shared = max(0, min(x + width, left + across) - max(x, left)) * max(
            0, min(y + height, top + down) - max(y, top)
        )
        return shared / (width * height + across * down - shared)
    left_HW, right_HW = (_bitmap(entry["segmentation"], image) for entry in (one, other))
    return float((left_HW & right_HW).sum() / (left_HW | right_HW).sum())


def _bitmap(mask: Any, image: Entry) -> NDArray[np.bool_]:
    if isinstance(mask, list):
        mask = coco_mask.merge(coco_mask.frPyObjects(mask, image["height"], image["width"]))
    return coco_mask.decode(mask).astype(bool)


def _average(answers: list[str], total: int) -> float:
    """Mean over 101 recalls of the best precision at that recall or beyond, in percent."""
    counted = [answer == "true" for answer in answers if answer != "ignored"]
    points = [(sum(counted[: n + 1]) / total, sum(counted[: n + 1]) / (n + 1)) for n in range(len(counted))]
    levels = np.linspace(0, 1, 101)
    return 100 * float(np.mean([max((p for recall, p in points if recall >= level), default=0) for level in levels]))
