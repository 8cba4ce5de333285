"""`python -m d2zero_bench.training`: the training step's variants side by side, and data loading alone.

First every variant takes a step from the same weights on the same batch with the same seed: its losses and the
gradient's norms must be the published form's, or it is not timed. float32 is exact, convolutions too, except in
variants with the part tf32 (torch 1.9, which the published code was written for, used TF32 wherever a GPU had it).
Then the variants take a step each, round by round, in a new order each round. There is no dropout: its
random numbers are others in compiled code.

Without options: on a GPU the published model at 960x960, with the largest power of two of images that the
published form's memory allows; on a CPU the same model at 128x128, one image.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from d2zero.cli.terminal import tracked
from d2zero.model import D2Zero
from d2zero.training.config import PRESETS, TrainConfig, config_to_dict, find_preset, with_settings
from d2zero.training.distributed import Processes, pick_device
from d2zero.training.memory import keep_freed_memory
from d2zero_bench.cases import parse_counts
from d2zero_bench.environment import environment, without_folders
from d2zero_bench.measure import round_order
from d2zero_bench.training_data import loading_rates, training_set
from d2zero_bench.training_report import EXACT, LOW_PRECISION, Result, TrainingReport, compare, show
from d2zero_bench.training_steps import (
    PUBLISHED,
    Variant,
    drawn_batch,
    drawn_model,
    largest_batch,
    variant_config,
)
from d2zero_runtime import D2ZeroError

VARIANTS = {
    "cuda": "published,model,kernel,amp,compiled,kernel+amp,kernel+amp+compiled",
    "cpu": "published,model",  # bfloat16 and compilation take minutes a step on some
}
SIZES = {"cuda": 960, "cpu": 128}
LOADED_SIZE = 960  # loading is measured at the recipe's size on every machine
WORKERS = "1,2,4"


@dataclass(frozen=True)
class Plan:
    """What to measure.

    Args:
        config: of the run whose step it is; its batch is the batch, its `augment.size` the images' sides.
        variants: names, `published` among them.
        device: where.
        batch_fits: take the largest batch that fits instead, on a GPU.
        instances: an image.
        classes: seen ones.
        rounds: of all variants.
        warmup: steps of each before the first round, after the one that is compared.
        loading: measure it.
        loaded_size: sides of the images then.
        data: a COCO folder to load from; drawn images without it.
        workers: numbers of processes that load.
        seconds: of loading, for each number and round.
    """

    config: TrainConfig
    variants: tuple[str, ...]
    device: torch.device
    batch_fits: bool = False
    instances: int = 10
    classes: int = 48
    rounds: int = 5
    warmup: int = 1
    loading: bool = True
    loaded_size: int = LOADED_SIZE
    data: Path | None = None
    workers: tuple[int, ...] = (0, 1, 2, 4)
    seconds: float = 3.0


def measure(plan: Plan, report: TrainingReport) -> None:
    """Fill a report; what was found so far is in it at any moment."""
    if plan.device.type == "cuda":
        torch.cuda.set_device(plan.device)
    keep_freed_memory()  # as training does
    if plan.variants:
        model = drawn_model(plan.config, plan.classes)
        if plan.batch_fits:
            plan = replace(plan, config=replace(plan.config, batch_size=_fitting(plan, model)))
            report.settings["batch"] = plan.config.batch_size
        _Steps(plan, report, model).run()
    if plan.loading:
        _load(plan, report)


def _fitting(plan: Plan, model: D2Zero) -> int:
    """Judged by the published form, which needs most; it is thrown away."""
    variant = Variant(PUBLISHED, plan.config, model, plan.device)
    return largest_batch(
        variant,
        lambda count: drawn_batch(replace(plan.config, batch_size=count), plan.classes, plan.instances, plan.device),
    )


def _load(plan: Plan, report: TrainingReport) -> None:
    config = replace(plan.config, augment=replace(plan.config.augment, size=plan.loaded_size), steps=10**6)
    processes = Processes(0, 1, plan.device)
    try:
        with training_set(config, plan.data) as data:
            report.settings["images loaded"] = len(data)
            found = loading_rates(data, config, processes, plan.workers, 3, plan.seconds, tracked)
            report.loading.update(found)
    except D2ZeroError as error:
        report.notes["loading"] = without_folders(str(error))


class _Steps:
    """The variants, from weights to samples."""

    def __init__(self, plan: Plan, report: TrainingReport, model: D2Zero) -> None:
        self.plan, self.report, self.model = plan, report, model
        self.batch = drawn_batch(plan.config, plan.classes, plan.instances, plan.device)
        self.variants: dict[str, Variant] = {}
        self.results: dict[str, Result] = {}

    def run(self) -> None:
        for name in sorted(self.plan.variants, key=lambda name: name != PUBLISHED):  # stable: the baseline first
            with self._going_on(name):
                self._open(name)
        order = list(self.plan.variants)
        self.report.results.sort(key=lambda result: order.index(result.variant))
        for variant in self.variants.values():
            with self._going_on(variant.name):
                for _ in range(self.plan.warmup):
                    variant.run(self.batch)
        self._rounds()
        for name, variant in self._able():
            with self._going_on(name):
                self.results[name].peak_mb = variant.peak_mb(self.batch)

    def _open(self, name: str) -> None:
        """Take the first step; only what is right is kept to be timed."""
        variant = Variant(name, self.plan.config, self.model, self.plan.device)
        result = Result(name, str(variant.step.precision or torch.float32).removeprefix("torch."))
        self.report.results.append(result)
        self.results[name] = result
        result.first_step = variant.first_step(self.batch)
        if name != PUBLISHED:
            base = self.results[PUBLISHED].first_step
            if base is None:
                raise D2ZeroError(f"there is nothing to compare it with: {self.report.notes[PUBLISHED]}")
            limits = LOW_PRECISION if variant.low_precision else EXACT
            result.equality = compare(result.first_step, base, limits)
            if result.equality.failures:
                raise D2ZeroError("not the published step, not timed: " + "; ".join(result.equality.failures))
        self.variants[name] = variant

    def _rounds(self) -> None:
        rounds = self.plan.rounds
        for number in tracked(iter(range(rounds)), rounds, "rounds"):
            names = [name for name, _ in self._able()]
            found = {}
            for name in round_order(names, "training step", number, self.plan.config.seed):
                with self._going_on(name):
                    found[name] = self.variants[name].run(self.batch)
            for name, sample in found.items():  # a whole round or nothing: rounds are pairs
                self.results[name].samples.append(sample)

    def _able(self) -> list[tuple[str, Variant]]:
        return [(name, variant) for name, variant in self.variants.items() if name not in self.report.notes]

    @contextmanager
    def _going_on(self, name: str) -> Iterator[None]:
        """Note why a variant cannot go on; the others do."""
        try:
            yield
        except (D2ZeroError, RuntimeError, MemoryError) as error:  # torch's, CUDA's and compilers' are RuntimeErrors
            kind = "" if isinstance(error, D2ZeroError) else f"{type(error).__name__}: "
            self.report.notes[name] = without_folders(kind + " ".join(str(error).split())[:400])
            if self.plan.device.type == "cuda":
                torch.cuda.empty_cache()


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and write; 1 if a variant was left out, 2 for what a person can mend, 130 when interrupted."""
    given = _parser().parse_args(arguments)
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        plan = _plan(given)
        where = environment(words, None)
        where["command"] = " ".join(["python -m d2zero_bench.training", *map(without_folders, words)])
        report = TrainingReport(where, _settings(plan))
        try:
            measure(plan, report)
        finally:
            show(report, given.json)
    except D2ZeroError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 1 if report.notes else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m d2zero_bench.training",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--variants", help="with commas; published, model, or parts: kernel, amp, tf32, compiled, kernel+amp, …")
    add("--preset", default="coco-48-17", choices=tuple(PRESETS), help="the run whose step is measured")
    add("--set", dest="settings", action="append", default=[], metavar="KEY=VALUE", help="as of d2zero train")
    add("--device", default="auto", help="auto, cpu or cuda:N")
    add("--size", type=int, help="of the square images, a multiple of 32")
    add("--batch", type=int, help="images a step; on a GPU the largest that fits if left out")
    add("--queries", type=int, help="of the model")
    add("--instances", type=int, default=10, help="an image")
    add("--classes", type=int, default=48, help="seen classes")
    add("--rounds", type=int, default=5, help="each variant takes a step in each")
    add("--warmup", type=int, default=1, help="steps of each variant before the first round")
    add("--seed", type=int, default=0, help="of weights, images and orders")
    add("--only", choices=("steps", "loading"), help="one of the two")
    add("--data", type=Path, help="a COCO folder to load from; drawn images without it")
    add("--workers", default=WORKERS, help="processes that load, with commas; 0 is always measured")
    add("--seconds", type=float, default=3.0, help="of loading, for each number of workers and of three rounds")
    add("--json", type=Path, help="write all samples and figures")
    return parser


def _plan(given: argparse.Namespace) -> Plan:
    device = pick_device(given.device)
    for name, least in (("instances", 1), ("classes", 1), ("rounds", 1), ("warmup", 0), ("batch", 1)):
        value = getattr(given, name)
        if value is not None and value < least:
            raise D2ZeroError(f"--{name} must be at least {least}, got {value}")
    changes = [
        f"augment.size={given.size or SIZES[device.type]}",
        f"seed={given.seed}",
        f"batch_size={given.batch or 1}",
    ]
    changes += [] if given.queries is None else [f"model.num_queries={given.queries}"]
    config = with_settings(find_preset(given.preset), [*changes, "model.adaptation_dropout=0.0", *given.settings])
    names = [] if given.only == "loading" else [n.strip() for n in (given.variants or VARIANTS[device.type]).split(",")]
    for name in names:
        variant_config(name, config)  # refuses before any work
    if names and PUBLISHED not in names:
        names.insert(0, PUBLISHED)
    return Plan(
        config,
        tuple(dict.fromkeys(names)),
        device,
        batch_fits=device.type == "cuda" and given.batch is None,
        instances=given.instances,
        classes=given.classes,
        rounds=given.rounds,
        warmup=given.warmup,
        loading=given.only != "steps",
        loaded_size=given.size or LOADED_SIZE,
        data=given.data,
        workers=tuple(dict.fromkeys([0, *parse_counts("--workers", given.workers)])),
        seconds=given.seconds,
    )


def _settings(plan: Plan) -> dict[str, object]:
    config = plan.config
    return {
        "device": str(plan.device),
        "threads": torch.get_num_threads(),
        "size": config.augment.size,
        "batch": config.batch_size,
        "queries": config.model.num_queries,
        "instances": plan.instances,
        "classes": plan.classes,
        "rounds": plan.rounds,
        "warm-up steps": plan.warmup,
        "seed": config.seed,
        "loaded size": plan.loaded_size if plan.loading else None,
        "loaded from": None if not plan.loading else "drawn images" if plan.data is None else plan.data.name,
        "training": config_to_dict(config),
    }


if __name__ == "__main__":
    sys.exit(main())
