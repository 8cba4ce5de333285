"""What a training run leaves to read: a progress bar, `log.jsonl`, and TensorBoard curves."""

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from d2zero.evaluation.metrics import METRICS
from d2zero_runtime.files import atomic_write


class Record:
    """Losses by step, to the screen and to files.

    Args:
        output: The run's folder.
        steps: Steps in all.
        every: Steps between entries. Losses are read off the device only then.
        active: Whether this process writes (one of many does).
        console: Where progress goes; plain lines if it is not a terminal.
    """

    def __init__(
        self, output: Path, steps: int, every: int, active: bool = True, console: Console | None = None
    ) -> None:
        self.path = output / "log.jsonl"
        self.output, self.steps, self.every, self.active = output, steps, every, active
        self.console = console or Console(stderr=True)
        self.done = 0
        self.pending: list[dict[str, Tensor]] = []

    def rewind(self, step: int, pending: list[dict[str, Tensor]]) -> None:
        """Forget entries after `step`, which are about to be made again; `pending` were not yet written then."""
        self.done = step
        self.pending = pending
        if not self.active or not self.path.exists():
            return
        kept = []
        for line in self.path.read_text(encoding="utf-8").splitlines():
            try:
                if json.loads(line)["step"] <= step:
                    kept.append(line)
            except (json.JSONDecodeError, KeyError):  # a line that the kill cut short
                continue
        with atomic_write(self.path) as partial:
            partial.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")

    def __enter__(self) -> "Record":
        self.started, self.first = time.perf_counter(), self.done
        self.marked, self.marked_step = self.started, self.done
        if self.active:
            if self.done == 0:
                self.path.unlink(missing_ok=True)
            self.writer = SummaryWriter(str(self.output / "tensorboard"), purge_step=self.done + 1)
            self.progress = Progress(
                TextColumn("training"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[note]}"),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                console=self.console,
                disable=not self.console.is_terminal,
            )
            self.task = self.progress.add_task("training", total=self.steps, completed=self.done, note="")
            self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.active:
            self.progress.stop()
            self.writer.close()

    def evaluation(self, step: int, metrics: dict[str, Any]) -> None:
        """Note the metrics of an evaluation after a step."""
        if not self.active:
            return
        with self.path.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps({"step": step, "evaluation": metrics}) + "\n")
        for name, value in metrics.items():
            if value is not None:
                self.writer.add_scalar(f"evaluation/{name}", value, step)
        shown = ", ".join(f"{METRICS[name].label} {value:.2f}" for name, value in metrics.items() if value is not None)
        self.console.print(f"step {step}: {shown}", highlight=False)

    def step(self, step: int, losses: dict[str, Tensor], gradient_norm: Tensor, lr: float) -> None:
        """Note a finished step."""
        if not self.active:
            return
        self.pending.append({**losses, "gradient_norm": gradient_norm.detach()})
        self.progress.update(self.task, completed=step)
        if step % self.every and step != self.steps:
            return
        now = time.perf_counter()
        means = {
            name: torch.stack([entry[name].float().cpu() for entry in self.pending]).mean().item()
            for name in self.pending[0]
        }
        rate = (step - self.marked_step) / (now - self.marked)
        self.marked, self.marked_step = now, step
        self.pending.clear()
        entry: dict[str, Any] = {"step": step, **means, "lr": lr, "steps_per_second": rate}
        with self.path.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(entry) + "\n")
        for name, value in entry.items():
            if name != "step":
                self.writer.add_scalar(name, value, step)
        note = (
            f"loss {means['loss']:.3f} (class {means['loss_ce']:.3f}, mask {means['loss_mask']:.3f},"
            f" dice {means['loss_dice']:.3f}) {rate:.2f} steps/s"
        )
        self.progress.update(self.task, note=note)
        if not self.console.is_terminal:
            left = (self.steps - step) / max(rate, 1e-9)
            print(f"step {step}/{self.steps} {note}, {left / 60:.1f} min left", file=sys.stderr, flush=True)
