"""COCO annotation files: reading them, finding them in a data folder, decoding their masks."""

from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from d2zero.data.json_stream import EntriesOnDisk, JsonStream, open_seekable
from d2zero_runtime import D2ZeroError, read_image
from d2zero_runtime.errors import listed

PARTS = ("images", "annotations", "categories")
Keep = Callable[[dict[str, Any], int, int], None]  # of an annotation, its place in the file, the place after it


@dataclass(frozen=True, eq=False)
class CocoFile:
    """An annotation file.

    Args:
        path: where it came from.
        images: image entries by id, in the file's order.
        annotations: annotation entries by image id; images without any are left out.
        categories: category ids by name, in the file's order.
    """

    path: Path
    images: dict[int, dict[str, Any]]
    annotations: Mapping[int, list[dict[str, Any]]]
    categories: dict[str, int]

    @property
    def names(self) -> dict[int, str]:
        """Category names by id."""
        return {number: name for name, number in self.categories.items()}


def read_coco(path: Path) -> CocoFile:
    """Read and check a COCO instance annotation file.

    Raises:
        D2ZeroError: it is absent, no JSON, lacks a part, has no images, or annotations lack masks.
    """
    annotations: dict[int, list[dict[str, Any]]] = defaultdict(list)

    def keep(entry: dict[str, Any], _start: int, _end: int) -> None:
        entry.setdefault("iscrowd", 0)
        annotations[entry["image_id"]].append(entry)

    with open_seekable(path) as stream:
        images, categories = _read(path, stream, keep)
    return CocoFile(path, images, dict(annotations), categories)


@contextmanager
def open_coco(path: Path) -> Iterator[CocoFile]:
    """As `read_coco`, but annotations stay on disk until an image's are asked for, and are as the file has them.

    Raises:
        D2ZeroError: as `read_coco`.
    """
    with open_seekable(path) as stream:
        annotations = EntriesOnDisk(stream)
        images, categories = _read(path, stream, lambda entry, *place: annotations.note(entry["image_id"], *place))
        yield CocoFile(path, images, annotations, categories)


def _read(path: Path, stream: IO[bytes], keep: Keep) -> tuple[dict[int, dict[str, Any]], dict[str, int]]:
    """Images by id and category ids by name; annotations are checked and given away, each with its place."""
    survey = _Survey(path)

    def take(entry: Any, start: int, end: int) -> None:
        survey.add(entry)
        keep(entry, start, end)

    lists = _lists(JsonStream(stream, path), take)
    if lists.keys() != set(PARTS):
        raise D2ZeroError(f"{path} is not a COCO annotation file: it needs the lists {', '.join(PARTS)}")
    images = _checked_images(path, lists["images"])
    _require(path, "categories", lists["categories"], ("id", "name"))
    categories = {entry["name"]: entry["id"] for entry in lists["categories"]}
    survey.check(images.keys(), categories.values())
    return images, categories


def _lists(text: JsonStream, take: Keep) -> dict[str, list[Any]]:
    """The parts that are lists; that of annotations empty, since they are given away one by one."""
    lists: dict[str, list[Any]] = {}
    if text.next() != "{":
        text.value()  # which tells whether it is JSON at all
    else:
        for part in text.members():
            if part == "annotations" and text.next() == "[":
                lists[part] = []
                for element in text.elements():
                    take(*element)
            else:
                value = text.value()
                if part in PARTS and isinstance(value, list):
                    lists[part] = value
    text.end()
    return lists


def _checked_images(path: Path, entries: list[Any]) -> dict[int, dict[str, Any]]:
    if not entries:
        raise D2ZeroError(f"{path} lists no images")
    _require(path, "images", entries, ("id", "file_name", "height", "width"))
    for entry in entries:
        sides = (entry["height"], entry["width"])
        if not all(isinstance(side, int) and side > 0 for side in sides):
            raise D2ZeroError(f"{path}: image {entry['id']} has a size of {sides}, expected positive whole numbers")
    return {entry["id"]: entry for entry in entries}


@dataclass
class _Survey:
    """What is wrong with annotations, told when all have been seen."""

    path: Path
    count: int = 0
    without: list[Any] = field(default_factory=list)  # ids of annotations that have no mask
    images: set[int] = field(default_factory=set)
    categories: set[int] = field(default_factory=set)

    def add(self, entry: Any) -> None:
        _require(self.path, "annotations", [entry], ("id", "image_id", "category_id"))
        self.count += 1
        if not entry.get("segmentation"):
            self.without.append(entry["id"])
        self.images.add(entry["image_id"])
        self.categories.add(entry["category_id"])

    def check(self, images: Collection[int], categories: Collection[int]) -> None:
        if self.without:
            raise D2ZeroError(
                f"{self.path}: {len(self.without)} of {self.count} annotations have no mask ('segmentation'),"
                f" ids {listed(self.without)}; instance segmentation needs masks, not boxes alone"
            )
        foreign = sorted(self.categories.difference(categories))
        if foreign:
            raise D2ZeroError(f"{self.path}: annotations of categories that it does not list: ids {listed(foreign)}")
        strays = sorted(self.images.difference(images))
        if strays:
            raise D2ZeroError(f"{self.path}: annotations refer to images that it does not list: {listed(strays)}")


def find_annotations(data: Path, split: str, part: str) -> Path:
    """The one annotation file of a part in a data folder.

    Looks for `instances_*_{part}_{split}.json` in DIR/annotations and DIR/annotations/ZSIS, as published
    and as written by `d2zero data`. `split` is a name such as `coco-48-17`.

    Raises:
        D2ZeroError: the folder is absent, or none or several files fit.
    """
    if not data.is_dir():
        raise D2ZeroError(f"data folder {data} does not exist")
    tail = split.removeprefix("coco-").replace("-", "_")
    pattern = f"instances_*_{part}_{tail}.json"
    found = [path for sub in ("annotations/ZSIS", "annotations") for path in sorted((data / sub).glob(pattern))]
    found = [path for path in found if not ("unseen_only" in path.name and len(found) > 1)]
    if not found:
        raise D2ZeroError(
            f"no annotations/{pattern} in {data}; make the files with"
            + (" `d2zero data shapes`" if tail == "shapes" else f" `d2zero data split --split {split}`")
        )
    if len(found) > 1:
        raise D2ZeroError(f"several files fit {pattern}: {listed(found)}; name one with --annotations")
    return found[0]


def find_image_folder(data: Path, annotations: Path) -> Path:
    """The folder of an annotation file's images: DIR/train2017 for `instances_train2017_seen_48_17.json`.

    Raises:
        D2ZeroError: there is no such folder.
    """
    stem = annotations.stem.removeprefix("instances_")
    folders = sorted((path for path in data.iterdir() if path.is_dir()), key=lambda path: -len(path.name))
    for folder in folders:
        if stem == folder.name or stem.startswith(f"{folder.name}_"):
            return folder
    raise D2ZeroError(f"{data} has no folder of images for {annotations.name}; name one with --images")


def read_listed_image(annotations: CocoFile, folder: Path, image_id: int) -> NDArray[np.uint8]:
    """An annotation file's image (H, W, 3) uint8 RGB, of the size that the file says.

    Raises:
        D2ZeroError: it cannot be read, or has another size, so that masks would not fit it.
    """
    entry = annotations.images[image_id]
    image = read_image(folder / entry["file_name"])
    expected = (entry["height"], entry["width"])
    if image.shape[:2] != expected:
        raise D2ZeroError(f"{entry['file_name']} is {image.shape[:2]} (height, width), its annotations say {expected}")
    return image


def encode_mask(annotation: Mapping[str, Any], height: int, width: int) -> dict[str, Any]:
    """An annotation's mask as compressed RLE, from polygons or either kind of RLE.

    Raises:
        D2ZeroError: the segmentation cannot be read or has another size.
    """
    from pycocotools import mask as coco_mask  # what trains on drawn masks does without

    segmentation = annotation["segmentation"]
    try:
        if isinstance(segmentation, list):
            encoded = coco_mask.merge(coco_mask.frPyObjects(segmentation, height, width))
        elif isinstance(segmentation["counts"], list):
            encoded = coco_mask.frPyObjects(segmentation, *segmentation["size"])
        else:
            encoded = segmentation
        size = tuple(encoded["size"])
    except Exception as error:  # pycocotools raises bare exceptions of many kinds
        raise D2ZeroError(f"annotation {annotation.get('id')} has a mask that cannot be read: {error}") from error
    if size != (height, width):
        raise D2ZeroError(f"annotation {annotation.get('id')} has a mask of {size}, its image is {(height, width)}")
    found: dict[str, Any] = encoded
    return found


def decode_mask(annotation: Mapping[str, Any], height: int, width: int) -> NDArray[np.bool_]:
    """An annotation's mask (H, W), from polygons or either kind of RLE.

    Raises:
        D2ZeroError: the segmentation cannot be read or has another size.
    """
    from pycocotools import mask as coco_mask

    encoded = encode_mask(annotation, height, width)
    try:
        mask: NDArray[np.bool_] = coco_mask.decode(encoded).astype(bool)
    except Exception as error:  # as above
        raise D2ZeroError(f"annotation {annotation.get('id')} has a mask that cannot be read: {error}") from error
    return mask


def _require(path: Path, part: str, entries: list[Any], keys: tuple[str, ...]) -> None:
    for entry in entries:
        missing = [key for key in keys if not isinstance(entry, dict) or key not in entry]
        if missing:
            raise D2ZeroError(f"{path}: an entry of '{part}' lacks {listed(missing)}")
