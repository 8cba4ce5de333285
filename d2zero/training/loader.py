"""The batches of a training run, as its processes read them."""

from typing import Any

from torch.utils.data import DataLoader

from d2zero.data.training_set import StepSampler, TrainingSet, collate
from d2zero.training.config import TrainConfig
from d2zero.training.distributed import Processes


def training_loader(data: TrainingSet, config: TrainConfig, processes: Processes, start: int = 0) -> "DataLoader[Any]":
    """A `Batch` for each step from `start` to the run's last: this process's share of it."""
    sampler = StepSampler(
        len(data), config.batch_size, config.seed, start, config.steps, processes.rank, processes.count
    )
    return DataLoader(
        data,
        batch_sampler=sampler,
        num_workers=config.workers,
        collate_fn=collate,
        pin_memory=processes.device.type == "cuda",
        persistent_workers=config.workers > 0,
    )
