"""The batches of a training run, as its processes read them."""

from collections.abc import Iterator

from torch.utils.data import DataLoader, Dataset

from d2zero.data.training_set import Batch, Sample, SampleKey, StepSampler, TrainingSet, collate
from d2zero.processes import Processes
from d2zero.training.config import TrainConfig
from d2zero_runtime import D2ZeroError


def training_loader(data: TrainingSet, config: TrainConfig, processes: Processes, start: int = 0) -> Iterator[Batch]:
    """A `Batch` for each step from `start` to the run's last: this process's share of it.

    Raises:
        D2ZeroError: What a worker raised, as it raised it.
    """
    sampler = StepSampler(
        len(data), config.batch_size, config.seed, start, config.steps, processes.rank, processes.count
    )
    loader = DataLoader(
        _SamplesOrErrors(data),
        batch_sampler=sampler,
        num_workers=config.workers,
        collate_fn=_batch_or_error,
        pin_memory=processes.device.type == "cuda",
        persistent_workers=config.workers > 0,
    )
    for batch in loader:
        if isinstance(batch, D2ZeroError):
            raise batch
        yield batch


class _SamplesOrErrors(Dataset[Sample | D2ZeroError]):
    """Returns errors instead of raising them: of what a worker raises, DataLoader keeps only a stack trace's text."""

    def __init__(self, data: TrainingSet) -> None:
        self.data = data

    def __getitem__(self, key: SampleKey) -> Sample | D2ZeroError:
        try:
            return self.data[key]
        except D2ZeroError as error:
            return error


def _batch_or_error(found: list[Sample | D2ZeroError]) -> Batch | D2ZeroError:
    errors = [entry for entry in found if isinstance(entry, D2ZeroError)]
    return errors[0] if errors else collate([entry for entry in found if isinstance(entry, Sample)])
