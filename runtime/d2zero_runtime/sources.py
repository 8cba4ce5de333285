"""Which images a source names: a file, a folder, a pattern, or what is in memory."""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from d2zero_runtime.errors import D2ZeroError, join_truncated

ImageLike = str | os.PathLike[str] | NDArray[np.uint8] | Image.Image
IMAGE_SUFFIXES = frozenset(
    [".jpg", ".jpeg", ".jfif", ".mpo", ".png", ".bmp", ".tif", ".tiff", ".webp", ".gif", ".avif", ".jp2"]
)  # of the formats that are read


def expand(source: ImageLike | Sequence[ImageLike], leave_out: Path | None = None) -> list[ImageLike]:
    """The images that a source names: a folder's, a pattern's, a list's, or the one.

    Hidden files and folders, whose names begin with a dot, are left out of folders and patterns.

    Args:
        source: An image, a list of them, a folder with all that is below it, or a pattern such as `photos/*.jpg`.
        leave_out: A folder whose files are not taken, such as one that pictures are written to.

    Raises:
        D2ZeroError: Nothing is there.
    """
    if not isinstance(source, (str, os.PathLike)):
        return list(source) if isinstance(source, (list, tuple)) else [source]  # type: ignore[list-item]
    path = Path(source)
    if path.is_dir():
        found = [file for file in _visible(path, "**/*", leave_out) if file.suffix.lower() in IMAGE_SUFFIXES]
        if not found:
            raise D2ZeroError(f"folder {path} holds no images ({join_truncated(sorted(IMAGE_SUFFIXES), 20)})")
        return [*found]
    if _is_pattern(path):
        folder = next(parent for parent in path.parents if parent.is_dir() or not parent.name)
        found = _visible(folder, str(path.relative_to(folder)), leave_out)
        if not found:
            raise D2ZeroError(f"no file matches {source}")
        return [*found]
    return [path]


def is_many(source: object) -> bool:
    """Whether a source names any number of images, and not one."""
    if isinstance(source, (str, os.PathLike)):
        return Path(source).is_dir() or _is_pattern(Path(source))
    return isinstance(source, (list, tuple))


def _visible(folder: Path, pattern: str, leave_out: Path | None) -> list[Path]:
    """Files below a folder, sorted. Signs of patterns in the folder's own name mean nothing."""
    hidden_asked = any(part.startswith(".") for part in Path(pattern).parts)
    left_out = leave_out.resolve() if leave_out else None
    return sorted(
        path
        for path in folder.glob(pattern)
        if path.is_file()
        and (hidden_asked or not any(part.startswith(".") for part in path.relative_to(folder).parts))
        and (left_out is None or left_out not in path.resolve().parents)
    )


def _is_pattern(path: Path) -> bool:
    return any(sign in str(path) for sign in "*?[") and not path.exists()
