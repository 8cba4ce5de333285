"""From raw network output to instances, for one image at a time.

As in the published code: p = softmax(temperature · logits) without background, top-k over queries × classes,
masks upsampled to the padded size, cropped to the image, resized to the output size, > 0; the score is
p times the mean sigmoid inside the mask.

Only masks that survive the top-k are touched, each query's once, several at a time in threads, and they go
straight to run lengths (`upsample`). Queries that were stored get names in the same way (`named`).

Letters: Q queries, K classes, N instances, h and w the mask logits' sides.
"""

import os
from dataclasses import dataclass
from enum import StrEnum
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from d2zero_runtime.detections import Detections
from d2zero_runtime.errors import D2ZeroError
from d2zero_runtime.images import Size
from d2zero_runtime.masks.device import MaskLogits, Sizes
from d2zero_runtime.masks.queries import LogitMasks, QueryMasks
from d2zero_runtime.vocabulary import Vocabulary

SOFTMAX_TEMPERATURE = 0.2
MAX_DETECTIONS = 100
THREADS = min(8, os.cpu_count() or 1)  # masks upsampled at a time, unless told otherwise
ModeName = Literal["gzsis", "zsis", "gzsis-copy-paste"]
MaskKind = Literal["rle", "bitmap", "packed", "none"]
MASK_KINDS = get_args(MaskKind)


class Mode(StrEnum):
    """Which classes compete and how many instances of each kind are kept."""

    GZSIS = "gzsis"
    """All active classes compete; the best instances are kept."""
    ZSIS = "zsis"
    """Only unseen classes compete in the softmax and may be predicted; seen ones still shape the classifier."""
    GZSIS_COPY_PASTE = "gzsis-copy-paste"
    """All compete; half the places go to seen classes and half to unseen ones."""

    @classmethod
    def parse(cls, text: str) -> "Mode":
        """Read a mode by its name.

        Raises:
            D2ZeroError: There is no such mode.
        """
        try:
            return cls(text)
        except ValueError:
            raise D2ZeroError(f"mode must be one of {', '.join(cls)}, got {text!r}") from None


@dataclass(frozen=True, eq=False)
class Selection:
    """The classes that compete in the softmax, and how many instances each group may place."""

    competing: NDArray[np.bool_]  # (K,)
    groups: tuple[tuple[NDArray[np.bool_], int], ...]  # ((K,) members, instances kept)


def selection(
    vocabulary: Vocabulary,
    mode: Mode,
    max_detections: int = MAX_DETECTIONS,
    only: NDArray[np.bool_] | None = None,
) -> Selection:
    """The one mechanism behind all modes.

    Args:
        vocabulary: The K classes.
        mode: Which of them compete, and for which places.
        max_detections: The number of places.
        only: (K,) bool, the classes that may be reported; all if left out. It has no influence on which compete.

    Raises:
        D2ZeroError: The mode needs seen or unseen classes that the vocabulary does not have.
    """
    seen, active = vocabulary.seen, vocabulary.active
    if mode is not Mode.GZSIS and not (active & ~seen).any():
        raise D2ZeroError(f"mode {mode} needs unseen classes, the vocabulary has none that are active")
    classes = active & (vocabulary.class_of == np.arange(len(vocabulary)))  # synonyms compete, but are not named
    if only is not None:
        classes &= only
    if mode is Mode.ZSIS:
        return Selection(active & ~seen, ((classes & ~seen, max_detections),))
    if mode is Mode.GZSIS_COPY_PASTE:
        half = max_detections // 2
        return Selection(active, ((classes & seen, max_detections - half), (classes & ~seen, half)))
    return Selection(active, ((classes, max_detections),))


def class_probabilities(
    class_logits: NDArray[np.float32],
    competing: NDArray[np.bool_],
    temperature: float = SOFTMAX_TEMPERATURE,
) -> NDArray[np.float32]:
    """Softmax over the competing classes and the background, which is then dropped.

    Args:
        class_logits: (Q, K + 1), the background last.
        competing: (K,) bool. Others get probability 0.
        temperature: Factor on the logits before the softmax.

    Returns:
        (Q, K) float32.
    """
    logits = temperature * class_logits.astype(np.float32)
    logits = np.where(np.append(competing, True), logits, -np.inf)
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    probabilities: NDArray[np.float32] = (powers / powers.sum(axis=1, keepdims=True))[:, :-1]
    return probabilities


def top_instances(probabilities: NDArray[np.float32], chosen: Selection) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The best (query, class) pairs of each group; a query may appear more than once.

    Returns:
        Queries and classes, (N,) int64 each, group after group, best first within a group.
    """
    queries, classes = [], []
    for members, kept in chosen.groups:
        columns = np.flatnonzero(members)
        scores = probabilities[:, columns].ravel()
        kept = min(kept, scores.size)
        best = np.argpartition(-scores, kept - 1)[:kept] if kept else np.zeros(0, np.int64)
        best = best[np.lexsort((best, -scores[best]))]
        queries.append(best // len(columns) if len(columns) else best)
        classes.append(columns[best % len(columns)] if len(columns) else best)
    return np.concatenate(queries).astype(np.int64), np.concatenate(classes).astype(np.int64)


def postprocess(
    class_logits: NDArray[np.float32],
    mask_logits: MaskLogits,
    vocabulary: Vocabulary,
    *,
    input_size: Size,
    output_size: Size,
    padded_size: Size,
    mode: Mode | ModeName = Mode.GZSIS,
    temperature: float = SOFTMAX_TEMPERATURE,
    max_detections: int = MAX_DETECTIONS,
    score_threshold: float = 0.0,
    masks: MaskKind = "rle",
    threads: int | None = None,
) -> Detections:
    """Turn one image's raw output into instances at the output size.

    Args:
        class_logits: (Q, K + 1) float32, the background last.
        mask_logits: (Q, h, w) float32, covering the padded input; on a device, masks are made there.
        vocabulary: The K classes that the logits belong to.
        input_size: (height, width) of the image as given to the network, before padding.
        output_size: (height, width) of the masks and boxes to return.
        padded_size: (height, width) after padding.
        mode: A `Mode` or its name.
        temperature: Softmax temperature of the class probabilities.
        max_detections: At most this many instances.
        score_threshold: Instances below this final score are dropped.
        masks: `rle` (COCO run lengths), `bitmap` (a (N, H, W) bool array), `packed` (`PackedMasks`: eight pixels a
            byte) or `none` (only boxes and scores).
        threads: Threads that upsample and encode masks; `THREADS` if left out.

    Raises:
        D2ZeroError: Logits are not finite, shapes do not fit the vocabulary, the mode does not, or there is no such
            kind of masks.
    """
    sizes = Sizes(padded_size, input_size, output_size)
    return named(
        class_logits,
        LogitMasks(mask_logits, sizes, threads or THREADS),
        vocabulary,
        mode=mode,
        temperature=temperature,
        max_detections=max_detections,
        score_threshold=score_threshold,
        masks=masks,
    )


def named(
    class_logits: NDArray[np.float32],
    of_queries: QueryMasks,
    vocabulary: Vocabulary,
    *,
    mode: Mode | ModeName = Mode.GZSIS,
    temperature: float = SOFTMAX_TEMPERATURE,
    max_detections: int = MAX_DETECTIONS,
    score_threshold: float = 0.0,
    masks: MaskKind = "rle",
    only: NDArray[np.bool_] | None = None,
) -> Detections:
    """Give one image's queries names: instances, best first.

    Args:
        class_logits: As of `postprocess`, and so are the options.
        of_queries: The queries' masks, of which only those that get a name are made.
        vocabulary: The K classes that the logits belong to.
        mode: A `Mode` or its name.
        temperature: Softmax temperature of the class probabilities.
        max_detections: At most this many instances.
        score_threshold: Instances below this final score are dropped.
        masks: The kind of masks.
        only: (K,) bool, the classes that may be reported; all if left out. The others compete all the same.

    Raises:
        D2ZeroError: As of `postprocess`.
    """
    if masks not in MASK_KINDS:
        raise D2ZeroError(f"masks must be one of {', '.join(MASK_KINDS)}, got {masks!r}")
    queries_count = len(class_logits)
    if class_logits.shape != (queries_count, len(vocabulary) + 1):
        raise D2ZeroError(
            f"class logits must be (Q, {len(vocabulary) + 1}) for a vocabulary of {len(vocabulary)} classes and"
            f" the background, got {class_logits.shape}"
        )
    require_finite_output(class_logits)
    mode = Mode.parse(mode) if isinstance(mode, str) else mode
    chosen = selection(vocabulary, mode, max_detections, only)
    probabilities = class_probabilities(class_logits, chosen.competing, temperature)
    if vocabulary.synonyms:
        probabilities = _with_synonyms(probabilities, vocabulary.class_of)
    queries, classes = top_instances(probabilities, chosen)
    used, row_of = np.unique(queries, return_inverse=True)
    found = of_queries.found(used, masks)
    quality = np.array([mask.quality for mask in found], np.float32)
    scores = probabilities[queries, classes] * quality[row_of]
    order = np.argsort(-scores, kind="stable")
    order = order[scores[order] >= score_threshold]
    picked = [found[row] for row in row_of[order]]
    class_ids = classes[order]
    return Detections(
        boxes=np.array([mask.box for mask in picked], np.float32).reshape(-1, 4),
        scores=scores[order].astype(np.float32),
        class_ids=class_ids,
        names=tuple(vocabulary.names[index] for index in class_ids),
        seen=vocabulary.seen[class_ids],
        masks=of_queries.of_kind(queries[order], picked, masks),
        image_size=of_queries.size,
    )


def require_finite_output(values: NDArray[np.float32]) -> None:
    """Refuse a network's output with infinity or what is no number.

    Raises:
        D2ZeroError: Says what it may come from.
    """
    if not np.isfinite(values).all():
        raise D2ZeroError(
            "the network's output is not finite: its weights are damaged, or a file in half precision overflows"
        )


def _with_synonyms(probabilities: NDArray[np.float32], class_of: NDArray[np.int64]) -> NDArray[np.float32]:
    """Add what synonyms got to their classes; synonyms compete for the same probability."""
    summed = np.zeros_like(probabilities)
    np.add.at(summed.T, class_of, probabilities.T)
    return summed
