"""The measurement: candidates in turn, round by round, in a new order each round.

A machine that drifts (heat, neighbours) slows all candidates of a round alike; ratios are of pairs of a round.
All findings go into the report at once: an interruption loses the round it falls into and nothing more.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

import numpy as np

from d2zero_bench.candidates import Candidate
from d2zero_bench.cases import Case, Photos
from d2zero_bench.environment import without_folders
from d2zero_bench.equality import compare, lower_precision
from d2zero_bench.report import Report, Result, Sample
from d2zero_runtime import D2ZeroError
from d2zero_runtime.backends.base import Raw

Progress = Callable[[Iterator[int], int, str], Iterator[int]]


@dataclass(frozen=True)
class Settings:
    """How often and in which order.

    Args:
        rounds: of each case; in each, every candidate runs one batch.
        warmup: runs of a candidate before a case's first round, not counted.
        seed: of the orders.
        compared: batches whose raw outputs are compared.
    """

    rounds: int = 20
    warmup: int = 2
    seed: int = 0
    compared: int = 1


def round_order(names: Sequence[str], case: Case | str, number: int, seed: int) -> list[str]:
    """The order of candidates in one round: a function of the seed, the case and the round."""
    shuffled = list(names)
    Random(f"{seed} {case} {number}").shuffle(shuffled)
    return shuffled


@dataclass
class Measurement:
    """Candidates over cases; findings go into the report.

    A candidate that cannot go on is left out from there, with the reason in `report.failures`.

    Args:
        candidates: by name.
        photos: what they read.
        settings: how often.
        report: filled.
        progress: wraps loops, as `d2zero.cli.terminal.tracked` does.
    """

    candidates: Mapping[str, Candidate]
    photos: Photos
    settings: Settings
    report: Report
    progress: Progress
    _compared: set[Case] = field(default_factory=set)

    def run(self, cases: Sequence[Case]) -> None:
        """Compare outputs and take times in each case."""
        for number, case in enumerate(cases, 1):
            # A peer has no classes to vary.
            kinds = ("d2zero", "peer") if case.classes == cases[0].classes else ("d2zero",)
            ready = self._prepared(case, kinds)
            self._compare(case, ready)
            self._rounds(case, ready, f"{case} ({number} of {len(cases)})")

    def accuracies(self, annotations: Path, images: Path, limit: int | None) -> None:
        """Accuracy of each candidate that has one."""
        for name, candidate in self.candidates.items():
            with self._going_on(name):
                found = candidate.accuracy(annotations, images, limit)
                if found is not None:
                    self.report.accuracy.append(found)

    def _prepared(self, case: Case, kinds: Sequence[str]) -> list[str]:
        """The candidates that take part in a case, warmed up."""
        ready = []
        for name, candidate in self.candidates.items():
            if candidate.info.kind not in kinds or name in self.report.failures:
                continue
            with self._going_on(name):
                candidate.prepare(case)
                for number in range(self.settings.warmup):
                    candidate.run(case, self.photos.batch(case, number))
                ready.append(name)
        return ready

    def _compare(self, case: Case, ready: Sequence[str]) -> None:
        """Once for each size and number of classes, on the first photos."""
        alike = Case(case.height, case.width, classes=case.classes)
        if alike in self._compared or self.report.baseline not in ready:
            return
        self._compared.add(alike)
        baseline = self.candidates[self.report.baseline]
        with self._going_on(self.report.baseline):
            theirs = self._raw(baseline, case)
            for name in ready:
                with self._going_on(name):
                    ours = self._raw(self.candidates[name], case) if name != self.report.baseline else None
                    if ours is not None and theirs is not None:
                        info = self.candidates[name].info
                        precision = lower_precision(info.precision, baseline.info.precision)
                        self.report.equality.append(compare(info, case, theirs, ours, precision))

    def _raw(self, candidate: Candidate, case: Case) -> Raw | None:
        """Raw outputs of the first batches as one; None of what has none to compare."""
        found: list[Raw] = []
        for number in range(self.settings.compared):
            raw = candidate.raw(case, self.photos.batch(case, number))
            if raw is None:
                return None
            found.append(raw)
        return np.concatenate([classes for classes, _ in found]), np.concatenate([masks for _, masks in found])

    def _rounds(self, case: Case, ready: Sequence[str], label: str) -> None:
        results = {name: Result(name, case) for name in ready}
        self.report.results += results.values()
        rounds = self.settings.rounds
        for number in self.progress(iter(range(rounds)), rounds, label):
            paths = self.photos.batch(case, number)
            found: dict[str, Sample] = {}
            for name in round_order(ready, case, number, self.settings.seed):
                if name not in self.report.failures:
                    with self._going_on(name):
                        found[name] = self.candidates[name].run(case, paths)
            for name, sample in found.items():  # a whole round or nothing: rounds are pairs
                results[name].samples.append(sample)
        for name, result in results.items():
            with self._going_on(name):
                result.host_mb, result.gpu_mb = self.candidates[name].memory()

    @contextmanager
    def _going_on(self, name: str) -> Iterator[None]:
        """Note an error of one candidate; the others go on."""
        try:
            yield
        except D2ZeroError as error:
            self.report.failures.setdefault(name, without_folders(str(error)))
