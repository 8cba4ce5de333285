"""Our RLE equals pycocotools' to the letter."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from properties import cases

from d2zero_runtime import D2ZeroError
from d2zero_runtime.masks import rle

coco_mask = pytest.importorskip("pycocotools.mask")
MASKS = arrays(bool, array_shapes(min_dims=2, max_dims=2, max_side=40))
LETTERS = st.characters(min_codepoint=40, max_codepoint=120)


def masks() -> list[np.ndarray]:
    random = np.random.default_rng(0)
    drawn = [random.random((h, w)) > share for h, w, share in ((7, 5, 0.5), (40, 60, 0.97), (33, 1, 0.2), (1, 9, 0.5))]
    full, empty = np.ones((6, 4), bool), np.zeros((6, 4), bool)
    columns = np.zeros((10, 8), bool)
    columns[:, 2:5] = True  # runs that touch across the ends of columns
    corner = np.zeros((500, 700), bool)
    corner[-1, -1] = corner[0, 0] = True
    return [*drawn, full, empty, columns, corner]


@pytest.mark.parametrize("mask", masks())
def test_equals_pycocotools(mask: np.ndarray) -> None:
    expected = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
    ours = rle.encode(mask)
    assert ours == {"size": list(mask.shape), "counts": expected["counts"].decode()}
    assert np.array_equal(rle.decode(ours), mask)
    assert rle.area(ours) == mask.sum()


def test_a_window_is_the_mask_around_it() -> None:
    whole = np.zeros((20, 30), bool)
    window = np.random.default_rng(1).random((6, 9)) > 0.4
    whole[3:9, 12:21] = window
    assert rle.encode_window(window, 3, 12, 20, 30) == rle.encode(whole)


def test_window_of_full_height() -> None:
    whole = np.zeros((5, 8), bool)
    whole[:, 3:6] = True
    assert rle.encode_window(whole[:, 3:6], 0, 3, 5, 8) == rle.encode(whole)


def test_reads_bytes_as_well() -> None:
    mask = np.eye(9, dtype=bool)
    assert np.array_equal(rle.decode(coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))), mask)


@pytest.mark.parametrize("mask", masks())
def test_uncompressed_runs(mask: np.ndarray) -> None:
    flat = mask.T.ravel()
    runs = np.diff(np.flatnonzero(np.diff(flat, prepend=False)), prepend=0, append=flat.size).tolist()
    assert rle.from_runs(runs, *mask.shape) == rle.encode(mask)
    split = [part for run in runs for part in ([run - 1, 0, 1] if run > 1 else [run])]
    assert rle.from_runs([*split, 0], *mask.shape) == rle.encode(mask)


def test_masks_checked_together_are_each_what_they_are_on_their_own() -> None:
    good = [rle.encode(mask) for mask in masks()]
    counts, sizes = [mask["counts"] for mask in good], [(mask["size"][0], mask["size"][1]) for mask in good]
    assert rle.problems(counts, sizes) == [""] * len(good) and rle.problems([], []) == []
    for place in range(len(good)):
        changed = [*counts[:place], counts[place] + "1", *counts[place + 1 :]]
        assert [bool(problem) for problem in rle.problems(changed, sizes)] == [n == place for n in range(len(good))]
        cut = [*counts[:place], counts[place][:-1], *counts[place + 1 :]]
        assert [bool(problem) for problem in rle.problems(cut, sizes)] == [n == place for n in range(len(good))]


@pytest.mark.parametrize("counts", ["", "ooo", "1", "P1", "é", "~", "0" * 100, "o" * 1000 + "0"])
def test_runs_that_do_not_fill_the_mask(counts: str) -> None:
    for read in (rle.decode, rle.area):
        with pytest.raises(D2ZeroError, match="a mask "):
            read({"size": [5, 7], "counts": counts})


@cases(100)
@given(MASKS)
def test_any_mask_equals_pycocotools(mask: np.ndarray) -> None:
    test_equals_pycocotools(mask)
    test_uncompressed_runs(mask)


@cases(100)
@given(MASKS, st.data())
def test_any_window_is_the_mask_around_it(window: np.ndarray, data: st.DataObject) -> None:
    top, bottom, left, right = (data.draw(st.integers(0, 9)) for _ in range(4))
    whole = np.pad(window, ((top, bottom), (left, right)))
    assert rle.encode_window(window, top, left, *whole.shape) == rle.encode(whole)


def runs_of(text: str) -> list[int] | None:
    """Run lengths as pycocotools' specification has them, number by number; None if they cannot be read."""
    runs: list[int] = []
    value = place = 0
    for letter in text:
        code = ord(letter) - 48
        if not 0 <= code < 64:
            return None
        value |= (code & 0x1F) << 5 * place
        place += 1
        if code & 0x20:
            continue
        if place > rle.MOST_DIGITS:
            return None
        value -= ((code & 0x10) << 1) << 5 * (place - 1)
        runs.append(value + (runs[-2] if len(runs) > 2 else 0))
        value = place = 0
    return None if place or not runs else runs


@cases(80)
@given(
    st.lists(st.tuples(MASKS, st.booleans(), st.integers(0, 999), st.characters(min_codepoint=40, max_codepoint=120)))
)
def test_changed_texts_are_judged_as_they_read(drawn: list[tuple[np.ndarray, bool, int, str]]) -> None:
    counts, sizes, fine = [], [], []
    for mask, changed, place, letter in drawn:
        text = rle.encode(mask)["counts"]
        if changed:
            place %= len(text)
            text = text[:place] + letter + text[place + 1 :]
        runs = runs_of(text)
        counts.append(text)
        sizes.append(mask.shape)
        fine.append(runs is not None and min(runs) >= 0 and sum(runs) == mask.size and all(runs[1:-1]))
    assert [not problem for problem in rle.problems(counts, sizes)] == fine
    for text, size, good in zip(counts, sizes, fine, strict=True):
        if good:
            decoded = rle.decode({"size": list(size), "counts": text})
            np.testing.assert_array_equal(decoded, coco_mask.decode({"size": list(size), "counts": text}))
