"""A benchmark from what was asked for to its report: candidates opened, measured, closed."""

from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from d2zero.cli.terminal import tracked
from d2zero_bench.candidates import Spec
from d2zero_bench.cases import Case, Photos, make_cases
from d2zero_bench.environment import environment, without_folders
from d2zero_bench.measure import Measurement, Progress, Settings
from d2zero_bench.peers import parse_peers
from d2zero_bench.process import OwnProcess
from d2zero_bench.report import Report
from d2zero_bench.variants import VARIANTS
from d2zero_runtime import D2ZeroError, Preprocessing
from d2zero_runtime.errors import listed
from d2zero_runtime.formats import EXPORTED_SUFFIXES, read_exported
from d2zero_runtime.images import Size

PHOTO = (480, 640)  # whose size a model's preprocessing decides where none is given


@dataclass(frozen=True)
class Plan:
    """What to measure; fields are the options of `d2zero benchmark`."""

    models: tuple[Path, ...]
    variants: tuple[str, ...] | None = None
    peers: str | None = None
    baseline: str | None = None
    sizes: tuple[Size, ...] = ()
    batches: tuple[int, ...] = (1,)
    classes: tuple[int | None, ...] = (None,)
    grid: bool = False
    images: Path | None = None
    annotations: Path | None = None
    limit: int | None = None
    threads: int | None = None
    providers: tuple[str, ...] | None = None
    providers_of: Mapping[Path, tuple[str, ...]] = field(default_factory=dict)  # of single files, instead
    device: str = "auto"
    masks: str = "rle"
    settings: Settings = field(default_factory=Settings)
    left_out: Mapping[str, str] = field(default_factory=dict)  # candidates that could not be made, and why
    all_must_open: bool = True  # or else those that cannot be opened are left out; the baseline always must
    title: str = "D2Zero benchmark"

    def specs(self) -> list[Spec]:
        """The candidates; peers learn queries and classes from the baseline, once it is open.

        Raises:
            D2ZeroError: names or choices do not fit.
        """
        found = [spec for path in self.models for spec in self._of(path)]
        peers = parse_peers(self.peers) if self.peers else []
        found += [Spec(peer, peer=peer, device=self.device, threads=self.threads) for peer in peers]
        twice = [name for name, count in Counter(spec.name for spec in found).items() if count > 1]
        if twice:
            raise D2ZeroError(f"two candidates are called {twice[0]!r}; give files of different names")
        return found

    def _of(self, path: Path) -> list[Spec]:
        common: dict[str, Any] = {"device": self.device, "threads": self.threads, "masks": self.masks}
        providers = self.providers_of.get(path, self.providers)
        if path.suffix == ".onnx" and providers:  # a candidate each
            many = len(providers) > 1 or path in self.providers_of
            return [
                Spec(f"{path.name}:{provider}" if many else path.name, path, providers=(provider,), **common)
                for provider in providers
            ]
        if path.suffix in EXPORTED_SUFFIXES:
            return [Spec(path.name, path, **common)]
        chosen = self.variants or ("model",)
        strangers = [name for name in chosen if name not in VARIANTS]
        if strangers:
            raise D2ZeroError(f"--variant must be among {', '.join(VARIANTS)}; got {strangers[0]!r}")
        return [Spec(path.name if name == "model" else f"{path.name}:{name}", path, name, **common) for name in chosen]


class Session:
    """Runs a plan.

    Args:
        plan: what to measure.
        command: words of the command line, for the record.
        progress: Wraps loops, as of `Measurement`.

    Raises:
        D2ZeroError: the plan does not fit together.
    """

    def __init__(self, plan: Plan, command: Sequence[str] = (), progress: Progress | None = None) -> None:
        self.plan, self._command, self._progress = plan, command, progress or tracked
        self.specs = plan.specs()
        self.report: Report | None = None
        exported = [path for path in plan.models if path.suffix in EXPORTED_SUFFIXES]
        if plan.variants and len(exported) == len(plan.models):
            raise D2ZeroError("--variant is for checkpoints (.safetensors), and none was given")
        if plan.providers and not any(path.suffix == ".onnx" for path in plan.models):
            raise D2ZeroError("--providers is for exported models (.onnx), and none was given")
        ours = [spec.name for spec in self.specs if not spec.peer]
        self.baseline = plan.baseline or ours[0]
        if self.baseline not in ours:
            raise D2ZeroError(f"--baseline must be one of {listed(ours, 20)}; got {self.baseline!r}")

    def run(self, facts: Mapping[str, Any] | None = None) -> Report:
        """Measure; `self.report` has what was found so far, at any moment.

        Args:
            facts: more for the report's settings, such as what the hardware needs at least.

        Raises:
            D2ZeroError: a candidate cannot be opened.
        """
        plan = self.plan
        if plan.annotations and plan.images:
            _require_images(plan.annotations, plan.images, plan.limit)  # before minutes are spent
        with ExitStack() as stack:
            folder = Path(stack.enter_context(TemporaryDirectory()))
            cases = self._cases()
            photos = Photos.of(folder, plan.images, cases)
            self.report = report = self._empty(cases, photos)
            report.settings.update(facts or {})
            candidates = {process.info.name: process for process in self._opened(stack, report)}
            measurement = Measurement(candidates, photos, plan.settings, report, self._progress)
            measurement.run(cases)
            if plan.annotations and plan.images:
                measurement.accuracies(plan.annotations, plan.images, plan.limit)
            report.complete = True
        return report

    def _opened(self, stack: ExitStack, report: Report) -> list[OwnProcess]:
        """All candidates, ours first: peers are made to the baseline's measure."""
        ours = sorted((spec for spec in self.specs if not spec.peer), key=lambda spec: spec.name != self.baseline)
        found = self._opened_together(stack, report, ours)
        base = found[0].info
        classes = self.plan.classes[0] or base.classes
        peers = [replace(spec, queries=base.queries, classes=classes) for spec in self.specs if spec.peer]
        found += self._opened_together(stack, report, peers)
        order = [spec.name for spec in self.specs]
        found.sort(key=lambda process: order.index(process.info.name))
        report.candidates += [process.info for process in found]
        return found

    def _opened_together(self, stack: ExitStack, report: Report, specs: Sequence[Spec]) -> list[OwnProcess]:
        """Start all processes, then wait for each; the baseline must open."""
        found, opening = [], []
        for spec in specs:
            opening.append((spec, OwnProcess(spec)))
            stack.callback(opening[-1][1].close)
        for spec, process in opening:
            try:
                found.append(process.open())
            except D2ZeroError as error:
                if self.plan.all_must_open or spec.name == self.baseline:
                    raise
                report.failures[spec.name] = without_folders(str(error))
        return found

    def _cases(self) -> list[Case]:
        plan = self.plan
        sizes = plan.sizes or (self._own_size(),)
        return make_cases(sizes, plan.batches, plan.classes, plan.grid)

    def _own_size(self) -> Size:
        """What the baseline's preprocessing makes of an ordinary photo."""
        path = next(spec.path for spec in self.specs if spec.name == self.baseline)
        assert path is not None
        own = _preprocessing(path)
        return own.canvas or own.network_size(PHOTO)

    def _empty(self, cases: Sequence[Case], photos: Photos) -> Report:
        plan = self.plan
        settings = {
            "rounds": plan.settings.rounds,
            "warm-up runs": plan.settings.warmup,
            "batches compared": plan.settings.compared,
            "seed": plan.settings.seed,
            "cases": len(cases),
            "masks": plan.masks,
            "photos": f"{len(photos.given)} given" if photos.given else "drawn",
        }
        where = environment(self._command, plan.threads)
        return Report(plan.title, where, settings, self.baseline, failures=dict(plan.left_out))


def _require_images(annotations: Path, images: Path, limit: int | None) -> None:
    from d2zero.data.coco import read_coco
    from d2zero.evaluation.run import require_images

    require_images(read_coco(annotations), images, limit)


def _preprocessing(path: Path) -> Preprocessing:
    if path.suffix in EXPORTED_SUFFIXES:
        return read_exported(path)[0].preprocessing
    from d2zero.checkpoints.files import load_model

    return load_model(path).preprocessing
