"""A drawn zero-shot dataset: coloured shapes on noise, in COCO format, learnable on two cores.

A class is a colour and a shape; its embedding is the normalised sum of the two attributes' fixed random
vectors. Every colour and every shape occurs among the seen classes, but the unseen combinations occur in
no training image: naming them takes composition, not memory.

Folders and files of `write_dataset(DIR)`:
    DIR/train, DIR/val, DIR/val_unseen_only       images; training holds seen classes only, `val` mixes
    DIR/annotations/instances_train_seen_shapes.json
    DIR/annotations/instances_val_{gzsi,unseen}_shapes.json
    DIR/annotations/instances_val_unseen_only_unseen_shapes.json
    DIR/vocabulary.npz
"""

import colorsys
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from d2zero.data.splits import Split
from d2zero_runtime import D2ZeroError, Vocabulary
from d2zero_runtime.masks import rle

COLOURS = {"red": 0.0, "yellow": 0.14, "green": 0.33, "cyan": 0.5, "blue": 0.64, "magenta": 0.84}  # hues
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
EMBEDDING_WIDTH = 64
SUPERSAMPLE = 4
_UNSEEN = (
    "red ring", "red star", "yellow circle", "green square", "green star", "cyan triangle",
    "blue circle", "blue cross", "magenta ring",
)  # fmt: skip
ALL_NAMES = tuple(f"{colour} {shape}" for colour in COLOURS for shape in SHAPES)
SPLIT = Split("shapes", seen=tuple(name for name in ALL_NAMES if name not in _UNSEEN), unseen=_UNSEEN)


@dataclass(frozen=True)
class ShapesConfig:
    """What is drawn."""

    size: int = 96  # pixels per side
    train_images: int = 6000
    val_images: int = 600  # of each validation set
    max_objects: int = 4
    radius: tuple[float, float] = (0.13, 0.26)  # of the side
    max_occlusion: float = 0.35  # share of an object that others may hide
    distractors: int = 2  # at most so many grey ellipses that are not annotated
    seed: int = 0

    def __post_init__(self) -> None:
        if self.size < 32:
            raise D2ZeroError(f"size must be at least 32 pixels, got {self.size}")
        for name in ("train_images", "val_images"):
            if getattr(self, name) < 0:
                raise D2ZeroError(f"{name} must not be negative, got {getattr(self, name)}")


def vocabulary() -> Vocabulary:
    """The 36 classes in split order, with embeddings composed from fixed attribute vectors."""
    random = np.random.default_rng(2023)
    attributes = [*COLOURS, *SHAPES]
    vectors = random.standard_normal((len(attributes), EMBEDDING_WIDTH))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    rows = []
    for name in SPLIT.names:
        colour, shape = name.split()
        row = vectors[attributes.index(colour)] + vectors[attributes.index(shape)]
        rows.append(row / np.linalg.norm(row))
    return Vocabulary(
        names=SPLIT.names,
        embeddings=np.array(rows, np.float32),
        seen=np.array(SPLIT.is_seen(SPLIT.names)),
        source={"encoder": "shapes-attributes", "split": SPLIT.name},
    )


@dataclass(frozen=True)
class _Object:
    name: str
    mask: NDArray[np.bool_]  # what is visible of it
    area: int  # before others hid parts of it


def write_dataset(
    directory: Path, config: ShapesConfig, progress: Callable[[Iterator[int], int, str], Iterator[int]] | None = None
) -> None:
    """Draw the dataset into a folder.

    Args:
        directory: Made if absent; files of the same names are replaced.
        config: What to draw.
        progress: Wraps each loop: `progress(iterator, length, label)`.
    """
    sets = (
        ("train", config.train_images, SPLIT.seen, SPLIT.seen, {"seen": SPLIT.seen}),
        ("val", config.val_images, SPLIT.names, SPLIT.unseen, {"gzsi": SPLIT.names, "unseen": SPLIT.unseen}),
        ("val_unseen_only", config.val_images, SPLIT.unseen, SPLIT.unseen, {"unseen": SPLIT.unseen}),
    )
    annotations = directory / "annotations"
    annotations.mkdir(parents=True, exist_ok=True)
    for number, (name, count, classes, first, files) in enumerate(sets):
        if not count:
            continue
        images, entries = [], []
        (directory / name).mkdir(exist_ok=True)
        numbers: Iterator[int] = iter(range(count))
        for index in progress(numbers, count, f"drawing {name}") if progress else numbers:
            picture, objects = draw_image(config, classes, np.random.default_rng([config.seed, number, index]), first)
            image_id = 1_000_000 * number + index + 1
            file_name = f"{image_id:07d}.png"
            Image.fromarray(picture).save(directory / name / file_name, compress_level=1)
            images.append({"id": image_id, "file_name": file_name, "height": config.size, "width": config.size})
            entries += [_annotation(entry, image_id, 100 * image_id + k) for k, entry in enumerate(objects)]
        for part, kept in files.items():
            _write_json(annotations / f"instances_{name}_{part}_shapes.json", images, entries, kept)
    vocabulary().save(directory / "vocabulary.npz")


def draw_image(
    config: ShapesConfig,
    names: tuple[str, ...],
    random: np.random.Generator,
    first_names: tuple[str, ...] | None = None,
) -> tuple[NDArray[np.uint8], list[_Object]]:
    """One picture (H, W, 3) uint8 and its objects, of the given classes.

    The first object is of `first_names`: a mixed image has an unseen object for certain, as the zero-shot
    protocol's test images have.
    """
    picture = _background(config.size, random)
    for _ in range(random.integers(config.distractors + 1)):
        stencil, grey = _ellipse(config.size, random), random.uniform(50, 210)
        picture = _paint(picture, stencil, np.full(3, grey))
    objects: list[_Object] = []
    for index in range(random.integers(1, config.max_objects + 1)):
        for _attempt in range(10):
            name = str(random.choice(names if index or first_names is None else first_names))
            stencil = _stencil(config.size, name.split()[1], config.radius, random)
            mask = stencil > 0.5
            if all((seen.mask & ~mask).sum() >= (1 - config.max_occlusion) * seen.area for seen in objects):
                objects = [_Object(seen.name, seen.mask & ~mask, seen.area) for seen in objects]
                objects.append(_Object(name, mask, int(mask.sum())))
                picture = _paint(picture, stencil, _colour(name.split()[0], random))
                break
    picture += random.normal(0, 4, picture.shape)
    return picture.clip(0, 255).astype(np.uint8), objects


def _background(size: int, random: np.random.Generator) -> NDArray[np.float64]:
    coarse = random.uniform(60, 190, (5, 5, 1)) + random.uniform(-18, 18, (5, 5, 3))
    image = Image.fromarray(coarse.clip(0, 255).astype(np.uint8)).resize((size, size), Image.Resampling.BICUBIC)
    return np.asarray(image) + random.normal(0, 12, (size, size, 1))


def _paint(
    picture: NDArray[np.float64], stencil: NDArray[np.float64], colour: NDArray[np.float64]
) -> NDArray[np.float64]:
    return picture + stencil[:, :, None] * (colour - picture)


def _colour(colour: str, random: np.random.Generator) -> NDArray[np.float64]:
    hue = (COLOURS[colour] + random.normal(0, 0.012)) % 1
    return 255 * np.array(colorsys.hsv_to_rgb(hue, random.uniform(0.7, 1.0), random.uniform(0.65, 1.0)))


def _ellipse(size: int, random: np.random.Generator) -> NDArray[np.float64]:
    x, y = random.uniform(0.1, 0.9, 2)
    a, b = random.uniform(0.05, 0.16, 2)
    return _drawn(size, lambda draw, side: draw.ellipse(_scaled([x - a, y - b, x + a, y + b], side), fill=255))


def _stencil(size: int, shape: str, radius: tuple[float, float], random: np.random.Generator) -> NDArray[np.float64]:
    """How much of each pixel a shape covers, (H, W) in 0..1."""
    r = random.uniform(*radius)
    x, y = random.uniform(r * 0.8, 1 - r * 0.8, 2)
    turn = random.uniform(0, 2 * math.pi)

    def paint(draw: ImageDraw.ImageDraw, side: int) -> None:
        if shape in ("circle", "ring"):
            draw.ellipse(_scaled([x - r, y - r, x + r, y + r], side), fill=255)
            if shape == "ring":
                h = 0.5 * r
                draw.ellipse(_scaled([x - h, y - h, x + h, y + h], side), fill=0)
            return
        corners = [
            (x + r * distance * math.cos(angle + turn), y + r * distance * math.sin(angle + turn))
            for distance, angle in _outline(shape)
        ]
        draw.polygon(_scaled([value for corner in corners for value in corner], side), fill=255)

    return _drawn(size, paint)


def _drawn(size: int, paint: Callable[[ImageDraw.ImageDraw, int], None]) -> NDArray[np.float64]:
    side = size * SUPERSAMPLE
    image = Image.new("L", (side, side))
    paint(ImageDraw.Draw(image), side)
    return np.asarray(image.resize((size, size), Image.Resampling.BOX)) / 255


def _scaled(values: list[float], side: int) -> list[float]:
    return [value * side for value in values]


def _outline(shape: str) -> list[tuple[float, float]]:
    """Corners in polar coordinates (distance in radii, angle)."""
    if shape == "star":
        return [(1.0 if k % 2 == 0 else 0.45, k * math.pi / 5) for k in range(10)]
    if shape == "cross":
        arm = math.atan2(0.3, 0.95)
        notch = (math.hypot(0.3, 0.3), math.pi / 4)
        return [
            corner
            for k in range(4)
            for corner in (
                (1.0, k * math.pi / 2 - arm),
                (1.0, k * math.pi / 2 + arm),
                (notch[0], k * math.pi / 2 + notch[1]),
            )
        ]
    corners = {"triangle": 3, "square": 4}[shape]
    return [(1.0, k * 2 * math.pi / corners) for k in range(corners)]


def _annotation(entry: _Object, image_id: int, annotation_id: int) -> dict[str, Any]:
    rows, columns = np.flatnonzero(entry.mask.any(1)), np.flatnonzero(entry.mask.any(0))
    left, top = int(columns[0]), int(rows[0])
    return {
        "id": annotation_id,
        "image_id": image_id,
        "category_id": ALL_NAMES.index(entry.name) + 1,
        "segmentation": rle.encode(entry.mask),
        "area": int(entry.mask.sum()),
        "bbox": [left, top, int(columns[-1]) + 1 - left, int(rows[-1]) + 1 - top],
        "iscrowd": 0,
    }


def _write_json(
    path: Path, images: list[dict[str, Any]], entries: list[dict[str, Any]], names: tuple[str, ...]
) -> None:
    ids = {ALL_NAMES.index(name) + 1: name for name in names}
    content = {
        "info": {"description": "coloured shapes, drawn by d2zero"},
        "images": images,
        "annotations": [entry for entry in entries if entry["category_id"] in ids],
        "categories": [{"id": number, "name": name} for number, name in ids.items()],
    }
    path.write_text(json.dumps(content))
