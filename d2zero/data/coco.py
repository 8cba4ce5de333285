"""COCO annotation files: reading them, finding them in a data folder, decoding their masks."""

import json
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from d2zero_runtime import D2ZeroError, read_image
from d2zero_runtime.errors import listed


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
    annotations: dict[int, list[dict[str, Any]]]
    categories: dict[str, int]

    @property
    def names(self) -> dict[int, str]:
        """Category names by id."""
        return {number: name for name, number in self.categories.items()}


def read_json(path: Path) -> Any:
    """Read JSON, with an error that a person can act on.

    Raises:
        D2ZeroError: the file is absent or no JSON.
    """
    try:
        return json.loads(path.read_text())
    except FileNotFoundError as error:
        raise D2ZeroError(f"{path} does not exist") from error
    except IsADirectoryError as error:
        raise D2ZeroError(f"{path} is a folder, expected a JSON file") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise D2ZeroError(f"{path} is not JSON or is cut short: {error}") from error


def read_coco(path: Path) -> CocoFile:
    """Read and check a COCO instance annotation file.

    Raises:
        D2ZeroError: it is absent, no JSON, lacks a part, has no images, or annotations lack masks.
    """
    content = read_json(path)
    parts = ("images", "annotations", "categories")
    if not isinstance(content, dict) or not all(isinstance(content.get(part), list) for part in parts):
        raise D2ZeroError(f"{path} is not a COCO annotation file: it needs the lists {', '.join(parts)}")
    if not content["images"]:
        raise D2ZeroError(f"{path} lists no images")
    _require(path, "images", content["images"], ("id", "file_name", "height", "width"))
    _require(path, "categories", content["categories"], ("id", "name"))
    _require(path, "annotations", content["annotations"], ("id", "image_id", "category_id"))
    without = [entry["id"] for entry in content["annotations"] if not entry.get("segmentation")]
    if without:
        raise D2ZeroError(
            f"{path}: {len(without)} of {len(content['annotations'])} annotations have no mask ('segmentation'),"
            f" ids {listed(without)}; instance segmentation needs masks, not boxes alone"
        )
    for entry in content["images"]:
        sides = (entry["height"], entry["width"])
        if not all(isinstance(side, int) and side > 0 for side in sides):
            raise D2ZeroError(f"{path}: image {entry['id']} has a size of {sides}, expected positive whole numbers")
    known = {entry["id"] for entry in content["categories"]}
    foreign = {entry["category_id"] for entry in content["annotations"]} - known
    if foreign:
        raise D2ZeroError(f"{path}: annotations of categories that it does not list: ids {listed(sorted(foreign))}")
    images = {entry["id"]: entry for entry in content["images"]}
    strays = {entry["image_id"] for entry in content["annotations"]} - images.keys()
    if strays:
        raise D2ZeroError(f"{path}: annotations refer to images that it does not list: {listed(sorted(strays))}")
    annotations: dict[int, list[dict[str, Any]]] = defaultdict(list)
    for entry in content["annotations"]:
        entry.setdefault("iscrowd", 0)
        annotations[entry["image_id"]].append(entry)
    categories = {entry["name"]: entry["id"] for entry in content["categories"]}
    return CocoFile(path, images, dict(annotations), categories)


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


def decode_mask(annotation: Mapping[str, Any], height: int, width: int) -> NDArray[np.bool_]:
    """An annotation's mask (H, W), from polygons or either kind of RLE.

    Raises:
        D2ZeroError: the segmentation cannot be read or has another size.
    """
    from pycocotools import mask as coco_mask  # what trains on drawn masks does without

    segmentation = annotation["segmentation"]
    try:
        if isinstance(segmentation, list):
            encoded = coco_mask.merge(coco_mask.frPyObjects(segmentation, height, width))
        elif isinstance(segmentation["counts"], list):
            encoded = coco_mask.frPyObjects(segmentation, height, width)
        else:
            encoded = segmentation
        mask: NDArray[np.bool_] = coco_mask.decode(encoded).astype(bool)
    except Exception as error:  # pycocotools raises bare exceptions of many kinds
        raise D2ZeroError(f"annotation {annotation.get('id')} has a mask that cannot be read: {error}") from error
    if mask.shape != (height, width):
        raise D2ZeroError(
            f"annotation {annotation.get('id')} has a mask of {mask.shape}, its image is {(height, width)}"
        )
    return mask


def _require(path: Path, part: str, entries: list[Any], keys: tuple[str, ...]) -> None:
    for entry in entries:
        missing = [key for key in keys if not isinstance(entry, dict) or key not in entry]
        if missing:
            raise D2ZeroError(f"{path}: an entry of '{part}' lacks {listed(missing)}")
