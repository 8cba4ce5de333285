"""Segmenting images with a model, whatever runs its network; no torch.

`load` opens an exported model. The segmenter does what is the same for all of them: reading, resizing,
batches, vocabularies, post-processing. What runs the network is its backend.

Letters: B batch, Q queries, K classes, D text width, H and W the padded input's sides.
"""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from d2zero_runtime.artifacts.contract import ModelContract
from d2zero_runtime.artifacts.engine import Sidecar
from d2zero_runtime.artifacts.onnx import read_contract
from d2zero_runtime.artifacts.pt2 import Pt2Description
from d2zero_runtime.backends.base import Backend, Input, Raw
from d2zero_runtime.backends.onnxruntime import OnnxBackend, Provider
from d2zero_runtime.backends.openvino.backend import OpenVinoBackend
from d2zero_runtime.backends.pixels import PixelBatch
from d2zero_runtime.backends.tensorrt.backend import TensorrtBackend
from d2zero_runtime.backends.torch_pt2 import Pt2Backend
from d2zero_runtime.detections import Detections
from d2zero_runtime.errors import D2ZeroError
from d2zero_runtime.images import PADDING_LOGIT, Preprocessing, Size, as_image, open_rgb, size_of
from d2zero_runtime.masks.postprocess import MASK_KINDS, MAX_DETECTIONS, Mode, postprocess, postprocess_all, selection
from d2zero_runtime.sources import ImageLike, expand, is_many
from d2zero_runtime.vocabulary import Vocabulary

EXPORTED_SUFFIXES = (".onnx", ".engine", ".pt2")
READERS = min(4, os.cpu_count() or 1)  # images that are decoded and resized at once, by a thread each
OPENVINO = {"openvino": "float32", "openvino-bf16": "bfloat16"}  # providers, and the precision that they compute in

OnError = Callable[[ImageLike, D2ZeroError], None]


@dataclass(frozen=True, eq=False)
class RawOutput:
    """The network's output for a list of images, before any selection or resizing.

    Args:
        class_logits: (B, Q, K + 1) float32, the background last.
        mask_logits: (B, Q, H/4, W/4) float32, H and W being the largest padded size among the images;
            `PADDING_LOGIT` outside an image's own.
        padded_sizes: (height, width) after padding, an image each.
    """

    class_logits: NDArray[np.float32]
    mask_logits: NDArray[np.float32]
    padded_sizes: tuple[Size, ...]


def load(
    path: str | os.PathLike[str],
    providers: Provider | Sequence[Provider] | None = None,
    threads: int | None = None,
    device: int = 0,
    cuda_graphs: bool = True,
) -> "Segmenter":
    """Load an exported model.

    Args:
        path: an `.onnx` file, a TensorRT `.engine` or a `.pt2` for torch, made by `d2zero export`.
        providers: of an `.onnx`: `cpu` (the default), `cuda`, `tensorrt` or ONNX Runtime's own names, in order
            of preference, each alone or with its options: `("cuda", {"device_id": 1})`; or `openvino` or
            `openvino-bf16` alone. One that is not available is an error, never a silent fallback.
        threads: of an `.onnx` or a `.pt2`: threads inside an operator; the library's choice if left out.
        device: of an engine or a `.pt2` for GPUs: CUDA's number of the GPU.
        cuda_graphs: of the same: replay a captured graph from a shape's second run on.

    Raises:
        D2ZeroError: the file cannot be used, or a provider is not available.
    """
    path = Path(path)
    if path.suffix == ".engine":
        if providers is not None:
            raise D2ZeroError("an engine is run by TensorRT itself; leave out the providers")
        return _load_engine(path, device, cuda_graphs)
    if path.suffix == ".pt2":
        if providers is not None:
            raise D2ZeroError("a .pt2 runs where it was compiled for; leave out the providers")
        description = Pt2Description.read(path)
        backend = Pt2Backend(path, description, device, cuda_graphs, threads)
        return Segmenter(backend, description.contract, description.vocabulary)
    if path.suffix != ".onnx":
        raise D2ZeroError(
            f"expected an exported model ({' or '.join(EXPORTED_SUFFIXES)}), got {path.name!r}; make one with"
            " `d2zero export`"
        )
    return _load_onnx(path, ("cpu",) if providers is None else providers, threads)


def read_exported(path: Path) -> tuple[ModelContract, Vocabulary]:
    """The contract of an exported model and its default vocabulary, without loading it.

    Raises:
        D2ZeroError: it cannot be read.
    """
    if path.suffix == ".engine":
        sidecar = Sidecar.read(path)
        return sidecar.contract, sidecar.vocabulary
    if path.suffix == ".pt2":
        description = Pt2Description.read(path)
        return description.contract, description.vocabulary
    return read_contract(path)


def _load_engine(path: Path, device: int, cuda_graphs: bool) -> "Segmenter":
    sidecar = Sidecar.read(path)
    low, high = sidecar.profile.min, sidecar.profile.max
    contract = sidecar.contract
    if (low.height, low.width) == (high.height, high.width):
        contract = replace(contract, preprocessing=replace(contract.preprocessing, canvas=(low.height, low.width)))
    if low.batch == high.batch:
        contract = replace(contract, batch=low.batch)
    backend = TensorrtBackend(path, sidecar, device, cuda_graphs)
    return Segmenter(backend, contract, sidecar.vocabulary, max_batch=high.batch)


def _load_onnx(path: Path, providers: Provider | Sequence[Provider], threads: int | None) -> "Segmenter":
    contract, vocabulary = read_contract(path)
    chosen: Any = [providers] if isinstance(providers, str) or _is_pair(providers) else list(providers)
    names = [entry if isinstance(entry, str) else entry[0] for entry in chosen]
    if contract.deform_attn == "plugin" and not {"tensorrt", "TensorrtExecutionProvider"} & set(names):
        raise D2ZeroError(
            f"{path} holds an operator that only TensorRT has (it was exported with --deform-attn plugin); run it with"
            " the provider tensorrt, or export with --deform-attn gridsample"
        )
    if any(name in OPENVINO for name in names):
        if len(names) > 1:
            raise D2ZeroError(f"openvino runs a model alone, got the providers {', '.join(names)}")
        return Segmenter(OpenVinoBackend(path, OPENVINO[names[0]], threads), contract, vocabulary)
    return Segmenter(onnx_backend(path, contract, chosen, threads), contract, vocabulary)


def onnx_backend(
    path: Path, contract: ModelContract, providers: Sequence[Provider], threads: int | None = None
) -> OnnxBackend:
    """ONNX Runtime for a file, with the float32 math that its contract says; see `load`."""
    backend = OnnxBackend(path, providers, threads, contract.tf32)
    if backend.on_gpu:
        backend.precision = contract.precision_on_gpu
    return backend


class Segmenter:
    """Finds and segments objects of a vocabulary's classes.

    Args:
        backend: runs the network.
        contract: of the model.
        vocabulary: the default one, inside the model.
        max_batch: most images that the backend runs at once; larger batches are run in parts.
    """

    def __init__(
        self, backend: Backend, contract: ModelContract, vocabulary: Vocabulary, max_batch: int | None = None
    ) -> None:
        self.backend, self.contract, self._max_batch = backend, contract, max_batch
        self._default = self._vocabulary = vocabulary

    @property
    def vocabulary(self) -> Vocabulary:
        """The classes in use."""
        return self._vocabulary

    @property
    def precision(self) -> str:
        """What the network computes in: as its file says, unless the backend lowers it."""
        return str(getattr(self.backend, "precision", None) or self.contract.precision)

    @property
    def preprocessing(self) -> Preprocessing:
        """How images become input."""
        return self.contract.preprocessing

    def set_vocabulary(self, vocabulary: Vocabulary) -> None:
        """Use other classes, without exporting anew.

        Raises:
            D2ZeroError: the embeddings' width or encoder is not the model's, or its classes are constants.
        """
        self.contract.require_fit(vocabulary, self._default)
        self._vocabulary = vocabulary

    def __call__(
        self,
        source: ImageLike | Sequence[ImageLike],
        mode: Mode | str = Mode.GZSIS,
        *,
        vocabulary: Vocabulary | None = None,
        batch_size: int = 1,
        score_threshold: float = 0.0,
        max_detections: int = MAX_DETECTIONS,
        masks: str = "rle",
    ) -> Any:
        """Segment one image, or several.

        Args:
            source: an image (path, PIL image or (H, W, 3) uint8 RGB array), or a list, folder or glob pattern.
            mode: `gzsis`, `zsis` or `gzsis-copy-paste`.
            vocabulary: classes for this call alone.
            batch_size: at most so many neighbours of one padded size run together; pays on a GPU.
            score_threshold: instances below it are dropped.
            max_detections: at most so many an image.
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
        mode: Mode | str = Mode.GZSIS,
        *,
        vocabulary: Vocabulary | None = None,
        batch_size: int = 1,
        on_error: OnError | None = None,
        **options: Any,
    ) -> Iterator[tuple[ImageLike, Detections]]:
        """Segment images while the next ones are read and the last ones are post-processed.

        Memory holds three batches and `READERS` images at a time, however many images there are.

        Args:
            sources: images, of any number; may be a generator.
            mode: as in `__call__`.
            vocabulary: as in `__call__`.
            batch_size: as in `__call__`.
            on_error: told of a source that cannot be read, which is then skipped; without it, that raises.
            options: `score_threshold`, `max_detections` and `masks`, as in `__call__`.

        Yields:
            Each source with its instances, in order.
        """
        mode = Mode.parse(mode) if isinstance(mode, str) else mode
        words = vocabulary or self._vocabulary
        self.contract.require_fit(words, self._default)
        selection(words, mode)  # refuses a mode that the vocabulary does not allow, before any work
        _require_options(batch_size, options)
        settings = {"vocabulary": words, "mode": mode, **options}
        with ThreadPoolExecutor(READERS) as readers, ThreadPoolExecutor(1) as finisher:
            finishing: list[Future[list[tuple[ImageLike, Detections]]]] = []
            for batch in _grouped(self._read(iter(sources), readers, max(batch_size, READERS), on_error), batch_size):
                raw = self._run(_joined([entry.pixels for entry in batch]), words)
                finishing.append(finisher.submit(self._finished, batch, raw, settings))
                if len(finishing) > 1:
                    yield from finishing.pop(0).result()
            for future in finishing:
                yield from future.result()

    def close(self) -> None:
        """Give a GPU's memory back now, not when the object is collected."""
        if isinstance(self.backend, TensorrtBackend):
            self.backend.close()

    def predict_raw(self, images: Sequence[NDArray[np.uint8]]) -> RawOutput:
        """Normalise and pad images, run the network, resize nothing.

        Images of different padded sizes run apart: an image's output never depends on the others.

        Args:
            images: (H, W, 3) uint8 RGB arrays, at network size.
        """
        sizes = self.preprocessing.padded_sizes(images)
        height, width = (max(size[axis] for size in sizes) for axis in (0, 1))
        count, queries = len(images), self.contract.num_queries
        class_logits = np.empty((count, queries, len(self._vocabulary) + 1), np.float32)
        mask_logits = np.full((count, queries, height // 4, width // 4), PADDING_LOGIT, np.float32)
        for size, rows in self.preprocessing.groups(images):
            classes, masks = self._run(self.input_of([images[row] for row in rows], size), self._vocabulary)
            class_logits[rows] = classes
            mask_logits[rows, :, : size[0] // 4, : size[1] // 4] = masks
        return RawOutput(class_logits, mask_logits, tuple(sizes))

    def input_of(self, images: Sequence[NDArray[np.uint8]], padded: Size) -> Input:
        """What `backend.run` takes.

        Args:
            images: (H, W, 3) uint8 RGB arrays, at network size.
            padded: the size of all of them after padding.
        """
        if getattr(self.backend, "takes_pixels", False):
            return PixelBatch.of(images, padded, self.preprocessing)
        return self.preprocessing.batch(images, padded)

    def postprocess(
        self,
        out: RawOutput,
        input_sizes: Sequence[Size],
        output_sizes: Sequence[Size],
        mode: Mode | str = Mode.GZSIS,
        **options: Any,
    ) -> list[Detections]:
        """Turn raw output into instances.

        Args:
            out: what `predict_raw` returned.
            input_sizes: (height, width) of each image as given to `predict_raw`.
            output_sizes: (height, width) that each image's masks and boxes shall have.
            mode: `gzsis`, `zsis` or `gzsis-copy-paste`.
            options: `max_detections`, `score_threshold`, `masks`, `threads`.
        """
        return postprocess_all(
            out.class_logits,
            out.mask_logits,
            out.padded_sizes,
            self._vocabulary,
            input_sizes,
            output_sizes,
            mode=mode,
            temperature=self.contract.softmax_temperature,
            **options,
        )

    def _run(self, images_B3HW: Input, vocabulary: Vocabulary) -> Raw:
        embeddings = None if self.contract.baked or vocabulary is self._default else vocabulary.embeddings
        size = self.contract.batch or min(len(images_B3HW), self._max_batch or len(images_B3HW))
        parts = [
            self._run_exactly(images_B3HW[start : start + size], embeddings)
            for start in range(0, len(images_B3HW), size)
        ]
        if len(parts) == 1:
            return parts[0]
        return np.concatenate([part[0] for part in parts]), np.concatenate([part[1] for part in parts])

    def _run_exactly(self, images_B3HW: Input, embeddings: NDArray[np.float32] | None) -> Raw:
        """Run a batch; one of a fixed size is filled up with empty images, whose results are dropped."""
        count, size = len(images_B3HW), self.contract.batch or 0
        if count < size:
            images_B3HW = _filled_up(images_B3HW, size)
        class_logits, mask_logits = self.backend.run(images_B3HW, embeddings)
        self._require_shapes(images_B3HW, class_logits, mask_logits)
        return class_logits[:count], mask_logits[:count]

    def _require_shapes(self, images: Input, class_logits: NDArray[np.float32], mask_logits: Any) -> None:
        """Refuse outputs of another shape than the contract says: they would be read as something else."""
        pixels = images.pixels_BHW3.shape[:3] if isinstance(images, PixelBatch) else (len(images), *images.shape[2:])
        expected = (pixels[0], self.contract.num_queries)
        wanted = (*expected, pixels[1] // 4, pixels[2] // 4)
        if class_logits.shape[:2] != expected or tuple(mask_logits.shape) != wanted:
            raise D2ZeroError(
                f"the network made class logits of shape {class_logits.shape} and mask logits of shape"
                f" {tuple(mask_logits.shape)}, expected {expected} by classes and {wanted}; export the model again"
            )

    def _read(
        self, sources: Iterator[ImageLike], readers: ThreadPoolExecutor, ahead: int, on_error: OnError | None
    ) -> "Iterator[_Prepared]":
        """Sources in order, `ahead` of them being read at a time."""
        waiting: deque[tuple[ImageLike, Future[_Prepared]]] = deque()
        for source in sources:
            waiting.append((source, readers.submit(self._prepared, source)))
            if len(waiting) > ahead:
                yield from _taken(*waiting.popleft(), on_error)
        while waiting:
            yield from _taken(*waiting.popleft(), on_error)

    def _prepared(self, source: ImageLike) -> "_Prepared":
        image = open_rgb(source) if isinstance(source, (str, os.PathLike, Image.Image)) else as_image(source)
        resized = self.preprocessing.resize(image)
        padded = self.preprocessing.padded_size(resized.shape[:2])
        return _Prepared(source, self.input_of([resized], padded), resized.shape[:2], size_of(image), padded)

    def _finished(
        self, batch: "list[_Prepared]", raw: Raw, settings: dict[str, Any]
    ) -> list[tuple[ImageLike, Detections]]:
        return [
            (
                entry.source,
                postprocess(
                    raw[0][row],
                    raw[1][row],
                    input_size=entry.input_size,
                    output_size=entry.output_size,
                    padded_size=entry.padded_size,
                    temperature=self.contract.softmax_temperature,
                    **settings,
                ),
            )
            for row, entry in enumerate(batch)
        ]


@dataclass(frozen=True, eq=False)
class _Prepared:
    """One image, ready for the network."""

    source: ImageLike
    pixels: Input  # of one image
    input_size: Size
    output_size: Size
    padded_size: Size


def _joined(inputs: Sequence[Any]) -> Input:
    """One input of several; a single one is not copied."""
    if isinstance(inputs[0], PixelBatch):
        return PixelBatch.joined(inputs)
    return inputs[0] if len(inputs) == 1 else np.concatenate(inputs)


def _filled_up(images_B3HW: Input, size: int) -> Input:
    """A batch of so many, with empty images after these."""
    if isinstance(images_B3HW, PixelBatch):
        return images_B3HW.filled_up(size)
    more = np.zeros((size - len(images_B3HW), *images_B3HW.shape[1:]), np.float32)
    return np.concatenate([images_B3HW, more])


def _taken(source: ImageLike, future: Future[_Prepared], on_error: OnError | None) -> Iterator[_Prepared]:
    try:
        yield future.result()
    except D2ZeroError as error:
        if on_error is None:
            raise
        on_error(source, error)


def _grouped(prepared: Iterator[_Prepared], batch_size: int) -> Iterator[list[_Prepared]]:
    """Neighbours of one padded size, at most `batch_size` of them."""
    group: list[_Prepared] = []
    for entry in prepared:
        if group and (len(group) == batch_size or entry.padded_size != group[0].padded_size):
            yield group
            group = []
        group.append(entry)
        if len(group) == batch_size:
            yield group
            group = []
    if group:
        yield group


def _require_options(batch_size: int, options: dict[str, Any]) -> None:
    if batch_size < 1:
        raise D2ZeroError(f"batch_size must be at least 1, got {batch_size}")
    if options.get("max_detections", 1) < 1:
        raise D2ZeroError(f"max_detections must be at least 1, got {options['max_detections']}")
    if options.get("masks", "rle") not in MASK_KINDS:
        raise D2ZeroError(f"masks must be one of {', '.join(MASK_KINDS)}, got {options['masks']!r}")


def _is_pair(providers: object) -> bool:
    """One provider with its options, `("cuda", {…})`, and not a sequence of providers."""
    return isinstance(providers, tuple) and len(providers) == 2 and isinstance(providers[1], dict)
