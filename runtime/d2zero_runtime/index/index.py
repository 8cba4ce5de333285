"""An index: a folder of shards, and a description with all that naming needs, the classifier among it.

    INDEX/index.json            the model's contract, default vocabulary and classifier
    INDEX/shard-00000.parquet   some hundred images each (`shards`)

Letters: B batch, K classes.
"""

import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Self, TypeVar

import numpy as np
from numpy.typing import NDArray

from d2zero_runtime.artifacts.metadata import Metadata
from d2zero_runtime.backends.onnxruntime import OnnxClassifier
from d2zero_runtime.detections import Detections
from d2zero_runtime.errors import D2ZeroError
from d2zero_runtime.files import file_hash, locked, write_text
from d2zero_runtime.index.shards import (
    Features,
    IndexedImage,
    Rows,
    paths_in,
    read_shard,
    schema_of,
    shard_length,
    write_shard,
)
from d2zero_runtime.masks.postprocess import MAX_DETECTIONS, MaskKind, Mode, ModeName, named, selection
from d2zero_runtime.reading import one_behind
from d2zero_runtime.segmenter import SCORE_THRESHOLD, Segmenter
from d2zero_runtime.segments import Segments
from d2zero_runtime.vocabulary import Vocabulary, check_vocabulary

DESCRIPTION = "index.json"
ROWS = 256  # of a shard at most
SECONDS = 60.0  # after which images are written however few they are: what a killed process loses
LARGEST_BATCH = 16  # images classified at a time; more is no faster
ATTENTION_BYTES = 64 << 20  # of a batch's largest tensor, the scores of K classes attending to each other
HEADS = 8
_SHARD = re.compile(r"shard-(\d+)\.parquet")

T = TypeVar("T")
OnBadShard = Callable[[Path, D2ZeroError], None]


@dataclass(frozen=True)
class _Fields:
    features: Features
    model: str


@dataclass(frozen=True, eq=False)
class IndexDescription(Metadata):
    """What an index says about itself.

    Args:
        features: The type that features are stored in.
        model: The identity of the model that makes it (`Segmenter.identity`).
    """

    features: Features
    model: str

    FIELDS: ClassVar[type[Any]] = _Fields
    REMEDY: ClassVar[str] = "make the index again"

    @classmethod
    def of(cls, segmenter: Segmenter, features: Features) -> "IndexDescription":
        """The description of an index that a model makes.

        Raises:
            D2ZeroError: The model hands over no features.
        """
        vocabulary = segmenter.vocabulary
        return cls(
            contract=segmenter.contract.with_vocabulary(vocabulary),
            embeddings=vocabulary.embeddings,
            classifier=segmenter.classifier.to_onnx(),
            features=features,
            model=segmenter.identity,
        )

    @classmethod
    def read(cls, folder: Path) -> "IndexDescription":
        """Of an index.

        Raises:
            D2ZeroError: The folder is none, or the description is damaged or of a newer version.
        """
        path = folder / DESCRIPTION
        if not path.is_file():
            raise D2ZeroError(f"{folder} is no index: it has no {DESCRIPTION}; make one with `d2zero index`")
        return cls.from_json(path.read_bytes(), str(path))

    @property
    def schema(self) -> Any:
        """The Arrow schema of the shards."""
        return schema_of(self.contract, self.features, self.model)


class Index:
    """Images that were segmented, to be named.

    Args:
        folder: What `IndexWriter` made.
        threads: Threads of the classifier; ONNX Runtime's choice if left out.
        on_bad_shard: Told of a shard that cannot be used, which is then skipped; without it, that raises.

    Raises:
        D2ZeroError: The folder is no index, its description is damaged, or a shard cannot be used.
    """

    def __init__(self, folder: Path, threads: int | None = None, on_bad_shard: OnBadShard | None = None) -> None:
        self.folder, self.description = folder, IndexDescription.read(folder)
        self._on_bad_shard, self._schema = on_bad_shard, self.description.schema
        self._shards = [(path, rows) for path in shards_in(folder) for rows in self._usable(shard_length, path)]
        self.contract, self.vocabulary = self.description.contract, self.description.vocabulary
        self._classifier = OnnxClassifier(lambda: self.description.classifier, folder / DESCRIPTION, threads)

    def __repr__(self) -> str:
        return f"<Index: {len(self)} images in {self.folder}>"

    def __len__(self) -> int:
        return sum(rows for _, rows in self._shards)

    def paths(self) -> Iterator[str]:
        """The images' files, in the order in which they were segmented."""
        for path, _ in self._shards:
            for paths in self._usable(paths_in, path):
                yield from paths

    def check_compatible(self, vocabulary: Vocabulary, mode: Mode) -> None:
        """Refuse a vocabulary that images cannot be named with.

        Raises:
            D2ZeroError: It does not fit the model or the mode.
        """
        check_vocabulary(vocabulary, self.contract.text_dim, self.vocabulary)
        selection(vocabulary, mode)

    def name(
        self,
        vocabulary: Vocabulary | None = None,
        mode: Mode | ModeName = Mode.GZSIS,
        *,
        score_threshold: float = SCORE_THRESHOLD,
        max_detections: int = MAX_DETECTIONS,
        masks: MaskKind = "rle",
        only: Sequence[str] | None = None,
    ) -> Iterator[tuple[IndexedImage, Detections]]:
        """Name what was found in every image, as `Segmenter.name` does; arguments are checked now.

        Some images are read while others are classified and the last ones are post-processed; memory is flat.

        Args:
            vocabulary: The classes; those of the model if left out.
            mode: As in `Segmenter.__call__`, and so are the other options.
            score_threshold: As there.
            max_detections: As there.
            masks: As there.
            only: Names of the classes to report; all that are active if left out. The others compete all the same, and
                take no places among `max_detections`.

        Returns:
            Each image with its instances, in the order in which they were segmented.

        Raises:
            D2ZeroError: The vocabulary does not fit the model or the mode, it lacks a class to report, or a shard
                cannot be used.
        """
        chosen = vocabulary or self.vocabulary
        mode = Mode.parse(mode) if isinstance(mode, str) else mode
        self.check_compatible(chosen, mode)
        if not len(self):
            raise D2ZeroError(f"{self.folder} holds no images that can be used; run `d2zero index` again")
        options: dict[str, Any] = {
            "mode": mode,
            "temperature": self.contract.softmax_temperature,
            "score_threshold": score_threshold,
            "max_detections": max_detections,
            "masks": masks,
            "only": None if only is None else chosen.with_active(only).active,
        }

        def assigned(rows: Rows, class_logits_BQK: NDArray[np.float32]) -> list[tuple[IndexedImage, Detections]]:
            return [
                (image, named(class_logits_BQK[row], rows.masks(row), chosen, **options).without_empty())
                for row, image in enumerate(rows.images)
            ]

        return self._classified(chosen, assigned)

    def _classified(
        self, vocabulary: Vocabulary, finish: Callable[[Rows, NDArray[np.float32]], list[T]]
    ) -> Iterator[T]:
        """What comes of all images, classified here and finished in another thread."""

        def run(reader: ThreadPoolExecutor, finisher: ThreadPoolExecutor) -> Iterator[Future[list[T]]]:
            for rows in _ahead(self._rows(_batch_size(len(vocabulary))), reader):
                class_logits = self._classifier.run(rows.queries_NQC, rows.background_NC, vocabulary.embeddings)
                yield finisher.submit(finish, rows, class_logits)

        with ThreadPoolExecutor(1) as reader, ThreadPoolExecutor(1) as finisher:
            for done in one_behind(run(reader, finisher)):
                yield from done

    def _rows(self, size: int) -> Iterator[Rows]:
        for path, _ in self._shards:
            try:
                yield from read_shard(path, self._schema, size)
            except D2ZeroError as error:
                self._bad(path, error)

    def _usable(self, read: Callable[[Path, Any], T], path: Path) -> Iterator[T]:
        """What is read of a shard, if it can be."""
        try:
            yield read(path, self._schema)
        except D2ZeroError as error:
            self._bad(path, error)

    def _bad(self, path: Path, error: D2ZeroError) -> None:
        if self._on_bad_shard is None:
            raise error
        self._on_bad_shard(path, error)


class IndexWriter:
    """Makes an index, or goes on with one; for one process at a time.

    A shard is there when it is whole. A process that is killed loses what it has not written: images of the last
    `SECONDS` at most, which the next one segments again.

    Args:
        folder: The index, which is made if it is not there.
        description: Of the index to make; one that is there must have been made with the same model.
        rows: Images of a shard at most.
        on_bad_shard: Told of a shard that cannot be used and is put aside (`….parquet.bad`): its images are not in the
            index any more. Without it, that raises.

    Raises:
        D2ZeroError: The index that is there is another model's or stores other features, or another process is
            writing it.
    """

    def __init__(
        self, folder: Path, description: IndexDescription, rows: int = ROWS, on_bad_shard: OnBadShard | None = None
    ) -> None:
        self.folder, self._most, self._schema = folder, rows, description.schema
        self._waiting: list[tuple[IndexedImage, Segments]] = []
        self._written = time.monotonic()
        folder.mkdir(parents=True, exist_ok=True)
        with ExitStack() as stack:
            stack.enter_context(locked(folder / ".lock", f"another process is writing the index {folder}"))
            self._describe(description)
            shards = shards_in(folder)
            self._next = _number(shards[-1]) + 1 if shards else 0
            self._known = self._paths(shards, on_bad_shard)
            self._lock = stack.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self.flush()

    def __contains__(self, path: str | Path) -> bool:
        """Whether an image is in the index."""
        return str(path) in self._known

    def __len__(self) -> int:
        return len(self._known)

    def add(self, path: Path, segments: Segments) -> None:
        """Add an image.

        Args:
            path: Its file, which is read for its hash.
            segments: What was found in it.

        Raises:
            D2ZeroError: The file is not there any more, or its name is not UTF-8.
        """
        if not _is_utf8(str(path)):
            raise D2ZeroError(f"image {path} has a name that is not UTF-8, which an index cannot hold; rename it")
        try:
            image = IndexedImage(str(path), file_hash(path), segments.image_size)
        except OSError as error:
            raise D2ZeroError(f"image {path} cannot be read any more: {error.strerror}") from error
        empty = np.zeros((0, 0), np.float32)
        self._waiting.append((image, replace(segments, class_logits=empty, embeddings=empty)))  # not stored
        self._known.add(str(path))
        if len(self._waiting) >= self._most or time.monotonic() - self._written > SECONDS:
            self.flush()

    def flush(self) -> None:
        """Write what waits as a shard."""
        if self._waiting:
            write_shard(self.folder / f"shard-{self._next:05d}.parquet", self._waiting, self._schema)
            self._waiting, self._next = [], self._next + 1
        self._written = time.monotonic()

    def _describe(self, description: IndexDescription) -> None:
        path = self.folder / DESCRIPTION
        if not path.exists():
            write_text(path, description.to_json())
            return
        there = IndexDescription.read(self.folder)
        if there.model != description.model:
            raise D2ZeroError(
                f"{self.folder} is an index of another model, or of the same in another precision; use that, or choose"
                " another folder"
            )
        if there.features != description.features:
            raise D2ZeroError(
                f"{self.folder} stores features as {there.features}, not {description.features}; choose another folder,"
                f" or give --features {there.features}"
            )

    def _paths(self, shards: Iterable[Path], on_bad_shard: OnBadShard | None) -> set[str]:
        known: set[str] = set()
        for path in shards:
            try:
                known.update(paths_in(path, self._schema))
            except D2ZeroError as error:
                if on_bad_shard is None:
                    raise
                path.replace(path.with_name(f"{path.name}.bad"))
                on_bad_shard(path, error)
        return known


def shards_in(folder: Path) -> list[Path]:
    """The shards of an index, in order; other files are none of them."""
    return sorted((path for path in folder.glob("shard-*.parquet") if _SHARD.fullmatch(path.name)), key=_number)


def _number(shard: Path) -> int:
    found = _SHARD.fullmatch(shard.name)
    assert found
    return int(found[1])


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:  # bytes of a file name that are none
        return False
    return True


def _batch_size(classes: int) -> int:
    """Images classified at a time, so that their largest tensor stays small."""
    return max(1, min(LARGEST_BATCH, ATTENTION_BYTES // (4 * HEADS * (classes + 1) ** 2)))


def _ahead(items: Iterator[Rows], reader: ThreadPoolExecutor) -> Iterator[Rows]:
    """The items, each read while the one before is worked on."""
    pending = reader.submit(next, items, None)
    while (rows := pending.result()) is not None:
        pending = reader.submit(next, items, None)
        yield rows
