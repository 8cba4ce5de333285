"""Which images a source names (a file, a folder, a pattern, or what is in memory), and decoding them."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from d2zero_runtime.errors import D2ZeroError, join_truncated

ImageLike = str | os.PathLike[str] | NDArray[np.uint8] | Image.Image
LARGEST_IMAGE = 89_478_485  # pixels; from here on Pillow warns of bombs
TURNED = (5, 6, 7, 8)  # EXIF orientations that exchange height and width
FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "TIFF", "BMP", "GIF", "AVIF", "JPEG2000")  # as Pillow calls them
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


def read_image(path: str | os.PathLike[str]) -> NDArray[np.uint8]:
    """Read an image file as (H, W, 3) uint8 RGB, upright (EXIF orientation applied).

    Grey, palette, alpha, CMYK, 16-bit and float files are converted; transparency is dropped.

    Raises:
        D2ZeroError: The file is absent, empty, damaged, too large, or no image of `FORMATS`.
    """
    pixels: NDArray[np.uint8] = np.asarray(open_rgb(path))
    return pixels


def open_rgb(source: str | os.PathLike[str] | Image.Image) -> Image.Image:
    """An image file, or an image that Pillow has opened, in RGB and upright.

    Raises:
        D2ZeroError: As `read_image` does.
    """
    if isinstance(source, Image.Image):
        return _converted(source, getattr(source, "filename", "") or "the image", in_place=False)
    with _opened(Path(source)) as image:
        return _converted(image, str(source), in_place=True)


def image_size(path: str | os.PathLike[str]) -> tuple[int, int]:
    """(height, width) of an image file, upright; its pixels are not read.

    Raises:
        D2ZeroError: The file is absent, empty, damaged at its beginning, or no image of `FORMATS`.
    """
    with _opened(Path(path)) as image:
        if image.format == "PNG" and "exif" not in image.info:  # else Pillow decodes it, to look behind its pixels
            return image.height, image.width
        turned = image.getexif().get(ExifTags.Base.Orientation) in TURNED
        return (image.width, image.height) if turned else (image.height, image.width)


@contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    """An image file, whose pixels may still be to read; whatever goes wrong is said in one line."""
    try:
        with Image.open(path, formats=_readable()) as image:
            yield image
    except D2ZeroError:
        raise
    except FileNotFoundError as error:
        raise D2ZeroError(f"image {path} does not exist") from error
    except UnidentifiedImageError as error:
        raise D2ZeroError(f"{path} is not an image in a format that is read ({', '.join(FORMATS)})") from error
    except Exception as error:  # Pillow's, of many kinds
        raise _damaged(str(path), error) from error


@lru_cache(maxsize=1)
def _readable() -> tuple[str, ...]:
    """Those of `FORMATS` that this Pillow has."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def _converted(image: Image.Image, name: str, in_place: bool) -> Image.Image:
    pixels = image.width * image.height
    if pixels > LARGEST_IMAGE:
        raise D2ZeroError(
            f"image {name} has {pixels / 1e6:.0f} megapixels, at most {LARGEST_IMAGE / 1e6:.0f} are read; shrink it"
        )
    try:
        image.load()
        if in_place:
            ImageOps.exif_transpose(image, in_place=True)
            return _rgb(image)
        return _rgb(ImageOps.exif_transpose(image))
    except D2ZeroError as error:
        raise D2ZeroError(f"image {name}: {error}") from error
    except Exception as error:  # Pillow decodes only now
        raise _damaged(name, error) from error


def _damaged(name: str, error: Exception) -> D2ZeroError:
    reason = (str(error) or type(error).__name__).splitlines()[0]
    return D2ZeroError(f"image {name} is damaged or cut short: {reason}")


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16") or image.mode == "I":
        # Pillow would clip 16-bit greys at 255 instead of scaling them. Some files hold 8-bit levels in 16 bits.
        wide = np.asarray(image).astype(np.float32)
        return _grey(wide if wide.min() >= 0 and wide.max() <= 255 else wide / 257.0)
    if image.mode in ("LAB", "HSV"):
        raise D2ZeroError(f"its colours are {image.mode}, which are not converted; save it as RGB")
    if image.mode == "F":
        levels = np.asarray(image)
        low, high = float(levels.min()), float(levels.max())
        if not 0 <= low <= high <= 255:  # nor where it is no number
            raise D2ZeroError(f"its float values go from {low:g} to {high:g}; expected 0..1, or grey levels 0..255")
        return _grey(levels * 255 if high <= 1 else levels)
    return image if image.mode == "RGB" else image.convert("RGB")


def _grey(levels_HW: NDArray[np.float32]) -> Image.Image:
    return Image.fromarray((levels_HW + 0.5).clip(0, 255).astype(np.uint8)).convert("RGB")
