"""Only the training set's loader: images per second with the real augmentation, by number of workers."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from d2zero.cli.terminal import tracked
from d2zero.data.coco import find_annotations, find_image_folder, read_coco
from d2zero.data.shapes import ShapesConfig, write_dataset
from d2zero.data.shapes import vocabulary as shapes_vocabulary
from d2zero.data.splits import find_split
from d2zero.data.training_set import TrainingSet
from d2zero.data.zero_shot import write_split
from d2zero.processes import Processes
from d2zero.training.config import TrainConfig
from d2zero.training.loader import training_loader
from d2zero_bench.rounds import Rounds
from d2zero_runtime import D2ZeroError, Vocabulary

DRAWN = ShapesConfig(size=640, train_images=16, val_images=0)
ROUNDS = 3
PREFETCHED = 2  # batches that a worker reads ahead, DataLoader's own choice


@contextmanager
def training_set(config: TrainConfig, split: str, data: Path | None) -> Iterator[TrainingSet]:
    """The training set of a COCO folder, whose zero-shot file is made if it is not there; or of drawn images.

    Raises:
        D2ZeroError: The folder lacks what training needs, or pycocotools, which decodes masks, is absent.
    """
    if find_spec("pycocotools") is None:
        raise D2ZeroError("loading decodes masks with pycocotools, which is absent; pip install 'd2zero[train]'")
    with TemporaryDirectory() as temporary:
        yield _drawn(config, Path(temporary)) if data is None else _of_coco(config, split, data, Path(temporary))


def _drawn(config: TrainConfig, folder: Path) -> TrainingSet:
    write_dataset(folder, DRAWN)
    annotations = find_annotations(folder, "shapes", "seen")
    images = find_image_folder(folder, annotations)
    return TrainingSet(read_coco(annotations), images, shapes_vocabulary(), config.augment, config.cache)


def _of_coco(config: TrainConfig, name: str, data: Path, temporary: Path) -> TrainingSet:
    split = find_split(name)
    try:
        annotations = find_annotations(data, name, "seen")
    except D2ZeroError:
        sources = sorted((data / "annotations").glob("instances_train20??.json"))
        if len(sources) != 1:
            raise
        annotations = write_split(read_coco(sources[0]), None, split, temporary)[0].path
    rows = np.random.default_rng(0).standard_normal((len(split.names), config.model.text_dim)).astype(np.float32)
    words = Vocabulary(split.names, rows, seen=np.array(split.is_seen(split.names)))
    return TrainingSet(
        read_coco(annotations), find_image_folder(data, annotations), words, config.augment, config.cache
    )


def loading_rates(
    data: TrainingSet, config: TrainConfig, processes: Processes, workers: Sequence[int], seconds: float
) -> dict[int, list[float]]:
    """Images per second of each number of workers, once per round."""
    found: dict[int, list[float]] = {count: [] for count in workers}

    def rate(workers: str, _: int) -> float:
        return loading_rate(data, replace(config, workers=int(workers)), processes, seconds)

    for rates in Rounds({}, config.seed, tracked, noted=()).take([*map(str, workers)], ROUNDS, "loading", rate):
        for count in workers:
            found[count].append(rates[str(count)])
    return found


def loading_rate(data: TrainingSet, config: TrainConfig, processes: Processes, seconds: float) -> float:
    """Images per second, batch after batch, with nothing else going on.

    What was read ahead while the workers started is not counted.
    """
    batches = iter(training_loader(data, config, processes))
    for _ in range(1 + PREFETCHED * config.workers):
        next(batches)
    images, started = 0, time.perf_counter()
    while images == 0 or time.perf_counter() - started < seconds:
        images += len(next(batches).images)
    return images / (time.perf_counter() - started)
