"""Evaluating a model over an annotation file's images: resumable, in flat memory.

Detections are appended to one file per mode, one line per image, as they are made. A run that was stopped continues
after the last whole line. The metrics are then computed from the files, image by image.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from d2zero.data.coco import CocoFile, missing_images, read_listed_image
from d2zero.data.coco_values import Id
from d2zero.data.json_stream import EntriesOnDisk
from d2zero.evaluation.metrics import ZeroShotScores, in_order
from d2zero_runtime import D2ZeroError, Detections, Mode, Segmenter
from d2zero_runtime.errors import join_truncated

Progress = Callable[[Iterator[list[Id]], int, str], Iterator[list[Id]]]


def require_images(annotations: CocoFile, folder: Path, limit: int | None = None, all_of_them: bool = True) -> None:
    """Refuse a folder that has not all, or none, of the first images of an annotation file.

    Raises:
        D2ZeroError: Says how many are missing.
    """
    ids = list(annotations.images)[: limit or None]
    missing = [annotations.images[number]["file_name"] for number in missing_images(annotations, folder, ids)]
    if len(missing) == len(ids):
        raise D2ZeroError(f"none of the {len(ids)} images of {annotations.path.name} is in {folder}")
    if missing and all_of_them:
        raise D2ZeroError(
            f"{len(missing)} of the {len(ids)} images of {annotations.path.name} are not in {folder}"
            f" ({join_truncated(missing)}); accuracy needs all of them"
        )


def require_known_classes(annotations: CocoFile, names: Sequence[str]) -> None:
    """Refuse an annotation file with instances of classes that are not among some names.

    Raises:
        D2ZeroError: Names them.
    """
    unknown = annotations.categories.keys() - set(names)
    used = {entry["category_id"] for entries in annotations.annotations.values() for entry in entries}
    lost = [name for name, number in annotations.categories.items() if name in unknown and number in used]
    if lost:
        raise D2ZeroError(
            f"{annotations.path.name} has classes that the vocabulary lacks: {join_truncated(lost)}; evaluate with the"
            " files of the model's own split, or give --vocabulary"
        )


@dataclass
class EvaluationRun:
    """One model over one annotation file in one or several modes.

    Args:
        model: The segmenter, with the vocabulary to use; of a checkpoint, `D2Zero.segmenter()`.
        annotations: The ground truth; its categories must be classes of the vocabulary.
        images: The folder of its images.
        output: Where detections are kept, in a folder named after all that they depend on: model, vocabulary, images
            and categories. Masks are not among it: detections outlast their repair. A run of something else never
            touches them.
        modes: Evaluated from the same pass of the network.
        batch_size: Images at a time.
        identity: Distinguishes this model from others, such as its file's hash and its backend's name.
        limit: Evaluate only so many images.
        require_all: Refuse what lacks images, or has some that cannot be read; else they count as without detections.
    """

    model: Segmenter
    annotations: CocoFile
    images: Path
    output: Path
    modes: Sequence[Mode]
    batch_size: int = 1
    identity: str = ""
    limit: int | None = None
    require_all: bool = False
    unreadable: dict[Id, str] = field(default_factory=dict)  # what was wrong, by image id
    kept: int = field(default=0, init=False)  # images that an earlier run had evaluated

    def __post_init__(self) -> None:
        require_known_classes(self.annotations, self.model.vocabulary.names)
        if not self.images.is_dir():
            raise D2ZeroError(f"image folder {self.images} does not exist")
        ids = list(self.annotations.images)
        self.image_ids = ids[: self.limit] if self.limit else ids
        require_images(self.annotations, self.images, self.limit, all_of_them=self.require_all)
        self.folder = self.output / self._identity()[:12]

    def run(self, progress: Progress | None = None) -> dict[Mode, dict[str, Any]]:
        """Evaluate what is left to evaluate and sum up.

        Returns:
            Metrics by mode, as of `ZeroShotScores.summary`, with `unreadable` image files added.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        for mode in self.modes:
            _drop_cut_line(self._file(mode))
        done = set.intersection(*(self._done(mode) for mode in self.modes))
        left = [number for number in self.image_ids if number not in done]
        self.kept = len(self.image_ids) - len(left)
        batches = [left[start : start + self.batch_size] for start in range(0, len(left), self.batch_size)]
        steps = progress(iter(batches), len(batches), "evaluating") if progress else iter(batches)
        with ThreadPoolExecutor(1) as reader:
            pending = reader.submit(self._read, batches[0]) if batches else None
            for index, batch in enumerate(steps):
                assert pending is not None
                pictures = pending.result()
                if index + 1 < len(batches):
                    pending = reader.submit(self._read, batches[index + 1])
                self._predict(batch, pictures)
        return {mode: self._sum_up(mode) for mode in self.modes}

    def detections(self, mode: Mode, image_ids: Sequence[Id]) -> dict[Id, Detections]:
        """What was found in some of the images that have been evaluated."""
        names, wanted = self.annotations.names, set(image_ids)
        found = {}
        for line, *_ in self._lines(mode):
            if line["image_id"] in wanted:
                entry = self.annotations.images[line["image_id"]]
                size = (entry["height"], entry["width"])
                found[line["image_id"]] = Detections.from_coco(line["detections"], names, self.model.vocabulary, size)
                if len(found) == len(wanted):
                    break
        return found

    def _predict(self, image_ids: list[Id], pictures: list[NDArray[np.uint8] | None]) -> None:
        readable = [
            (number, picture) for number, picture in zip(image_ids, pictures, strict=True) if picture is not None
        ]
        entries: dict[tuple[Mode, Id], list[dict[str, Any]]] = {}
        if readable:
            resized = [self.model.preprocessing.resize(picture) for _, picture in readable]
            out = self.model.predict_raw(resized)
            input_sizes = [(image.shape[0], image.shape[1]) for image in resized]
            output_sizes = [(picture.shape[0], picture.shape[1]) for _, picture in readable]
            for mode in self.modes:
                found = self.model.postprocess(out, input_sizes, output_sizes, mode)
                for (number, _), detections in zip(readable, found, strict=True):
                    known = detections.named(self.annotations.categories)  # others are not evaluated
                    entries[mode, number] = known.to_coco(number, self.annotations.categories)
        for mode in self.modes:
            with self._file(mode).open("a") as stream:
                for number in image_ids:
                    line: dict[str, Any] = {"image_id": number, "detections": entries.get((mode, number), [])}
                    if number in self.unreadable:
                        line["unreadable"] = self.unreadable[number]
                    stream.write(json.dumps(line) + "\n")

    def _read(self, image_ids: list[Id]) -> list[NDArray[np.uint8] | None]:
        pictures: list[NDArray[np.uint8] | None] = []
        for number in image_ids:
            try:
                pictures.append(read_listed_image(self.annotations, self.images, number))
            except D2ZeroError as error:
                if self.require_all:
                    raise
                self.unreadable[number] = str(error)
                pictures.append(None)
        return pictures

    def _sum_up(self, mode: Mode) -> dict[str, Any]:
        """In the order of image ids, as COCO's evaluation goes: a run that was stopped may have another."""
        scores = ZeroShotScores(self.annotations, self.model.vocabulary.seen_names)
        unreadable: dict[Id, str] = {}
        with self._file(mode).open("rb") as stream:
            evaluated = EntriesOnDisk(stream)
            for line, start, end in self._lines(mode):
                if "unreadable" in line:  # a later run may have read it
                    unreadable[line["image_id"]] = line["unreadable"]
                elif line["image_id"] not in evaluated:
                    evaluated.note(line["image_id"], start, end)
            ids = in_order(self.image_ids)
            for number in ids:
                scores.add(number, evaluated[number][0]["detections"] if number in evaluated else [])
        lost = [unreadable[number] for number in ids if number not in evaluated]
        return {**scores.summary(mode), "unreadable": lost}

    def _done(self, mode: Mode) -> set[Id]:
        return {line["image_id"] for line, *_ in self._lines(mode) if "unreadable" not in line}

    def _lines(self, mode: Mode) -> Iterator[tuple[dict[str, Any], int, int]]:
        """Each line with the place where it begins and the place after it."""
        if not self._file(mode).exists():
            return
        end = 0
        with self._file(mode).open("rb") as stream:
            for line in stream:
                start, end = end, end + len(line)
                if line.endswith(b"\n"):  # else: cut short when the run was stopped
                    yield json.loads(line), start, end

    def _file(self, mode: Mode) -> Path:
        return self.folder / f"detections_{mode}.jsonl"

    def _identity(self) -> str:
        """A digest of all that detections depend on."""
        vocabulary = self.model.vocabulary
        digest = hashlib.sha256()
        for entry in self.annotations.images.values():
            digest.update(repr([entry[key] for key in ("id", "file_name", "height", "width")]).encode())
        digest.update(repr(self.annotations.categories).encode())
        for array in (vocabulary.embeddings, vocabulary.seen, vocabulary.active):
            digest.update(array.tobytes())
        digest.update(repr((vocabulary.names, vocabulary.synonyms, self.identity, str(self.images.resolve()))).encode())
        return digest.hexdigest()


def _drop_cut_line(path: Path) -> None:
    """Remove a last line that has no end, reading back from the file's end only as far as needed."""
    if not path.exists():
        return
    with path.open("rb+") as stream:
        end = stream.seek(0, os.SEEK_END)
        while end:
            start = max(0, end - 65_536)
            stream.seek(start)
            newline = stream.read(end - start).rfind(b"\n")
            if newline >= 0:
                stream.truncate(start + newline + 1)
                return
            end = start
        stream.truncate(0)
