"""Variants of the training step: what `d2zero.training.step` runs, under different settings, on one drawn batch.

A variant is a name: a base, `published` or `model`, or parts joined by `+` on the trainer's float32 form. To add a
part, name the settings that it changes in `PARTS_OF_VARIANTS`. Nothing here takes a step of its own.

Letters: B batch, T instances, H and W the image's sides.
"""

import ctypes
import gc
from collections.abc import Callable
from contextlib import suppress
from copy import deepcopy
from dataclasses import dataclass, replace
from time import perf_counter
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from d2zero.data.targets import Targets
from d2zero.data.training_set import Batch
from d2zero.model import D2Zero, build
from d2zero.processes import Processes
from d2zero.training.config import TrainConfig
from d2zero.training.step import PARTS, TrainingStep
from d2zero_bench.memory import host_peak_mb, reset_host_peak
from d2zero_bench.published import published_sampling
from d2zero_bench.report import Sample
from d2zero_runtime import D2ZeroError, Vocabulary

PUBLISHED = "published"
PLAIN: dict[str, Any] = {"precision": "float32", "deformable": "grid_sample", "compile": False, "tf32": False}
BASES: dict[str, dict[str, Any]] = {
    PUBLISHED: PLAIN | {"channels_last": False},  # and `published_sampling`
    "model": {},  # as `d2zero train` runs it on this device
}
PARTS_OF_VARIANTS: dict[str, dict[str, Any]] = {
    "kernel": {"deformable": "triton"},
    "amp": {"precision": "bfloat16"},
    "tf32": {"tf32": True},
    "compiled": {"compile": True},
}
UNSCALED_TRIES = 20  # of a float16 scaler, halving each time, to find a scale whose gradients are finite


def variant_config(name: str, config: TrainConfig) -> TrainConfig:
    """The trainer's configuration for a variant: `published`, `model`, `kernel`, `kernel+amp+compiled`, …

    Raises:
        D2ZeroError: A part is unknown, or a base is not the first.
    """
    base, *parts = name.split("+")
    settings = BASES.get(base)
    if settings is None:
        settings, parts = PLAIN, [base, *parts]
    for part in parts:
        if part not in PARTS_OF_VARIANTS:
            raise D2ZeroError(
                f"a variant is {' or '.join(BASES)}, or parts joined by +, of {', '.join(PARTS_OF_VARIANTS)}"
                f" (such as kernel+amp); got {name!r}"
            )
        settings = settings | PARTS_OF_VARIANTS[part]
    return replace(config, **settings)


@dataclass(frozen=True)
class Limits:
    """How far a variant may be from the published form, relatively."""

    losses: float
    gradient_norms: float


# Float32 forms differ only in the order of sums. Found on a CPU, seven draws of weights and images: losses up to
# 7e-6, norms up to 3e-4 (of the demo's backbone, whose batch norm takes statistics). bfloat16 keeps 8 bits, 0.4 % per
# rounding, and what it moves across an edge (attention masks, matches, points) moves a loss by a step: single losses
# up to 2e-2, norms up to 5e-2. The limits are a few times that; a wrong weight or a missing term is far beyond.
EXACT = Limits(losses=1e-3, gradient_norms=1e-2)
LOW_PRECISION = Limits(losses=5e-2, gradient_norms=2e-1)


@dataclass(frozen=True)
class Equality:
    """The first step compared with the published form's.

    Args:
        loss: The name of the loss that differs most.
        losses: By how much, relatively.
        gradient_norms: The relative difference of the norm by part of the model.
        failures: What is beyond the limits; empty if the variant is right.
    """

    loss: str
    losses: float
    gradient_norms: dict[str, float]
    failures: tuple[str, ...] = ()


def compare(ours: "FirstStep", published: "FirstStep", limits: Limits) -> Equality:
    """Compare a variant's first step with the published form's; what is not finite fails."""
    losses = _differences(ours.losses, published.losses)
    norms = _differences(ours.gradient_norms, published.gradient_norms)
    failures = [
        f"{what}: {name} differs by {value:.1e}, at most {limit:.0e} is right"
        for what, differences, limit in (
            ("losses", losses, limits.losses),
            ("gradient norms", norms, limits.gradient_norms),
        )
        for name, value in differences.items()
        if not value <= limit
    ]
    worst = max(losses, key=lambda name: (losses[name] != losses[name], losses[name]))
    return Equality(worst, losses[worst], norms, tuple(failures))


def _differences(ours: dict[str, float], theirs: dict[str, float]) -> dict[str, float]:
    assert ours.keys() == theirs.keys(), f"{sorted(ours)} and {sorted(theirs)}"
    return {name: abs(ours[name] - value) / max(abs(value), 1e-12) for name, value in theirs.items()}


@dataclass(frozen=True)
class FirstStep:
    """What a variant's first step found: losses by name, and the gradient's norm by part of the model, unclipped."""

    losses: dict[str, float]
    gradient_norms: dict[str, float]
    seconds: float  # compilation is in it


class Variant:
    """One way to train, with a model and an optimiser of its own.

    Args:
        name: The variant; see `variant_config`.
        config: The measured run's configuration.
        model: The weights to begin with; copied.
        device: Where it runs.
    """

    def __init__(self, name: str, config: TrainConfig, model: D2Zero, device: torch.device) -> None:
        self.name, self.device = name, device
        self.step = TrainingStep(variant_config(name, config), deepcopy(model), Processes(0, 1, device))
        if name.split("+")[0] == PUBLISHED and self.step.config.deformable == "grid_sample":
            self.step.model.set_deformable(published_sampling)
        self.step.prepare()
        self.step.model.train()
        self._steps = 0

    @property
    def low_precision(self) -> bool:
        """Whether some of it is computed in less than float32."""
        return self.step.precision is not None or self.step.config.tf32

    def first_step(self, batch: Batch) -> FirstStep:
        """Take the first step, and keep what it found."""
        norms: dict[str, float] = {}

        def look(part: str) -> None:
            if part == "backward":
                norms.update(gradient_norms(self.step.model, self.step.scaler.get_scale()))

        started = perf_counter()
        for _ in range(UNSCALED_TRIES):
            losses, _ = self.step(0, batch, look)
            if np.isfinite(list(norms.values())).all():  # else the scaler left the weights as they were
                break
        self._steps = 1
        return FirstStep({name: float(value) for name, value in losses.items()}, norms, perf_counter() - started)

    def run(self, batch: Batch) -> Sample:
        """Take a step: milliseconds by part."""
        clock = Clock(self.device)
        self.step(self._steps, batch, lambda part: clock.mark())
        self._steps += 1
        return dict(zip(PARTS, clock.milliseconds(), strict=True))

    def peak_mb(self, batch: Batch) -> float:
        """Memory of one more step in 1e6 bytes: this variant's tensors, and what the step adds at its peak.

        Other variants wait beside it and are left out of the count.
        """
        own = self._own_bytes() / 1e6
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            before = torch.cuda.memory_allocated(self.device)
            self.run(batch)
            return own + (torch.cuda.max_memory_allocated(self.device) - before) / 1e6
        import psutil  # which a lent GPU may come without

        gc.collect()
        with suppress(OSError, AttributeError):  # not glibc
            ctypes.CDLL(None).malloc_trim(
                0
            )  # give back what is free, so that the mark does not start from earlier peaks
        reset_host_peak()
        resident = float(psutil.Process().memory_info().rss) / 1e6
        self.run(batch)
        return own + (host_peak_mb() or resident) - resident

    def _own_bytes(self) -> int:
        model = self.step.model
        kept = [*model.parameters(), *model.buffers()]
        kept += [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        for state in self.step.optimizer.state.values():
            kept += [value for value in state.values() if isinstance(value, Tensor)]
        return sum(tensor.numel() * tensor.element_size() for tensor in kept)


class Clock:
    """Marks in time: CUDA events on a GPU, which do not wait for it; else the processor's clock."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._marks: list[Any] = []
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        self.mark()

    def mark(self) -> None:
        """Note the moment."""
        if self._device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._marks.append(event)
        else:
            self._marks.append(perf_counter())

    def milliseconds(self) -> list[float]:
        """Between one mark and the next."""
        pairs = list(zip(self._marks, self._marks[1:], strict=False))
        if self._device.type != "cuda":
            return [1000 * (end - start) for start, end in pairs]
        torch.cuda.synchronize(self._device)
        return [float(start.elapsed_time(end)) for start, end in pairs]


def gradient_norms(model: D2Zero, scale: float) -> dict[str, float]:
    """The L2 norm of the gradient by part of the model."""
    found = {}
    for name, part in model.named_children():
        squares = [p.grad.double().square().sum() for p in part.parameters() if p.grad is not None]
        if squares:
            found[name] = float(torch.stack(squares).sum().sqrt()) / scale
    return found


def drawn_model(config: TrainConfig, classes: int) -> D2Zero:
    """Random weights, and so many seen classes with drawn embeddings."""
    torch.manual_seed(config.seed)
    rows = np.random.default_rng(config.seed).standard_normal((classes, config.model.text_dim)).astype(np.float32)
    names = tuple(f"class {number}" for number in range(classes))
    return build(config.model, Vocabulary(names, rows, seen=np.ones(classes, bool)))


def drawn_batch(config: TrainConfig, classes: int, instances: int, device: torch.device) -> Batch:
    """Soft noise with ellipses in it, `instances` per image, which are its targets."""
    images, targets = [], []
    for number in range(config.batch_size):
        generator = torch.Generator().manual_seed(config.seed * 1_000_003 + number)
        image, masks = _drawn_image(config.augment.size, instances, generator)
        images.append(image)
        targets.append(Targets(torch.randint(classes, (instances,), generator=generator), masks))
    names = [f"drawn {number}" for number in range(config.batch_size)]
    batch = Batch(torch.stack(images), targets, names, list(range(config.batch_size)))
    return batch.pin_memory() if device.type == "cuda" else batch


def _drawn_image(size: int, instances: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """(3, H, W) uint8 and (T, H, W) bool."""

    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator)

    image = F.interpolate(uniform(1, 3, 8, 8), size=(size, size), mode="bilinear")[0]
    places = (torch.arange(size) + 0.5) / size
    centre, radius = uniform(instances, 2, 1, 1), 0.05 + 0.2 * uniform(instances, 2, 1, 1)
    masks = ((places[:, None] - centre[:, 0]) / radius[:, 0]) ** 2 + ((places - centre[:, 1]) / radius[:, 1]) ** 2 < 1
    for mask, colour in zip(masks, uniform(instances, 3), strict=True):
        image[:, mask] = colour[:, None]
    return (255 * image).to(torch.uint8), masks


Draw = Callable[[int], Batch]  # a batch of so many images


def largest_batch(variant: Variant, draw: Draw, share: float = 0.85) -> int:
    """The largest power of two whose step takes at most `share` of the GPU's memory.

    Beyond that the allocator asks the driver for memory again and again, and times mean little.
    """
    total, batch = torch.cuda.get_device_properties(variant.device).total_memory, 1
    while True:
        try:
            torch.cuda.reset_peak_memory_stats(variant.device)
            variant.run(draw(batch))
        except torch.cuda.OutOfMemoryError:
            break
        if torch.cuda.max_memory_allocated(variant.device) > share * total:
            break
        batch *= 2
    torch.cuda.empty_cache()
    if batch == 1:
        raise D2ZeroError(f"one image is too large for this GPU's {total / 1e9:.0f} GB; give a smaller --size")
    return batch // 2
