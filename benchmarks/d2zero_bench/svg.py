"""Small plots as SVG text: stacked bars, points, lines.

Horizontal places are percentages and heights are pixels, so that a plot fills whatever width there is, with
letters of one size on a phone and on a desk. Colours are CSS variables of the page (`--c0` …).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise

COLOURS = 8  # of candidates, in the page's style
LEFT, RIGHT = 10.0, 96.0  # percent, of the plotted area
ROW = 46  # pixels of one bar with its label
SPAN = 5.0  # of a scatter's upward scale at least: differences that mean nothing stay small


@dataclass(frozen=True)
class Bar:
    """One candidate's stacked bar.

    Args:
        label: its name.
        parts: colour class, name and length, from the left.
        total: written at its end; medians of parts do not add up to the median of the whole.
        reach: where a thin line beyond the bar's end goes (p90).
    """

    label: str
    parts: tuple[tuple[str, str, float], ...]
    total: float
    reach: float


@dataclass(frozen=True)
class Point:
    """A place with a name; `low` and `high` are ends of a vertical line through it."""

    x: float
    y: float
    label: str = ""
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Line:
    """Points joined in order, in one of the page's colours."""

    colour: int
    points: tuple[Point, ...]


def ticks(highest: float, about: int = 5, lowest: float = 0.0) -> list[float]:
    """Round numbers from at most `lowest` to at least `highest`."""
    if not highest > lowest:
        return [lowest, lowest + 1.0]
    rough = (highest - lowest) / about
    unit = 10.0 ** math.floor(math.log10(rough))
    step = next(unit * factor for factor in (1, 2, 2.5, 5, 10) if unit * factor >= rough)
    return [step * number for number in range(math.floor(lowest / step + 1e-9), math.ceil(highest / step - 1e-9) + 1)]


def bars(rows: Sequence[Bar], unit: str) -> str:
    """Stacked horizontal bars on a common scale from 0."""
    marks = ticks(1.12 * max(max(sum(part[2] for part in row.parts), row.reach) for row in rows), 4)
    bottom = ROW * len(rows) + 4
    out = [_vertical_grid(marks, 4, bottom, unit)]
    for number, row in enumerate(rows):
        out.append(_bar(row, ROW * number, marks[-1]))
    return _svg(bottom + 40, out, f"{unit} by candidate")


def _bar(row: Bar, top: int, highest: float) -> str:
    out = [f'<text class="label" x="0.5%" y="{top + 15}">{escape(row.label)}</text>']
    start = 0.0
    for colour, name, length in row.parts:
        out.append(
            f'<rect class="{colour}" x="{_along(start, highest, 0.5)}" y="{top + 22}" height="18"'
            f' width="{_percent((97 - 0.5) * length / highest)}"><title>{escape(name)}: {_short(length)}</title></rect>'
        )
        start += length
    end = max(start, row.reach)
    if row.reach > start:
        out.append(_stroke("whisker", _along(start, highest, 0.5), top + 31, _along(end, highest, 0.5), top + 31))
    text = f'<text class="value" dx="6" x="{_along(end, highest, 0.5)}" y="{top + 36}">{_short(row.total)}</text>'
    return "".join([*out, text])


def _vertical_grid(marks: Sequence[float], top: int, bottom: int, unit: str) -> str:
    out = []
    for mark in marks:
        x = _along(mark, marks[-1], 0.5)
        anchor = "start" if mark == 0 else "end" if mark == marks[-1] else "middle"
        out.append(_stroke("grid", x, top, x, bottom))
        out.append(_tick(x, bottom + 16, _short(mark), anchor))
    return "".join([*out, f'<text class="axis" text-anchor="end" x="97%" y="{bottom + 34}">{escape(unit)}</text>'])


def scatter(points: Sequence[Point], x_unit: str, y_unit: str, height: int = 300) -> str:
    """Points in the page's colours, in order; across from 0, upwards what the points need and `SPAN` at least."""
    across = ticks(1.15 * max(point.x for point in points))
    low, high = min(point.y for point in points), max(point.y for point in points)
    margin = max(SPAN - (high - low), 0.2 * (high - low)) / 2
    up = ticks(high + margin, lowest=max(low - margin, 0.0))
    top, bottom = 24, height - 44
    out = [_horizontal_grid(up, top, bottom, y_unit)]
    out += [_tick(_along(mark, across[-1]), bottom + 17, _short(mark)) for mark in across]
    out.append(f'<text class="axis" text-anchor="end" x="{RIGHT}%" y="{bottom + 36}">{escape(x_unit)}</text>')
    for number, point in enumerate(points):
        out.append(_dot(number, _along(point.x, across[-1]), _height(point.y, up, top, bottom), 6, point.label))
    return _svg(height, out, f"{y_unit} against {x_unit}")


def lines(drawn: Sequence[Line], labels: Sequence[str], x_unit: str, y_unit: str, height: int = 300) -> str:
    """Lines over evenly spaced labels; a point's `x` is the number of its label."""
    top, bottom = 24, height - 44
    up = ticks(max(max(point.y, point.high or 0.0) for line in drawn for point in line.points))
    out = [_horizontal_grid(up, top, bottom, y_unit)]
    out += [_tick(_place(number, len(labels)), bottom + 17, label) for number, label in enumerate(labels)]
    out.append(f'<text class="axis" text-anchor="end" x="{RIGHT}%" y="{bottom + 36}">{escape(x_unit)}</text>')
    out += [_line(line, len(labels), up, top, bottom) for line in drawn]
    return _svg(height, out, f"{y_unit} against {x_unit}")


def _line(line: Line, count: int, marks: Sequence[float], top: int, bottom: int) -> str:
    colour, out = f"c{line.colour % COLOURS}", []
    places = [(_place(point.x, count), _height(point.y, marks, top, bottom)) for point in line.points]
    for (x1, y1), (x2, y2) in pairwise(places):
        out.append(_stroke(f"line {colour}", x1, y1, x2, y2))
    for point, (x, y) in zip(line.points, places, strict=True):
        if point.low is not None and point.high is not None:
            ends = (_height(end, marks, top, bottom) for end in (point.low, point.high))
            out.append(_stroke(f"range {colour}", x, next(ends), x, next(ends)))
        out.append(_dot(line.colour, x, y, 4.5, point.label))
    shift = (7 * line.colour) % 36 - 14  # lines through the same places stay apart
    return f'<g transform="translate({shift} 0)">{"".join(out)}</g>'


def _dot(colour: int, x: str, y: float, radius: float, title: str) -> str:
    place = f'cx="{x}" cy="{y:.1f}" r="{radius}"'
    return f'<circle class="dot c{colour % COLOURS}" {place}><title>{escape(title)}</title></circle>'


def _horizontal_grid(marks: Sequence[float], top: int, bottom: int, unit: str) -> str:
    out = [f'<text class="axis" x="0.5%" y="12">{escape(unit)}</text>']
    for mark in marks:
        y = _height(mark, marks, top, bottom)
        out.append(_stroke("grid", f"{LEFT}%", y, f"{RIGHT}%", y))
        out.append(f'<text class="tick" text-anchor="end" x="{LEFT - 1}%" y="{y + 4:.1f}">{_short(mark)}</text>')
    return "".join(out)


def _tick(x: str, y: float, text: str, anchor: str = "middle") -> str:
    return f'<text class="tick" text-anchor="{anchor}" x="{x}" y="{y}">{escape(text)}</text>'


def _stroke(kind: str, x1: str, y1: float, x2: str, y2: float) -> str:
    return f'<line class="{kind}" x1="{x1}" y1="{y1:.1f}" x2="{x2}" y2="{y2:.1f}"/>'


def _svg(height: int, content: Sequence[str], title: str) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" role="img" aria-label="{escape(title)}" width="100%"'
        f' height="{height}">{"".join(content)}</svg>'
    )


def _along(value: float, highest: float, left: float = LEFT) -> str:
    right = RIGHT if left == LEFT else 97.0
    return _percent(left + (right - left) * value / highest)


def _place(number: float, count: int) -> str:
    margin = 0.12 if count > 1 else 0.5
    share = margin + (1 - 2 * margin) * (number / (count - 1) if count > 1 else 0)
    return _percent(LEFT + (RIGHT - LEFT) * share)


def _height(value: float, marks: Sequence[float], top: int, bottom: int) -> float:
    return bottom - (bottom - top) * (value - marks[0]) / (marks[-1] - marks[0])


def _percent(value: float) -> str:
    return f"{value:.3f}%"


def _short(value: float) -> str:
    return f"{value:,.0f}".replace(",", " ") if value >= 100 or value == round(value) else f"{value:.3g}"
