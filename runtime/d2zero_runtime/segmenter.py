"""Segmenting images with an exported model: ONNX Runtime, no torch.

Letters: B batch, Q queries, K classes, H and W the padded input's sides.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from glob import glob
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from d2zero_runtime.contract import EMBEDDINGS_INPUT, ModelContract
from d2zero_runtime.detections import Detections
from d2zero_runtime.errors import D2ZeroError, listed
from d2zero_runtime.images import PADDING_LOGIT, Preprocessing, Size, as_image, read_image, to_rgb
from d2zero_runtime.onnx_file import read_contract
from d2zero_runtime.postprocess import MAX_DETECTIONS, Mode, postprocess, postprocess_all, selection
from d2zero_runtime.vocabulary import Vocabulary, check_vocabulary

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp", ".gif"})
_PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider", "tensorrt": "TensorrtExecutionProvider"}

ImageLike = str | os.PathLike[str] | NDArray[np.uint8] | Image.Image


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


def load(path: str | os.PathLike[str], providers: Sequence[str] = ("cpu",), threads: int | None = None) -> "Segmenter":
    """Load an exported model.

    Args:
        path: an `.onnx` file made by `d2zero export`.
        providers: `cpu`, `cuda`, `tensorrt` or ONNX Runtime's own names, in order of preference. One that is
            not available is an error, never a silent fallback.
        threads: threads inside an operator; ONNX Runtime's choice if left out.

    Raises:
        D2ZeroError: the file cannot be used, or a provider is not available.
    """
    path = Path(path)
    if path.suffix != ".onnx":
        raise D2ZeroError(f"expected an exported model (.onnx), got {path.name!r}; make one with `d2zero export`")
    contract, vocabulary = read_contract(path)
    import onnxruntime

    chosen = [_PROVIDERS.get(name.lower(), name) for name in providers]
    missing = [name for name in chosen if name not in onnxruntime.get_available_providers()]
    if missing:
        raise D2ZeroError(
            f"{listed(missing)} not available; this onnxruntime has {listed(onnxruntime.get_available_providers())}."
            " For NVIDIA GPUs install 'd2zero[gpu]' instead of 'd2zero[cpu]' (never both)"
        )
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    if threads:
        options.intra_op_num_threads = threads
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=chosen)
    except Exception as error:  # onnxruntime has its own exceptions
        raise D2ZeroError(f"onnxruntime cannot load {path}: {str(error).splitlines()[0]}") from error
    return Segmenter(session, contract, vocabulary)


class Segmenter:
    """Finds and segments objects of a vocabulary's classes.

    Args:
        session: an ONNX Runtime session.
        contract: of the model.
        vocabulary: the default one, inside the model.
    """

    def __init__(self, session: Any, contract: ModelContract, vocabulary: Vocabulary) -> None:
        self.session, self.contract = session, contract
        self._default = self._vocabulary = vocabulary

    @property
    def vocabulary(self) -> Vocabulary:
        """The classes in use."""
        return self._vocabulary

    @property
    def preprocessing(self) -> Preprocessing:
        """How images become input."""
        return self.contract.preprocessing

    def set_vocabulary(self, vocabulary: Vocabulary) -> None:
        """Use other classes, without exporting anew.

        Raises:
            D2ZeroError: the embeddings' width or encoder is not the model's.
        """
        check_vocabulary(vocabulary, self.contract.text_dim, self._default)
        self._vocabulary = vocabulary

    def __call__(
        self,
        source: ImageLike | Sequence[ImageLike],
        mode: Mode | str = Mode.GZSIS,
        *,
        vocabulary: Vocabulary | None = None,
        score_threshold: float = 0.0,
        max_detections: int = MAX_DETECTIONS,
        with_masks: bool = True,
    ) -> Any:
        """Segment one image, or several.

        Args:
            source: an image (path, PIL image or (H, W, 3) uint8 RGB array), or a list, folder or glob pattern.
            mode: `gzsis`, `zsis` or `gzsis-copy-paste`.
            vocabulary: classes for this call alone.
            score_threshold: instances below it are dropped.
            max_detections: at most so many an image.
            with_masks: whether to return masks.

        Returns:
            `Detections` for one image, a list of them otherwise, in the order of the sources.
        """
        many = _is_many(source)
        options: dict[str, Any] = {
            "vocabulary": vocabulary,
            "score_threshold": score_threshold,
            "max_detections": max_detections,
            "with_masks": with_masks,
        }
        found = [detections for _, detections in self.stream(expand(source), mode, **options)]
        return found if many else found[0]

    def stream(
        self,
        sources: Iterable[ImageLike],
        mode: Mode | str = Mode.GZSIS,
        *,
        on_error: Callable[[ImageLike, D2ZeroError], None] | None = None,
        **options: Any,
    ) -> Iterator[tuple[ImageLike, Detections]]:
        """Segment images one after the other while the next is read and the last is post-processed.

        Memory holds three images at a time, however many there are.

        Args:
            sources: images, of any length; may be a generator.
            mode: as in `__call__`.
            on_error: told of a source that cannot be read, which is then skipped; without it, that raises.
            options: as in `__call__`.
        """
        mode = Mode.parse(mode) if isinstance(mode, str) else mode
        vocabulary = options.pop("vocabulary", None) or self._vocabulary
        selection(vocabulary, mode)  # refuses a mode that the vocabulary does not allow, before any work
        queue = iter(sources)
        with ThreadPoolExecutor(1) as reader, ThreadPoolExecutor(1) as finisher:
            reading = [(item, reader.submit(self._prepared, item)) for item in islice(queue, 1)]
            finishing: list[tuple[ImageLike, Any]] = []
            while reading:
                item, future = reading.pop()
                reading = [(following, reader.submit(self._prepared, following)) for following in islice(queue, 1)]
                try:
                    prepared = future.result()
                except D2ZeroError as error:
                    if on_error is None:
                        raise
                    on_error(item, error)
                    continue
                raw = self._run(prepared[0], vocabulary)
                finishing.append((item, finisher.submit(self._finished, prepared, raw, vocabulary, mode, options)))
                if len(finishing) > 1:
                    done, result = finishing.pop(0)
                    yield done, result.result()
            for done, result in finishing:
                yield done, result.result()

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
        for size, rows, batch in self.preprocessing.batches(images):
            classes, masks = self._run(batch, self._vocabulary)
            class_logits[rows] = classes
            mask_logits[rows, :, : size[0] // 4, : size[1] // 4] = masks
        return RawOutput(class_logits, mask_logits, tuple(sizes))

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
            options: `max_detections`, `score_threshold`, `with_masks`.
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

    def _run(self, images_B3HW: NDArray[np.float32], vocabulary: Vocabulary) -> Any:
        feed = {"images": images_B3HW}
        if vocabulary is not self._default:
            check_vocabulary(vocabulary, self.contract.text_dim, self._default)
            feed[EMBEDDINGS_INPUT] = vocabulary.embeddings
        return self.session.run(["class_logits", "mask_logits"], feed)

    def _prepared(self, source: ImageLike) -> tuple[NDArray[np.float32], Size, Size, Size]:
        image = _pixels(source)
        resized = self.preprocessing.resize(image)
        padded = self.preprocessing.padded_size(resized.shape[:2])
        batch = self.preprocessing.batch([resized], padded)
        return batch, resized.shape[:2], image.shape[:2], padded

    def _finished(
        self, prepared: Any, raw: Any, vocabulary: Vocabulary, mode: Mode, options: dict[str, Any]
    ) -> Detections:
        _, input_size, output_size, padded = prepared
        return postprocess(
            raw[0][0],
            raw[1][0],
            vocabulary,
            input_size=input_size,
            output_size=output_size,
            padded_size=padded,
            mode=mode,
            temperature=self.contract.softmax_temperature,
            **options,
        )


def expand(source: ImageLike | Sequence[ImageLike]) -> list[ImageLike]:
    """The images that a source names: a folder's, a pattern's, a list's, or the one.

    Raises:
        D2ZeroError: nothing is there.
    """
    if not isinstance(source, (str, os.PathLike)):
        return list(source) if isinstance(source, (list, tuple)) else [source]  # type: ignore[list-item]
    path = Path(source)
    if path.is_dir():
        found: list[ImageLike] = [*sorted(p for p in path.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES)]
        if not found:
            raise D2ZeroError(f"folder {path} holds no images ({listed(sorted(IMAGE_SUFFIXES), 10)})")
        return found
    if _is_pattern(path):
        matched: list[ImageLike] = [Path(name) for name in sorted(glob(str(source), recursive=True))]  # noqa: PTH207 (absolute)
        if not matched:
            raise D2ZeroError(f"no file matches {source}")
        return matched
    return [path]


def _is_many(source: object) -> bool:
    if isinstance(source, (str, os.PathLike)):
        return Path(source).is_dir() or _is_pattern(Path(source))
    return isinstance(source, (list, tuple))


def _is_pattern(path: Path) -> bool:
    return any(sign in str(path) for sign in "*?[") and not path.exists()


def _pixels(source: ImageLike) -> NDArray[np.uint8]:
    if isinstance(source, (str, os.PathLike)):
        return read_image(source)
    if isinstance(source, Image.Image):
        return to_rgb(source)
    return as_image(source)
