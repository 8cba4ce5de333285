"""Training samples and the order they come in.

Everything random is a function of the run's seed and the step, so that a run that was stopped goes on as if
it had not been: which images a step reads, how each is augmented, and where losses sample points.

A file that is missing or damaged, and an image that augmentation left empty, is replaced by the next one of
the data set; what was damaged is named.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset, Sampler
from torchvision import tv_tensors

from d2zero.data.augment import AugmentConfig, training_transform
from d2zero.data.coco import CocoFile, missing_images, read_listed_image
from d2zero.data.coco_values import Id, decoded
from d2zero.data.targets import Targets
from d2zero_runtime import D2ZeroError, Vocabulary
from d2zero_runtime.errors import join_truncated

MAX_REPLACEMENTS = 50


class SampleKey(NamedTuple):
    """The image's place in the set, and the seed of all that is random about it."""

    place: int
    seed: int


@dataclass(frozen=True)
class Sample:
    """An augmented image (3, H, W) uint8, its targets, and what was skipped on the way."""

    image: Tensor
    targets: Targets
    file_name: str
    seed: int
    problems: tuple[str, ...] = ()


@dataclass(frozen=True)
class Batch:
    """Samples stacked: images (B, 3, H, W) uint8."""

    images: Tensor
    targets: list[Targets]
    file_names: list[str]
    seeds: list[int]
    problems: list[str] = field(default_factory=list)

    def parts(self, count: int) -> "Iterator[Batch]":
        """The batch in so many parts of the same size, into which it can be divided."""
        size = len(self.targets) // count
        for start in range(0, len(self.targets), size):
            part = slice(start, start + size)
            yield Batch(self.images[part], self.targets[part], self.file_names[part], self.seeds[part])

    def pin_memory(self) -> "Batch":
        """A copy in page-locked memory: what a `DataLoader` with `pin_memory` calls, and only if it is there."""
        return replace(self, images=self.images.pin_memory(), targets=[target.pin_memory() for target in self.targets])


def require_trainable(vocabulary: Vocabulary) -> None:
    """Refuse a vocabulary that cannot be trained with.

    Raises:
        D2ZeroError: It has no seen classes, or synonyms.
    """
    if not vocabulary.seen.any():
        raise D2ZeroError("the vocabulary has no seen classes to train on")
    if vocabulary.synonyms:
        raise D2ZeroError("training takes one embedding per class; leave synonyms for inference")


class TrainingSet(Dataset[Sample]):
    """Images of an annotation file that hold at least one usable instance of a seen class.

    Args:
        annotations: The training annotations.
        images: The folder of the images.
        vocabulary: Its seen classes are the labels, in order.
        augment: How samples are varied.
        cache: Keep decoded images and masks in memory (for small sets).

    Raises:
        D2ZeroError: The file holds unseen classes, none of the seen ones, or none of the images is there.
    """

    def __init__(
        self,
        annotations: CocoFile,
        images: Path,
        vocabulary: Vocabulary,
        augment: AugmentConfig,
        cache: bool = False,
    ) -> None:
        label_of = {name: label for label, name in enumerate(vocabulary.seen_names)}
        _refuse_unseen(annotations, vocabulary)
        names = annotations.names
        self.labels = {number: label_of[name] for number, name in names.items() if name in label_of}
        self.folder = images
        self.annotations = annotations
        self.transform = training_transform(augment)
        self.cache: dict[Id, tuple[NDArray[np.uint8], NDArray[np.uint8], NDArray[np.int64]]] | None = (
            {} if cache else None
        )
        usable = [number for number in annotations.images if self._instances(number)]
        if not usable:
            reason = f"; {annotations.left_out}" if annotations.left_out.count else ""
            raise D2ZeroError(
                f"{annotations.path} holds no instance of the vocabulary's seen classes"
                f" ({join_truncated(label_of)}){reason}"
            )
        missing = dict.fromkeys(missing_images(annotations, images, usable))
        self.missing = [annotations.images[number]["file_name"] for number in missing]
        self.image_ids = [number for number in usable if number not in missing]
        if not self.image_ids:
            problem = "" if images.is_dir() else ", which does not exist"
            raise D2ZeroError(
                f"none of the {len(usable)} images of {annotations.path.name} is in {images}{problem} (first:"
                f" {self.missing[0]}); check --images or --data"
            )

    def __len__(self) -> int:
        return len(self.image_ids)

    def __getitem__(self, key: SampleKey) -> Sample:
        problems: list[str] = []
        for attempt in range(MAX_REPLACEMENTS):
            index = (key.place + attempt) % len(self)
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(key.seed)
                try:
                    image, targets = self._augmented(self.image_ids[index])
                except D2ZeroError as error:
                    problems.append(str(error))
                    continue
            if len(targets.labels):
                file_name = self.annotations.images[self.image_ids[index]]["file_name"]
                return Sample(image, targets, file_name, key.seed, tuple(problems))
        reason = f"; {problems[-1]}" if problems else "; augmentation left them all empty"
        raise D2ZeroError(f"{MAX_REPLACEMENTS} images in a row could not be used{reason}")

    def _augmented(self, image_id: Id) -> tuple[Tensor, Targets]:
        image_HWC, masks_THW, labels_T = self._decoded(image_id)
        image = tv_tensors.Image(torch.from_numpy(image_HWC.copy()).permute(2, 0, 1))
        image, masks = self.transform(image, tv_tensors.Mask(torch.from_numpy(masks_THW)))
        masks = masks.as_subclass(Tensor)  # 0 and 1: bytes are searched 30 times as fast as bools
        kept = masks.flatten(1).amax(dim=1).bool()
        return image.as_subclass(Tensor), Targets(torch.from_numpy(labels_T)[kept], masks.view(torch.bool)[kept])

    def _decoded(self, image_id: Id) -> tuple[NDArray[np.uint8], NDArray[np.uint8], NDArray[np.int64]]:
        if self.cache is not None and image_id in self.cache:
            return self.cache[image_id]
        image_HWC = read_listed_image(self.annotations, self.folder, image_id)
        size = (image_HWC.shape[0], image_HWC.shape[1])
        instances = self._instances(image_id)
        masks = np.stack([decoded(instance["segmentation"], size) for instance in instances]).astype(np.uint8)
        labels = np.array([self.labels[instance["category_id"]] for instance in instances], np.int64)
        if self.cache is not None:
            self.cache[image_id] = (image_HWC, masks, labels)
        return image_HWC, masks, labels

    def _instances(self, image_id: Id) -> list[dict[str, Any]]:
        return [
            entry
            for entry in self.annotations.annotations.get(image_id, [])
            if entry["category_id"] in self.labels and not entry.get("iscrowd")
        ]


class StepSampler(Sampler[list[SampleKey]]):
    """The samples of each step, from `start` to `stop`, for one process of several.

    Args:
        length: Images in the data set.
        batch_size: Samples per batch, of all processes together.
        seed: The run's seed.
        start: First step.
        stop: One past the last step.
        rank: This process.
        processes: Number of processes that share a batch.
    """

    def __init__(
        self, length: int, batch_size: int, seed: int, start: int, stop: int, rank: int = 0, processes: int = 1
    ) -> None:
        if batch_size % processes:
            raise D2ZeroError(f"batch_size ({batch_size}) must be a multiple of the {processes} processes")
        self.length, self.batch_size, self.seed = length, batch_size, seed
        self.start, self.stop = start, stop
        share = batch_size // processes
        self.own = range(rank * share, (rank + 1) * share)

    def __len__(self) -> int:
        return self.stop - self.start

    def __iter__(self) -> Iterator[list[SampleKey]]:
        epoch, order = -1, np.zeros(0, np.int64)
        for step in range(self.start, self.stop):
            keys = []
            for place in self.own:
                position = step * self.batch_size + place
                if position // self.length != epoch:
                    epoch = position // self.length
                    order = np.random.default_rng([self.seed, epoch]).permutation(self.length)
                seed = int(np.random.SeedSequence([self.seed, position]).generate_state(1)[0])
                keys.append(SampleKey(int(order[position % self.length]), seed))
            yield keys


def collate(samples: Sequence[Sample]) -> Batch:
    """Stack samples of the same size."""
    return Batch(
        images=torch.stack([sample.image for sample in samples]),
        targets=[sample.targets for sample in samples],
        file_names=[sample.file_name for sample in samples],
        seeds=[sample.seed for sample in samples],
        problems=[problem for sample in samples for problem in sample.problems],
    )


def _refuse_unseen(annotations: CocoFile, vocabulary: Vocabulary) -> None:
    names = annotations.names
    used = {names.get(entry["category_id"], "") for entries in annotations.annotations.values() for entry in entries}
    leaked = sorted(used & set(vocabulary.unseen_names))
    if leaked:
        raise D2ZeroError(
            f"{annotations.path} holds classes that the vocabulary calls unseen"
            f" ({join_truncated(leaked)}); training on it"
            " would not be zero-shot. Do file and vocabulary belong to the same split?"
        )
