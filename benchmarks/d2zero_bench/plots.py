"""Plots by matplotlib as inline SVG, in the colours of the page: they follow its light and dark mode.

matplotlib draws in the colours of `COLOURS`; `inline_svg` replaces each by the page's CSS variable of that name.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from io import StringIO
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from d2zero_bench.tables import milliseconds

COLOURS = {
    "ink": "#1e2127", "quiet": "#666b75", "rule": "#e0ddd6", "card": "#ffffff",
    "decode": "#a9b0ba", "preprocess": "#5aa9a3", "inference": "#3d6fb7", "network": "#8a6fc0",
    "postprocess": "#e0893a",
    "c0": "#3d6fb6", "c1": "#d9722c", "c2": "#2f9184", "c3": "#a24fa0", "c4": "#b08a1e", "c5": "#c8455f",
    "c6": "#5f7f3a", "c7": "#6b6f7a",
}  # fmt: skip
SERIES = 8  # colours of series: c0 … c7
SPAN = 5.0  # the least range of a scatter's vertical axis: differences that mean nothing stay small
STYLE: Any = {
    "svg.fonttype": "none", "svg.hashsalt": "d2zero", "font.size": 10, "font.family": "sans-serif",
    "text.color": COLOURS["ink"], "axes.labelcolor": COLOURS["quiet"], "axes.edgecolor": COLOURS["rule"],
    "xtick.color": COLOURS["quiet"], "ytick.color": COLOURS["quiet"], "grid.color": COLOURS["rule"],
    "axes.grid": True, "axes.axisbelow": True, "axes.spines.top": False, "axes.spines.right": False,
    "legend.frameon": False, "legend.fontsize": 9.5, "figure.constrained_layout.use": True,
    "text.parse_math": False,
}  # fmt: skip
WIDTH = 9.0  # inches, of 72 pixels


@dataclass(frozen=True)
class Bar:
    """A stacked bar.

    Args:
        label: Its name.
        parts: Lengths by stage, from the left.
        total: The median of the whole, written at its end; medians of parts do not add up to it.
        reach: Where a thin line beyond the bar's end goes (p90).
    """

    label: str
    parts: Mapping[str, float]
    total: float
    reach: float


@dataclass(frozen=True)
class Series:
    """A line, or a single point.

    Args:
        label: Its name.
        colour: Its number among the series, so that one candidate has one colour in all plots.
        x: Places; those of `lines` are numbers of its labels.
        y: Values.
        low: Lower ends of vertical strokes through the points.
        high: Their upper ends.
    """

    label: str
    colour: int
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] = ()
    high: Sequence[float] = ()


@rc_context(STYLE)
def bars(rows: Sequence[Bar], names: Mapping[str, str], unit: str) -> Figure:
    """Stacked horizontal bars on a common scale from 0.

    Args:
        rows: From the top.
        names: Stages for the legend, in order; colours have the stages' keys.
        unit: The scale's unit.
    """
    figure, axes = _axes(1.0 + 0.42 * len(rows))
    for place, row in enumerate(rows):
        left = 0.0
        for stage, length in row.parts.items():
            axes.barh(place, length, 0.55, left=left, color=COLOURS[stage], label=names[stage])
            left += length
        end = max(left, row.reach)
        axes.plot([left, end], [place, place], color=COLOURS["quiet"], linewidth=1.2)
        axes.annotate(milliseconds(row.total), (end, place), (5, 0), textcoords="offset points", va="center")
    axes.set_yticks(range(len(rows)), [row.label for row in rows], color=COLOURS["ink"])
    axes.invert_yaxis()
    axes.set_xlim(0, 1.1 * max(max(sum(row.parts.values()), row.reach) for row in rows))
    axes.grid(visible=False, axis="y")
    axes.set_xlabel(unit, loc="right")
    _legend(figure, axes, [names[stage] for stage in names if any(stage in row.parts for row in rows)])
    return figure


@rc_context(STYLE)
def scatter(points: Sequence[Series], x_unit: str, y_unit: str) -> Figure:
    """Points: across from 0, upwards what the points need and `SPAN` at least."""
    figure, axes = _axes(4.0)
    for point in points:
        axes.scatter(
            point.x, point.y, 60, color=_colour(point), edgecolors=COLOURS["card"], label=_visible(point.label)
        )
    low, high = min(min(point.y) for point in points), max(max(point.y) for point in points)
    margin = max(SPAN - (high - low), 0.2 * (high - low)) / 2
    axes.set_xlim(0, 1.1 * max(max(point.x) for point in points))
    axes.set_ylim(max(low - margin, 0), high + margin)
    _units(axes, x_unit, y_unit)
    _legend(figure, axes)
    return figure


@rc_context(STYLE)
def lines(drawn: Sequence[Series], labels: Sequence[str], x_unit: str, y_unit: str) -> Figure:
    """Lines from 0 over evenly spaced labels."""
    figure, axes = _axes(3.8)
    for series in drawn:
        axes.plot(series.x, series.y, marker="o", color=_colour(series), markeredgecolor=COLOURS["card"],
                  label=_visible(series.label))  # fmt: skip
        if series.low:
            axes.vlines(series.x, series.low, series.high, color=_colour(series), linewidth=5, alpha=0.3)
    axes.set_xticks(range(len(labels)), labels)
    axes.set_xlim(-0.4, len(labels) - 0.6)
    axes.set_ylim(bottom=0)
    _units(axes, x_unit, y_unit)
    _legend(figure, axes)
    return figure


@rc_context(STYLE)
def inline_svg(figure: Figure, label: str) -> str:
    """The figure as an element of a page: no header, no metadata, nothing that is fetched."""
    stream = StringIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    figure.savefig(stream, format="svg", transparent=True, metadata=nothing)
    text = stream.getvalue()
    text = text[text.index("<svg") :].replace("<svg", f'<svg role="img" aria-label="{escape(label)}"', 1)
    text = re.sub(r'<g id="[^"]*">', "<g>", text)  # the same in every plot
    for name, colour in COLOURS.items():
        text = text.replace(colour, f"var(--{name})")
    return text


def _axes(height: float) -> tuple[Figure, Axes]:
    figure = Figure((WIDTH, height))
    return figure, figure.subplots()


def _colour(series: Series) -> str:
    return COLOURS[f"c{series.colour % SERIES}"]


def _visible(label: str) -> str:
    """A legend leaves out names that begin with an underscore, unless something invisible is before it."""
    return f"\u200b{label}" if label.startswith("_") else label


def _units(axes: Axes, x_unit: str, y_unit: str) -> None:
    axes.set_xlabel(x_unit, loc="right")
    axes.set_ylabel(y_unit, loc="top")


def _legend(figure: Figure, axes: Axes, order: Sequence[str] = ()) -> None:
    """Above the plot, one entry per name."""
    handles, labels = axes.get_legend_handles_labels()
    found = dict(zip(labels, handles, strict=True))
    shown = order or list(found)
    figure.legend([found[name] for name in shown], shown, loc="outside upper left", ncols=5 if order else 3)
