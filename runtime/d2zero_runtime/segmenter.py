"""Segmenting images with a model, whatever runs its network; no torch.

The segmenter does what is the same for all models: reading, resizing, batches, vocabularies, post-processing. The
network is run by its backend (`d2zero_runtime.backends`). `d2zero_runtime.loading` opens exported models.

A call is two steps in a row, `segment` and `name`. It only makes no masks of queries that get no name.

Letters: B batch, Q queries, K classes, D text width, H and W the padded input's sides.
"""

import logging
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, Self, TypedDict, TypeVar, Unpack, overload

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from d2zero_runtime.artifacts.contract import ModelContract
from d2zero_runtime.backends.base import Backend, Classifier, Raw
from d2zero_runtime.backends.inputs import Input, filled_up, input_of, joined, shape_of
from d2zero_runtime.detections import Detections
from d2zero_runtime.errors import D2ZeroError
from d2zero_runtime.images import PADDING_LOGIT, Preprocessing, Size, as_image, size_of
from d2zero_runtime.masks.device import DeviceLogits, Sizes, mask_logits_of, stacked
from d2zero_runtime.masks.postprocess import (
    MASK_KINDS,
    MAX_DETECTIONS,
    THREADS,
    MaskKind,
    Mode,
    ModeName,
    named,
    postprocess,
    require_finite_output,
    selection,
)
from d2zero_runtime.masks.queries import LogitMasks
from d2zero_runtime.reading import OnError, Prepared, grouped, one_behind, read_ahead
from d2zero_runtime.segments import Segments
from d2zero_runtime.sources import ImageLike, expand, is_many, open_rgb
from d2zero_runtime.vocabulary import Vocabulary, check_vocabulary

logger = logging.getLogger("d2zero")

SCORE_THRESHOLD = 0.3  # of a prediction, unless another is asked for; evaluation keeps all instances
READERS = min(4, os.cpu_count() or 1)  # threads that decode and resize images, one each


class PredictOptions(TypedDict, total=False):
    """Options of `Segmenter.__call__`, which documents them."""

    vocabulary: Vocabulary | None
    batch_size: int
    score_threshold: float
    max_detections: int
    masks: MaskKind


T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class RawOutput:
    """The network's output for a list of images, before any selection or resizing.

    Args:
        class_logits: (B, Q, K + 1) float32, the background last.
        mask_logits: (B, Q, H/4, W/4) float32, H and W being the largest padded size among the images;
            `PADDING_LOGIT` outside an image's own. A torch tensor where the network left it on a GPU.
        padded_sizes: (height, width) after padding, one per image.
    """

    class_logits: NDArray[np.float32]
    mask_logits: Any
    padded_sizes: tuple[Size, ...]

    def to_numpy(self) -> "RawOutput":
        """The same with mask logits on the host."""
        logits = mask_logits_of(self.mask_logits)
        return replace(self, mask_logits=logits.to_numpy() if isinstance(logits, DeviceLogits) else logits)


@dataclass(frozen=True, eq=False)
class Segmented:
    """One image of a stream with its instances.

    Args:
        source: The image as it was given.
        image: The image as it was read.
        detections: Its instances.
    """

    source: ImageLike
    image: Image.Image | NDArray[np.uint8]
    detections: Detections


class Segmenter:
    """Finds and segments objects of a vocabulary's classes.

    Args:
        backend: Runs the network.
        contract: The model's contract.
        vocabulary: The default vocabulary, inside the model.
        classifier: The model's classifier apart from its network, if there is one.
    """

    def __init__(
        self,
        backend: Backend[Any],
        contract: ModelContract,
        vocabulary: Vocabulary,
        classifier: Classifier | None = None,
    ) -> None:
        self.backend, self.contract, self._classifier = backend, contract, classifier
        self._default = self._vocabulary = vocabulary
        self._closed = False

    def __repr__(self) -> str:
        return f"<Segmenter: {len(self._vocabulary)} classes, {self.precision}, {self.backend.name}>"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def vocabulary(self) -> Vocabulary:
        """The classes in use."""
        return self._vocabulary

    @property
    def precision(self) -> str:
        """What the network computes in: as its file says, unless the backend lowers it."""
        return self.backend.precision or self.contract.precision

    @property
    def identity(self) -> str:
        """Of this model in this precision: `segment` notes it, and `name` takes no other's segments."""
        return replace(self.contract, precision=self.precision).identity

    @property
    def preprocessing(self) -> Preprocessing:
        """How images become input."""
        return self.contract.preprocessing

    def set_vocabulary(self, vocabulary: Vocabulary | str | os.PathLike[str]) -> None:
        """Use other classes, without exporting again.

        Args:
            vocabulary: The classes, or a file of them (`.npz`).

        Raises:
            D2ZeroError: The file cannot be read, the embeddings' width or encoder is not the model's, or its classes
                are constants.
        """
        vocabulary = vocabulary if isinstance(vocabulary, Vocabulary) else Vocabulary.load(vocabulary)
        self.contract.check_compatible(vocabulary, self._default)
        self._vocabulary = vocabulary
        logger.info("changed the vocabulary to %d classes (%d unseen)", len(vocabulary), len(vocabulary.unseen_names))

    @overload
    def __call__(
        self, source: NDArray[np.uint8] | Image.Image, mode: Mode | ModeName = ..., **options: Unpack[PredictOptions]
    ) -> Detections: ...

    # A list for a folder or a pattern. Callers who know which it is need no assertion: hence the Any.
    @overload
    def __call__(  # type: ignore[overload-overlap]
        self, source: str | os.PathLike[str], mode: Mode | ModeName = ..., **options: Unpack[PredictOptions]
    ) -> Detections | Any: ...

    @overload
    def __call__(
        self, source: Sequence[ImageLike], mode: Mode | ModeName = ..., **options: Unpack[PredictOptions]
    ) -> list[Detections]: ...

    def __call__(
        self,
        source: ImageLike | Sequence[ImageLike],
        mode: Mode | ModeName = Mode.GZSIS,
        *,
        vocabulary: Vocabulary | None = None,
        batch_size: int = 1,
        score_threshold: float = SCORE_THRESHOLD,
        max_detections: int = MAX_DETECTIONS,
        masks: MaskKind = "rle",
    ) -> Detections | list[Detections]:
        """Segment one image, or several.

        Args:
            source: An image (path, PIL image or (H, W, 3) uint8 RGB array), or a list, folder or glob pattern.
            mode: `gzsis`, `zsis` or `gzsis-copy-paste`.
            vocabulary: Classes for this call only.
            batch_size: Maximum number of neighbours of the same padded size that run together; pays on a GPU.
            score_threshold: Instances below it are dropped, and so are those whose mask is empty.
            max_detections: Maximum number of instances per image.
            masks: `rle`, `bitmap`, `packed` or `none`.

        Returns:
            `Detections` for one image, a list of them otherwise, in the order of the sources.
        """
        many = is_many(source)
        options: dict[str, Any] = {"score_threshold": score_threshold, "max_detections": max_detections, "masks": masks}
        results = self.stream(expand(source), mode, vocabulary=vocabulary, batch_size=batch_size, **options)
        found = [detections for _, detections in results]
        return found if many else found[0]

    def stream(
        self,
        sources: Iterable[ImageLike],
        mode: Mode | ModeName = Mode.GZSIS,
        *,
        vocabulary: Vocabulary | None = None,
        batch_size: int = 1,
        on_error: OnError | None = None,
        **options: Any,
    ) -> Iterator[tuple[ImageLike, Detections]]:
        """Segment images while the next ones are read and the last ones are post-processed.

        Memory holds three batches and `READERS` images at a time, however many images there are.

        Args:
            sources: Images, of any number; may be a generator.
            mode: As in `__call__`.
            vocabulary: As in `__call__`.
            batch_size: As in `__call__`.
            on_error: Told of a source that cannot be read, which is then skipped; without it, that raises.
            options: `score_threshold`, `max_detections` and `masks`, as in `__call__`.

        Yields:
            Each source with its instances, in order.
        """
        for prepared, found in self._detected(sources, mode, vocabulary, batch_size, on_error, False, options):
            yield prepared.source, found

    def stream_with_images(
        self,
        sources: Iterable[ImageLike],
        mode: Mode | ModeName = Mode.GZSIS,
        *,
        on_error: OnError | None = None,
        vocabulary: Vocabulary | None = None,
        batch_size: int = 1,
        **options: Any,
    ) -> Iterator[Segmented]:
        """As `stream`, with each image as it was read, to draw on it; memory holds as many more images."""
        for prepared, found in self._detected(sources, mode, vocabulary, batch_size, on_error, True, options):
            assert prepared.image is not None
            yield Segmented(prepared.source, prepared.image, found)

    @overload
    def segment(self, source: NDArray[np.uint8] | Image.Image, *, batch_size: int = ...) -> Segments: ...

    # As of `__call__`.
    @overload
    def segment(  # type: ignore[overload-overlap]
        self, source: str | os.PathLike[str], *, batch_size: int = ...
    ) -> Segments | Any: ...

    @overload
    def segment(self, source: Sequence[ImageLike], *, batch_size: int = ...) -> list[Segments]: ...

    def segment(self, source: ImageLike | Sequence[ImageLike], *, batch_size: int = 1) -> Segments | list[Segments]:
        """Find all that an image shows, without naming it; `name` does that, with any vocabulary.

        Args:
            source: As in `__call__`.
            batch_size: As in `__call__`.

        Returns:
            `Segments` for one image, a list of them otherwise, in the order of the sources.

        Raises:
            D2ZeroError: The model's file hands over no features.
        """
        many = is_many(source)
        found = [segments for _, segments in self.segment_stream(expand(source), batch_size=batch_size)]
        return found if many else found[0]

    def segment_stream(
        self, sources: Iterable[ImageLike], *, batch_size: int = 1, on_error: OnError | None = None
    ) -> Iterator[tuple[ImageLike, Segments]]:
        """As `segment`, one image after another, in flat memory; arguments are those of `stream`."""
        self.require_features()
        _check_options(batch_size, {})
        vocabulary = self._vocabulary

        def finished(batch: list[Prepared], raw: Raw) -> list[Segments]:
            return [self._segments(entry, raw, row, vocabulary) for row, entry in enumerate(batch)]

        for prepared, segments in self._stream(sources, vocabulary, batch_size, on_error, False, finished):
            yield prepared.source, segments

    def name(
        self,
        segments: Segments,
        vocabulary: Vocabulary | None = None,
        mode: Mode | ModeName = Mode.GZSIS,
        *,
        score_threshold: float = SCORE_THRESHOLD,
        max_detections: int = MAX_DETECTIONS,
        masks: MaskKind = "rle",
    ) -> Detections:
        """Name what `segment` found. The network does not run again, only the classifier if the classes are others.

        Args:
            segments: Of this model, whatever ran it.
            vocabulary: The classes; the segmenter's own if left out.
            mode: As in `__call__`, and so are the other options.
            score_threshold: As there.
            max_detections: As there.
            masks: As there.

        Raises:
            D2ZeroError: The segments are another model's, or the vocabulary does not fit the model or the mode.
        """
        chosen = vocabulary or self._vocabulary
        _check_options(1, {"max_detections": max_detections, "masks": masks})
        if segments.model != self.identity:
            raise D2ZeroError("these segments are another model's, or of another precision; name them with theirs")
        found = named(
            self._class_logits(segments, chosen),
            segments.of_queries,
            chosen,
            mode=mode,
            temperature=self.contract.softmax_temperature,
            max_detections=max_detections,
            score_threshold=score_threshold,
            masks=masks,
        )
        return found.without_empty()

    @property
    def classifier(self) -> Classifier:
        """The model's classifier, apart from its network.

        Raises:
            D2ZeroError: The model's file has none.
        """
        self.require_features()
        assert self._classifier
        return self._classifier

    def require_features(self) -> None:
        """Refuse a file that hands over no features.

        Raises:
            D2ZeroError: It is from before, or goes end to end.
        """
        if self.contract.end_to_end:
            raise D2ZeroError("an end-to-end file hands over only what has names; use one without --end-to-end")
        if not self.contract.query_dim or self._classifier is None:
            raise D2ZeroError(
                "this file hands over no features of what it finds, and has no classifier beside its network: it was"
                " exported by an older d2zero; export the model again"
            )

    def _class_logits(self, segments: Segments, vocabulary: Vocabulary) -> NDArray[np.float32]:
        """Class logits (Q, K + 1): the network's own if it was given these classes."""
        embeddings, known = vocabulary.embeddings, segments.embeddings
        if embeddings is known or np.array_equal(embeddings, known):
            return segments.class_logits
        check_vocabulary(vocabulary, self.contract.text_dim, self._default)
        class_logits: NDArray[np.float32] = self.classifier.run(
            segments.queries[None], segments.background[None], embeddings
        )[0]
        return class_logits

    def _segments(self, entry: Prepared, raw: Raw, row: int, vocabulary: Vocabulary) -> Segments:
        """One image of a batch, with all masks made.

        Raises:
            D2ZeroError: The network's output is not finite.
        """
        for part in (raw.class_logits, raw.queries, raw.background):
            require_finite_output(part[row])
        count = self.contract.num_queries
        found = self._masks_of(entry, raw, row).found(np.arange(count), "rle")
        return Segments(
            queries=raw.queries[row],
            background=raw.background[row],
            boxes=np.array([mask.box for mask in found], np.float32).reshape(-1, 4),
            qualities=np.array([mask.quality for mask in found], np.float32),
            masks=tuple(mask.rle for mask in found if mask.rle is not None),
            image_size=entry.output_size,
            model=self.identity,
            embeddings=vocabulary.embeddings,
            class_logits=raw.class_logits[row],
        )

    def _masks_of(self, entry: Prepared, raw: Raw, row: int) -> LogitMasks:
        sizes = Sizes(entry.padded_size, entry.input_size, entry.output_size)
        return LogitMasks(raw.mask_logits[row], sizes, THREADS)

    def _detected(
        self,
        sources: Iterable[ImageLike],
        mode: Mode | ModeName,
        vocabulary: Vocabulary | None,
        batch_size: int,
        on_error: OnError | None,
        keep_images: bool,
        options: dict[str, Any],
    ) -> Iterator[tuple[Prepared, Detections]]:
        mode = Mode.parse(mode) if isinstance(mode, str) else mode
        chosen = vocabulary or self._vocabulary
        self.contract.check_compatible(chosen, self._default)
        self._check_mode(chosen, mode)
        _check_options(batch_size, options)
        settings = {"score_threshold": SCORE_THRESHOLD, "vocabulary": chosen, "mode": mode, **options}

        def finished(batch: list[Prepared], raw: Any) -> list[Detections]:
            return [found.without_empty() for found in self._postprocessed(batch, raw, settings)]

        yield from self._stream(sources, chosen, batch_size, on_error, keep_images, finished)

    def _stream(
        self,
        sources: Iterable[ImageLike],
        vocabulary: Vocabulary,
        batch_size: int,
        on_error: OnError | None,
        keep_images: bool,
        finish: Callable[[list[Prepared], Any], list[T]],
    ) -> Iterator[tuple[Prepared, T]]:
        """Run the network on batches, and what is to be done with its output in another thread."""

        def prepare(source: ImageLike) -> Prepared:
            return self._prepared(source, keep_images)

        def finished(batch: list[Prepared], raw: Any) -> list[tuple[Prepared, T]]:
            return list(zip(batch, finish(batch, raw), strict=True))

        def run(
            readers: ThreadPoolExecutor, finisher: ThreadPoolExecutor
        ) -> Iterator[Future[list[tuple[Prepared, T]]]]:
            read = read_ahead(iter(sources), prepare, readers, max(batch_size, READERS), on_error)
            for batch in grouped(read, batch_size):
                raw = self._run(joined([entry.pixels for entry in batch]), vocabulary)
                yield finisher.submit(finished, batch, raw)

        with ThreadPoolExecutor(READERS) as readers, ThreadPoolExecutor(1) as finisher:
            for done in one_behind(run(readers, finisher)):
                yield from done

    def close(self) -> None:
        """Give a GPU's memory back now, not when the object is collected. Closing twice does nothing."""
        if not self._closed:
            self._closed = True
            self.backend.close()

    def predict_raw(self, images: Sequence[NDArray[np.uint8]]) -> RawOutput:
        """Normalise and pad images, run the network, resize nothing.

        Images of different padded sizes run apart: an image's output never depends on the others.

        Args:
            images: (H, W, 3) uint8 RGB arrays, at network size.
        """
        sizes = self.preprocessing.padded_sizes(images)
        height, width = (max(size[axis] for size in sizes) for axis in (0, 1))
        class_logits = np.empty((len(images), self.contract.num_queries, len(self._vocabulary) + 1), np.float32)
        parts = []
        for size, rows in self.preprocessing.groups(images):
            raw = self._run(self.input_of([images[row] for row in rows], size), self._vocabulary)
            class_logits[rows] = raw.class_logits
            parts.append((rows, raw.mask_logits))
        mask_logits = stacked(parts, (*class_logits.shape[:2], height // 4, width // 4), PADDING_LOGIT)
        tensor_or_array = mask_logits.tensor if isinstance(mask_logits, DeviceLogits) else mask_logits
        return RawOutput(class_logits, tensor_or_array, tuple(sizes))

    def input_of(self, images: Sequence[NDArray[np.uint8]], padded: Size) -> Input:
        """The input of `backend.run`.

        Args:
            images: (H, W, 3) uint8 RGB arrays, at network size.
            padded: The size of all of them after padding.
        """
        return input_of(images, padded, self.preprocessing, self.backend.accepts_uint8)

    def postprocess(
        self,
        out: RawOutput,
        input_sizes: Sequence[Size],
        output_sizes: Sequence[Size],
        mode: Mode | ModeName = Mode.GZSIS,
        **options: Any,
    ) -> list[Detections]:
        """Turn raw output into instances.

        Args:
            out: What `predict_raw` returned.
            input_sizes: (height, width) of each image as given to `predict_raw`.
            output_sizes: (height, width) that each image's masks and boxes shall have.
            mode: `gzsis`, `zsis` or `gzsis-copy-paste`.
            options: `max_detections`, `score_threshold`, `masks`, `threads`.

        Raises:
            D2ZeroError: The counts differ, or the vocabulary does not allow the mode.
        """
        if not len(out.class_logits) == len(input_sizes) == len(output_sizes):
            raise D2ZeroError(
                f"expected as many sizes as images ({len(out.class_logits)}),"
                f" got {len(input_sizes)} input sizes and {len(output_sizes)} output sizes"
            )
        mask_logits = mask_logits_of(out.mask_logits)
        return [
            postprocess(
                np.asarray(out.class_logits[row], np.float32),
                mask_logits[row][:, : padded[0] // 4, : padded[1] // 4],
                self._vocabulary,
                input_size=input_sizes[row],
                output_size=output_sizes[row],
                padded_size=padded,
                mode=mode,
                temperature=self.contract.softmax_temperature,
                **options,
            )
            for row, padded in enumerate(out.padded_sizes)
        ]

    def _run(self, images_B3HW: Input, vocabulary: Vocabulary) -> Raw:
        """Run any number of images, in parts of the size that the model takes."""
        self._require_open()
        embeddings = None if self.contract.baked else vocabulary.embeddings
        profile = self.backend.profile
        size = self.contract.batch or min(len(images_B3HW), profile.max.batch if profile else len(images_B3HW))
        parts = [
            self._run_exactly(images_B3HW[start : start + size], embeddings)
            for start in range(0, len(images_B3HW), size)
        ]
        return Raw.joined(parts)

    def _run_exactly(self, images_B3HW: Input, embeddings: NDArray[np.float32] | None) -> Raw:
        """Run a batch; one of a fixed size is filled up with empty images, whose results are dropped."""
        count, size = len(images_B3HW), self.contract.batch or 0
        if count < size:
            images_B3HW = filled_up(images_B3HW, size)
        raw = self.backend.run(images_B3HW, embeddings)
        self._check_shapes(images_B3HW, raw)
        return raw.first(count)

    def _check_shapes(self, images: Input, raw: Raw) -> None:
        """Refuse outputs of another shape than the contract says: they would be read as something else."""
        batch, height, width = shape_of(images)
        expected = (batch, self.contract.num_queries)
        wanted = ((*expected, height // 4, width // 4), (*expected, self.contract.query_dim))
        class_logits, *found = (tuple(part.shape) for part in (raw.class_logits, raw.mask_logits, raw.queries))
        if class_logits[:2] != expected or tuple(found) != wanted:
            raise D2ZeroError(
                f"the network made class logits of shape {class_logits}, mask logits of shape {found[0]} and queries of"
                f" shape {found[1]}, expected {expected} by classes, {wanted[0]} and {wanted[1]}; export it again"
            )

    def _require_open(self) -> None:
        if self._closed:
            raise D2ZeroError("this segmenter was closed; load the model again")

    def _check_mode(self, vocabulary: Vocabulary, mode: Mode) -> None:
        """Refuse a mode that the vocabulary does not allow, before any work."""
        selection(vocabulary, mode)

    def _prepared(self, source: ImageLike, keep_image: bool) -> Prepared:
        image = open_rgb(source) if isinstance(source, (str, os.PathLike, Image.Image)) else as_image(source)
        resized = self.preprocessing.resize(image)
        pixels, padded = self._network_input(resized)
        return Prepared(source, pixels, resized.shape[:2], size_of(image), padded, image if keep_image else None)

    def _network_input(self, resized: NDArray[np.uint8]) -> tuple[Any, Size]:
        """What `_run` takes of an image at network size, and the size of that; those of the same size run together."""
        padded = self.preprocessing.padded_size(resized.shape[:2])
        return self.input_of([resized], padded), padded

    def _postprocessed(self, batch: Sequence[Prepared], raw: Any, settings: dict[str, Any]) -> Iterator[Detections]:
        """The instances of each image of a batch, of what `_run` returned."""
        for row, entry in enumerate(batch):
            masks, temperature = self._masks_of(entry, raw, row), self.contract.softmax_temperature
            yield named(raw.class_logits[row], masks, temperature=temperature, **settings)


def _check_options(batch_size: int, options: dict[str, Any]) -> None:
    if batch_size < 1:
        raise D2ZeroError(f"batch_size must be at least 1, got {batch_size}")
    if options.get("max_detections", 1) < 1:
        raise D2ZeroError(f"max_detections must be at least 1, got {options['max_detections']}")
    if options.get("masks", "rle") not in MASK_KINDS:
        raise D2ZeroError(f"masks must be one of {', '.join(MASK_KINDS)}, got {options['masks']!r}")
