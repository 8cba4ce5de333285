"""Zero-shot annotation files, built from a COCO file and a split.

Training keeps images without any unseen instance; tests keep images with at least one. Files and their
names are laid out as the published ones.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from d2zero.data.coco import CocoFile
from d2zero.data.coco_entries import FREQUENCIES, VERIFIED
from d2zero.data.coco_values import Id
from d2zero.data.splits import Split
from d2zero_runtime import D2ZeroError
from d2zero_runtime.errors import join_truncated
from d2zero_runtime.files import atomic_write


@dataclass(frozen=True)
class Part:
    """One file that was written."""

    path: Path
    images: int
    annotations: int


def training_part(source: CocoFile, split: Split) -> dict[str, Any]:
    """Seen annotations of the images that hold no unseen instance."""
    unseen = _ids(source, split.unseen)
    kept = [
        number
        for number, entries in source.annotations.items()
        if not any(entry["category_id"] in unseen for entry in entries)
    ]
    return _content(source, kept, split.seen)


def test_part(source: CocoFile, split: Split, names: tuple[str, ...]) -> dict[str, Any]:
    """Annotations of `names` in the images that hold at least one unseen instance."""
    unseen = _ids(source, split.unseen)
    kept = [
        number
        for number, entries in source.annotations.items()
        if any(entry["category_id"] in unseen for entry in entries)
    ]
    return _content(source, kept, names)


def write_split(
    train: CocoFile | None, val: CocoFile | None, split: Split, output: Path, replace: bool = False
) -> list[Part]:
    """Write `instances_{train}_seen_…`, `instances_{val}_gzsi_…` and `instances_{val}_unseen_…`.

    Raises:
        D2ZeroError: A source lacks categories of the split, a part would be empty, or files exist that may not
            be replaced.
    """
    parts: list[tuple[str, str, dict[str, Any]]] = []
    if train is not None:
        parts.append((train.path.stem, "seen", training_part(train, split)))
    if val is not None:
        parts.append((val.path.stem, "gzsi", test_part(val, split, split.names)))
        parts.append((val.path.stem, "unseen", test_part(val, split, split.unseen)))
    there = [path for stem, part, _ in parts if (path := output / f"{stem}_{part}_{split.tail}.json").exists()]
    if there and not replace:
        raise D2ZeroError(
            f"{join_truncated(there)} exist already; replace them with --force, or choose another --output"
        )
    for stem, part, content in parts:
        if not content["annotations"]:
            raise D2ZeroError(f"{stem}.json holds no image for the part '{part}' of split {split.name}")
    written = []
    for stem, part, content in parts:
        path = output / f"{stem}_{part}_{split.tail}.json"
        with atomic_write(path) as partial:
            partial.write_text(json.dumps(content))
        written.append(Part(path, len(content["images"]), len(content["annotations"])))
    return written


def _ids(source: CocoFile, names: tuple[str, ...]) -> set[Id]:
    lacking = [name for name in names if name not in source.categories]
    if lacking:
        raise D2ZeroError(
            f"{source.path} lacks categories of the split: {join_truncated(lacking)}; expected a file with all of them"
        )
    return {source.categories[name] for name in names}


def _content(source: CocoFile, image_ids: list[Id], names: tuple[str, ...]) -> dict[str, Any]:
    kept = _ids(source, names)
    annotations = [
        entry for number in image_ids for entry in source.annotations[number] if entry["category_id"] in kept
    ]
    used = {entry["image_id"] for entry in annotations}
    letters = {
        name: {"frequency": letter} for letter, group in FREQUENCIES.items() for name in source.groups.get(group, ())
    }
    return {
        "images": [_of_categories(entry, kept) for number, entry in source.images.items() if number in used],
        "annotations": annotations,
        "categories": [{"id": source.categories[name], "name": name, **letters.get(name, {})} for name in names],
    }


def _of_categories(image: dict[str, Any], kept: set[Id]) -> dict[str, Any]:
    """An image's entry whose lists of categories have only some."""
    lists = {key: [category for category in image[key] if category in kept] for key in VERIFIED if key in image}
    return {**image, **lists}
