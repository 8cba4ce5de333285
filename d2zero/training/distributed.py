"""One process or many: what `torchrun` set up, and the few things that depend on it."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist

from d2zero_runtime import D2ZeroError


@dataclass(frozen=True)
class Processes:
    """This process among all that train together."""

    rank: int
    count: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and progress."""
        return self.rank == 0


@contextmanager
def joined(device: str = "auto") -> Iterator[Processes]:
    """Join the processes that `torchrun` started, or be the only one.

    Args:
        device: `auto` takes a GPU where there is one, or a device such as `cpu` or `cuda:1`.
    """
    rank, count = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    local = int(os.environ.get("LOCAL_RANK", 0))
    chosen = pick_device(device, local)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    if count > 1:
        dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo")
    try:
        yield Processes(rank, count, chosen)
    finally:
        if count > 1:
            dist.destroy_process_group()


def pick_device(name: str, local_rank: int = 0) -> torch.device:
    """The device of that name, or the best there is for `auto`.

    Raises:
        D2ZeroError: there is no such device here.
    """
    if name == "auto":
        return torch.device("cuda", local_rank) if torch.cuda.is_available() else torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise D2ZeroError(f"device must be auto, cpu or cuda[:N], got {name!r}") from error
    if device.type not in ("cpu", "cuda"):
        raise D2ZeroError(f"device must be auto, cpu or cuda[:N], got {name!r}")
    if name == "cuda":
        device = torch.device("cuda", local_rank)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise D2ZeroError(f"device {name} asked for, but torch sees no GPU here; use --device cpu")
    return device
