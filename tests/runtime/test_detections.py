"""The result type: validation, selection, conversions, pictures."""

from dataclasses import replace

import numpy as np
import pytest

from d2zero_runtime import D2ZeroError, Detections, Vocabulary
from d2zero_runtime.draw import SheetRow, class_colour, contact_sheet
from d2zero_runtime.masks import rle


def two() -> Detections:
    masks = np.zeros((2, 40, 50), bool)
    masks[0, 5:20, 10:30] = masks[1, 15:35, 2:12] = True
    return Detections(
        boxes=np.array([[10, 5, 30, 20], [2, 15, 12, 35]], np.float32),
        scores=np.array([0.9, 0.4], np.float32),
        class_ids=np.array([3, 1]),
        names=("dog", "cat"),
        seen=np.array([False, True]),
        masks=tuple(rle.encode(mask) for mask in masks),
        image_size=(40, 50),
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"boxes": np.zeros((2, 5))}, r"boxes must have shape \(2, 4\), got \(2, 5\)"),
        ({"class_ids": np.zeros(3, int)}, r"class_ids must have shape \(2,\)"),
        ({"names": ("dog",)}, "names must have 2 entries"),
        ({"image_size": (50, 40)}, r"image's size \[50, 40\], got \[40, 50\]"),
    ],
)
def test_fields_must_agree(change: dict, message: str) -> None:
    with pytest.raises(D2ZeroError, match=message):
        replace(two(), **change)


def test_selection() -> None:
    assert two().above(0.5).names == ("dog",)
    assert two()[[1, 0]].names == ("cat", "dog")
    assert len(two()[:0]) == 0 and two()[:0].bitmaps().shape == (0, 40, 50)


def test_duplicates_are_left_out_best_first() -> None:
    pair = two()
    assert isinstance(pair.masks, tuple)
    shifted = np.zeros((40, 50), bool)
    shifted[5:20, 12:30] = True  # overlaps the dog's mask by 0.9
    more = Detections(
        boxes=np.concatenate([pair.boxes, [[12, 5, 30, 20]]]).astype(np.float32),
        scores=np.array([0.6, 0.4, 0.9], np.float32),
        class_ids=np.array([3, 1, 2]),
        names=("dog", "cat", "fox"),
        seen=np.array([False, True, True]),
        masks=(*pair.masks, rle.encode(shifted)),
        image_size=(40, 50),
    )
    assert more.without_duplicates().names == ("cat", "fox")
    assert replace(more, masks=None).without_duplicates().names == ("cat", "fox")
    assert more.without_duplicates(iou=0.95).names == ("dog", "cat", "fox")
    assert len(more[:0].without_duplicates()) == 0


def test_coco_entries() -> None:
    entries = two().to_coco(7, {"dog": 18, "cat": 17})
    assert [entry["category_id"] for entry in entries] == [18, 17]
    assert entries[0]["bbox"] == [10, 5, 20, 15] and entries[0]["image_id"] == 7
    assert rle.area(entries[0]["segmentation"]) == 300
    words = Vocabulary(
        ("cow", "cat", "emu", "dog"), np.eye(4, 4, dtype=np.float32), seen=np.array([True, True, True, False])
    )
    again = Detections.from_coco(entries, {18: "dog", 17: "cat"}, words, (40, 50))
    for field in ("boxes", "scores", "class_ids", "seen"):
        np.testing.assert_array_equal(getattr(again, field), getattr(two(), field))
    assert again.masks == two().masks and again.names == two().names
    with pytest.raises(D2ZeroError, match="no category id given for cat"):
        two().to_coco(7, {"dog": 18})


def test_supervision_and_pandas() -> None:
    converted = two().to_supervision()
    np.testing.assert_array_equal(converted.mask, two().bitmaps())
    np.testing.assert_array_equal(converted.xyxy, two().boxes)
    assert list(converted.data["class_name"]) == ["dog", "cat"]
    table = two().to_pandas()
    assert list(table["area"]) == [300, 200] and list(table["x2"]) == [30, 12]


def test_no_masks() -> None:
    with pytest.raises(D2ZeroError, match="carry no masks"):
        replace(two(), masks=None).bitmaps()


def test_masks_are_tinted_and_outlined_by_kind() -> None:
    image = np.full((240, 300, 3), 100, np.uint8)
    mask = np.zeros((2, 240, 300), bool)
    mask[0, 100:200, 20:120] = mask[1, 100:200, 160:260] = True
    found = Detections(
        boxes=np.array([[20, 100, 120, 200], [160, 100, 260, 200]], np.float32),
        scores=np.array([0.9, 0.8], np.float32),
        class_ids=np.array([0, 3]),
        names=("a", "b"),
        seen=np.array([True, False]),
        masks=mask,
        image_size=(240, 300),
    )
    picture = np.asarray(found.plot(image)).astype(int)
    for middle, class_id in ((70, 0), (210, 3)):
        expected = 0.55 * 100 + 0.45 * np.array(class_colour(class_id))
        np.testing.assert_allclose(picture[150, middle], expected, atol=2)
    edge = [tuple(picture[150, column]) for column in (20, 21, 160, 161, 162)]
    assert edge[0] == class_colour(0) and edge[1] != class_colour(0)  # thin, of its class
    assert edge[2] == edge[3] == (255, 255, 255) != edge[4]  # thick and white


def test_overlay_changes_what_is_inside_and_enlarges_small_images() -> None:
    image = np.full((40, 50, 3), 100, np.uint8)
    picture = np.asarray(two().plot(image))
    assert picture.shape == (240, 300, 3)  # six times
    assert (picture[12 * 6, 20 * 6] != 100).any() and (picture[38 * 6, 45 * 6] == 100).all()
    assert two()[:0].plot(image).size == (300, 240)
    assert two().plot(image).size == (300, 240)


def test_contact_sheet_of_several_and_of_none() -> None:
    image = np.full((40, 50, 3), 100, np.uint8)
    sheet = contact_sheet([SheetRow(image, two().instances(), two().instances())] * 4, columns=3, cell=100)
    assert sheet.width == 3 * 214 + 10 and sheet.height == 58 + 2 * 110 + 10
    assert contact_sheet([]).height > 0
