"""Searching an index: the best instances of some classes over all its images, in flat memory."""

import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import count

import numpy as np

from d2zero_runtime.detections import Detections
from d2zero_runtime.errors import D2ZeroError
from d2zero_runtime.index.index import Index
from d2zero_runtime.index.shards import IndexedImage
from d2zero_runtime.masks.rle import RLE
from d2zero_runtime.text.prompts import Progress
from d2zero_runtime.vocabulary import Vocabulary


@dataclass(frozen=True, eq=False)
class Match:
    """An instance that a search found.

    Args:
        image: Where it is.
        name: Its class.
        score: In 0..1.
        box: x1, y1, x2, y2 in pixels of the image, x2 and y2 exclusive.
        mask: COCO run lengths.
        seen: Whether training saw its class.
    """

    image: IndexedImage
    name: str
    score: float
    box: tuple[float, float, float, float]
    mask: RLE
    seen: bool


def search(
    index: Index,
    names: Sequence[str],
    vocabulary: Vocabulary | None = None,
    *,
    top: int = 50,
    score_threshold: float = 0.0,
    progress: Progress | None = None,
) -> list[Match]:
    """The best instances of some classes over a whole index.

    All active classes of the vocabulary compete, as in mode `gzsis`, but only those that are asked for are reported and
    take places: none is crowded out by what else an image shows. Where several queries found one object, the best of
    them is reported. Memory holds `top` instances, however many images there are.

    Args:
        index: The images.
        names: Classes of the vocabulary; a synonym asks for its class, and an inactive class becomes active.
        vocabulary: The context; the index's own if left out.
        top: At most this many instances, of all classes together.
        score_threshold: Instances with a lower score are left out.
        progress: Shows how far it has come.

    Returns:
        The instances, best first; of equal scores, the one that was segmented first.

    Raises:
        D2ZeroError: The vocabulary lacks a class or does not fit the model, or a shard cannot be used.
    """
    if top < 1:
        raise D2ZeroError(f"top must be at least 1, got {top}")
    context = vocabulary or index.vocabulary
    wanted = context.with_active(names).active
    results = index.name(
        replace(context, active=context.active | wanted),
        score_threshold=score_threshold,
        max_detections=index.contract.num_queries * len(names),
        only=names,
    )
    heap: list[tuple[float, int, Match]] = []
    order = count(0, -1)
    for image, found in progress(results, len(index), "searching") if progress else results:
        rising = found[found.scores > heap[0][0]] if len(heap) == top else found
        for match in _matches(image, rising):
            entry = (match.score, next(order), match)
            if len(heap) < top:
                heapq.heappush(heap, entry)
            else:
                heapq.heappushpop(heap, entry)
    return [match for *_, match in sorted(heap, reverse=True)]


def _matches(image: IndexedImage, found: Detections) -> Iterator[Match]:
    """An image's instances, those of each class without duplicates."""
    for class_id in np.unique(found.class_ids):
        distinct = found[found.class_ids == class_id].without_duplicates()
        assert isinstance(distinct.masks, tuple)
        for row, mask in enumerate(distinct.masks):
            x1, y1, x2, y2 = distinct.boxes[row].tolist()
            yield Match(
                image,
                distinct.names[row],
                float(distinct.scores[row]),
                (x1, y1, x2, y2),
                mask,
                bool(distinct.seen[row]),
            )
