"""The training run.

A step is a function of the run's configuration, its seed and the step's number, so that a run killed at any
moment continues from its last checkpoint with the same losses as an uninterrupted one.
"""

import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from d2zero.checkpoints.files import description, read_state, save_model
from d2zero.checkpoints.runs import BEST_FILE, KEPT_FOLDER, MODEL_FILE, STATE_FILE
from d2zero.data.training_set import TrainingSet
from d2zero.model import D2Zero
from d2zero.processes import Processes
from d2zero.training.config import TrainConfig, config_from_dict, config_to_dict
from d2zero.training.loader import training_loader
from d2zero.training.memory import keep_freed_memory
from d2zero.training.optim import load_optimizer
from d2zero.training.record import Record
from d2zero.training.step import TrainingStep
from d2zero_runtime import D2ZeroError
from d2zero_runtime.errors import join_truncated
from d2zero_runtime.files import atomic_write

logger = logging.getLogger("d2zero")

EARLY = (100, 1000)  # steps after which pictures are drawn, too: what is wrong shows before hours have passed

# What a resume may change: where and how a step is computed, and, with a warning, the schedule and what is kept.
_SILENT = {"workers", "cache", "deformable", "epochs"}
_WARNED = {"steps", "log_every", "checkpoint_every", "keep_every", "picture_every", "eval_every", "eval_images"}
_WARNED |= {f"optim.{name}" for name in ("lr", "schedule", "milestones", "gamma", "final_factor")}
WORST = (-1.0, -1.0, -1.0)  # below the score of any evaluation


@dataclass
class Run:
    """A training run: its parts and how far it has come."""

    training_step: TrainingStep  # the model, its optimiser, and how they take a step
    output: Path
    data: TrainingSet
    record: Record
    draw: Callable[[D2Zero, Path], None] | None = None  # draws predictions into a file, every `picture_every` steps
    evaluate: Callable[[D2Zero, Processes], dict[str, Any]] | None = None  # metrics, every `eval_every` steps
    step: int = 0  # steps done
    best: tuple[float, ...] = WORST  # the score of the best evaluation
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
        self.training_step.train()
        with self.record as record:
            for batch in training_loader(self.data, self.config, self.processes, self.step):
                losses, gradient_norm = self.training_step(self.step, batch)
                self.step += 1
                for problem in batch.problems:
                    self.bad_files[problem] = self.bad_files.get(problem, 0) + 1
                record.step(self.step, losses, gradient_norm, optimizer.param_groups[-1]["lr"])
                if self.evaluate and self._is_due(self.config.eval_every):
                    self._evaluate(self.evaluate)
                if self.step % self.config.checkpoint_every == 0 or self.step == self.config.steps:
                    self.save_state()
                if self._is_due(self.config.keep_every):
                    self._save(self.output / KEPT_FOLDER / f"step_{self.step:06d}.safetensors")
                every = self.config.picture_every
                if self.draw and every and (self.step in EARLY or self.step % every == 0):
                    self._draw_pictures()
        self._save(self.output / MODEL_FILE)
        return self.output / MODEL_FILE

    def _is_due(self, every: int) -> bool:
        return bool(every) and (self.step % every == 0 or self.step == self.config.steps)

    def _evaluate(self, evaluate: Callable[[D2Zero, Processes], dict[str, Any]]) -> None:
        """Before the state is saved: a run that is killed in between evaluates again."""
        metrics = evaluate(self.training_step.shown, self.processes)
        self.training_step.train()
        self.record.evaluation(self.step, metrics)
        score = best_by(metrics)
        if score >= self.best:
            self.best = score
            self._save(self.output / BEST_FILE, metrics)

    def _save(self, path: Path, metrics: dict[str, Any] | None = None) -> None:
        if self.processes.is_main:
            notes = {"training": config_to_dict(self.config), "step": self.step, "metrics": metrics or {}}
            save_model(self.training_step.shown, path, notes)

    def _draw_pictures(self) -> None:
        if self.processes.is_main and self.draw:
            self.draw(self.training_step.shown, self.output / "pictures" / f"step_{self.step:06d}.png")
            self.training_step.train()
        self.processes.wait()

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
            "best": self.best,
            "description": json.dumps(description(self.training_step.shown)),
            "ema": self.training_step.average_state(),
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

    def resume(self) -> bool:
        """Take up the state of the last checkpoint; whether the run continues with other settings.

        Raises:
            D2ZeroError: It is absent, damaged, of a run with other settings, or past the last step.
        """
        state = run_state(self.output)
        stored = config_from_dict(json.loads(state["config"]), f"the state of {self.output}")
        ours, theirs = config_to_dict(self.config), config_to_dict(stored)
        changes = {name: text for name, text in _differences(ours, theirs) if name not in _SILENT}
        differing = [text for name, text in changes.items() if name not in _WARNED]
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
        training.load_average(state.get("ema"))
        for text in changes.values():
            logger.warning("the run continues with another %s", text)
        self.best = tuple(state.get("best", WORST)) if "eval_images" not in changes else WORST
        load_optimizer(training.optimizer, state["optimizer"])
        if state["scaler"]:  # a device without float16 leaves it empty
            training.scaler.load_state_dict(state["scaler"])
        watched = state.get("scale_watch") or {"scale": training.scaler.get_scale(), "skipped": 0}
        training.scale_watch.load_state_dict(watched)
        self.step = state["step"]
        self.bad_files = state["bad_files"]
        if self.step > self.config.steps:
            raise D2ZeroError(f"{self.output} has done {self.step} steps, more than {self.config.steps}; give more")
        if self.step == self.config.steps:
            logger.warning("all %d steps were done before; to continue, give more --steps or --epochs", self.step)
        self.record.rewind(self.step, state["pending"])
        return bool(changes)

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


def run_state(output: Path, mmap: bool = False) -> dict[str, Any]:
    """The content of a run's last checkpoint.

    Args:
        output: The run's folder.
        mmap: Read arrays only when they are used.

    Raises:
        D2ZeroError: There is none, or it is damaged.
    """
    path = output / STATE_FILE
    if not path.is_file():
        raise D2ZeroError(f"{output} has no checkpoint ({STATE_FILE}) to resume from; start without --resume")
    return read_state(path, mmap)


def stored_config(output: Path) -> TrainConfig:
    """The settings of the run in a folder, as its last checkpoint has them; its arrays are not read.

    Raises:
        D2ZeroError: There is none, or it is damaged.
    """
    return config_from_dict(json.loads(run_state(output, mmap=True)["config"]), f"the state of {output}")


def best_by(metrics: dict[str, Any]) -> tuple[float, ...]:
    """What evaluations are compared by: the harmonic mean, then unseen, then seen classes; of equal ones the later."""
    return tuple(float(metrics.get(key) or 0) for key in ("hm_ap50", "unseen_ap50", "seen_ap50"))


def _differences(ours: dict[str, Any], theirs: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Names of the settings that differ, each with both values."""
    for key in sorted(ours.keys() | theirs.keys()):
        left, right = ours.get(key), theirs.get(key)
        if isinstance(left, dict) and isinstance(right, dict):
            yield from _differences(left, right, f"{prefix}{key}.")
        elif left != right:
            yield f"{prefix}{key}", f"{prefix}{key}: now {left}, then {right}"
