"""Whether a segmenter's two steps find what its call finds."""

from dataclasses import replace
from typing import Any

import numpy as np

from d2zero_runtime import Detections, Segmenter, Segments, Vocabulary
from d2zero_runtime.masks.packed import PackedMasks
from d2zero_runtime.masks.postprocess import MASK_KINDS, MaskKind, Mode

EVERY_PAIR: dict[str, Any] = {"score_threshold": 0.0, "max_detections": 10**6}  # of query and class


def other_words(known: Vocabulary, classes: int = 9) -> Vocabulary:
    """Classes that a model was not asked about before: half of them unseen, one inactive, one with a synonym."""
    random = np.random.default_rng(1)
    rows = known.embeddings[np.arange(classes) % len(known)]
    noise = 0.3 * rows.std() * random.standard_normal(rows.shape)
    active = np.ones(classes, bool)
    active[2] = False
    return Vocabulary(
        tuple(f"word {number}" for number in range(classes)),
        (rows + noise).astype(np.float32),
        seen=np.arange(classes) % 2 == 0,
        active=active,
        source=known.source,
        synonyms={"word 3": "word 1"},
    )


def require_equal(found: Detections, expected: Detections) -> None:
    """Instances must be equal, bit by bit and in the same order."""
    assert found.names == expected.names and found.image_size == expected.image_size
    for part in ("scores", "boxes", "class_ids", "seen"):
        np.testing.assert_array_equal(getattr(found, part), getattr(expected, part), err_msg=part)
    assert type(found.masks) is type(expected.masks)
    if isinstance(expected.masks, PackedMasks):
        np.testing.assert_array_equal(found.bitmaps(), expected.bitmaps())
    elif isinstance(expected.masks, np.ndarray):
        np.testing.assert_array_equal(found.masks, expected.masks)
    else:
        assert found.masks == expected.masks


def require_close(found: Detections, expected: Detections, tolerance: float) -> float:
    """Instances must be the same, each with a score that differs by no more than the tolerance.

    Args:
        found: All instances (`EVERY_PAIR`): where some are left out, which ones may depend on rounding.
        expected: The same of what is compared with.
        tolerance: Of scores.

    Returns:
        The largest difference of scores.
    """
    (ours, scores), (theirs, expected_scores) = map(_by_name_and_mask, (found, expected))
    assert ours == theirs and ours
    furthest = float(np.abs(scores - expected_scores).max())
    assert furthest <= tolerance
    return furthest


def _by_name_and_mask(detections: Detections) -> tuple[list[tuple[str, str]], np.ndarray]:
    """Name and mask of each instance, and scores, in an order that does not depend on scores."""
    assert isinstance(detections.masks, tuple)
    counts = [mask["counts"] for mask in detections.masks]
    entries = sorted(zip(detections.names, counts, detections.scores.tolist(), strict=True))
    return [entry[:2] for entry in entries], np.array([entry[2] for entry in entries])


def require_named_alike(segmenter: Segmenter, image: np.ndarray, tolerance: float = 1e-6) -> float:
    """`name` of `segment` must be what a call finds: exactly with the classes in use, closely with others.

    Returns:
        The largest difference of scores with others.
    """
    segments, words, furthest = segmenter.segment(image), other_words(segmenter.vocabulary), 0.0
    for mode in Mode:
        for masks in MASK_KINDS:
            require_equal(*both(segmenter, segments, image, mode, masks))
        named = segmenter.name(segments, words, mode, **EVERY_PAIR)
        called = segmenter(image, mode, vocabulary=words, **EVERY_PAIR)
        assert "word 2" not in named.names and "word 3" not in named.names
        furthest = max(furthest, require_close(named, called, tolerance))
    return furthest


def both(
    segmenter: Segmenter, segments: Segments, image: np.ndarray, mode: Mode, masks: MaskKind
) -> tuple[Detections, Detections]:
    """What `name` makes of segments, and a call of the image."""
    named = segmenter.name(segments, None, mode, score_threshold=0.0, masks=masks)
    called = segmenter(image, mode, score_threshold=0.0, masks=masks)
    assert len(called)
    return named, called


def renamed(words: Vocabulary) -> Vocabulary:
    """The same classes under other names."""
    return replace(words, names=tuple(name.upper() for name in words.names))
