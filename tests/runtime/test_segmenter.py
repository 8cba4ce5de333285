"""The segmenter's own work, with a backend that answers by rule: batches, order, static shapes, kinds of masks."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from d2zero_runtime import D2ZeroError, Preprocessing, Segmenter, Vocabulary
from d2zero_runtime.artifacts.contract import ModelContract
from d2zero_runtime.backends.base import Backend, Raw
from d2zero_runtime.segmenter import SCORE_THRESHOLD

QUERIES, WIDTH = 5, 4
WORDS = Vocabulary(("cat", "dog", "cow"), np.eye(3, WIDTH, dtype=np.float32) + 0.1, seen=np.array([True, True, False]))


class Bright(Backend):
    """Query q covers the pixels that are brighter than q/Q of all; classes are the embeddings' first elements."""

    name = "by rule"

    def __init__(self) -> None:
        self.batches: list[tuple[int, ...]] = []
        self.embeddings: list[NDArray[np.float32] | None] = []

    def run(self, images: NDArray[np.float32], embeddings: NDArray[np.float32] | None) -> Raw:
        self.batches.append(images.shape)
        self.embeddings.append(embeddings)
        text = WORDS.embeddings if embeddings is None else embeddings
        scores = np.append(10 * text[:, 0], 0).astype(np.float32)
        grey = images.mean(axis=1)[:, ::4, ::4]
        levels = np.linspace(-1, 1, QUERIES)[:, None, None]
        return Raw.of(np.tile(scores, (len(images), QUERIES, 1)), (grey[:, None] - levels).astype(np.float32))


def segmenter(**changes: Any) -> Segmenter:
    contract = ModelContract(
        class_names=WORDS.names,
        seen=tuple(WORDS.seen.tolist()),
        active=tuple(WORDS.active.tolist()),
        vocabulary_source={},
        text_dim=WIDTH,
        num_queries=QUERIES,
        preprocessing=Preprocessing(shortest_edge=64, longest_edge=128),
    )
    return Segmenter(Bright(), replace(contract, **changes), WORDS)


def pictures(*sizes: tuple[int, int]) -> list[NDArray[np.uint8]]:
    random = np.random.default_rng(0)
    return [
        np.asarray(Image.fromarray(random.integers(0, 256, (4, 4, 3), np.uint8)).resize(size[::-1])) for size in sizes
    ]


def test_batches_are_of_neighbours_of_one_size_and_give_what_single_images_give() -> None:
    images = pictures((64, 90), (70, 70), (70, 70), (70, 70), (64, 90))
    together, single = segmenter(), segmenter()
    found = together(images, batch_size=2)
    expected = [single(image) for image in images]
    assert [shape[0] for shape in together.backend.batches] == [1, 2, 1, 1]  # type: ignore[attr-defined]
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_array_equal(ours.scores, theirs.scores)
        assert ours.masks == theirs.masks


def test_a_stream_reads_only_as_far_ahead_as_its_batches() -> None:
    taken = 0

    def sources() -> Iterator[NDArray[np.uint8]]:
        nonlocal taken
        for image in pictures(*[(64, 64)] * 40):
            taken += 1
            yield image

    stream = segmenter().stream(sources(), batch_size=2)
    for _ in range(4):
        next(stream)
    assert taken <= 12


def test_kinds_of_masks_agree() -> None:
    image = pictures((64, 90))[0]
    model = segmenter()
    rle, bitmap, none = (model(image, masks=kind) for kind in ("rle", "bitmap", "none"))
    assert isinstance(bitmap.masks, np.ndarray) and bitmap.masks.dtype == bool and none.masks is None
    np.testing.assert_array_equal(bitmap.masks, rle.bitmaps())
    np.testing.assert_array_equal(none.boxes, rle.boxes)
    np.testing.assert_array_equal(none.scores, rle.scores)
    ids = {name: number for number, name in enumerate(WORDS.names)}
    assert bitmap.to_coco(1, ids) == rle.to_coco(1, ids)
    np.testing.assert_array_equal(bitmap[:2].bitmaps(), rle[:2].bitmaps())
    with pytest.raises(D2ZeroError, match="masks must be one of rle, bitmap, packed, none, got 'polygon'"):
        model(image, masks="polygon")  # type: ignore[call-overload]


def test_a_fixed_size_and_batch_are_filled_up() -> None:
    static = Preprocessing(shortest_edge=64, longest_edge=128, static_size=(64, 96))
    model = segmenter(preprocessing=static, batch=4)
    found = model(pictures((200, 100), (64, 90), (30, 30)))
    assert set(model.backend.batches) == {(4, 3, 64, 96)}  # type: ignore[attr-defined]
    assert [detections.image_size for detections in found] == [(200, 100), (64, 90), (30, 30)]
    assert static.network_size((200, 100)) == (64, 32) and static.network_size((64, 90)) == (64, 90)
    raw = model.predict_raw(pictures(*[(64, 96)] * 5))
    assert raw.class_logits.shape[0] == 5 and model.backend.batches[-1][0] == 4  # type: ignore[attr-defined]
    with pytest.raises(D2ZeroError, match=r"up to 64x96 \(height x width\), got 96x64"):
        model.predict_raw(pictures((96, 64)))


def test_baked_classes_keep_their_embeddings_but_not_their_names_and_flags() -> None:
    model = segmenter(baked=True)
    renamed = replace(WORDS, names=("Katze", "Hund", "Kuh"), active=np.array([True, False, False]))
    model.set_vocabulary(renamed)
    assert set(model(pictures((64, 64))[0]).names) == {"Katze"}
    assert model.backend.embeddings == [None]  # type: ignore[attr-defined]
    with pytest.raises(D2ZeroError, match="exported with --bake"):
        model.set_vocabulary(replace(WORDS, embeddings=2 * WORDS.embeddings))


def test_synonyms_count_for_their_class() -> None:
    words = replace(WORDS, names=("sofa", "couch", "cow"), embeddings=np.ones((3, WIDTH), np.float32))
    image = pictures((64, 64))[0]
    apart = segmenter()(image, vocabulary=words, score_threshold=0.0)
    joined = segmenter()(image, vocabulary=words.with_synonyms({"couch": "sofa"}), score_threshold=0.0)
    assert set(joined.names) == {"sofa", "cow"}
    best = {
        name: max(s for s, n in zip(d.scores, d.names, strict=True) if n == name) for d in (joined,) for name in d.names
    }
    alone = max(apart.scores)
    assert best["sofa"] == pytest.approx(2 * alone, rel=1e-5) and best["cow"] == pytest.approx(alone, rel=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"max_detections": 0}, "max_detections must be at least 1"),
        ({"mode": "all"}, "mode must be one of"),
    ],
)
def test_wrong_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(D2ZeroError, match=message):
        segmenter()(pictures((64, 64))[0], **options)


def test_sources_that_are_no_images(tmp_path: Path) -> None:
    for source in (None, 7, [None], np.zeros((4, 4), np.uint8)):
        with pytest.raises(D2ZeroError, match="an image must be"):
            segmenter()(source)  # type: ignore[arg-type]


def test_weak_and_empty_instances_are_left_out() -> None:
    model, image = segmenter(), pictures((64, 64))[0]
    everything = model(image, score_threshold=0.0)
    assert (everything.boxes[:, 2] > everything.boxes[:, 0]).all()
    usual = model(image)
    assert len(usual) == (everything.scores >= SCORE_THRESHOLD).sum()
    raw = model.postprocess(model.predict_raw([image]), [(64, 64)], [(64, 64)])[0]
    assert len(raw) >= len(everything)


def test_a_closed_segmenter_is_refused(tmp_path: Path) -> None:
    image = pictures((64, 64))[0]
    with segmenter() as model:
        assert model(image).image_size == (64, 64)
        replace(WORDS, names=("x", "y", "z")).save(tmp_path / "other.npz")
        model.set_vocabulary(tmp_path / "other.npz")
        assert model.vocabulary.names == ("x", "y", "z")
    model.close()
    with pytest.raises(D2ZeroError, match="was closed; load the model again"):
        model(image)


def test_what_is_shown_of_objects_fits_a_line() -> None:
    model, image = segmenter(), pictures((64, 64))[0]
    for shown in map(repr, (model, model(image), model.vocabulary)):
        assert "\n" not in shown and len(shown) < 120
