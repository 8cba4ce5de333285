"""Our RLE equals pycocotools' to the letter."""

import numpy as np
import pytest

from d2zero_runtime import rle

coco_mask = pytest.importorskip("pycocotools.mask")


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
