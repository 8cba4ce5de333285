"""What is in an annotation file: how much of what, and which annotations look like mistakes.

Reads annotations image by image, so that those of an open file may stay on disk. Image files are left to others.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from d2zero.data.coco import CocoFile
from d2zero.data.coco_values import Id, Size, encoded

MEDIUM, LARGE = 32**2, 96**2  # pixels, from which on COCO calls an instance so
TINY = 16  # pixels: one pixel of the masks that the network predicts
OUTSIDE = 1.0  # pixels that a box may reach beyond its image: polygons end between pixels
APART, APART_SHARE = 5.0, 0.5  # how far a box may differ from its mask's: in pixels, or of its longer side

Progress = Callable[[Iterator[Id], int, str], Iterator[Id]]


class Count(NamedTuple):
    """Of one class."""

    instances: int = 0
    images: int = 0


@dataclass
class Contents:
    """What an annotation file holds; instances are annotations that are not crowds.

    Args:
        classes: Instances and images by name, in the file's order.
        sizes: Images by (height, width).
        small: Instances whose masks have less than 32 x 32 pixels.
        medium: Those of less than 96 x 96.
        large: All others.
        crowds: Annotations with `iscrowd`.
        empty: Images without an instance.
        same_file: File names that several images have.
        tiny: Ids of annotations whose masks have some pixels, but less than `TINY`.
        outside: Ids of annotations whose boxes have no extent or reach beyond their images.
        apart: Ids of annotations whose boxes are inside, and not those of their masks.
        repeated: Ids of annotations that have the mask and the class of an earlier one of their image.
        relabelled: Ids of annotations that have the mask of an earlier one, but another class.
    """

    classes: dict[str, Count]
    sizes: Counter[Size] = field(default_factory=Counter)
    small: int = 0
    medium: int = 0
    large: int = 0
    crowds: int = 0
    empty: list[Id] = field(default_factory=list)
    same_file: list[str] = field(default_factory=list)
    tiny: list[Any] = field(default_factory=list)
    outside: list[Any] = field(default_factory=list)
    apart: list[Any] = field(default_factory=list)
    repeated: list[Any] = field(default_factory=list)
    relabelled: list[Any] = field(default_factory=list)

    @property
    def images(self) -> int:
        """All that the file lists."""
        return self.sizes.total()

    @property
    def instances(self) -> int:
        """All annotations that are no crowds."""
        return sum(count.instances for count in self.classes.values())


def read_contents(annotations: CocoFile, progress: Progress | None = None) -> Contents:
    """Count what is in a file and look at each mask and box."""
    found = Contents({name: Count() for name in annotations.categories})
    names = Counter(image["file_name"] for image in annotations.images.values())
    found.same_file = [name for name, count in names.items() if count > 1]
    ids, name_of = iter(annotations.images), annotations.names
    for number in progress(ids, len(annotations.images), "reading annotations") if progress else ids:
        image = annotations.images[number]
        size = (image["height"], image["width"])
        found.sizes[size] += 1
        entries = annotations.annotations.get(number, [])
        instances = [entry for entry in entries if not entry.get("iscrowd")]
        found.crowds += len(entries) - len(instances)
        if not instances:
            found.empty.append(number)
            continue
        _count_classes(found, [name_of[entry["category_id"]] for entry in instances])
        _look_at(found, instances, size)
    return found


def _count_classes(found: Contents, names: list[str]) -> None:
    for name, count in Counter(names).items():
        before = found.classes[name]
        found.classes[name] = Count(before.instances + count, before.images + 1)


def _look_at(found: Contents, instances: list[dict[str, Any]], size: Size) -> None:
    """Masks and boxes of one image's instances."""
    from pycocotools import mask as coco_mask  # what only lists commands does without

    masks = [encoded(entry["segmentation"], size) for entry in instances]
    areas, boxes = coco_mask.area(masks), coco_mask.toBbox(masks)
    class_of: dict[bytes, Id] = {}
    for entry, mask, area, box in zip(instances, masks, areas.tolist(), boxes, strict=True):
        found.small += area < MEDIUM
        found.medium += MEDIUM <= area < LARGE
        found.large += area >= LARGE
        if not area:  # reading has named it
            continue
        if area < TINY:
            found.tiny.append(entry["id"])
        if "bbox" in entry:
            _compare(found, entry, box, size)
        runs = mask["counts"].encode() if isinstance(mask["counts"], str) else mask["counts"]
        if runs in class_of:
            (found.repeated if class_of[runs] == entry["category_id"] else found.relabelled).append(entry["id"])
        else:
            class_of[runs] = entry["category_id"]


def _compare(found: Contents, entry: dict[str, Any], of_mask: NDArray[np.float64], size: Size) -> None:
    """An annotation's box with its image's border and its mask's box; both are x, y, width, height."""
    x, y, width, height = entry["bbox"]
    beyond = max(-x, -y, x + width - size[1], y + height - size[0])
    if beyond > OUTSIDE or min(width, height) <= 0:
        found.outside.append(entry["id"])
        return
    left, top, across, down = of_mask.tolist()
    sides = (x - left, y - top, x + width - left - across, y + height - top - down)
    if max(map(abs, sides)) > max(APART, APART_SHARE * max(across, down)):
        found.apart.append(entry["id"])
