"""How a cost grows with its work: curves, fitted exponents, verdicts; no measuring.

An exponent is the slope of log cost over log work by least squares: 1 doubles with the work, 2 is its square. A
constant part hides growth at first and makes the slope smaller, so the last step alone is judged too: what grows
with a square shows there. Points that were measured in turns (folders, queries) drift alike, so each round has its own
exponent and the median of them counts; of costs, too. Where points were measured one after another, a round is as good
a draw of their times as any.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

from d2zero_runtime import D2ZeroError

MEMORY = "memory"
FIT_SLACK, STEP_SLACK = 0.15, 0.3  # how far above its limit a time's exponent may be: noise, and caches that fill up
MEMORY_SLACK = 0.1  # memory is noisy too (allocators), but less


@dataclass(frozen=True)
class Point:
    """One amount of work, measured.

    Args:
        label: for people.
        work: in the curve's unit, above 0.
        samples: of each quantity, one a round; milliseconds, or 1e6 bytes of `MEMORY`.
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
        quantity: a stage, or `MEMORY`.
        exponent: over all points, median of the rounds.
        last: between the last two points, likewise.
        limit: what it should be at most.
        why: an explanation, where one is known; shown only if it grows worse.
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
        name: of what varies.
        unit: of the work.
        about: what stays the same.
        points: with ascending work, two at least; all with the same quantities.
        limits: the largest exponent that is right, by quantity.
        reasons: known explanations, by quantity.
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


def exponent(work: Sequence[float], costs: Sequence[float]) -> float:
    """The slope of log cost over log work, by least squares.

    Raises:
        D2ZeroError: there are fewer than two different amounts of work.
    """
    if len(set(work)) < 2:
        raise D2ZeroError(f"a curve needs two different amounts of work at least, got {list(work)}")
    x, y = ([math.log(value) for value in values] for values in (work, costs))
    x_mean, y_mean = sum(x) / len(x), sum(y) / len(y)
    shared = sum((one - x_mean) * (other - y_mean) for one, other in zip(x, y, strict=True))
    return shared / sum((one - x_mean) ** 2 for one in x)
