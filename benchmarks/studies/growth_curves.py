"""How a cost grows with its work: curves, fitted exponents, verdicts, shown as a table and a page; no measuring.

An exponent is the slope of log cost over log work by least squares: 1 doubles with the work, 2 is its square. A
constant part hides growth at first and makes the slope smaller, so the last step is judged too: what grows with a
square shows there. Points that were measured interleaved (folders, queries) drift alike, so each round has its own
exponent and the median of them counts; of costs, too. Where points were measured one after another, a round is as good
a sample of their times as any.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

import numpy as np

from d2zero_bench.report import STAGE_NAMES
from d2zero_bench.tables import Alarm, Table, milliseconds
from d2zero_runtime import D2ZeroError

MEMORY = "memory"
FIT_SLACK, STEP_SLACK = 0.15, 0.3  # how far above its limit a time's exponent may be: noise, and caches that fill up
MEMORY_SLACK = 0.1  # memory is noisy too (allocators), but less
NAMES = {**STAGE_NAMES, MEMORY: "memory, MB"}
POINTS = (
    "Each curve is measured in a process of its own, from small to large; folders and queries interleaved, round by"
    " round. The median of the rounds counts; memory is the high-water mark of the process.",
    "The exponent is the slope of log cost over log work by least squares: 1 doubles with the work, 2 is its square. A"
    " constant part makes it smaller, so the last step (between the last two points) is judged too. Each round has its"
    " own; the median of them is shown.",
    f"Within: times at most {FIT_SLACK} (all points) and {STEP_SLACK} (last step) above what it should be, memory at"
    f" most {MEMORY_SLACK}.",
)


@dataclass(frozen=True)
class Point:
    """One amount of work, measured.

    Args:
        label: What is shown for it.
        work: In the curve's unit, above 0.
        samples: Samples of each quantity, one per round; milliseconds, or 1e6 bytes of `MEMORY`.
    """

    label: str
    work: float
    samples: dict[str, tuple[float, ...]]

    def cost(self, quantity: str) -> float:
        """The median of the rounds."""
        return median(self.samples[quantity])


@dataclass(frozen=True)
class Growth:
    """What is said of one quantity of a curve.

    Args:
        quantity: A stage, or `MEMORY`.
        exponent: Over all points, median of the rounds.
        last: Between the last two points, likewise.
        limit: The largest exponent that is right.
        why: An explanation, where one is known; shown only if it grows worse.
    """

    quantity: str
    exponent: float
    last: float
    limit: float
    why: str = ""

    @property
    def worse(self) -> bool:
        """Whether it grows worse than its work."""
        fit, step = (MEMORY_SLACK, MEMORY_SLACK) if self.quantity == MEMORY else (FIT_SLACK, STEP_SLACK)
        return self.exponent > self.limit + fit or self.last > self.limit + step

    @property
    def verdict(self) -> str:
        """In words."""
        return "grows worse than its work" if self.worse else "within"


@dataclass(frozen=True)
class Curve:
    """Cost against one kind of work.

    Args:
        name: What varies.
        unit: The work's unit.
        about: What stays the same.
        points: At least two, with ascending work.
        limits: The largest exponent that is right, by quantity.
        reasons: Known explanations, by quantity.
    """

    name: str
    unit: str
    about: str
    points: tuple[Point, ...]
    limits: dict[str, float]
    reasons: dict[str, str]

    @property
    def growths(self) -> list[Growth]:
        """The verdicts, in the order of the limits; nothing of what was not measured everywhere."""
        return [self._growth(quantity) for quantity in self.quantities]

    @property
    def quantities(self) -> list[str]:
        """What all points have."""
        return [name for name in self.limits if all(name in point.samples for point in self.points)]

    @property
    def explanations(self) -> list[str]:
        """Of what grows worse and is known."""
        return [f"{_name(growth.quantity)}: {growth.why}" for growth in self.growths if growth.worse and growth.why]

    def _growth(self, quantity: str) -> Growth:
        work = [point.work for point in self.points]
        rounds = list(zip(*(point.samples[quantity] for point in self.points), strict=True))
        return Growth(
            quantity,
            median(exponent(work, costs) for costs in rounds),
            median(exponent(work[-2:], costs[-2:]) for costs in rounds),
            self.limits[quantity],
            self.reasons.get(quantity, ""),
        )

    def relative(self, quantity: str) -> list[float]:
        """Cost against what it should be, 1 at the first point: a rising line grows worse than its work."""
        each = [point.cost(quantity) / point.work ** self.limits[quantity] for point in self.points]
        return [value / each[0] for value in each]

    def to_dict(self) -> dict[str, Any]:
        """Plain data, with the verdicts."""
        growths = [{**asdict(growth), "verdict": growth.verdict} for growth in self.growths]
        return {"name": self.name, "unit": self.unit, "about": self.about,
                "points": [asdict(point) for point in self.points], "growth": growths}  # fmt: skip

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> "Curve":
        """Read what `to_dict` made; limits and reasons of what has a verdict."""
        points = tuple(Point(**point) for point in content["points"])
        limits = {growth["quantity"]: growth["limit"] for growth in content["growth"]}
        reasons = {growth["quantity"]: growth["why"] for growth in content["growth"]}
        return cls(content["name"], content["unit"], content["about"], points, limits, reasons)


def exponent(work: Sequence[float], costs: Sequence[float]) -> float:
    """The slope of log cost over log work, by least squares.

    Raises:
        D2ZeroError: There are fewer than two different amounts of work.
    """
    if len(set(work)) < 2:
        raise D2ZeroError(f"a curve needs at least two different amounts of work, got {list(work)}")
    return float(np.polyfit(np.log(work), np.log(costs), 1)[0])


def table(curve: Curve) -> Table:
    """One row per quantity: its cost at each point, and the verdict."""
    head = ["", *(point.label for point in curve.points), "exponent", "last step", "should be", "verdict"]
    rows = []
    for growth in curve.growths:
        costs = (milliseconds(point.cost(growth.quantity)) for point in curve.points)
        exponents = (f"{growth.exponent:.2f}", f"{growth.last:.2f}", f"≤ {growth.limit:g}")
        verdict = Alarm(growth.verdict) if growth.worse else growth.verdict
        rows.append([_name(growth.quantity), *costs, *exponents, verdict])
    return Table(head, rows, f"{curve.name}: {curve.about}; ms")


def page(content: dict[str, Any]) -> str:
    """The page of what `growth.py` writes as JSON."""
    from d2zero_bench.page import Plot, Section, conditions, render

    sections = []
    for curve in map(Curve.from_dict, content["curves"]):
        cost, relative = figures(curve)
        drawn = [
            Plot.of(f"Time: {curve.about}", cost),
            Plot.of("Cost over what it should be, 1 at the first point: a rising line grows worse.", relative),
        ]
        sections.append(Section(f"Against {curve.name}", curve.explanations, drawn, tables=[table(curve)]))
    sections.append(conditions(POINTS, content["environment"], content["settings"]))
    return render(content["title"], content["environment"], sections)


def figures(curve: Curve) -> tuple[Any, Any]:
    """The times, and each quantity over what it should be; one colour per quantity in both."""
    from d2zero_bench.plots import Series, lines

    labels, places = [point.label for point in curve.points], range(len(curve.points))
    unit = curve.name if curve.name == curve.unit else f"{curve.name}, {curve.unit}"
    times = [
        Series(_name(name), colour, places, [point.cost(name) for point in curve.points])
        for colour, name in enumerate(curve.quantities)
        if name != MEMORY
    ]
    relative = [
        Series(_name(name), colour, places, curve.relative(name)) for colour, name in enumerate(curve.quantities)
    ]
    return lines(times, labels, unit, "milliseconds"), lines(relative, labels, unit, "times the first")


def _name(quantity: str) -> str:
    return NAMES.get(quantity, quantity)
