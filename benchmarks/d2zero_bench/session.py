"""A benchmark from its plan to its report: candidates opened, measured, closed."""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from d2zero.cli.terminal import tracked
from d2zero_bench.candidates import Spec
from d2zero_bench.cases import Case, Photos, make_cases
from d2zero_bench.environment import environment, without_folders
from d2zero_bench.measure import Measurement
from d2zero_bench.plan import Plan
from d2zero_bench.report import Report
from d2zero_bench.rounds import Progress
from d2zero_bench.transformers_model import preprocessing_of
from d2zero_bench.worker import Worker
from d2zero_runtime import D2ZeroError, Preprocessing
from d2zero_runtime.formats import is_exported, read_exported
from d2zero_runtime.images import Size

PHOTO = (480, 640)  # whose size a model's preprocessing decides where none is given


class Session:
    """Runs a plan.

    Args:
        plan: What to measure.
        command: The command line, for the record.
        progress: Wraps loops, as `d2zero.cli.terminal.tracked` does.
    """

    def __init__(self, plan: Plan, command: Sequence[str] = (), progress: Progress | None = None) -> None:
        self.plan, self._command, self._progress = plan, command, progress or tracked
        self.report: Report | None = None

    def run(self, facts: Mapping[str, Any] | None = None) -> Report:
        """Measure; `self.report` has what was found so far, at any moment.

        Args:
            facts: More for the report's settings, such as the hardware's lower bounds.

        Raises:
            D2ZeroError: A candidate cannot be opened.
        """
        plan = self.plan
        if plan.annotations and plan.images:
            _require_images(plan.annotations, plan.images, plan.limit)  # before minutes are spent
        with ExitStack() as stack:
            folder = Path(stack.enter_context(TemporaryDirectory()))
            cases = make_cases(plan.sizes or (self._own_size(),), plan.batches, plan.classes, plan.grid)
            photos = Photos.of(folder, plan.images, cases)
            self.report = report = self._empty(cases, photos)
            report.settings.update(facts or {})
            workers = {worker.name: worker for worker in self._open_all(stack, report)}
            measurement = Measurement(workers, photos, report, plan, self._progress)
            measurement.run(cases)
            if plan.annotations and plan.images:
                measurement.evaluate(plan.annotations, plan.images, plan.limit)
            report.complete = True
        return report

    def _open_all(self, stack: ExitStack, report: Report) -> list[Worker]:
        """All candidates, ours first: peers get as many queries and classes as the baseline has."""
        plan = self.plan
        ours = sorted((spec for spec in plan.specs if not spec.peer), key=lambda spec: spec.name != plan.baseline_name)
        found = self._open(stack, report, ours)
        base = found[0].info
        classes = plan.classes[0] or base.classes
        peers = [replace(spec, queries=base.queries, classes=classes) for spec in plan.specs if spec.peer]
        found += self._open(stack, report, peers)
        order = [spec.name for spec in plan.specs]
        found.sort(key=lambda worker: order.index(worker.name))
        report.candidates += [worker.info for worker in found]
        return found

    def _open(self, stack: ExitStack, report: Report, specs: Sequence[Spec]) -> list[Worker]:
        """Start all processes, then wait for each; the baseline must open."""
        found, opening = [], []
        for spec in specs:
            opening.append(Worker(spec))
            stack.callback(opening[-1].close)
        for worker in opening:
            try:
                found.append(worker.open())
            except D2ZeroError as error:
                if self.plan.all_must_open or worker.name == self.plan.baseline_name:
                    raise
                report.failures[worker.name] = without_folders(str(error))
        return found

    def _own_size(self) -> Size:
        """What the baseline's preprocessing makes of an ordinary photo."""
        path = next(spec.path for spec in self.plan.specs if spec.name == self.plan.baseline_name)
        assert path is not None
        own = _preprocessing(path)
        return own.static_size or own.network_size(PHOTO)

    def _empty(self, cases: Sequence[Case], photos: Photos) -> Report:
        plan = self.plan
        settings = {
            "rounds": plan.rounds,
            "warm-up runs": plan.warmup,
            "batches compared": plan.compared,
            "seed": plan.seed,
            "cases": len(cases),
            "masks": plan.masks,
            "photos": f"{len(photos.given)} given" if photos.given else "drawn",
        }
        where = environment(self._command, plan.threads)
        return Report(plan.title, where, settings, plan.baseline_name, failures=dict(plan.left_out))


def _require_images(annotations: Path, images: Path, limit: int | None) -> None:
    from d2zero.data.coco import read_coco
    from d2zero.evaluation.run import require_images

    require_images(read_coco(annotations), images, limit)


def _preprocessing(path: Path) -> Preprocessing:
    if path.is_dir():
        return preprocessing_of(path)
    if is_exported(path):
        return read_exported(path).contract.preprocessing
    from d2zero.checkpoints.files import load_model

    return load_model(path).preprocessing
