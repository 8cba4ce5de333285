"""Segmenting with an end-to-end file, whose graph goes from pixels to detections.

Scores and order are the file's, so a mask's quality is measured at network size. Masks and boxes are at the size of the
image, as always: a file with `logits` gives them as a file of the network would; one with `packed` has them at network
size, where images that need no resizing are finished, and others get them resized.

Letters: B batch, N instances, H and W the sides of the images at network size.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from d2zero_runtime.artifacts.contract import ModelContract
from d2zero_runtime.backends.inputs import filled_up
from d2zero_runtime.backends.onnxruntime import NO_RAW_OUTPUT, EndToEndBackend
from d2zero_runtime.detections import Detections
from d2zero_runtime.errors import D2ZeroError
from d2zero_runtime.images import Size
from d2zero_runtime.masks.device import Sizes
from d2zero_runtime.masks.packed import PackedMasks
from d2zero_runtime.masks.postprocess import MAX_DETECTIONS, THREADS, MaskKind, Mode
from d2zero_runtime.masks.queries import as_kind, packed_as, upsampled
from d2zero_runtime.reading import Prepared
from d2zero_runtime.segmenter import Segmenter
from d2zero_runtime.vocabulary import Vocabulary

Found = list[NDArray[Any]]  # boxes (B, N, 4), scores (B, N), class ids (B, N) and masks


class EndToEndSegmenter(Segmenter):
    """A segmenter whose file does pre- and post-processing, in one mode, with a maximum number of detections.

    Args:
        backend: Runs the file.
        contract: The file's contract.
        vocabulary: The default vocabulary, inside the file.
    """

    def __init__(self, backend: EndToEndBackend, contract: ModelContract, vocabulary: Vocabulary) -> None:
        super().__init__(backend, contract, vocabulary)
        assert contract.end_to_end
        self._file, self.steps = backend, contract.end_to_end

    def found_in(self, pixels_BHW3: NDArray[np.uint8], vocabulary: Vocabulary | None = None) -> list[Detections]:
        """The instances of equally large images at network size: all that have a score, weak ones and empty ones, too.

        Args:
            pixels_BHW3: uint8 RGB, not padded.
            vocabulary: Classes for this call only.
        """
        chosen = vocabulary or self.vocabulary
        size = (pixels_BHW3.shape[1], pixels_BHW3.shape[2])
        found = self._run(pixels_BHW3, chosen)
        return [
            self._detections(image, Sizes(size, size, size), chosen, "packed") for image in zip(*found, strict=True)
        ]

    def predict_raw(self, images: Sequence[NDArray[np.uint8]]) -> NoReturn:
        """Refuses: such a file hands over no logits."""
        raise D2ZeroError(NO_RAW_OUTPUT)

    def _check_mode(self, vocabulary: Vocabulary, mode: Mode) -> None:
        if mode != self.steps.mode:
            raise D2ZeroError(
                f"the mode {self.steps.mode} is fixed in this end-to-end file, got {mode}; give that"
                " mode, or use a file without --end-to-end"
            )
        super()._check_mode(vocabulary, mode)

    def _network_input(self, resized: NDArray[np.uint8]) -> tuple[NDArray[np.uint8], Size]:
        size = (resized.shape[0], resized.shape[1])
        self.preprocessing.padded_size(size)  # refuses what is too large for a static shape
        return resized[None], size

    def _run(self, pixels_BHW3: Any, vocabulary: Vocabulary) -> Any:
        self._require_open()
        baked = self.contract.baked
        embeddings, active = (None if baked else vocabulary.embeddings), self.steps.competing(vocabulary)
        size = self.contract.batch or len(pixels_BHW3)
        parts = []
        for start in range(0, len(pixels_BHW3), size):
            part = pixels_BHW3[start : start + size]
            whole: Any = part if len(part) == size else filled_up(part, size)
            found = self._file.find(whole, embeddings, None if baked else active)
            parts.append([array[: len(part)] for array in found])
        return [np.concatenate(arrays) for arrays in zip(*parts, strict=True)] if len(parts) > 1 else parts[0]

    def _postprocessed(self, batch: Sequence[Prepared], found: Found, settings: dict[str, Any]) -> Iterator[Detections]:
        for entry, image in zip(batch, zip(*found, strict=True), strict=True):
            sizes = Sizes(entry.input_size, entry.input_size, entry.output_size)
            best = [array[: settings.get("max_detections", MAX_DETECTIONS)] for array in image]
            kept = best[1] >= settings["score_threshold"]  # before work on masks
            strong = [array[kept] for array in best]
            yield self._detections(strong, sizes, settings["vocabulary"], settings.get("masks", "rle"))

    def _detections(
        self, image: Sequence[NDArray[Any]], sizes: Sizes, vocabulary: Vocabulary, kind: MaskKind
    ) -> Detections:
        boxes, scores, class_ids, masks = image
        kept = scores > 0
        class_ids = class_ids[kept]
        boxes, as_wanted = self._masks(boxes[kept], masks[kept], sizes, kind)
        return Detections(
            boxes=boxes,
            scores=scores[kept],
            class_ids=class_ids,
            names=tuple(vocabulary.names[index] for index in class_ids),
            seen=vocabulary.seen[class_ids],
            masks=as_wanted,
            image_size=sizes.output,
        )

    def _masks(
        self, boxes: NDArray[np.float32], masks: NDArray[Any], sizes: Sizes, kind: MaskKind
    ) -> tuple[NDArray[np.float32], Any]:
        """Boxes and masks at the output size."""
        if self.steps.masks == "packed":
            packed = PackedMasks(masks, sizes.used)
            if sizes.used == sizes.output:
                return boxes, packed_as(packed, kind)
            logits = packed.bitmaps() - np.float32(0.5)
        else:
            logits = np.asarray(masks, np.float32)
            height, width = logits.shape[1:]
            sizes = replace(sizes, padded=(4 * height, 4 * width))
        found = upsampled(logits, np.arange(len(logits)), sizes, kind, THREADS)
        at_output = np.array([mask.box for mask in found], np.float32).reshape(-1, 4)
        return at_output, as_kind(found, kind, sizes.output)
