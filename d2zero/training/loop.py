"""The training run.

A step is a function of the run's configuration, its seed and the step's number, so that a run killed at any
moment goes on from its last checkpoint with the same losses as an uninterrupted one.
"""

import ctypes
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from timm.layers import convert_sync_batchnorm  # type: ignore[attr-defined]
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from d2zero.checkpoints.files import save_model
from d2zero.data.training_set import Batch, StepSampler, TrainingSet, collate
from d2zero.losses.criterion import Criterion
from d2zero.model import D2Zero
from d2zero.training.config import TrainConfig, config_to_dict
from d2zero.training.distributed import Processes
from d2zero.training.optim import build_optimizer, lr_factor, set_lr
from d2zero.training.record import Record
from d2zero_runtime import D2ZeroError
from d2zero_runtime.errors import listed

STATE_FILE = "last.pt"  # everything a resume needs
MODEL_FILE = "model.safetensors"  # the finished model
_ERROR_PREFIX = f"{D2ZeroError.__module__}.{D2ZeroError.__qualname__}: "


@dataclass
class Run:
    """A training run: its parts and how far it has come."""

    config: TrainConfig
    output: Path
    model: D2Zero
    data: TrainingSet
    processes: Processes
    record: Record
    draw: Callable[[D2Zero, Path], None] | None = None  # draws predictions into a file, every `picture_every` steps
    step: int = 0  # steps done
    bad_files: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        device = self.processes.device
        memory = torch.channels_last if self.config.channels_last else torch.contiguous_format
        self.model.to(device)
        self.model.to(memory_format=memory)
        self.optimizer = build_optimizer(self.model, self.config.optim)
        self.precision = _precision(self.config.precision, device)
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.precision == torch.float16)
        vocabulary = self.model.vocabulary
        embeddings = torch.from_numpy(vocabulary.embeddings).to(device)
        seen = torch.from_numpy(vocabulary.seen).to(device)
        self.criterion = Criterion(self.config.loss, embeddings[seen], embeddings[~seen])
        with_unseen = bool(self.config.loss.unseen_weight) and bool((~seen).any())
        self.text = torch.cat([embeddings[seen], embeddings[~seen]]) if with_unseen else embeddings[seen]

    def train(self) -> Path:
        """Run to the last step and return the finished model's file."""
        keep_freed_memory()
        network = self._network()
        self.model.train()
        with self.record as record:
            for batch in self._batches():
                losses, gradient_norm = self._train_step(network, batch)
                self.step += 1
                for problem in batch.problems:
                    self.bad_files[problem] = self.bad_files.get(problem, 0) + 1
                record.step(self.step, losses, gradient_norm, self.optimizer.param_groups[-1]["lr"])
                if self.step % self.config.checkpoint_every == 0 or self.step == self.config.steps:
                    self.save_state()
                if self.draw and self.config.picture_every and self.step % self.config.picture_every == 0:
                    self._draw_pictures()
        if self.processes.is_main:
            save_model(self.model.eval(), self.output / MODEL_FILE, {"training": config_to_dict(self.config)})
        return self.output / MODEL_FILE

    def _train_step(self, network: nn.Module, batch: Batch) -> tuple[dict[str, Tensor], Tensor]:
        device = self.processes.device
        torch.manual_seed(self.config.seed * 1_000_003 + self.step * 1009 + self.processes.rank)  # dropout
        set_lr(self.optimizer, lr_factor(self.step, self.config.steps, self.config.optim))
        images = self._normalised(batch.images)
        targets = [target.to(device) for target in batch.targets]
        generators = [torch.Generator(device).manual_seed(seed) for seed in batch.seeds]
        autocast = nullcontext() if self.precision is None else torch.autocast(device.type, self.precision)
        with autocast:
            heads = network(images, self.text, all_heads=True)
        losses: dict[str, Tensor] = self.criterion(heads, targets, generators)
        total = torch.stack(list(losses.values())).sum()
        self._check_finite(total, losses, batch)
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(total).backward()
        self.scaler.unscale_(self.optimizer)
        gradient_norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.config.optim.clip_norm)
        if not self.scaler.is_enabled():  # with float16, the scaler skips such a step and scales down
            self._check_finite(gradient_norm, {"gradient": gradient_norm}, batch)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return self._of_all_processes({"loss": total, **losses}), gradient_norm

    def _of_all_processes(self, losses: dict[str, Tensor]) -> dict[str, Tensor]:
        """Each loss averaged over the processes: that of the whole batch."""
        values = torch.stack([value.detach() for value in losses.values()])
        if self.processes.count > 1:
            dist.all_reduce(values)
            values = values / self.processes.count
        return dict(zip(losses, values.unbind(), strict=True))

    def _normalised(self, images_B3HW: Tensor) -> Tensor:
        preprocessing, device = self.config.model.preprocessing, self.processes.device
        mean = torch.tensor(preprocessing.mean, device=device)[:, None, None]
        std = torch.tensor(preprocessing.std, device=device)[:, None, None]
        images = (images_B3HW.to(device, non_blocking=True).float() - mean) / std
        return images.to(memory_format=torch.channels_last) if self.config.channels_last else images

    def _network(self) -> nn.Module:
        if self.processes.count == 1:
            return self.model
        if self.processes.device.type == "cuda" and not self.config.model.frozen_backbone_norm:
            convert_sync_batchnorm(self.model)
        ids = [self.processes.device.index] if self.processes.device.type == "cuda" else None
        return DistributedDataParallel(self.model, device_ids=ids)

    def _batches(self) -> Iterator[Batch]:
        try:
            yield from self._loader()
        except D2ZeroError as error:  # a worker wraps it in its own stack trace
            raise D2ZeroError(str(error).strip().splitlines()[-1].removeprefix(_ERROR_PREFIX)) from None

    def _loader(self) -> "DataLoader[Any]":
        config, processes = self.config, self.processes
        sampler = StepSampler(
            len(self.data), config.batch_size, config.seed, self.step, config.steps, processes.rank, processes.count
        )
        return DataLoader(
            self.data,
            batch_sampler=sampler,
            num_workers=config.workers,
            collate_fn=collate,
            pin_memory=processes.device.type == "cuda",
            persistent_workers=config.workers > 0,
        )

    def _check_finite(self, total: Tensor, losses: dict[str, Tensor], batch: Batch) -> None:
        finite = torch.isfinite(total.detach()).to(torch.float32)
        if self.processes.count > 1:
            dist.all_reduce(finite, dist.ReduceOp.MIN)
        if finite:
            return
        broken = [name for name, value in losses.items() if not torch.isfinite(value)]
        raise D2ZeroError(
            f"the loss is not finite at step {self.step + 1} ({listed(broken, 3) or 'in another process'}), images"
            f" {listed(batch.file_names, 32)}. Nothing of it was saved: look at these images, or begin a new run with"
            " a lower optim.lr"
        )

    def _draw_pictures(self) -> None:
        if self.processes.is_main and self.draw:
            self.model.eval()
            self.draw(self.model, self.output / "pictures" / f"step_{self.step:06d}.png")
            self.model.train()
        if self.processes.count > 1:
            dist.barrier()

    def save_state(self) -> None:
        """Write everything a resume needs, atomically."""
        if not self.processes.is_main:
            return
        state = {
            "step": self.step,
            "config": json.dumps(config_to_dict(self.config)),
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "inputs": self._inputs(),
            "bad_files": self.bad_files,
            "pending": self.record.pending,
        }
        partial = self.output / f".{STATE_FILE}.partial"
        with partial.open("wb") as stream:
            torch.save(state, stream)
            stream.flush()
            os.fsync(stream.fileno())
        partial.replace(self.output / STATE_FILE)

    def resume(self) -> None:
        """Take up the state of the last checkpoint.

        Raises:
            D2ZeroError: it is absent, damaged, or of a run with other settings.
        """
        state = read_state(self.output)
        ours, theirs = config_to_dict(self.config), json.loads(state["config"])
        differing = _differences(ours, theirs)
        if differing:
            raise D2ZeroError(
                f"{self.output} was begun with other settings ({listed(differing)}); resume with the same, or start"
                " a new run in another folder"
            )
        for what, digest in self._inputs().items():
            if state["inputs"][what] != digest:
                raise D2ZeroError(
                    f"{self.output} was begun with another {what}; resume with the same, or start a new run in another"
                    " folder"
                )
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        self.step = state["step"]
        self.bad_files = state["bad_files"]
        self.record.rewind(self.step, state["pending"])

    def _inputs(self) -> dict[str, str]:
        """Digests of what a run is begun with, beside its settings."""
        vocabulary = self.model.vocabulary
        words = hashlib.sha256(vocabulary.embeddings.tobytes() + vocabulary.seen.tobytes())
        words.update(repr(vocabulary.names).encode())
        images = hashlib.sha256(repr(self.data.image_ids).encode())
        return {"vocabulary": words.hexdigest(), "set of images": images.hexdigest()}

    def all_bad_files(self) -> list[str]:
        """What could not be used, in all processes; every process must call it."""
        if self.processes.count == 1:
            return sorted(self.bad_files)
        gathered: list[Any] = [None] * self.processes.count
        dist.all_gather_object(gathered, self.bad_files)
        return sorted({problem for found in gathered for problem in found})


def keep_freed_memory() -> None:
    """Let glibc keep what is freed: a step's tensors then reuse it instead of asking the kernel for pages."""
    with suppress(OSError, AttributeError):  # not glibc
        libc = ctypes.CDLL(None)
        for parameter, value in ((-4, 0), (-1, 1 << 30), (-2, 1 << 28)):  # MMAP_MAX, TRIM_THRESHOLD, TOP_PAD
            libc.mallopt(parameter, value)


def read_state(output: Path) -> dict[str, Any]:
    """The content of a run's last checkpoint.

    Raises:
        D2ZeroError: there is none, or it is damaged.
    """
    path = output / STATE_FILE
    if not path.is_file():
        raise D2ZeroError(f"{output} has no checkpoint ({STATE_FILE}) to resume from; start without --resume")
    try:
        state: dict[str, Any] = torch.load(path, "cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds on damaged files
        raise D2ZeroError(f"{path} is damaged or cut short: {str(error).splitlines()[0]}") from error
    missing = {"step", "config", "model", "optimizer", "scaler", "inputs", "bad_files", "pending"} - state.keys()
    if missing:
        raise D2ZeroError(f"{path} is not a checkpoint of this d2zero: it lacks {listed(sorted(missing))}")
    return state


def _differences(ours: dict[str, Any], theirs: dict[str, Any], prefix: str = "") -> list[str]:
    """Names of the settings that differ, leaving out those that do not change the losses."""
    free = {"workers", "cache", "log_every", "checkpoint_every", "picture_every"}
    found = []
    for key in sorted(ours.keys() | theirs.keys()):
        left, right = ours.get(key), theirs.get(key)
        if isinstance(left, dict) and isinstance(right, dict):
            found += _differences(left, right, f"{prefix}{key}.")
        elif left != right and f"{prefix}{key}" not in free:
            found.append(f"{prefix}{key}: now {left}, then {right}")
    return found


def _precision(name: str, device: torch.device) -> torch.dtype | None:
    if name == "auto":
        return torch.float16 if device.type == "cuda" else None
    if name == "float16" and device.type == "cpu":
        raise D2ZeroError("precision float16 needs a GPU; use --set precision=float32 or bfloat16 on a CPU")
    return {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}[name]
