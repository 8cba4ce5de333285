"""Does an end-to-end file find what the runtime makes of the same network's output?

Letters: B batch, N instances, H and W the sides of the images.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from d2zero_export.parity import alike, drawn_image
from d2zero_runtime import D2ZeroError, Detections, Mode, Segmenter, Vocabulary, load
from d2zero_runtime.artifacts.contract import EndToEnd
from d2zero_runtime.end_to_end import EndToEndSegmenter

CLEAR_SCORE = 0.01  # instances below it are not compared: among the weakest, order is chance
MOST_BOXES = 1e-3  # pixels
MOST_BITS = 1e-4  # share of mask pixels that differ: those whose logit is zero except for rounding


def most_scores(precision: str) -> float:
    """The largest difference of scores that passes."""
    return 1e-5 if precision == "float32" else 1e-2


def open_end_to_end(path: Path) -> EndToEndSegmenter:
    """Load an end-to-end file.

    Raises:
        D2ZeroError: It is another file, or onnxruntime is absent.
    """
    segmenter = load(path)
    if not isinstance(segmenter, EndToEndSegmenter):
        raise D2ZeroError(f"{path} is no end-to-end file; export one with --end-to-end")
    return segmenter


@dataclass(frozen=True)
class EndToEndDifference:
    """How far an end-to-end file is from the runtime on some images.

    Args:
        instances: Compared.
        unmatched: How many of them the file does not have.
        boxes: Largest difference of a coordinate, in pixels.
        scores: Largest difference of a score.
        bits: Largest share of a mask's pixels that differ.
    """

    instances: int
    unmatched: int
    boxes: float
    scores: float
    bits: float

    def with_pair(self, ours: Detections, theirs: Detections, tolerance: float) -> "EndToEndDifference":
        """These and one more image's instances; each is looked for among those of its class with nearly its score."""
        instances, unmatched, boxes, scores, bits = self.instances, self.unmatched, self.boxes, self.scores, self.bits
        left, right = ours.bitmaps(), theirs.bitmaps()
        free = np.ones(len(theirs), bool)
        for row in np.flatnonzero(ours.scores >= CLEAR_SCORE):
            alike = free & (theirs.class_ids == ours.class_ids[row])
            alike &= np.abs(theirs.scores - ours.scores[row]) <= 10 * tolerance
            instances += 1
            if not alike.any():
                unmatched += 1
                continue
            rows = np.flatnonzero(alike)
            match = rows[np.abs(theirs.boxes[rows] - ours.boxes[row]).max(axis=1).argmin()]
            free[match] = False
            scores = max(scores, float(abs(theirs.scores[match] - ours.scores[row])))
            boxes = max(boxes, float(np.abs(theirs.boxes[match] - ours.boxes[row]).max()))
            bits = max(bits, float((left[row] != right[match]).mean()))
        return EndToEndDifference(instances, unmatched, boxes, scores, bits)

    def failures(self, precision: str) -> list[str]:
        """What exceeds the limits of a precision."""
        missing = [f"{self.unmatched} of {self.instances} instances are missing"] if self.unmatched else []
        limits = (
            ("scores", self.scores, most_scores(precision)),
            ("boxes", self.boxes, MOST_BOXES),
            ("mask pixels", self.bits, MOST_BITS),
        )
        return missing + [
            f"{what} differ by {value:.2g} (limit {limit:g})" for what, value, limit in limits if value > limit
        ]


def end_to_end_difference(reference: Segmenter, path: Path) -> EndToEndDifference:
    """Compare an end-to-end file with the runtime on drawn images: sizes, a batch, and other classes.

    Args:
        reference: The same network with post-processing by the runtime, such as the file without `--end-to-end`.
        path: The end-to-end file.
    """
    session = open_end_to_end(path)
    random, contract = np.random.default_rng(0), session.contract
    height, width = contract.preprocessing.static_size or (96, 160)
    batch, found = contract.batch or 1, EndToEndDifference(0, 0, 0.0, 0.0, 0.0)
    few = None if contract.baked else session.vocabulary.select(session.vocabulary.names[::2])
    for size, count, vocabulary in (
        ((height, width), batch, None),
        ((height - height // 5, width - width // 3 - 1), contract.batch or 2, None),
        ((height - height // 3, width), batch, few if few is not None and _allows(few, session.steps) else None),
    ):
        images = np.stack([drawn_image(random, *size) for _ in range(count)])
        theirs = session.found_in(images, vocabulary)
        ours = runtime_detections(reference, images, vocabulary or session.vocabulary, session)
        for left, right in zip(ours, theirs, strict=True):
            found = found.with_pair(left, right, most_scores(contract.precision))
    return found


def _allows(vocabulary: Vocabulary, steps: EndToEnd) -> bool:
    return steps.mode == Mode.GZSIS or bool((vocabulary.active & ~vocabulary.seen).any())


def runtime_detections(
    reference: Segmenter, images_BHWC: NDArray[np.uint8], vocabulary: Vocabulary, whole: EndToEndSegmenter
) -> list[Detections]:
    """A network's raw output, post-processed by the runtime as an end-to-end file does: at the images' own size.

    Args:
        reference: Runs the network.
        images_BHWC: uint8 RGB, equally large.
        vocabulary: The classes.
        whole: The end-to-end file's.
    """
    same = alike(reference, whole.preprocessing, vocabulary)
    sizes = [(images_BHWC.shape[1], images_BHWC.shape[2])] * len(images_BHWC)
    steps, raw = whole.steps, same.predict_raw(list(images_BHWC))
    return same.postprocess(raw, sizes, sizes, steps.mode, max_detections=steps.max_detections, masks="bitmap")
