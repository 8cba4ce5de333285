"""Pictures of results: overlays of one image, contact sheets of many, and sheets of single instances.

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

from d2zero_runtime.errors import printable
from d2zero_runtime.fonts import font_for

SMALLEST_SIDE = 240  # pictures with shorter sides are drawn enlarged, so that labels can be read
LARGEST_SIDE = 8192  # of an enlarged picture
BACKDROP, GREY, WHITE, PALE = (32, 34, 38), (84, 87, 92), (255, 255, 255), (200, 204, 210)  # of sheets
SURROUNDINGS = 0.3  # of an instance's longer side, shown on each side of it
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


LEGEND = "thick white outline and *: class never seen in training"


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
    sheet = Image.new("RGB", (columns * (pair + gap) + gap, head + lines * (cell + gap) + gap), BACKDROP)
    _draw_heading(sheet, gap, title, f"{sides}; {LEGEND}")
    for number, row in enumerate(rows):
        left = gap + (number % columns) * (pair + gap)
        top = head + (number // columns) * (cell + gap)
        for side, instances in enumerate((row.truth, row.found)):
            picture = overlay(row.image, instances, shown_at=cell)
            picture.thumbnail((cell, cell), Image.Resampling.LANCZOS)
            sheet.paste(picture, (left + side * (cell + 4), top))
    return sheet


@dataclass(frozen=True, eq=False)
class SheetCell:
    """One instance of a sheet.

    Args:
        picture: What `crop` made, or why there is no picture.
        caption: Lines below it.
    """

    picture: Image.Image | str
    caption: Sequence[str]


def crop(image: Image.Image | NDArray[np.uint8], instance: Instance, side: int) -> Image.Image:
    """An instance with its outline and what is around it.

    Args:
        image: An RGB image, or (H, W, 3) uint8 RGB.
        instance: Where it is; without a mask, its box is outlined. Its label is not drawn.
        side: The longer side of the result, to which small instances are enlarged.
    """
    image = Image.fromarray(image) if isinstance(image, np.ndarray) else image
    left, top, right, bottom = _window(instance.box, image.size)
    factor = side / max(right - left, bottom - top)
    size = max(1, round(factor * (right - left))), max(1, round(factor * (bottom - top)))
    picture = image.crop((left, top, right, bottom)).resize(size, Image.Resampling.LANCZOS)
    if instance.mask is None:
        inside = np.zeros((image.height, image.width), bool)
        x1, y1, x2, y2 = (int(place) for place in instance.box)
        inside[y1:y2, x1:x2] = True
    else:
        inside = instance.mask()
    shape = Image.fromarray(inside[top:bottom, left:right]).resize(size, Image.Resampling.NEAREST)
    _draw_outline(picture, (0, 0, *size), np.asarray(shape), instance, max(2, side // 100))
    return picture


def crop_sheet(cells: Sequence[SheetCell], columns: int = 8, title: str = "", side: int = 220) -> Image.Image:
    """Single instances in rows, best first as they are given, with captions.

    Args:
        cells: The instances; one without a picture becomes a grey cell that says why.
        columns: Cells side by side.
        title: One line above.
        side: The side of each cell in pixels; no picture is larger.
    """
    gap, head, line, letters = 10, 58, 17, 13
    columns = min(columns, max(3, len(cells)))  # room for the title
    pitch = side + line * max((len(cell.caption) for cell in cells), default=0) + gap
    rows = -(-len(cells) // columns)
    sheet = Image.new("RGB", (columns * (side + gap) + gap, head + rows * pitch + gap), BACKDROP)
    draw = ImageDraw.Draw(sheet)
    _draw_heading(sheet, gap, title, LEGEND)
    for number, cell in enumerate(cells):
        left, top = gap + (number % columns) * (side + gap), head + (number // columns) * pitch
        if isinstance(cell.picture, str):
            draw.rectangle((left, top, left + side - 1, top + side - 1), fill=GREY)
            _draw_line(draw, (left + gap, top + side // 2 - letters), cell.picture, letters, WHITE, side - 2 * gap)
        else:
            width, height = cell.picture.size
            sheet.paste(cell.picture, (left + (side - width) // 2, top + (side - height) // 2))
        for place, text in enumerate(cell.caption):
            _draw_line(draw, (left, top + side + 2 + place * line), text, letters, PALE if place else WHITE, side)
    return sheet


def _window(box: tuple[float, float, float, float], size: tuple[int, int]) -> tuple[int, int, int, int]:
    """A square around a box with its surroundings, as far as the image goes."""
    x1, y1, x2, y2 = box
    half = max(8.0, max(x2 - x1, y2 - y1) * (0.5 + SURROUNDINGS))
    (left, right), (top, bottom) = (
        (max(0, int(middle - half)), min(length, int(np.ceil(middle + half))))
        for middle, length in zip(((x1 + x2) / 2, (y1 + y2) / 2), size, strict=True)
    )
    return left, top, right, bottom


def _draw_heading(sheet: Image.Image, gap: int, title: str, legend: str) -> None:
    draw, width = ImageDraw.Draw(sheet), sheet.width - 2 * gap
    for text, top, size, colour in ((title, 8, 20, WHITE), (legend, 34, 14, PALE)):
        _draw_line(draw, (gap, top), text, size, colour, width)


def _draw_line(
    draw: ImageDraw.ImageDraw, place: tuple[int, int], text: str, size: int, colour: tuple[int, int, int], width: int
) -> None:
    """Draw a line of text; the middle of a long one gives way to an ellipsis."""
    font, text = font_for(printable(text), size)
    shown, kept = text, len(text)
    while font.getlength(shown) > width and kept > 2:
        kept -= 1
        shown = f"{text[: kept - kept // 2]}…{text[len(text) - kept // 2 :]}"
    draw.text(place, shown, fill=colour, font=font)


def _draw_mask(canvas: Image.Image, instance: Instance, zoom: int, thickness: int) -> None:
    x1, y1, x2, y2 = (int(side) for side in instance.box)
    if instance.mask is None or x2 <= x1 or y2 <= y1:
        return
    box = (x1 * zoom, y1 * zoom, x2 * zoom, y2 * zoom)
    shape = Image.fromarray(instance.mask()[y1:y2, x1:x2])
    mask = np.asarray(shape.resize((box[2] - box[0], box[3] - box[1]), Image.Resampling.NEAREST))
    canvas.paste(class_colour(instance.class_id), box, Image.fromarray(mask * np.uint8(0.45 * 255)))
    _draw_outline(canvas, box, mask, instance, thickness)


def _draw_outline(
    canvas: Image.Image, box: tuple[int, int, int, int], mask: NDArray[np.bool_], instance: Instance, thickness: int
) -> None:
    edge = mask & ~_eroded(mask, thickness if instance.seen else 2 * thickness)
    canvas.paste(class_colour(instance.class_id) if instance.seen else "white", box, Image.fromarray(edge))


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
