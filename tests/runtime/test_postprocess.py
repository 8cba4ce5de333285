"""Post-processing equals a plain torch version of the specification."""

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from properties import cases

from d2zero_runtime import D2ZeroError, Mode, Vocabulary, postprocess

SIDES = st.integers(1, 70)
SIZES: dict[str, Any] = {"input_size": (90, 121), "output_size": (135, 160), "padded_size": (96, 128)}


def words(count: int = 6, seen: int = 4) -> Vocabulary:
    return Vocabulary(
        tuple(f"c{i}" for i in range(count)), np.eye(count, 8, dtype=np.float32), seen=np.arange(count) < seen
    )


def raw(queries: int = 12, classes: int = 6, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    coarse = torch.from_numpy(random.standard_normal((1, queries, 5, 6)).astype(np.float32))
    masks = F.interpolate(4 * coarse - 1, (24, 32), mode="bicubic")[0].numpy()
    return (20 * random.standard_normal((queries, classes + 1))).astype(np.float32), masks


def plainly(
    class_logits: np.ndarray, mask_logits: np.ndarray, seen: np.ndarray, mode: Mode, sizes: dict = SIZES
) -> list[tuple]:
    """The published order of things: every mask at full size, then the scores."""
    logits = 0.2 * torch.from_numpy(class_logits)
    columns = np.flatnonzero(~seen) if mode is Mode.ZSIS else np.arange(len(seen))
    p = logits[:, [*columns, len(seen)]].softmax(-1)[:, :-1]
    groups = [(np.arange(len(columns)), 100)]
    if mode is Mode.GZSIS_COPY_PASTE:
        groups = [(np.flatnonzero(seen), 50), (np.flatnonzero(~seen), 50)]
    height, width = sizes["input_size"]
    masks = F.interpolate(torch.from_numpy(mask_logits)[None], sizes["padded_size"], mode="bilinear")
    masks = F.interpolate(masks[..., :height, :width], sizes["output_size"], mode="bilinear")[0]
    found = []
    for members, kept in groups:
        scores, flat = p[:, members].flatten().topk(min(kept, p[:, members].numel()))
        for score, index in zip(scores, flat, strict=True):
            mask = masks[index // len(members)]
            inside = mask > 0
            quality = (mask.sigmoid() * inside).sum() / (inside.sum() + 1e-6)
            name = int(columns[members[index % len(members)]])
            found.append((name, float(score * quality), inside.numpy()))
    return found


@pytest.mark.parametrize("mode", list(Mode))
def test_equals_the_plain_version(mode: Mode) -> None:
    class_logits, mask_logits = raw()
    mask_logits[3] = -5.0  # a query without a mask
    detections = postprocess(class_logits, mask_logits, words(), mode=mode, **SIZES)
    expected = plainly(class_logits, mask_logits, words().seen, mode)
    assert len(detections) == len(expected)
    assert (np.diff(detections.scores) <= 0).all()
    bitmaps = detections.bitmaps()
    ours = sorted(zip(detections.class_ids, detections.scores.round(5), bitmaps.sum((1, 2)), strict=True))
    theirs = sorted((name, round(score, 5), mask.sum()) for name, score, mask in expected)
    np.testing.assert_allclose(np.array(ours, float), np.array(theirs, float), atol=2e-5)
    for box, mask in zip(detections.boxes, bitmaps, strict=True):
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        tight = [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1] if len(rows) else [0, 0, 0, 0]
        assert box.tolist() == tight


@cases(60)
@given(
    mode=st.sampled_from(list(Mode)),
    classes=st.integers(2, 8),
    queries=st.integers(1, 12),
    input_size=st.tuples(SIDES, SIDES),
    output_size=st.tuples(SIDES, SIDES),
    seed=st.integers(0, 99),
)
def test_any_case_equals_the_plain_version(
    mode: Mode, classes: int, queries: int, input_size: tuple[int, int], output_size: tuple[int, int], seed: int
) -> None:
    padded = (-(-input_size[0] // 32) * 32, -(-input_size[1] // 32) * 32)
    sizes: dict[str, Any] = {"input_size": input_size, "output_size": output_size, "padded_size": padded}
    random = np.random.default_rng(seed)
    class_logits = (20 * random.standard_normal((queries, classes + 1))).astype(np.float32)
    coarse = torch.from_numpy(random.standard_normal((1, queries, 4, 4)).astype(np.float32))
    mask_logits = F.interpolate(4 * coarse, (padded[0] // 4, padded[1] // 4), mode="bicubic")[0].numpy()
    vocabulary = words(classes, seen=classes - 1)
    found = postprocess(class_logits, mask_logits, vocabulary, mode=mode, **sizes)
    expected = plainly(class_logits, mask_logits, vocabulary.seen, mode, sizes)
    assert len(found) == len(expected)
    np.testing.assert_allclose(found.scores, sorted((score for _, score, _ in expected), reverse=True), atol=1e-4)
    ours = np.bincount(found.class_ids, found.bitmaps().sum((1, 2)), classes)
    theirs = np.bincount([name for name, *_ in expected], [mask.sum() for *_, mask in expected], classes)
    np.testing.assert_allclose(ours, theirs, atol=2 + 1e-3 * len(expected) * output_size[0] * output_size[1])


def test_masks_equal_pixel_by_pixel() -> None:
    class_logits, mask_logits = raw(queries=3, classes=6, seed=4)
    class_logits[:] = -100
    class_logits[[0, 1, 2], [0, 1, 2]] = [60, 50, 40]  # each query has one class of its own
    best = postprocess(class_logits, mask_logits, words(), max_detections=3, **SIZES)
    expected = {name: mask for name, _, mask in plainly(class_logits, mask_logits, words().seen, Mode.GZSIS)[:3]}
    for class_id, bitmap in zip(best.class_ids, best.bitmaps(), strict=True):
        assert (bitmap != expected[int(class_id)]).mean() < 1e-4


def test_fewer_pairs_than_places() -> None:
    class_logits, mask_logits = raw(queries=2, classes=3)
    assert len(postprocess(class_logits, mask_logits, words(3, 2), **SIZES)) == 6


def test_threshold_count_and_masks() -> None:
    class_logits, mask_logits = raw()
    everything = postprocess(class_logits, mask_logits, words(), **SIZES)
    threshold = float(everything.scores[4])
    some = postprocess(class_logits, mask_logits, words(), score_threshold=threshold, **SIZES)
    assert len(some) == 5
    few = postprocess(class_logits, mask_logits, words(), max_detections=7, masks="none", **SIZES)
    assert len(few) == 7 and few.masks is None


def test_only_active_classes_are_predicted() -> None:
    class_logits, mask_logits = raw()
    active = words().with_active(["c1", "c5"])
    assert set(postprocess(class_logits, mask_logits, active, **SIZES).names) == {"c1", "c5"}
    assert set(postprocess(class_logits, mask_logits, active, mode="zsis", **SIZES).names) == {"c5"}


def test_refusals() -> None:
    class_logits, mask_logits = raw()
    with pytest.raises(D2ZeroError, match="vocabulary of 5 classes"):
        postprocess(class_logits, mask_logits, words(5), **SIZES)
    with pytest.raises(D2ZeroError, match="gzsis, zsis, gzsis-copy-paste, got 'best'"):
        postprocess(class_logits, mask_logits, words(), mode="best", **SIZES)  # type: ignore[arg-type]
    with pytest.raises(D2ZeroError, match="needs unseen classes"):
        postprocess(class_logits, mask_logits, words(6, 6), mode="zsis", **SIZES)
