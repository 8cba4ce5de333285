"""Evaluating vocabularies over an index: accuracy of prompts, synonyms and contexts, without running the network.

Images of the index are those of the annotation file by their files' names. Metrics are those of a full evaluation
(`d2zero.evaluation.run`) of the model that made the index.
"""

import json
import os
from collections import Counter, deque
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, Any

from d2zero.data.coco import CocoFile, ids_by_file_name, require_size
from d2zero.data.coco_values import Id
from d2zero.data.json_stream import EntriesOnDisk
from d2zero.evaluation.matching import Entries
from d2zero.evaluation.metrics import ZeroShotScores, in_order
from d2zero.evaluation.run import require_known_classes
from d2zero_runtime import D2ZeroError, Mode, Vocabulary
from d2zero_runtime.errors import join_truncated
from d2zero_runtime.index import Index
from d2zero_runtime.text.prompts import Progress


class IndexRun:
    """An index and an annotation file of its images.

    Images that only the index has are ignored; those that only the annotation file has count as without detections.

    Args:
        index: The images, segmented.
        annotations: The ground truth.

    Raises:
        D2ZeroError: They have no image in common, or several of one file name.
    """

    def __init__(self, index: Index, annotations: CocoFile) -> None:
        self.index, self.annotations = index, annotations
        listed, ids = Counter(map(_file_name, annotations.images.values())), ids_by_file_name(annotations)
        paths = [path for path in index.paths() if Path(path).name in listed]
        counts = Counter(Path(path).name for path in paths)
        several = [name for name, count in counts.items() if count > 1 or listed[name] > 1]
        if several:
            raise D2ZeroError(
                f"images are matched by file name, and {index.folder} or {annotations.path} has several of"
                f" {join_truncated(several)}; make an index and an annotation file in which names are unique"
            )
        if not paths:
            raise D2ZeroError(
                f"none of the {len(annotations.images)} images of {annotations.path} is in the index {index.folder};"
                " make an index of these images, or give their annotations"
            )
        self._ids = {path: ids[Path(path).name] for path in paths}

    def check(self, vocabulary: Vocabulary, mode: Mode) -> None:
        """Refuse a vocabulary that cannot be evaluated, before anything is.

        Raises:
            D2ZeroError: It does not fit the model or the mode, or lacks classes that are annotated.
        """
        require_known_classes(self.annotations, vocabulary.names)
        self.index.check_compatible(vocabulary, mode)

    def summary(self, vocabulary: Vocabulary, mode: Mode, progress: Progress | None = None) -> dict[str, Any]:
        """Metrics of a vocabulary, from one pass over the index.

        Args:
            vocabulary: The classes, those of the annotation file among them.
            mode: As in `Segmenter.__call__`.
            progress: Shows how far it has come.

        Returns:
            As of `ZeroShotScores.summary`, with file names of images that the index lacks as `missing`.

        Raises:
            D2ZeroError: As of `check`, or an image has another size than the annotation file says.
        """
        self.check(vocabulary, mode)
        scores = ZeroShotScores(self.annotations, vocabulary.seen_names)
        categories, images = self.annotations.categories, self.annotations.images
        results = self.index.name(vocabulary, mode, score_threshold=0.0)
        with TemporaryFile() as file:
            ordered = _InOrder(scores, images, set(self._ids.values()), file)
            for image, found in progress(results, len(self.index), "naming") if progress else results:
                number = self._ids.get(image.path)
                if number is not None:
                    require_size(images[number], image.size)
                    ordered.add(number, found.named(categories).to_coco(number, categories))
            ordered.finish()
        return {**scores.summary(mode), "missing": [_file_name(images[number]) for number in ordered.missing]}


def summaries_by_vocabulary(
    run: IndexRun, vocabularies: Mapping[str, Vocabulary], modes: Sequence[Mode], progress: Progress | None = None
) -> dict[str, dict[Mode, dict[str, Any]]]:
    """Metrics of several vocabularies, by their names and by mode; each is a pass over the index.

    Raises:
        D2ZeroError: One cannot be evaluated, which is said before any is; as of `IndexRun.summary`.
    """
    for name, vocabulary in vocabularies.items():
        for mode in modes:
            try:
                run.check(vocabulary, mode)
            except D2ZeroError as error:
                raise D2ZeroError(f"{name}: {error}") from error
    return {
        name: {mode: run.summary(vocabulary, mode, progress) for mode in modes}
        for name, vocabulary in vocabularies.items()
    }


class _InOrder:
    """Gives images to scores by rising ids, in whatever order they come; those that come early wait on disk.

    Args:
        scores: What they are added to.
        ids: All images.
        coming: Those that will come, unless a shard is damaged; the others are added without detections.
        file: Where they wait.
    """

    def __init__(self, scores: ZeroShotScores, ids: Collection[Id], coming: Collection[Id], file: IO[bytes]) -> None:
        self._scores, self._due, self._coming = scores, deque(in_order(ids)), coming
        self._file, self._early = file, EntriesOnDisk(file)
        self.missing: list[Id] = []
        self._take_known()

    def add(self, number: Id, detections: Entries) -> None:
        """Add an image that is to come."""
        if self._due[0] == number:
            self._scores.add(self._due.popleft(), detections)
            self._take_known()
        else:
            start = self._file.seek(0, os.SEEK_END)
            self._file.write(json.dumps(detections)[1:-1].encode())
            self._early.note(number, start, self._file.tell())

    def finish(self) -> None:
        """Add what is left: images that did not come are missing."""
        while self._due:
            self._take()

    def _take_known(self) -> None:
        """Add those that are due and have come, or will not come."""
        while self._due and (self._due[0] in self._early or self._due[0] not in self._coming):
            self._take()

    def _take(self) -> None:
        number = self._due.popleft()
        if number not in self._early:
            self.missing.append(number)
        self._scores.add(number, self._early.get(number, []))


def _file_name(image: dict[str, Any]) -> str:
    return Path(image["file_name"]).name
