"""Pictures of results: overlays of one image, and contact sheets of many.

Seen and unseen classes are told apart by the outline and the label: seen instances have a thin outline and a
dark label, unseen ones a thick white outline and a white label with a star.
"""

import colorsys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from d2zero_runtime.fonts import font_for

SMALLEST_SIDE = 240  # pictures with shorter sides are drawn enlarged, so that labels can be read
LARGEST_SIDE = 8192  # of an enlarged picture
_GOLDEN = 0.618033988749895


@dataclass(frozen=True, eq=False)
class Instance:
    """What is drawn of one instance.

    Args:
        box: x1, y1, x2, y2 in pixels, x2 and y2 exclusive.
        label: The text beside it.
        class_id: Chooses the colour.
        seen: Whether its class was seen in training.
        mask: Makes its (H, W) bool mask, if it has one; called once, since many large ones take much memory.
    """

    box: tuple[float, float, float, float]
    label: str
    class_id: int
    seen: bool
    mask: Callable[[], NDArray[np.bool_]] | None = None


def class_colour(class_id: int) -> tuple[int, int, int]:
    """A colour for a class, far from those of its neighbours."""
    hue = (0.11 + class_id * _GOLDEN) % 1
    red, green, blue = colorsys.hsv_to_rgb(hue, 0.75, 1.0)
    return int(255 * red), int(255 * green), int(255 * blue)


def overlay(
    image: Image.Image | NDArray[np.uint8],
    instances: Sequence[Instance],
    shown_at: int | None = None,
    font: str | None = None,
) -> Image.Image:
    """Masks, boxes and labels over an image; small images are enlarged by a whole factor.

    Args:
        image: An RGB image, or (H, W, 3) uint8 RGB.
        instances: What to draw, the first on top.
        shown_at: The longest side, in pixels, that the picture will be shrunk to; labels are drawn larger so
            that they can be read then.
        font: A font file for labels; `d2zero_runtime.fonts` finds one if left out.
    """
    image = Image.fromarray(image) if isinstance(image, np.ndarray) else image
    zoom = max(1, min(-(-SMALLEST_SIDE // min(image.size)), LARGEST_SIDE // max(image.size)))
    canvas = image.resize((image.width * zoom, image.height * zoom), Image.Resampling.NEAREST)
    shrink = max(1.0, max(canvas.size) / shown_at) if shown_at else 1.0
    thickness = max(1, round(min(canvas.size) / 300), round(shrink))
    for instance in reversed(instances):
        _draw_mask(canvas, instance, zoom, thickness)
    draw = ImageDraw.Draw(canvas)
    size = max(round(11 * shrink), round(min(canvas.size) / 34))
    taken: list[tuple[float, float, float, float]] = []
    for instance in reversed(instances):
        box = tuple(side * zoom for side in instance.box)
        if box[2] <= box[0] or box[3] <= box[1]:
            continue
        colour, seen = class_colour(instance.class_id), instance.seen
        draw.rectangle((box[0], box[1], box[2] - 1, box[3] - 1), outline=colour if seen else "white", width=thickness)
        label = _Label(*font_for(instance.label, size, font), colour, seen)
        _draw_label(draw, label, canvas.size, box, taken)
    return canvas


@dataclass(frozen=True)
class SheetRow:
    """One image of a contact sheet with its annotations and predictions."""

    image: NDArray[np.uint8]
    truth: Sequence[Instance]
    found: Sequence[Instance]


def contact_sheet(
    rows: Sequence[SheetRow],
    columns: int = 3,
    title: str = "",
    cell: int = 300,
    sides: str = "left: ground truth, right: prediction",
) -> Image.Image:
    """Pairs of ground truth (left) and prediction (right), with a legend on top.

    Args:
        rows: The images.
        columns: Pairs side by side.
        title: One line above.
        cell: Longest side of each picture in pixels.
        sides: What the legend says of left and right.
    """
    gap, head = 10, 58
    pair = 2 * cell + 4
    lines = -(-len(rows) // columns)
    sheet = Image.new("RGB", (columns * (pair + gap) + gap, head + lines * (cell + gap) + gap), (32, 34, 38))
    draw = ImageDraw.Draw(sheet)
    legend = f"{sides}; thick white outline and *: class never seen in training"
    for text, top, size, colour in ((title, 8, 20, (255, 255, 255)), (legend, 34, 14, (200, 204, 210))):
        font, text = font_for(text, size)
        draw.text((gap, top), text, fill=colour, font=font)
    for number, row in enumerate(rows):
        left = gap + (number % columns) * (pair + gap)
        top = head + (number // columns) * (cell + gap)
        for side, instances in enumerate((row.truth, row.found)):
            picture = overlay(row.image, instances, shown_at=cell)
            picture.thumbnail((cell, cell), Image.Resampling.LANCZOS)
            sheet.paste(picture, (left + side * (cell + 4), top))
    return sheet


def _draw_mask(canvas: Image.Image, instance: Instance, zoom: int, thickness: int) -> None:
    x1, y1, x2, y2 = (int(side) for side in instance.box)
    if instance.mask is None or x2 <= x1 or y2 <= y1:
        return
    box = (x1 * zoom, y1 * zoom, x2 * zoom, y2 * zoom)
    shape = Image.fromarray(instance.mask()[y1:y2, x1:x2])
    mask = np.asarray(shape.resize((box[2] - box[0], box[3] - box[1]), Image.Resampling.NEAREST))
    colour, seen = class_colour(instance.class_id), instance.seen
    edge = mask & ~_eroded(mask, thickness if seen else 2 * thickness)
    canvas.paste(colour, box, Image.fromarray(mask * np.uint8(0.45 * 255)))
    canvas.paste(colour if seen else "white", box, Image.fromarray(edge))


def _eroded(mask: NDArray[np.bool_], width: int) -> NDArray[np.bool_]:
    """What is at least `width` pixels from the mask's border, up, down and sideways."""
    padded = np.pad(mask, width)
    height, breadth = mask.shape
    kept = mask.copy()
    for start in range(2 * width + 1):
        kept &= padded[start : start + height, width : width + breadth]
        kept &= padded[width : width + height, start : start + breadth]
    return kept


class _Label(NamedTuple):
    """How a label looks."""

    font: ImageFont.FreeTypeFont
    text: str
    colour: tuple[int, int, int]
    seen: bool


def _draw_label(
    draw: ImageDraw.ImageDraw,
    label: _Label,
    canvas: tuple[int, int],
    box: tuple[float, ...],
    taken: list[tuple[float, float, float, float]],
) -> None:
    """Above the box if there is room, else inside; moved down past labels that are already there."""
    font, text, colour, seen = label
    left, top, right, bottom = draw.textbbox((0, 0), text, font=font)
    width, height = right - left + 6, bottom - top + 5
    x = min(max(0.0, box[0]), max(0.0, canvas[0] - width))
    y = box[1] - height if box[1] >= height else box[1]
    for _ in range(len(taken)):
        clash = [t for t in taken if x < t[2] and x + width > t[0] and y < t[3] and y + height > t[1]]
        if not clash:
            break
        y = max(t[3] for t in clash)
    y = min(y, canvas[1] - height)
    taken.append((x, y, x + width, y + height))
    draw.rectangle((x, y, x + width, y + height), fill=(20, 20, 22) if seen else "white", outline=colour)
    draw.text((x + 3 - left, y + 2 - top), text, fill=colour if seen else (20, 20, 22), font=font)
