"""COCO annotation files: reading them, and finding them in a data folder."""

from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from d2zero.data.coco_entries import (
    ABSENT,
    check_verified,
    checked_categories,
    checked_images,
    frequency_groups,
    lacking,
)
from d2zero.data.coco_values import (
    NO_PIXEL,
    Id,
    Size,
    WaitingMasks,
    foreign,
    form_problem,
    shown,
    tidy,
)
from d2zero.data.json_stream import EntriesOnDisk, JsonStream, open_seekable
from d2zero.data.splits import file_tail
from d2zero_runtime import D2ZeroError, read_image
from d2zero_runtime.errors import join_truncated
from d2zero_runtime.images import size_of
from d2zero_runtime.sources import image_size

PARTS = ("images", "annotations", "categories")
KEYS = frozenset(("id", "image_id", "category_id"))  # of annotations, besides the mask
NAMED = 3  # unusable annotations that a message describes
Keep = Callable[[dict[str, Any], int, int], None]  # of an annotation, its place in the file, the place after it


@dataclass
class Unusable:
    """Annotations that cannot be used: how many of how many, and what is wrong with the first."""

    total: int = 0
    count: int = 0
    first: list[str] = field(default_factory=list)

    def add(self, problem: str, count: int = 1) -> None:
        """Count annotations with a problem."""
        self.count += count
        if len(self.first) < NAMED:
            self.first.append(problem)

    def __str__(self) -> str:
        more = f"; and {self.count - len(self.first)} more" if self.count > len(self.first) else ""
        return f"{self.count} of {self.total} annotations cannot be used: {'; '.join(self.first)}{more}"


@dataclass(frozen=True, eq=False)
class CocoFile:
    """An annotation file, checked: ids of a kind are all numbers or all texts, masks fit their images.

    Args:
        path: Where it came from.
        images: Image entries by id, in the file's order. Those of LVIS have lists of category ids: `neg_category_ids`
            of classes that are verified to be absent, `not_exhaustive_category_ids` of classes some of whose instances
            may not be annotated.
        annotations: Annotation entries by image id; images without any are left out. `iscrowd` is 0 or 1; `bbox` and
            `area` are there if they are usable numbers.
        categories: Category ids by name, in the file's order.
        left_out: Annotations that could not be used; none unless they were to be left out.
        without_pixels: Ids of annotations that are kept although their masks have no pixel, as pycocotools keeps them.
        groups: Class names by group, to report accuracy for: LVIS's `rare`, `common` and `frequent`.
    """

    path: Path
    images: dict[Id, dict[str, Any]]
    annotations: Mapping[Id, list[dict[str, Any]]]
    categories: dict[str, Id]
    left_out: Unusable = field(default_factory=Unusable)
    without_pixels: list[Any] = field(default_factory=list)
    groups: dict[str, tuple[str, ...]] = field(default_factory=dict)

    @property
    def is_federated(self) -> bool:
        """Whether each image says which classes were looked for, as in LVIS; else, all were."""
        return ABSENT in next(iter(self.images.values()), {})

    @property
    def names(self) -> dict[Id, str]:
        """Category names by id."""
        return {number: name for name, number in self.categories.items()}


def read_coco(path: Path, leave_out: bool = False) -> CocoFile:
    """Read and check a COCO instance annotation file.

    Args:
        path: The file.
        leave_out: Leave out annotations that cannot be used or have no pixel, instead of refusing the file.

    Raises:
        D2ZeroError: It is absent, no JSON, lacks a part, has no images, or ones whose entries are wrong; annotations
            cannot be used, which are named.
    """
    annotations: dict[Id, list[dict[str, Any]]] = defaultdict(list)

    def keep(entry: dict[str, Any], _start: int, _end: int) -> None:
        annotations[entry["image_id"]].append(entry)

    with open_seekable(path) as stream:
        reading = _Reading(path, keep, leave_out)
        found = reading.read(stream, annotations)
    if found.left_out.count:
        names, bad = found.names, set(map(id, reading.refused))  # some are known only after they were kept
        for number, entries in list(annotations.items()):
            annotations[number] = [e for e in entries if id(e) not in bad and e["category_id"] in names]
            if not annotations[number]:
                del annotations[number]
    return found


@contextmanager
def open_coco(path: Path) -> Iterator[CocoFile]:
    """As `read_coco`, but annotations stay on disk until an image's are asked for.

    Raises:
        D2ZeroError: As `read_coco`.
    """
    with open_seekable(path) as stream:
        annotations = EntriesOnDisk(stream, _tidied)
        reading = _Reading(path, lambda entry, *place: annotations.note(entry["image_id"], *place))
        yield reading.read(stream, annotations)


def _tidied(entry: dict[str, Any]) -> dict[str, Any]:
    tidy(entry)
    return entry


class _Reading:
    """Reads a file once: images and categories whole, annotations one by one, each checked and given away.

    Masks are compared with the sizes of images: annotations that come before those are read when they are known.
    """

    def __init__(self, path: Path, keep: Keep, leave_out: bool = False) -> None:
        self._path, self._keep, self._leave_out = path, keep, leave_out
        self._images: dict[Id, dict[str, Any]] = {}
        self._unusable = Unusable()
        self.refused: list[Any] = []  # what `keep` is not told of, or was told of too early
        self._without_pixels: list[Any] = []
        self._categories: dict[Id, list[Any]] = {}  # how many annotations have it, and the id of the first

    def read(self, stream: IO[bytes], annotations: Mapping[Id, list[dict[str, Any]]]) -> CocoFile:
        lists, place = self._lists(JsonStream(stream, self._path))
        if lists.keys() != set(PARTS):
            raise D2ZeroError(f"{self._path} is not a COCO annotation file: it needs the lists {', '.join(PARTS)}")
        if place is not None:
            stream.seek(place)
            self._take(JsonStream(stream, self._path).elements())
        categories = checked_categories(self._path, lists["categories"])
        self._refuse_foreign(dict.fromkeys(categories.values()))
        if self._unusable.count and not self._leave_out:
            raise D2ZeroError(f"{self._path}: {self._unusable}; correct or remove them")
        check_verified(self._path, self._images, dict.fromkeys(categories.values()))
        groups = frequency_groups(self._path, lists["categories"])
        return CocoFile(self._path, self._images, annotations, categories, self._unusable, self._without_pixels, groups)

    def _lists(self, text: JsonStream) -> tuple[dict[str, list[Any]], int | None]:
        """The parts that are lists, that of annotations empty; and where that is, if it still has to be read."""
        lists: dict[str, list[Any]] = {}
        place = None
        if text.next() != "{":
            text.value()  # which tells whether it is JSON at all
        else:
            for part in text.members():
                if part in lists:
                    raise D2ZeroError(f"{self._path} has two parts called '{part}'; remove or join them")
                if part == "annotations" and text.next() == "[":
                    lists[part] = []
                    if self._images:
                        self._take(text.elements())
                    else:
                        place = text.position
                        deque(text.elements(), maxlen=0)
                else:
                    value = text.value()
                    if part in PARTS and isinstance(value, list):
                        lists[part] = value
                        if part == "images":
                            self._images = checked_images(self._path, value)
        text.end()
        return lists, place

    def _take(self, elements: Iterator[tuple[Any, int, int]]) -> None:
        waiting = WaitingMasks(self._judge)
        for entry, start, end in elements:
            self._unusable.total += 1
            problem = self._problem(entry)
            if problem:
                self._refuse(entry, problem)
                continue
            waiting.add(entry, entry["segmentation"], self._size(entry))
            self._categories.setdefault(entry["category_id"], [0, entry["id"]])[0] += 1
            self._keep(entry, start, end)
        waiting.check()

    def _judge(self, entry: dict[str, Any], problem: str) -> None:
        if problem == NO_PIXEL and not self._leave_out:
            self._without_pixels.append(entry["id"])
        else:
            self._refuse(entry, problem)

    def _refuse(self, entry: Any, problem: str) -> None:
        known = isinstance(entry, dict) and "id" in entry
        name = f"annotation {shown(entry['id'])}" if known else f"annotation number {self._unusable.total - 1}"
        self._unusable.add(f"{name} {problem}")
        if self._leave_out:
            self.refused.append(entry)

    def _problem(self, entry: Any) -> str:
        """What is wrong with an annotation except in the numbers of its mask, or nothing."""
        problem = lacking(entry, KEYS) or tidy(entry)
        if problem:
            return problem
        if entry["image_id"] not in self._images:
            return f"is of image {foreign(entry['image_id'], self._images, 'the file')}"
        return form_problem(entry.get("segmentation"), self._size(entry))

    def _refuse_foreign(self, known: Mapping[Id, Any]) -> None:
        for category, (count, first) in self._categories.items():
            if category not in known:
                more = f" (and {count - 1} more)" if count > 1 else ""
                self._unusable.add(
                    f"annotation {shown(first)}{more} is of category {foreign(category, known, 'the file')}", count
                )

    def _size(self, entry: dict[str, Any]) -> Size:
        image = self._images[entry["image_id"]]
        return image["height"], image["width"]


def find_annotations(data: Path, split: str, part: str) -> Path:
    """The one annotation file of a part in a data folder.

    Looks for `*_{part}_{split}.json` in DIR/annotations and DIR/annotations/ZSIS, as published
    and as written by `d2zero data`. `split` is a name such as `coco-48-17`.

    Raises:
        D2ZeroError: The folder is absent, or none or several files fit.
    """
    if not data.is_dir():
        raise D2ZeroError(f"data folder {data} does not exist")
    tail = file_tail(split)
    pattern = f"*_{part}_{tail}.json"
    found = [path for sub in ("annotations/ZSIS", "annotations") for path in sorted((data / sub).glob(pattern))]
    found = [path for path in found if not ("unseen_only" in path.name and len(found) > 1)]
    if not found:
        raise D2ZeroError(
            f"no annotations/{pattern} in {data}; make the files with"
            + (" `d2zero data shapes`" if tail == "shapes" else f" `d2zero data split --split {split}`")
        )
    if len(found) > 1:
        raise D2ZeroError(f"several files fit {pattern}: {join_truncated(found)}; name one with --annotations")
    return found[0]


def find_image_folder(data: Path, annotations: Path) -> Path:
    """The folder of an annotation file's images: DIR/train2017 for `instances_train2017_seen_48_17.json`.

    Raises:
        D2ZeroError: There is no such folder.
    """
    stem = annotations.stem.removeprefix("instances_")
    folders = sorted((path for path in data.iterdir() if path.is_dir()), key=lambda path: -len(path.name))
    for folder in folders:
        if stem == folder.name or stem.startswith(f"{folder.name}_"):
            return folder
    raise D2ZeroError(f"{data} has no folder of images for {annotations.name}; name one with --images")


def image_path(folder: Path, image: Mapping[str, Any]) -> Path:
    """The file of an image entry; of one that is named by its address at COCO, also without the address's folder."""
    paths = [folder / name for name in _file_names(image)]
    return next((path for path in paths[:-1] if path.exists()), paths[-1])


def missing_images(annotations: CocoFile, folder: Path, image_ids: Iterable[Id]) -> list[Id]:
    """Those of some images whose files are not there; folders are listed once, which is faster than to ask per file."""
    listed: dict[Path, set[str]] = {}

    def is_there(path: Path) -> bool:
        if path.parent not in listed:
            listed[path.parent] = {found.name for found in path.parent.iterdir()} if path.parent.is_dir() else set()
        return path.name in listed[path.parent]

    return [
        number
        for number in image_ids
        if not any(is_there(folder / name) for name in _file_names(annotations.images[number]))
    ]


def _file_names(image: Mapping[str, Any]) -> list[str]:
    """Where an image may be in a folder: COCO's names are unique without the folders of its addresses."""
    name: str = image["file_name"]
    by_address = "/" in name and str(image.get("coco_url", "")).endswith(f"/{name}")
    return [name, name.rpartition("/")[2]] if by_address else [name]


def ids_by_file_name(annotations: CocoFile) -> dict[str, Id]:
    """Image ids by file name, in whatever folder the files are; names that several images have are left out."""
    names = Counter(Path(entry["file_name"]).name for entry in annotations.images.values())
    ids = {Path(entry["file_name"]).name: number for number, entry in annotations.images.items()}
    return {name: number for name, number in ids.items() if names[name] == 1}


def read_listed_image(annotations: CocoFile, folder: Path, image_id: Id) -> NDArray[np.uint8]:
    """An annotation file's image (H, W, 3) uint8 RGB, of the size that the file says.

    Raises:
        D2ZeroError: It cannot be read, or has another size, so that masks would not fit it.
    """
    entry = annotations.images[image_id]
    image = read_image(image_path(folder, entry))
    require_size(entry, size_of(image))
    return image


def check_listed_size(annotations: CocoFile, folder: Path, image_id: Id) -> None:
    """As `read_listed_image`, but reads no more of the file than its size.

    Raises:
        D2ZeroError: It is absent, no image, or has another size.
    """
    entry = annotations.images[image_id]
    require_size(entry, image_size(image_path(folder, entry)))


def require_size(image: Mapping[str, Any], size: Size) -> None:
    """Refuse an image (height, width) that masks of its annotations would not fit.

    Raises:
        D2ZeroError: Its entry says another size.
    """
    expected = (image["height"], image["width"])
    if size != expected:
        raise D2ZeroError(f"{image['file_name']} is {size} (height, width), its annotations say {expected}")
