"""Curves of growth for people: a table for the terminal, and one HTML page."""

from collections.abc import Sequence
from html import escape
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from d2zero_bench import svg
from d2zero_bench.growth_curves import FIT_SLACK, MEMORY, MEMORY_SLACK, STEP_SLACK, Curve, Growth
from d2zero_bench.html import conditions, document, figure, legend, section, table
from d2zero_bench.report import STAGE_NAMES
from d2zero_bench.table import milliseconds

NAMES = {**STAGE_NAMES, MEMORY: "memory, MB"}
NOTES = (
    "Each curve is measured in a process of its own, from small to large; folders and queries in turns, round by round."
    " The median of the rounds counts; memory is the highest mark of the process.",
    "The exponent is the slope of log cost over log work by least squares: 1 doubles with the work, 2 is its square. A"
    " constant part makes it smaller, so the last step (between the last two points) is judged too. Each round has its"
    " own; the median of them is shown.",
    f"Within: times at most {FIT_SLACK} (all points) and {STEP_SLACK} (last step) above what it should be, memory at"
    f" most {MEMORY_SLACK}.",
)


def terminal_table(curve: Curve) -> Table:
    """One row a quantity: its cost at each point, and the verdict."""
    found = Table(title=f"{curve.name}: {curve.about}; ms", box=box.SIMPLE, title_justify="left", pad_edge=False)
    for number, name in enumerate(_head(curve)):
        found.add_column(name, justify="right" if number else "left", no_wrap=True)
    for growth in curve.growths:
        *cells, verdict = _cells(curve, growth)
        found.add_row(*cells, Text(verdict, style="bold red" if growth.worse else ""))
    return found


def page(title: str, environment: dict[str, Any], settings: dict[str, Any], curves: Sequence[Curve]) -> str:
    """The page as text."""
    sections = [section(f"Against {curve.name}", _curve(curve)) for curve in curves]
    sections.append(section("How it was measured", conditions(NOTES, environment, settings)))
    return document(title, environment, True, sections)


def _curve(curve: Curve) -> str:
    colours = {name: number for number, name in enumerate(curve.quantities)}
    labels = [point.label for point in curve.points]
    unit = curve.name if curve.name == curve.unit else f"{curve.name}, {curve.unit}"
    times = [_line(curve, colour, name) for name, colour in colours.items() if name != MEMORY]
    cost = svg.lines(times, labels, unit, "milliseconds")
    drawn = [_line(curve, colour, name, relative=True) for name, colour in colours.items()]
    relative = svg.lines(drawn, labels, unit, "times the first")
    rows = [[escape(cell) for cell in _cells(curve, growth)[:-1]] + [_verdict(growth)] for growth in curve.growths]
    return (
        legend((f"c{colour}", NAMES.get(name, name)) for name, colour in colours.items())
        + figure(f"Time: {curve.about}", cost)
        + figure("Cost over what it should be, 1 at the first point: a rising line grows worse.", relative)
        + table(_head(curve), rows)
        + "".join(f"<p>{escape(NAMES.get(g.quantity, g.quantity))}: {escape(g.why)}</p>" for g in _explained(curve))
    )


def _explained(curve: Curve) -> list[Growth]:
    return [growth for growth in curve.growths if growth.worse and growth.why]


def _line(curve: Curve, colour: int, quantity: str, relative: bool = False) -> svg.Line:
    values = curve.relative(quantity) if relative else [point.cost(quantity) for point in curve.points]
    name = NAMES.get(quantity, quantity)
    return svg.Line(colour, tuple(svg.Point(at, value, f"{name}: {value:.3g}") for at, value in enumerate(values)))


def _head(curve: Curve) -> list[str]:
    return ["", *(point.label for point in curve.points), "exponent", "last step", "should be", "verdict"]


def _cells(curve: Curve, growth: Growth) -> list[str]:
    costs = [milliseconds(point.cost(growth.quantity)) for point in curve.points]
    exponents = [f"{growth.exponent:.2f}", f"{growth.last:.2f}", f"≤ {growth.limit:g}"]
    return [NAMES.get(growth.quantity, growth.quantity), *costs, *exponents, growth.verdict]


def _verdict(growth: Growth) -> str:
    return f'<strong class="warning">{growth.verdict}</strong>' if growth.worse else growth.verdict
