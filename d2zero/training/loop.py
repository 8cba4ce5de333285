"""The training run.

A step is a function of the run's configuration, its seed and the step's number, so that a run killed at any
moment continues from its last checkpoint with the same losses as an uninterrupted one.
"""

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from d2zero.checkpoints.files import save_model
from d2zero.data.training_set import TrainingSet
from d2zero.model import D2Zero
from d2zero.training.config import TrainConfig, config_to_dict
from d2zero.training.distributed import Processes
from d2zero.training.loader import training_loader
from d2zero.training.memory import keep_freed_memory
from d2zero.training.optim import load_optimizer
from d2zero.training.record import Record
from d2zero.training.step import TrainingStep
from d2zero_runtime import D2ZeroError
from d2zero_runtime.errors import join_truncated
from d2zero_runtime.files import atomic_write

STATE_FILE = "last.pt"  # everything a resume needs
MODEL_FILE = "model.safetensors"  # the finished model


@dataclass
class Run:
    """A training run: its parts and how far it has come."""

    training_step: TrainingStep  # the model, its optimiser, and how they take a step
    output: Path
    data: TrainingSet
    record: Record
    draw: Callable[[D2Zero, Path], None] | None = None  # draws predictions into a file, every `picture_every` steps
    step: int = 0  # steps done
    bad_files: dict[str, int] = field(default_factory=dict)

    @property
    def config(self) -> TrainConfig:
        """The run's settings."""
        return self.training_step.config

    @property
    def model(self) -> D2Zero:
        """What is trained."""
        return self.training_step.model

    @property
    def processes(self) -> Processes:
        """This process among all that train together."""
        return self.training_step.processes

    def train(self) -> Path:
        """Run to the last step and return the finished model's file."""
        keep_freed_memory()
        self.training_step.prepare()
        optimizer = self.training_step.optimizer
        self.model.train()
        with self.record as record:
            for batch in training_loader(self.data, self.config, self.processes, self.step):
                losses, gradient_norm = self.training_step(self.step, batch)
                self.step += 1
                for problem in batch.problems:
                    self.bad_files[problem] = self.bad_files.get(problem, 0) + 1
                record.step(self.step, losses, gradient_norm, optimizer.param_groups[-1]["lr"])
                if self.step % self.config.checkpoint_every == 0 or self.step == self.config.steps:
                    self.save_state()
                if self.draw and self.config.picture_every and self.step % self.config.picture_every == 0:
                    self._draw_pictures()
        if self.processes.is_main:
            save_model(self.model.eval(), self.output / MODEL_FILE, {"training": config_to_dict(self.config)})
        return self.output / MODEL_FILE

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
            "optimizer": self.training_step.optimizer.state_dict(),
            "scaler": self.training_step.scaler.state_dict(),
            "scale_watch": self.training_step.scale_watch.state_dict(),
            "inputs": self._inputs(),
            "bad_files": self.bad_files,
            "pending": self.record.pending,
        }
        path = self.output / STATE_FILE
        try:
            with atomic_write(path) as partial, partial.open("wb") as stream:
                torch.save(state, stream)
                stream.flush()
                os.fsync(stream.fileno())
        except (OSError, RuntimeError) as error:  # of a full disk, torch makes a RuntimeError
            reason = str(error).splitlines()[0]
            raise D2ZeroError(
                f"step {self.step} cannot be saved to {path} ({reason}); is the disk full? The checkpoint before it is"
                " as it was: make room, then continue with --resume"
            ) from error

    def resume(self) -> None:
        """Take up the state of the last checkpoint.

        Raises:
            D2ZeroError: It is absent, damaged, or of a run with other settings.
        """
        state = read_state(self.output)
        ours = config_to_dict(self.config)
        theirs = {"compile": False, "tf32": False, **json.loads(state["config"])}
        differing = _differences(ours, theirs)
        if differing:
            raise D2ZeroError(
                f"{self.output} was begun with other settings"
                f" ({join_truncated(differing)}); resume with the same, or start"
                " a new run in another folder"
            )
        for what, digest in self._inputs().items():
            if state["inputs"][what] != digest:
                raise D2ZeroError(
                    f"{self.output} was begun with another {what}; resume with the same, or start a new run in another"
                    " folder"
                )
        self.model.load_state_dict(state["model"])
        training = self.training_step
        load_optimizer(training.optimizer, state["optimizer"])
        if state["scaler"]:  # a device without float16 leaves it empty
            training.scaler.load_state_dict(state["scaler"])
        watched = state.get("scale_watch") or {"scale": training.scaler.get_scale(), "skipped": 0}
        training.scale_watch.load_state_dict(watched)
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


def read_state(output: Path) -> dict[str, Any]:
    """The content of a run's last checkpoint.

    Raises:
        D2ZeroError: There is none, or it is damaged.
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
        raise D2ZeroError(f"{path} is not a checkpoint of this d2zero: it lacks {join_truncated(sorted(missing))}")
    return state


def _differences(ours: dict[str, Any], theirs: dict[str, Any], prefix: str = "") -> list[str]:
    """Names of the settings that differ, leaving out those that change the losses by rounding at most."""
    free = {"workers", "cache", "deformable", "log_every", "checkpoint_every", "picture_every"}
    found = []
    for key in sorted(ours.keys() | theirs.keys()):
        left, right = ours.get(key), theirs.get(key)
        if isinstance(left, dict) and isinstance(right, dict):
            found += _differences(left, right, f"{prefix}{key}.")
        elif left != right and f"{prefix}{key}" not in free:
            found.append(f"{prefix}{key}: now {left}, then {right}")
    return found
