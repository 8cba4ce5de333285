"""What is said of many samples: percentiles, throughput, and ratios to a baseline round by round."""

from collections.abc import Sequence
from dataclasses import dataclass


def percentile(samples: Sequence[float], percent: float) -> float:
    """Linear between neighbours, as NumPy's default."""
    assert samples, "no samples"
    ordered = sorted(samples)
    place = (len(ordered) - 1) * percent / 100
    below = int(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (place - below)


@dataclass(frozen=True)
class Spread:
    """Percentiles of one quantity."""

    p10: float
    p50: float
    p90: float
    p99: float

    @classmethod
    def of(cls, samples: Sequence[float]) -> "Spread":
        """Of at least one sample."""
        return cls(*(percentile(samples, percent) for percent in (10, 50, 90, 99)))


def throughput(milliseconds: Sequence[float], batch: int) -> float:
    """Images a second, one batch after the other."""
    return 1000 * batch * len(milliseconds) / sum(milliseconds)


def ratios(samples: Sequence[float], baseline: Sequence[float]) -> Spread:
    """How many times the baseline's time a candidate takes, from samples of the same rounds.

    Both of a pair ran within moments of each other: what slows the machine for a while slows both.
    """
    return Spread.of([ours / theirs for ours, theirs in zip(samples, baseline, strict=True)])
