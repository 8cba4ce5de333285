"""Entries of a COCO file's images and categories, checked one by one and against each other.

LVIS has more to say of both, in the same lists: how frequent a category is; and of each image, which classes were
looked for and are not there (`neg_category_ids`), and of which classes not every instance is annotated
(`not_exhaustive_category_ids`). Its images are named by their address at COCO (`coco_url`).
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Set
from pathlib import Path
from typing import Any

from d2zero.data.coco_values import Id, as_id, foreign, shown, size_problem, text_problem
from d2zero_runtime import D2ZeroError
from d2zero_runtime.errors import join_truncated

FREQUENCIES = {"r": "rare", "c": "common", "f": "frequent"}  # in 1 to 10, 11 to 100, and more images of LVIS
VERIFIED = ABSENT, INCOMPLETE = "neg_category_ids", "not_exhaustive_category_ids"


def checked_images(path: Path, entries: list[Any]) -> dict[Id, dict[str, Any]]:
    """Image entries by id; ids and sizes are made whole numbers where they are written 3.0.

    Raises:
        D2ZeroError: There are none; one lacks something, has a size or name that none can have; two share an id.
    """
    if not entries:
        raise D2ZeroError(f"{path} lists no images")
    _name_by_address(path, entries)
    _require(path, "images", entries, {"id", "file_name", "height", "width"})
    found: dict[Id, dict[str, Any]] = {}
    for entry, number in zip(entries, _ids(path, "images", entries), strict=True):
        problem = size_problem(entry)
        if problem:
            raise D2ZeroError(f"{path}: image {shown(number)} has a size of {problem}")
        problem = text_problem(entry["file_name"])
        if problem:
            raise D2ZeroError(f"{path}: image {shown(number)} has the file_name {problem}")
        entry |= {"id": number, "height": int(entry["height"]), "width": int(entry["width"])}
        if found.setdefault(number, entry) != entry:
            names = f"{shown(found[number]['file_name'])} and {shown(entry['file_name'])}"
            raise D2ZeroError(f"{path} lists two images with the id {shown(number)}: {names}; give each its own")
    return found


def checked_categories(path: Path, entries: list[Any]) -> dict[str, Id]:
    """Category ids by name.

    Raises:
        D2ZeroError: One lacks something or has no text as its name; two share an id or a name.
    """
    _require(path, "categories", entries, {"id", "name"})
    found: dict[str, Id] = {}
    for entry, number in zip(entries, _ids(path, "categories", entries), strict=True):
        problem = text_problem(entry["name"])
        if problem:
            raise D2ZeroError(f"{path}: category {shown(number)} has the name {problem}")
        if found.setdefault(entry["name"], number) != number:
            ids = f"{shown(found[entry['name']])} and {shown(number)}"
            raise D2ZeroError(f"{path} lists two categories called {shown(entry['name'])}: ids {ids}; join them")
    if len(set(found.values())) < len(found):
        twice = [number for number, count in Counter(found.values()).items() if count > 1]
        raise D2ZeroError(
            f"{path} lists categories of different names with one id: {join_truncated(map(shown, twice))}"
        )
    return found


def frequency_groups(path: Path, entries: Iterable[Mapping[str, Any]]) -> dict[str, tuple[str, ...]]:
    """Names of categories by how frequent LVIS says they are: `rare`, `common`, `frequent`; without it, nothing.

    Raises:
        D2ZeroError: A category's frequency is something else.
    """
    found: dict[str, list[str]] = {group: [] for group in FREQUENCIES.values()}
    for entry in entries:
        if "frequency" in entry:
            frequency = entry["frequency"]
            if not isinstance(frequency, str) or frequency not in FREQUENCIES:
                raise D2ZeroError(
                    f"{path}: category {shown(entry['id'])} has the frequency {shown(frequency)},"
                    f" expected {', '.join(FREQUENCIES)}"
                )
            found[FREQUENCIES[frequency]].append(entry["name"])
    return {group: tuple(dict.fromkeys(names)) for group, names in found.items() if names}


def check_verified(path: Path, images: Mapping[Id, dict[str, Any]], categories: Mapping[Id, Any]) -> None:
    """Check what images say of classes beyond their annotations; ids are made whole numbers where written 3.0.

    Raises:
        D2ZeroError: An image has no list of categories of the file, or none where others have one.
    """
    for key in VERIFIED:
        if not any(key in entry for entry in images.values()):
            continue
        for number, entry in images.items():
            if key not in entry:
                raise D2ZeroError(
                    f"{path}: image {shown(number)} lacks {key}, which other images have; give it a list, empty or not"
                )
            ids = list(map(as_id, entry[key])) if isinstance(entry[key], list) else [None]
            known = [category for category in ids if category is not None]
            if len(known) < len(ids):
                raise D2ZeroError(
                    f"{path}: image {shown(number)} has the {key} {shown(entry[key])}, expected a list of category ids"
                )
            unknown = [category for category in known if category not in categories]
            if unknown:
                raise D2ZeroError(
                    f"{path}: image {shown(number)} has in {key} the category"
                    f" {foreign(unknown[0], categories, 'the file')}; correct or remove it"
                )
            entry[key] = known


def _name_by_address(path: Path, entries: list[Any]) -> None:
    """Name images that have no `file_name` by the end of their `coco_url`: `val2017/000000397133.jpg`."""
    for entry in entries:
        if isinstance(entry, dict) and "file_name" not in entry and "coco_url" in entry:
            address = entry["coco_url"]
            places = address.partition("://")[2].split("/")[1:] if isinstance(address, str) else []
            if not places or not places[-1]:
                raise D2ZeroError(
                    f"{path}: image {shown(entry.get('id'))} has the coco_url {shown(address)}, expected an address"
                    " that ends in a folder and a file, such as http://…/val2017/000000397133.jpg"
                )
            entry["file_name"] = "/".join(places[-2:])


def _ids(path: Path, part: str, entries: list[dict[str, Any]]) -> list[Id]:
    ids = []
    for entry in entries:
        number = as_id(entry["id"])
        if number is None:
            raise D2ZeroError(f"{path}: '{part}' has the id {shown(entry['id'])}, expected a whole number or text")
        ids.append(number)
    texts, numbers = ([n for n in ids if isinstance(n, kind)] for kind in (str, int))
    if texts and numbers:
        both = f"texts ({shown(texts[0])}) and numbers ({numbers[0]})"
        raise D2ZeroError(f"{path}: ids of '{part}' are partly {both}; write them all in one way")
    return ids


def _require(path: Path, part: str, entries: list[Any], keys: Set[str]) -> None:
    for entry in entries:
        problem = lacking(entry, keys)
        if problem:
            raise D2ZeroError(f"{path}: an entry of '{part}' {problem}")


def lacking(entry: Any, keys: Set[str]) -> str:
    """What an entry lacks, or nothing."""
    if not isinstance(entry, dict):
        return f"is {shown(entry)}, expected an object with {join_truncated(sorted(keys))}"
    return "" if entry.keys() >= keys else f"lacks {join_truncated(sorted(keys - entry.keys()))}"
