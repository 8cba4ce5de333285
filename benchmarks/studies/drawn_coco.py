"""Drawn COCO files at full size: annotations and results, to measure an evaluation that needs no picture.

Masks are blobs: circles whose radius varies with the angle by four waves. Half of an image's results are shaken
copies of its annotations, the better the higher their score; the others are blobs of their own. Numbers (about
seven annotations per image, two fifths of them small, few classes per image, classes of uneven frequency, one in a
hundred a crowd) are as in COCO. Everything is a function of the seed and the image's number.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as coco_mask

from d2zero.data.splits import COCO_IDS, Split

SIZES = ((480, 640), (427, 640), (640, 480), (640, 427), (375, 500), (612, 612))  # (height, width)
CORNERS = 40  # of a blob's polygon
WAVES = np.arange(1, 5)
CROWDS = 0.01
DENSITY = 7  # mean annotations per image
MOST = 60

Entries = list[dict[str, Any]]


@dataclass(frozen=True)
class Blobs:
    """n blobs.

    Args:
        centre: (n, 2) x and y in pixels.
        radius: (n,) in pixels.
        waves: (n, 4, 2) cosine and sine amplitudes of the radius, as parts of it.
    """

    centre: NDArray[np.float64]
    radius: NDArray[np.float64]
    waves: NDArray[np.float64]

    @classmethod
    def draw(cls, rng: np.random.Generator, count: int, height: int, width: int) -> "Blobs":
        """Blobs anywhere in an image, two fifths below 32x32 pixels."""
        return cls(
            rng.uniform(0, 1, (count, 2)) * (width, height),
            np.clip(rng.lognormal(np.log(23), 0.9, count), 4, 0.4 * min(height, width)),
            rng.normal(0, 1, (count, 4, 2)) * 0.15 / WAVES[:, None],
        )

    def shaken(self, rng: np.random.Generator, chosen: NDArray[np.int64], by: NDArray[np.float64]) -> "Blobs":
        """Copies of chosen ones, each moved, scaled and bent by a part of its radius."""
        radius, count = self.radius[chosen], len(chosen)
        return Blobs(
            self.centre[chosen] + rng.normal(0, 1, (count, 2)) * (by * radius)[:, None],
            radius * np.exp(rng.normal(0, 1, count) * by),
            self.waves[chosen] + rng.normal(0, 0.5, (count, 4, 2)) * by[:, None, None] / WAVES[:, None],
        )

    def polygons(self, height: int, width: int) -> list[list[float]]:
        """Corners x, y, x, y … inside the image, to a hundredth of a pixel."""
        angle = np.linspace(0, 2 * np.pi, CORNERS, endpoint=False)
        turns = np.stack([np.cos(WAVES[:, None] * angle), np.sin(WAVES[:, None] * angle)], axis=1)  # (4, 2, corners)
        length = self.radius[:, None] * np.clip(1 + np.einsum("nwk,wkc->nc", self.waves, turns), 0.2, 2)
        corners = self.centre[:, None] + length[..., None] * np.stack([np.cos(angle), np.sin(angle)], axis=1)
        found: list[list[float]] = np.clip(corners, 0, (width, height)).reshape(-1, 2 * CORNERS).round(2).tolist()
        return found


class DrawnImage(NamedTuple):
    """One image's entries of both files."""

    image: dict[str, Any]
    annotations: Entries
    results: Entries


def draw_image(number: int, split: Split, detections: int, seed: int) -> DrawnImage:
    """The image of that number; ids of images are in no order, as in COCO."""
    rng = np.random.default_rng((seed, number))
    height, width = SIZES[rng.integers(len(SIZES))]
    image_id = (number * 7919 + 13) % 1_000_003
    image = {"id": image_id, "file_name": f"{image_id:012d}.jpg", "height": height, "width": width}
    ids = np.array([COCO_IDS[name] for name in split.names])
    here = rng.choice(ids, 1 + rng.poisson(2), replace=True, p=_frequencies(len(ids)))
    blobs = Blobs.draw(rng, min(rng.geometric(1 / DENSITY), MOST), height, width)
    classes = rng.choice(here, len(blobs.radius))
    annotations = _annotations(rng, image, blobs, classes)
    results = _results(rng, image, blobs, classes, ids, detections)
    return DrawnImage(image, annotations, results)


def _frequencies(classes: int) -> NDArray[np.float64]:
    """Uneven, in an order that has seen and unseen classes among the frequent ones."""
    weights = 1 / (1 + np.arange(classes) * 7 % classes)
    normal: NDArray[np.float64] = weights / weights.sum()
    return normal


def _annotations(rng: np.random.Generator, image: dict[str, Any], blobs: Blobs, classes: NDArray[np.int64]) -> Entries:
    height, width = image["height"], image["width"]
    polygons = blobs.polygons(height, width)
    masks = coco_mask.frPyObjects(polygons, height, width)
    found = []
    for place, (polygon, mask, category) in enumerate(zip(polygons, masks, classes.tolist(), strict=True)):
        crowd, area = bool(rng.random() < CROWDS), int(coco_mask.area(mask))
        if area:
            found.append(
                {
                    "id": image["id"] * MOST + place + 1,
                    "image_id": image["id"],
                    "category_id": category,
                    "iscrowd": int(crowd),
                    "area": area,
                    "bbox": coco_mask.toBbox(mask).tolist(),
                    "segmentation": _runs(mask) if crowd else [polygon],
                }
            )
    return found


def _runs(mask: dict[str, Any]) -> dict[str, Any]:
    """The uncompressed form, which COCO's crowds have."""
    flat = coco_mask.decode(mask).ravel(order="F")
    changes = np.flatnonzero(np.diff(flat, prepend=0))
    return {"size": mask["size"], "counts": np.diff(changes, prepend=0, append=flat.size).tolist()}


def _results(
    rng: np.random.Generator,
    image: dict[str, Any],
    blobs: Blobs,
    classes: NDArray[np.int64],
    ids: NDArray[np.int64],
    count: int,
) -> Entries:
    """Half copies, a third of them called something else; half false. In no order."""
    height, width = image["height"], image["width"]
    chosen = np.arange(count // 2) % len(classes)
    by = rng.exponential(0.2, len(chosen))
    copies, others = blobs.shaken(rng, chosen, by), Blobs.draw(rng, count - len(chosen), height, width)
    right = rng.random(len(chosen)) < 2 / 3
    names = np.where(right, classes[chosen], rng.choice(ids, len(chosen)))
    category = np.concatenate([names, rng.choice(ids, len(others.radius))])
    good = np.clip(0.9 * np.exp(-2 * by) * np.where(right, 1, 0.4) + rng.normal(0, 0.08, len(by)), 0.001, 0.999)
    score = np.concatenate([good, rng.beta(1, 6, len(others.radius))]).round(5)
    polygons = copies.polygons(height, width) + others.polygons(height, width)
    masks = coco_mask.frPyObjects(polygons, height, width)
    return [
        {
            "image_id": image["id"],
            "category_id": int(category[place]),
            "bbox": coco_mask.toBbox(masks[place]).tolist(),
            "score": float(score[place]),
            "segmentation": {"size": [height, width], "counts": masks[place]["counts"].decode("ascii")},
        }
        for place in rng.permutation(count)
    ]


def write_drawn(annotations: Path, results: Path, split: Split, images: int, detections: int, seed: int = 0) -> None:
    """Draw both files; annotations are not sorted by image, results are grouped by image, as tools write them."""
    entries: list[DrawnImage] = []
    with _json_list(results) as stream:
        for number in range(images):
            drawn = draw_image(number, split, detections, seed)
            for place, entry in enumerate(drawn.results):
                stream.write((", " if number or place else "") + json.dumps(entry))
            entries.append(drawn._replace(results=[]))
    shuffled = [entry for drawn in entries for entry in drawn.annotations]
    order = np.random.default_rng(seed).permutation(len(shuffled))
    content = {
        "images": [drawn.image for drawn in entries],
        "annotations": [shuffled[place] for place in order],
        "categories": [{"id": COCO_IDS[name], "name": name} for name in split.names],
    }
    annotations.write_text(json.dumps(content), encoding="utf-8")


@contextmanager
def _json_list(path: Path) -> Iterator[IO[str]]:
    with path.open("w", encoding="utf-8") as stream:
        stream.write("[")
        yield stream
        stream.write("]")
