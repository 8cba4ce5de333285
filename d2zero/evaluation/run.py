"""Evaluating a model over an annotation file's images: resumable, in flat memory.

Detections are appended to one file per mode, one line per image, as they are made. A run that was stopped continues
with the images that have no whole line. The metrics are then computed from the files, image by image.

Several processes share the images (`d2zero.evaluation.processes` starts or joins them): one makes the plan, each
evaluates a share of it and appends to a file of its own, and one sums up what is in all files.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from d2zero.data.coco import CocoFile, missing_images, read_listed_image
from d2zero.data.coco_values import Id
from d2zero.data.json_stream import EntriesOnDisk
from d2zero.evaluation.metrics import ZeroShotScores, in_order
from d2zero_runtime import D2ZeroError, Detections, Mode, Segmenter
from d2zero_runtime.errors import join_truncated
from d2zero_runtime.files import locked

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
        """Evaluate what is left to evaluate and sum up, in this process.

        Returns:
            As of `summaries`.
        """
        self.evaluate(self.plan(), progress=progress)
        return self.summaries()

    def plan(self) -> list[list[Id]]:
        """The images that are left to evaluate, in batches; to be made before any process evaluates some of them."""
        done = set.intersection(*(self._done(mode) for mode in self.modes))
        left = [number for number in self.image_ids if number not in done]
        self.kept = len(self.image_ids) - len(left)
        return [left[start : start + self.batch_size] for start in range(0, len(left), self.batch_size)]

    def evaluate(self, batches: Sequence[list[Id]], shard: int = 0, progress: Progress | None = None) -> None:
        """Evaluate batches of a plan and append the detections to a shard's files.

        Args:
            batches: All of the plan, or this process's share.
            shard: The number of the process; no two write the same files.
            progress: Shows how far it has come; a batch has been written when the next one is asked for.

        Raises:
            D2ZeroError: Another evaluation is writing the shard's files.
        """
        if not batches:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        steps = progress(iter(batches), len(batches), "evaluating") if progress else iter(batches)
        with ExitStack() as files, ThreadPoolExecutor(1) as reader:
            streams = {mode: files.enter_context(_appending(self._file(mode, shard))) for mode in self.modes}
            pending = reader.submit(self._read, batches[0])
            for index, batch in enumerate(steps):
                pictures = pending.result()
                if index + 1 < len(batches):
                    pending = reader.submit(self._read, batches[index + 1])
                self._predict(batch, pictures, streams)

    def summaries(self) -> dict[Mode, dict[str, Any]]:
        """Metrics by mode, as of `ZeroShotScores.summary`, from all shards; with `unreadable` image files added.

        Raises:
            D2ZeroError: Images are left to evaluate.
        """
        return {mode: self._sum_up(mode) for mode in self.modes}

    def detections(self, mode: Mode, image_ids: Sequence[Id]) -> dict[Id, Detections]:
        """What was found in some of the images that have been evaluated."""
        names, wanted = self.annotations.names, set(image_ids)
        found = {}
        for line in self._lines(mode):
            if line["image_id"] in wanted and "unreadable" not in line:
                entry = self.annotations.images[line["image_id"]]
                size = (entry["height"], entry["width"])
                found[line["image_id"]] = Detections.from_coco(line["detections"], names, self.model.vocabulary, size)
                wanted.remove(line["image_id"])
                if not wanted:
                    break
        return {number: found[number] for number in image_ids if number in found}

    def _predict(
        self, image_ids: list[Id], pictures: list[NDArray[np.uint8] | None], streams: Mapping[Mode, IO[bytes]]
    ) -> None:
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
        for mode, stream in streams.items():
            for number in image_ids:
                line: dict[str, Any] = {"image_id": number, "detections": entries.get((mode, number), [])}
                if number in self.unreadable:
                    line["unreadable"] = self.unreadable[number]
                stream.write(json.dumps(line).encode() + b"\n")
            stream.flush()

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
        """In the order of image ids, as COCO's evaluation goes: files have them as they were evaluated."""
        scores = ZeroShotScores(self.annotations, self.model.vocabulary.seen_names)
        ids, unreadable = in_order(self.image_ids), dict[Id, str]()
        evaluated: dict[Id, EntriesOnDisk] = {}  # the file that has it
        with ExitStack() as files:
            for path in self._files(mode):
                lines = EntriesOnDisk(files.enter_context(path.open("rb")))
                for line, start, end in _whole_lines(path):
                    if "unreadable" in line:  # a later run may have read it
                        unreadable[line["image_id"]] = line["unreadable"]
                    elif line["image_id"] not in evaluated:
                        lines.note(line["image_id"], start, end)
                        evaluated[line["image_id"]] = lines
            missing = [number for number in ids if number not in evaluated and number not in unreadable]
            if missing:
                raise D2ZeroError(
                    f"{len(missing)} of {len(ids)} images have no detections in {self.folder}; all processes have to"
                    " write there, with the same model: run the command again to evaluate the rest"
                )
            for number in ids:
                scores.add(number, evaluated[number][number][0]["detections"] if number in evaluated else [])
        lost = [unreadable[number] for number in ids if number not in evaluated]
        return {**scores.summary(mode), "unreadable": lost}

    def _done(self, mode: Mode) -> set[Id]:
        return {line["image_id"] for line in self._lines(mode) if "unreadable" not in line}

    def _lines(self, mode: Mode) -> Iterator[dict[str, Any]]:
        for path in self._files(mode):
            for line, *_ in _whole_lines(path):
                yield line

    def _files(self, mode: Mode) -> list[Path]:
        """Those of all shards, of however many processes earlier runs had."""
        return sorted(self.folder.glob(f"detections_{mode}.*jsonl"))

    def _file(self, mode: Mode, shard: int) -> Path:
        return self.folder / (f"detections_{mode}.{shard}.jsonl" if shard else f"detections_{mode}.jsonl")

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


def _whole_lines(path: Path) -> Iterator[tuple[dict[str, Any], int, int]]:
    """Each line with the place where it begins and the place after it."""
    end = 0
    with path.open("rb") as stream:
        for line in stream:
            if not line.endswith(b"\n"):  # cut short when its process was stopped
                return
            start, end = end, end + len(line)
            yield json.loads(line), start, end


@contextmanager
def _appending(path: Path) -> Iterator[IO[bytes]]:
    """A file of lines to append to, for one process at a time.

    Raises:
        D2ZeroError: Another process has it.
    """
    message = f"another evaluation is writing {path}; wait until it has ended, or choose another --output"
    with locked(path, message) as stream:
        _drop_cut_line(stream)
        yield stream


def _drop_cut_line(stream: IO[bytes]) -> None:
    """Remove a last line that has no end, reading back from the file's end only as far as needed."""
    end = stream.seek(0, os.SEEK_END)
    while end:
        start = max(0, end - 65_536)
        stream.seek(start)
        newline = stream.read(end - start).rfind(b"\n")
        if newline >= 0:
            end = start + newline + 1
            break
        end = start
    stream.truncate(end)
