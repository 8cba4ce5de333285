"""Limits for CI: what a report must not exceed."""

from dataclasses import dataclass

from d2zero.evaluation.metrics import METRICS
from d2zero_bench.report import FILE, Report, names
from d2zero_runtime import D2ZeroError


@dataclass(frozen=True)
class Gate:
    """One limit, for a named candidate or for every D2Zero candidate.

    Args:
        value: The limit, in the metric's unit.
        candidate: The candidate's name; empty for all.
    """

    value: float
    candidate: str = ""

    @classmethod
    def parse(cls, flag: str, text: str) -> "Gate":
        """Read `120` or `demo.onnx=120`.

        Raises:
            D2ZeroError: It is not written so.
        """
        name, _, number = text.rpartition("=")
        try:
            return cls(float(number), name)
        except ValueError:
            raise D2ZeroError(f"{flag} must be a number, or CANDIDATE=NUMBER; got {text!r}") from None

    def candidates(self, report: Report) -> list[str]:
        """The candidates that must keep it."""
        return [self.candidate] if self.candidate else names(report, ("d2zero",))


def failures(report: Report, max_p90: tuple[Gate, ...], min_hm: tuple[Gate, ...]) -> list[str]:
    """What exceeds a limit: the candidate, the value, the limit. What was not measured has not passed."""
    slow = [line for gate in max_p90 for name in gate.candidates(report) for line in _slow(report, name, gate.value)]
    inaccurate = [
        line for gate in min_hm for name in gate.candidates(report) for line in _inaccurate(report, name, gate.value)
    ]
    return slow + inaccurate


def _slow(report: Report, name: str, limit: float) -> list[str]:
    spreads = {
        result.case: result.spread(FILE) for result in report.results if result.candidate == name and result.samples
    }
    if not spreads:
        return [f"{name}: p90 was not measured (limit {limit:g} ms)"]
    return [
        f"{name}: p90 of {FILE} {spread.p90:.1f} ms at {case} (limit {limit:g} ms)"
        for case, spread in spreads.items()
        if spread is not None and not spread.p90 <= limit
    ]


def _inaccurate(report: Report, name: str, limit: float) -> list[str]:
    measured = report.accuracy_of(name)
    value, label = measured.figures.get("hm_ap50") if measured else None, METRICS["hm_ap50"].label
    if value is None:
        return [f"{name}: {label} was not measured (limit {limit:g})"]
    return [] if value >= limit else [f"{name}: {label} {value:.2f} (limit {limit:g})"]
