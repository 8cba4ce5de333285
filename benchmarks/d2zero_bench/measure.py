"""The measurement: what is asked of the candidates in each case.

All findings go into the report immediately: an interruption loses the round it falls into and nothing more.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from d2zero_bench.candidates import Logits
from d2zero_bench.cases import Case, Photos
from d2zero_bench.plan import Plan
from d2zero_bench.report import CandidateInfo, Equality, Report, Result, Sample
from d2zero_bench.rounds import Progress, Rounds
from d2zero_bench.worker import Worker, evaluate, prepare, read_memory, run
from d2zero_export.parity import LIMITS, difference

_NARROWEST_FIRST = ("float32", "tf32", "float16", "bfloat16", "int8")


@dataclass
class Measurement:
    """Candidates over cases.

    A candidate that cannot go on is left out from there, with the reason in `report.failures`.

    Args:
        workers: The candidates by name.
        photos: The image files that they read.
        report: Where findings go.
        plan: How often, and in which order.
        progress: Wraps loops, as `d2zero.cli.terminal.tracked` does.
    """

    workers: Mapping[str, Worker]
    photos: Photos
    report: Report
    plan: Plan
    progress: Progress
    _compared: set[Case] = field(default_factory=set)

    def __post_init__(self) -> None:
        self._rounds = Rounds(self.report.failures, self.plan.seed, self.progress)

    def run(self, cases: Sequence[Case]) -> None:
        """Compare outputs and take times in each case."""
        for number, case in enumerate(cases, 1):
            # A peer has no classes to vary.
            kinds = ("d2zero", "transformers", "peer") if case.classes == cases[0].classes else ("d2zero",)
            ready = self._prepare(case, kinds)
            self._compare(case, ready)
            self._measure(case, ready, f"{case} ({number} of {len(cases)})")

    def evaluate(self, annotations: Path, images: Path, limit: int | None) -> None:
        """Measure the accuracy of each candidate that has one."""
        for name, worker in self.workers.items():
            with self._rounds.noting_failure(name):
                found = worker.ask(evaluate, annotations, images, limit)
                if found is not None:
                    self.report.accuracy.append(found)

    def _prepare(self, case: Case, kinds: Sequence[str]) -> list[str]:
        """The candidates that take part in a case, warmed up."""
        ready = []
        for name, worker in self.workers.items():
            if worker.info.kind not in kinds or name in self.report.failures:
                continue
            with self._rounds.noting_failure(name):
                worker.ask(prepare, case)
                for number in range(self.plan.warmup):
                    worker.ask(run, case, self.photos.batch(case, number))
                ready.append(name)
        return ready

    def _compare(self, case: Case, ready: Sequence[str]) -> None:
        """Compare with the baseline, once per size and number of classes, on the first photos."""
        alike, baseline = Case(case.height, case.width, classes=case.classes), self.report.baseline
        if alike in self._compared or baseline not in ready:
            return
        self._compared.add(alike)
        with self._rounds.noting_failure(baseline):
            theirs = self._logits(baseline, case)
            for name in ready:
                with self._rounds.noting_failure(name):
                    ours = self._logits(name, case) if name != baseline else None
                    if ours is not None and theirs is not None:
                        infos = self.workers[name].info, self.workers[baseline].info
                        self.report.equality.append(compare(infos, case, theirs, ours))

    def _logits(self, name: str, case: Case) -> Logits | None:
        """Logits of the first batches together; None where there are none to compare."""
        found: list[Logits] = []
        for number in range(self.plan.compared):
            logits = self.workers[name].ask(run, case, self.photos.batch(case, number), with_logits=True).logits
            if logits is None:
                return None
            found.append(logits)
        return np.concatenate([classes for classes, _ in found]), np.concatenate([masks for _, masks in found])

    def _measure(self, case: Case, ready: Sequence[str], label: str) -> None:
        results = {name: Result(name, case) for name in ready}
        self.report.results += results.values()

        def one_batch(name: str, number: int) -> Sample:
            return self.workers[name].ask(run, case, self.photos.batch(case, number)).sample

        for found in self._rounds.take(ready, self.plan.rounds, label, one_batch):
            for name, sample in found.items():
                results[name].samples.append(sample)
        for name, result in results.items():
            with self._rounds.noting_failure(name):
                result.host_mb, result.gpu_mb = self.workers[name].ask(read_memory)


def compare(infos: tuple[CandidateInfo, CandidateInfo], case: Case, theirs: Logits, ours: Logits) -> Equality:
    """Whether a candidate is the same model as the baseline, each attending by its own masks (`d2zero_export.parity`).

    Args:
        infos: The candidate and the baseline; limits are those of the lower precision.
        case: Where they ran.
        theirs: The baseline's class and mask logits.
        ours: The candidate's.
    """
    name, layers = infos[0].name, [info.decoder_layers for info in infos]
    if all(layers) and layers[0] != layers[1]:
        failure = f"another model: it has {layers[0]} decoder layers, the baseline {layers[1]}"
        return Equality(name, case, None, None, (failure,))
    for tensor, left, right in zip(("class logits", "mask logits"), theirs, ours, strict=True):
        if left.shape != right.shape:
            failure = f"another model: {tensor} have shape {right.shape}, the baseline's {left.shape}"
            return Equality(name, case, None, None, (failure,))
    found = difference(str(case), theirs, ours)
    failures = tuple(found.failures(LIMITS[lower_precision(infos[0].precision, infos[1].precision)]))
    return Equality(name, case, found.class_logits, found.mask_logits, failures, found.class_most, found.mask_most)


def lower_precision(one: str, other: str) -> str:
    """Of two, the one with the wider limits."""
    return max(one, other, key=_NARROWEST_FIRST.index)
