"""Entries of a COCO file's images and categories, checked one by one and against each other."""

from collections import Counter
from collections.abc import Set
from pathlib import Path
from typing import Any

from d2zero.data.coco_values import Id, as_id, shown, size_problem, text_problem
from d2zero_runtime import D2ZeroError
from d2zero_runtime.errors import join_truncated


def checked_images(path: Path, entries: list[Any]) -> dict[Id, dict[str, Any]]:
    """Image entries by id; ids and sizes are made whole numbers where they are written 3.0.

    Raises:
        D2ZeroError: There are none; one lacks something, has a size or name that none can have; two share an id.
    """
    if not entries:
        raise D2ZeroError(f"{path} lists no images")
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
