"""One process or many: what `torchrun` set up, and the few things that depend on it."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from d2zero.devices import pick_device


@dataclass(frozen=True)
class Processes:
    """This process among all that train or evaluate together."""

    rank: int
    count: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and progress."""
        return self.rank == 0

    def wait(self) -> None:
        """Wait until all processes are here."""
        if self.count > 1:
            dist.barrier()


@contextmanager
def joined(device: str = "auto", backend: str | None = None, timeout: timedelta | None = None) -> Iterator[Processes]:
    """Join the processes that `torchrun` started, or be the only one.

    Args:
        device: `auto` takes a GPU where there is one, or a device such as `cpu` or `cuda:1`.
        backend: What they talk through; `nccl` on GPUs and `gloo` on CPUs if left out.
        timeout: The longest that one waits for the others; torch's own if left out.
    """
    rank, count = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    local = int(os.environ.get("LOCAL_RANK", 0))
    chosen = pick_device(device, local)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    if count > 1:
        dist.init_process_group(backend or ("nccl" if chosen.type == "cuda" else "gloo"), timeout=timeout)
    try:
        yield Processes(rank, count, chosen)
    finally:
        if count > 1:
            dist.destroy_process_group()
