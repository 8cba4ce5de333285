"""One process or many: the cores that one may use, and what `torchrun` set up. Torch only where it is used."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


def usable_cores() -> int:
    """Cores that this process may use; Linux can give it fewer than the machine has."""
    usable = getattr(os, "sched_getaffinity", None)
    return len(usable(0)) if usable else os.cpu_count() or 1


@dataclass(frozen=True)
class Torchrun:
    """This process among those that `torchrun` started, on all machines and on this one."""

    rank: int
    count: int
    local_rank: int
    local_count: int


def torchrun() -> Torchrun:
    """What `torchrun` says of this process; without `torchrun`, it is the only one."""
    names = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1}
    return Torchrun(*(int(os.environ.get(name, default)) for name, default in names.items()))


@dataclass(frozen=True)
class Processes:
    """This process among all that train or evaluate together."""

    rank: int
    count: int
    device: "torch.device"

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and progress."""
        return self.rank == 0

    def wait(self) -> None:
        """Wait until all processes are here."""
        if self.count > 1:
            import torch.distributed as dist

            dist.barrier()

    def share(self, objects: list[Any]) -> None:
        """Replace objects by those of the main process."""
        if self.count > 1:
            import torch.distributed as dist

            dist.broadcast_object_list(objects)


@contextmanager
def joined(device: str = "auto", backend: str | None = None, timeout: timedelta | None = None) -> Iterator[Processes]:
    """Join the processes that `torchrun` started, or be the only one.

    Args:
        device: `auto` takes a GPU where there is one, or a device such as `cpu` or `cuda:1`.
        backend: What they talk through; `nccl` on GPUs and `gloo` on CPUs if left out.
        timeout: The longest that one waits for the others; torch's own if left out.
    """
    import torch
    import torch.distributed as dist

    from d2zero.devices import pick_device

    started = torchrun()
    chosen = pick_device(device, started.local_rank)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    if started.count > 1:
        dist.init_process_group(backend or ("nccl" if chosen.type == "cuda" else "gloo"), timeout=timeout)
    try:
        yield Processes(started.rank, started.count, chosen)
    finally:
        if started.count > 1:
            dist.destroy_process_group()
