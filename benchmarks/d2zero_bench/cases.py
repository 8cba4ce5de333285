"""What is measured: image size, batch, number of classes; and the photos that are read for it."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from d2zero_runtime import D2ZeroError
from d2zero_runtime.images import Preprocessing, Size
from d2zero_runtime.sources import expand

DRAWN = 8  # photos drawn per size
JPEG_QUALITY = 90


@dataclass(frozen=True)
class Case:
    """One setting in which all candidates are measured.

    Args:
        height: The image's height as the network gets it, before padding to multiples of 32.
        width: Its width.
        batch: Images per batch.
        classes: The number of drawn embeddings; the model's own vocabulary if left out.
    """

    height: int
    width: int
    batch: int = 1
    classes: int | None = None

    def __str__(self) -> str:
        classes = "" if self.classes is None else f", {self.classes} classes"
        return f"{self.height}×{self.width}, batch {self.batch}{classes}"

    def preprocessing(self, own: Preprocessing) -> Preprocessing:
        """A model's preprocessing with this case's size: photos are fitted into it and padded to it.

        Raises:
            D2ZeroError: The model was made for one other size.
        """
        divisor = own.size_divisor
        static_size = -(-self.height // divisor) * divisor, -(-self.width // divisor) * divisor
        if own.static_size not in (None, static_size):
            raise D2ZeroError(
                f"the model has one fixed size, {own.static_size[0]}x{own.static_size[1]}, and cannot be measured at"
                f" {self.height}x{self.width}; leave out --size, or export it without one"
            )
        sides = sorted((self.height, self.width))
        return replace(own, shortest_edge=sides[0], longest_edge=sides[1], static_size=static_size)


def parse_sizes(text: str) -> list[Size]:
    """Read `800x1216,480x640` (height x width).

    Raises:
        D2ZeroError: It is not written so.
    """
    sizes = []
    for part in text.split(","):
        sides = part.strip().lower().split("x")
        if len(sides) != 2 or not all(side.isdecimal() and int(side) >= 32 for side in sides):
            raise D2ZeroError(
                f"--size must be HEIGHTxWIDTH, at least 32x32, several with commas: 800x1216,480x640; got {text!r}"
            )
        sizes.append((int(sides[0]), int(sides[1])))
    return sizes


def parse_counts(flag: str, text: str) -> list[int]:
    """Read `1,4,8`.

    Raises:
        D2ZeroError: It is not written so.
    """
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) for part in parts):
        raise D2ZeroError(f"{flag} must be whole numbers from 1 on, several with commas: 1,4,8; got {text!r}")
    return [int(part) for part in parts]


def make_cases(
    sizes: Sequence[Size], batches: Sequence[int], classes: Sequence[int | None], grid: bool = False
) -> list[Case]:
    """Cases from lists: around the first of each one thing varies at a time; or, as a grid, all combinations."""
    every = [Case(*size, batch, count) for size, batch, count in product(sizes, batches, classes)]
    if not grid:
        first = (sizes[0], batches[0], classes[0])
        every = [
            case
            for case in every
            if sum(
                (one != other)
                for one, other in zip(first, ((case.height, case.width), case.batch, case.classes), strict=True)
            )
            <= 1
        ]
    return list(dict.fromkeys(every))


@dataclass(frozen=True)
class Photos:
    """Image files to read: given ones, or drawn ones of each case's size."""

    folder: Path
    given: tuple[Path, ...] = ()

    @classmethod
    def of(cls, folder: Path, images: Path | None, cases: Sequence[Case]) -> "Photos":
        """Real photos if there are some, else drawn ones, written to `folder`.

        Raises:
            D2ZeroError: The folder of photos holds none.
        """
        if images is not None:
            files = tuple(Path(str(item)) for item in expand(images))
            if not all(path.is_file() for path in files):
                raise D2ZeroError(f"--images must be a folder or a pattern of photos; {images} does not exist")
            return cls(folder, files)
        for size in {(case.height, case.width) for case in cases}:
            _draw(folder / _name(size), size)
        return cls(folder)

    def batch(self, case: Case, number: int) -> list[Path]:
        """The files of a case's `number`-th run: the same for every candidate."""
        files = self.given or tuple(sorted((self.folder / _name((case.height, case.width))).iterdir()))
        start = number * case.batch
        return [files[index % len(files)] for index in range(start, start + case.batch)]


def _name(size: Size) -> str:
    return f"{size[0]}x{size[1]}"


def _draw(folder: Path, size: Size) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(0)
    for number in range(DRAWN):
        Image.fromarray(drawn_image(random, *size)).save(folder / f"{number}.jpg", quality=JPEG_QUALITY)


def drawn_image(random: np.random.Generator, height: int, width: int) -> NDArray[np.uint8]:
    """A picture with structure: soft areas of colour and some noise; compresses much as a photo does."""
    coarse = random.integers(0, 256, (max(2, height // 64), max(2, width // 64), 3)).astype(np.uint8)
    soft = np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC), np.float32)
    noisy = soft + random.normal(0, 8, (height, width, 3))
    return noisy.clip(0, 255).astype(np.uint8)
