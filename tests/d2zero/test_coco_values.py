"""Values of COCO files: what has one meaning is put right, anything else is refused or left out by name, before C code.

Bad values that pycocotools got used to end in crashes, endless loops, all memory, or wrong numbers.
"""

import copy
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from commands import Command

from d2zero.checkpoints.files import save_model
from d2zero.data.augment import AugmentConfig
from d2zero.data.coco import open_coco, read_coco
from d2zero.data.coco_values import MAX_PIXELS, decoded
from d2zero.data.training_set import SampleKey, TrainingSet
from d2zero.evaluation.metrics import score, score_detections
from d2zero.evaluation.result_entries import open_results
from d2zero.evaluation.run import EvaluationRun
from d2zero.model import D2Zero
from d2zero_runtime import D2ZeroError, Mode, Vocabulary
from d2zero_runtime.masks import rle

coco_mask = pytest.importorskip("pycocotools.mask")

Content = dict[str, Any]
GZSI, SEEN = "annotations/instances_val_gzsi_shapes.json", "annotations/instances_train_seen_shapes.json"
FULL = {"size": [96, 96], "counts": [0, 9216]}


@pytest.fixture
def truth(shapes_data: Path) -> Content:
    """Four images with their annotations."""
    content = json.loads((shapes_data / GZSI).read_text())
    content["images"] = content["images"][:4]
    ids = {image["id"] for image in content["images"]}
    content["annotations"] = [entry for entry in content["annotations"] if entry["image_id"] in ids]
    return content


def written(content: object, tmp_path: Path, name: str = "truth.json") -> Path:
    (tmp_path / name).write_text(json.dumps(content))
    return tmp_path / name


def perfect(content: Content) -> list[Content]:
    """COCO's own form of results: no box."""
    keys = ("image_id", "category_id", "segmentation")
    return [{**{key: entry[key] for key in keys}, "score": 0.9} for entry in content["annotations"]]


def metrics(content: Content, results: list[Content], tmp_path: Path) -> Content:
    """From files on disk, and the same from memory."""
    path, found = written(content, tmp_path), written(results, tmp_path, "found.json")
    with open_coco(path) as annotations, open_results(found, annotations) as entries:
        lazy = score(annotations, entries, (), Mode.GZSIS)
    assert score_detections(read_coco(path), results, (), Mode.GZSIS) == lazy
    return lazy


NAN, INF, HUGE = math.nan, math.inf, 10**400
BAD_MASKS: list[tuple[Any, str]] = [
    (None, "has no mask"),
    ([], "has no mask"),
    ("x", "expected polygons or"),
    (7, "expected polygons or"),
    ({"size": [96, 96]}, "expected polygons or"),
    ([10, 10, 40, 10, 40, 40], "has polygons with 10, expected lists"),
    ([[[10, 10, 40, 10, 40, 40]]], "expected numbers"),
    ([{"size": [96, 96], "counts": "0"}], "expected lists"),
    ([[10, 10, 40, 10, 40, None]], "has a polygon with null"),
    ([[10, 10, 40, 10, 40, "40"]], "has a polygon with '40'"),
    ([[True] * 6], "has a polygon with True"),
    ([[10, 10, 40, 10, 40, NAN]], "not finite"),
    ([[NAN, 10, 40, 10, 40, HUGE]], "not finite"),
    ([[10, 10, 40, 10, 40, INF]], "not finite"),
    ([[10, 10, 2.1e8, 3.5e8, 40, 40]], "beyond 131072 pixels"),
    ([[10, 10, HUGE, 10, 40, 40]], "beyond 131072 pixels"),
    ([[0, 0, 96, 96] * 100_000], "outline of more than"),
    ([[10, 10, 40, 10, 40, 40, 5]], "7 coordinates, expected an even number"),
    ([[]], "a polygon of 0 points, expected at least 3"),
    ([[10, 10]], "a polygon of 1 points"),
    ([[10, 10, 40, 40]], "a polygon of 2 points"),
    ({"size": [96, 96], "counts": [0, 9000]}, "sum to 9000, expected height x width = 96 x 96 = 9216"),
    ({"size": [96, 96], "counts": []}, "sum to 0"),
    ({"size": [96, 96], "counts": [-1, 9217]}, "a run length of -1"),
    ({"size": [96, 96], "counts": [1.5, 9214.5]}, "a run length of 1.5"),
    ({"size": [96, 96], "counts": [True, 9215]}, "a run length of True"),
    ({"size": [96, 96], "counts": [NAN]}, "a run length of nan"),
    ({"size": [96, 96], "counts": [2**64]}, "sum to 18446744073709551616"),
    ({"size": [96, 96], "counts": None}, "run lengths of null"),
    ({"size": [96, 96], "counts": ""}, "has no run lengths"),
    ({"size": [96, 96], "counts": "é"}, "no ASCII text"),
    ({"size": [96, 96], "counts": "~~"}, "characters that COCO's compressed form does not have"),
    ({"size": [96, 96], "counts": "kP61o21O1O"}, "sum to 6459"),
    ({"size": [96, 96], "counts": "ooo"}, "cut short"),
    ({"size": [96, 96], "counts": "o" * 100_000 + "0"}, "too many digits"),
    ({"size": [96, 48], "counts": "0"}, "a mask of size [96, 48]"),
    ({"size": [10**9, 10**9], "counts": "0"}, "a mask of size [1000000000, 1000000000]"),
    ({"size": None, "counts": "0"}, "a mask of size null"),
    ({"size": "96", "counts": "0"}, "a mask of size '96'"),
]


@pytest.mark.parametrize(("mask", "message"), BAD_MASKS, ids=[message for _, message in BAD_MASKS])
def test_bad_masks(mask: object, message: str, truth: Content, tmp_path: Path) -> None:
    results = perfect(truth)
    results[3]["segmentation"] = mask
    with pytest.raises(D2ZeroError) as caught:
        metrics(truth, results, tmp_path)
    assert "found.json: detection number 3 " in str(caught.value) and message in str(caught.value)
    truth["annotations"][2]["segmentation"] = mask
    name = truth["annotations"][2]["id"]
    with pytest.raises(D2ZeroError) as caught:
        read_coco(written(truth, tmp_path))
    assert f"annotations cannot be used: annotation {name} has " in str(caught.value) and message in str(caught.value)
    left = read_coco(tmp_path / "truth.json", leave_out=True)
    assert left.left_out.count == 1 and str(name) in left.left_out.first[0]
    assert sum(map(len, left.annotations.values())) == len(truth["annotations"]) - 1


@pytest.mark.parametrize(
    "mask",
    [
        [[10.0, 10, 40, 10, 40, 40]],
        [[10, 10, 40, 40], [10, 10, 40, 10, 40, 40], []],  # a stray line beside it encloses nothing
        [[-50, -50, 200, -50, 200, 200, -50, 200]],
        {"size": [96.0, 96], "counts": [900, 30, 66, 0, 0, 30, 8190]},
        {"size": [96, 96], "counts": [9216.0]},
    ],
)
def test_masks_with_one_meaning(mask: Any, truth: Content, tmp_path: Path) -> None:
    if isinstance(mask, dict):
        columns = np.zeros(96 * 96, bool)
        if len(mask["counts"]) > 1:
            columns[900:930] = columns[996:1026] = True
        expected = columns.reshape(96, 96).T
    else:
        whole = [polygon for polygon in mask if len(polygon) > 4]
        expected = coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects(whole, 96, 96))).astype(bool)
    np.testing.assert_array_equal(decoded(mask, (96, 96)), expected)
    truth["annotations"][2] = {**truth["annotations"][2], "segmentation": mask, "area": None, "bbox": None}
    found = metrics(truth, perfect(truth), tmp_path)
    assert found["segm"]["ap50"] == pytest.approx(100) or not expected.any()


@pytest.mark.parametrize("value", [None, [], "", "x", {}, [1, 2], [1, 2, 3, None], [1, 2, 3, NAN], [1, 2, 3, 1e300], 5])
def test_boxes_and_areas_come_from_the_mask(value: object, truth: Content, tmp_path: Path) -> None:
    expected = metrics(truth, perfect(truth), tmp_path)
    assert expected["bbox"]["ap"] == expected["segm"]["ap"] == pytest.approx(100)
    changed = copy.deepcopy(truth)
    for entry in changed["annotations"]:
        entry["bbox"], entry["area"] = value, -1 if value == 5 else value
    assert metrics(changed, perfect(changed), tmp_path) == expected


@pytest.mark.parametrize("value", [None, "0", 0.0, False, "", "false"])
def test_flags_of_one_meaning(value: object, truth: Content, tmp_path: Path) -> None:
    expected = metrics(truth, perfect(truth), tmp_path)
    for entry in truth["annotations"]:
        entry["iscrowd"] = value
    assert metrics(truth, perfect(truth), tmp_path) == expected
    truth["annotations"][0]["iscrowd"] = "1"
    assert metrics(truth, perfect(truth), tmp_path)["annotations"] == expected["annotations"] - 1


def renumbered(content: Content, part: str, key: str, change: Callable[[int], Any]) -> Content:
    content = copy.deepcopy(content)
    for entry in content[part]:
        entry["id"] = change(entry["id"])
    for entry in content["annotations"]:
        entry[key] = change(entry[key])
    return content


@pytest.mark.parametrize(("part", "key"), [("categories", "category_id"), ("images", "image_id")])
@pytest.mark.parametrize("change", [str, float, lambda number: -number], ids=["text", "float", "negative"])
def test_consistent_ids_of_any_kind(
    part: str, key: str, change: Callable[[int], Any], truth: Content, tmp_path: Path
) -> None:
    expected = metrics(truth, perfect(truth), tmp_path)
    changed = renumbered(truth, part, key, change)
    assert metrics(changed, perfect(changed), tmp_path) == expected


@pytest.mark.parametrize("change", [str, lambda number: -number], ids=["text", "negative"])
def test_a_model_is_evaluated_with_ids_of_any_kind(
    change: Callable[[int], Any], truth: Content, small_model: D2Zero, shapes_data: Path, tmp_path: Path
) -> None:
    found = []
    changed = renumbered(renumbered(truth, "categories", "category_id", change), "images", "image_id", change)
    for content in (truth, changed):
        file = written(content, tmp_path)
        run = EvaluationRun(
            small_model.segmenter(), read_coco(file), shapes_data / "val", tmp_path, [Mode.GZSIS], limit=2
        )
        found.append(run.run()[Mode.GZSIS])
        assert run.detections(Mode.GZSIS, run.image_ids[:1])
    for summary in found:
        assert summary["detections"] == found[0]["detections"] > 100
        assert summary["segm"]["recall40"] == found[0]["segm"]["recall40"]


BAD_ENTRIES = [
    (("annotations", "image_id"), [1], "has the image_id [1], expected a whole number or text"),
    (("annotations", "image_id"), True, "has the image_id True"),
    (("annotations", "image_id"), 5, "is of image 5, which the file does not list"),
    (("annotations", "image_id"), "1000001", "is of image '1000001' (a text), which the file lists as a number"),
    (("annotations", "category_id"), None, "has the category_id null"),
    (("annotations", "category_id"), 1.5, "has the category_id 1.5"),
    (("annotations", "category_id"), NAN, "has the category_id nan"),
    (("annotations", "category_id"), 999, "is of category 999, which the file does not list"),
    (("annotations", "category_id"), "16", "is of category '16' (a text), which the file lists as a number"),
    (("annotations", "iscrowd"), 2, "has iscrowd 2, expected 0 or 1"),
    (("annotations", "iscrowd"), [], "has iscrowd []"),
    (("images", "id"), None, "'images' has the id null"),
    (("images", "id"), {}, "'images' has the id {}"),
    (("images", "id"), "1000001", "ids of 'images' are partly texts ('1000001') and numbers (1000002)"),
    (("images", "id"), 1000002, "lists two images with the id 1000002: '1000001.png' and '1000002.png'"),
    (("images", "height"), 0, "a size of 0 x 96"),
    (("images", "height"), "96", "a size of '96' x 96, expected positive whole numbers"),
    (("images", "height"), True, "a size of True x 96"),
    (("images", "height"), NAN, "a size of nan x 96"),
    (("images", "width"), 10**9, f"more than {MAX_PIXELS} pixels"),
    (("images", "file_name"), 5, "has the file_name 5, expected text"),
    (("images", "file_name"), "", "has the file_name '', expected text"),
    (("images", "file_name"), "a\0.png", "a character that no name can have"),
    (("images", "file_name"), "\ud800.png", "a character that no name can have"),
    (("categories", "id"), [1], "'categories' has the id [1]"),
    (("categories", "id"), "1", "ids of 'categories' are partly texts ('1') and numbers (2)"),
    (("categories", "id"), 2, "categories of different names with one id: 2"),
    (("categories", "name"), None, "has the name null, expected text"),
    (("categories", "name"), "red square", "lists two categories called 'red square': ids 1 and 2"),
]


@pytest.mark.parametrize(("place", "value", "message"), BAD_ENTRIES, ids=[message for *_, message in BAD_ENTRIES])
def test_bad_entries(place: tuple[str, str], value: object, message: str, truth: Content, tmp_path: Path) -> None:
    truth[place[0]][0][place[1]] = value
    path = written(truth, tmp_path)
    with pytest.raises(D2ZeroError) as caught:
        read_coco(path)
    assert message in str(caught.value) and "truth.json" in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(D2ZeroError), open_coco(path):
        pass
    if place[0] == "annotations":
        left = read_coco(path, leave_out=True)
        assert left.left_out.count == 1 and message in str(left.left_out)
        assert sum(map(len, left.annotations.values())) == len(truth["annotations"]) - 1
    else:  # masks of a photo that is not the one they were drawn on cannot be left out one by one
        with pytest.raises(D2ZeroError):
            read_coco(path, leave_out=True)


@pytest.mark.parametrize("part", ["images", "annotations", "categories"])
@pytest.mark.parametrize("value", [None, 3, "x", []])
def test_entries_that_are_no_objects(part: str, value: object, truth: Content, tmp_path: Path) -> None:
    truth[part][0] = value
    with pytest.raises(D2ZeroError, match="expected an object with"):
        read_coco(written(truth, tmp_path))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text[:-1] + ',"annotations": []}', "has two parts called 'annotations'"),
        (lambda text: text[:-1] + ',"images": []}', "has two parts called 'images'"),
        (lambda _: "", "Expecting value at byte 0"),
        (lambda _: "null", "needs the lists images, annotations, categories"),
        (lambda _: "[]", "needs the lists"),
        (lambda _: "{}", "needs the lists"),
        (lambda _: '{"images": {}, "annotations": [], "categories": []}', "needs the lists"),
        (lambda _: "{1: 2}", "Expecting a key in double quotes at byte 1"),
        (lambda _: "[" * 100_000, "too long or nested too deep"),
        (lambda text: text[:-1] + ',"x": ' + "1" * 5000 + "}", "too long or nested too deep"),
    ],
)
def test_files_that_are_wrong_as_a_whole(
    change: Callable[[str], str], message: str, truth: Content, tmp_path: Path
) -> None:
    path = tmp_path / "truth.json"
    path.write_text(change(json.dumps(truth)))
    with pytest.raises(D2ZeroError, match=r"truth\.json") as caught:
        read_coco(path)
    assert message in str(caught.value)


def test_encodings(truth: Content, tmp_path: Path) -> None:
    expected = metrics(truth, perfect(truth), tmp_path)
    path, found = tmp_path / "truth.json", tmp_path / "found.json"
    for file in (path, found):
        file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    with open_coco(path) as annotations, open_results(found, annotations) as entries:
        assert score(annotations, entries, (), Mode.GZSIS) == expected
    path.write_text(json.dumps(truth), encoding="utf-16")
    with pytest.raises(D2ZeroError, match="is in UTF-16 or UTF-32, expected UTF-8"):
        read_coco(path)


def test_an_image_that_is_listed_twice_alike_is_one(truth: Content, tmp_path: Path) -> None:
    expected = metrics(truth, perfect(truth), tmp_path)
    truth["images"].append(dict(truth["images"][0]))
    assert metrics(truth, perfect(truth), tmp_path) == expected


def test_annotations_before_images(truth: Content, tmp_path: Path) -> None:
    expected = metrics(truth, perfect(truth), tmp_path)
    turned = {part: truth[part] for part in ("categories", "annotations", "images")}
    assert metrics(turned, perfect(truth), tmp_path) == expected
    turned["annotations"][0]["segmentation"] = {"size": [5, 5], "counts": "i0"}
    with pytest.raises(D2ZeroError, match=r"a mask of size \[5, 5\], its image has"):
        read_coco(written(turned, tmp_path))


@pytest.mark.parametrize(
    "mask",
    [
        [[10, 10, 10, 10, 10, 10]],
        [[10, 10, 20, 10, 30, 10]],
        [[-90, -90, -10, -90, -10, -10]],
        [[200, 10, 290, 10, 290, 90]],
        {"size": [96, 96], "counts": [9216]},
        {"size": [96, 96], "counts": "PP9"},
    ],
)
def test_masks_of_no_pixel_count_as_in_pycocotools(
    mask: Any, truth: Content, shapes_data: Path, tmp_path: Path, command: Command
) -> None:
    """COCO's own file has such polygons: training leaves them out, evaluation keeps and names them."""
    assert not decoded(mask, (96, 96)).any()
    whole = metrics(truth, perfect(truth), tmp_path)
    results = written(perfect(truth), tmp_path, "found.json")
    truth["annotations"][2]["segmentation"] = mask
    name = truth["annotations"][2]["id"]
    path = written(truth, tmp_path)
    assert read_coco(path).without_pixels == [name]
    assert f"annotation {name} has a mask of no pixel" in str(read_coco(path, leave_out=True).left_out)
    outcome = command(
        "eval", "--detections", results, "--annotations", path, "-v", shapes_data / "vocabulary.npz",
        "--json", tmp_path / "out.json",
    )  # fmt: skip
    assert outcome.code == 0 and f"1 annotations of truth.json have masks of no pixel (ids {name})" in outcome.err
    counted = json.loads((tmp_path / "out.json").read_text())
    assert counted["annotations"] == whole["annotations"] and counted["segm"]["ap"] < whole["segm"]["ap"]


def test_training_leaves_out_annotations_alone(shapes_data: Path, tmp_path: Path, command: Command) -> None:
    """An image whose annotations are all left out goes, as one with only crowds does; the others keep their masks."""
    content = json.loads((shapes_data / SEEN).read_text())
    first, second = (image["id"] for image in content["images"][:2])
    bad = 0
    for entry in content["annotations"]:
        others = sum(other["image_id"] == entry["image_id"] for other in content["annotations"])
        if entry["image_id"] == first or (entry["image_id"] == second and others > 1 and not bad % 2):
            entry["segmentation"] = [[10, 10, 40, 40]]
            bad += 1
    path = written(content, tmp_path)
    words = Vocabulary.load(shapes_data / "vocabulary.npz")
    data = TrainingSet(
        read_coco(path, leave_out=True), shapes_data / "train", words, AugmentConfig(size=96, scale_range=(1.0, 1.0))
    )
    assert first not in data.image_ids and len(data) == 47 and data.annotations.left_out.count == bad
    assert not data[SampleKey(0, 0)].problems
    outcome = command(
        "train", "--preset", "shapes", "--data", shapes_data, "--annotations", path, "--images", shapes_data / "train",
        "-v", shapes_data / "vocabulary.npz", "-o", tmp_path / "run", "--device", "cpu", "--set", "steps=1",
        "--set", "batch_size=2", "--set", "picture_every=0",
    )  # fmt: skip
    assert outcome.code == 0, outcome.err
    told = f"warning: truth.json: {bad} of {len(content['annotations'])} annotations cannot be used: annotation "
    assert outcome.err.count(told) == 2 and "a polygon of 2 points" in outcome.err  # at the beginning and at the end


def test_a_file_is_refused_before_any_image_and_its_repair_keeps_detections(
    truth: Content, small_model: D2Zero, shapes_data: Path, tmp_path: Path, command: Command
) -> None:
    checkpoint = save_model(small_model, tmp_path / "m.safetensors")
    common = ("--images", shapes_data / "val", "-o", tmp_path / "out", "--device", "cpu")
    good = truth["annotations"][2]["segmentation"]
    truth["annotations"][2]["segmentation"] = [[10, 10, 40, 40]]
    path = written(truth, tmp_path)
    outcome = command("eval", checkpoint, "--annotations", path, *common)
    assert outcome.code == 2 and outcome.err.count("\n") == 1 and not (tmp_path / "out").exists()
    for mask in ([[10, 10, 40, 10, 40, 40]], good):
        truth["annotations"][2]["segmentation"] = mask
        outcome = command("eval", checkpoint, "--annotations", written(truth, tmp_path), *common)
        assert outcome.code == 0, outcome.err
    assert "4 of 4 images were evaluated before" in outcome.err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_id": "1000001"}, "is of image '1000001' (a text), which truth.json lists as a number"),
        ({"image_id": [1]}, "has the image_id [1]"),
        ({"category_id": {}}, "has the category_id {}"),
        ({"category_id": "16"}, "is of category '16' (a text), which truth.json lists as a number"),
        ({"score": "0.5"}, "needs a finite score, got '0.5'"),
        ({"score": True}, "needs a finite score, got True"),
        ({"score": HUGE}, "needs a finite score"),
        ({"bbox": [1, 2, 3, NAN]}, "needs a bbox"),
    ],
)
def test_results_that_are_refused(change: Content, message: str, truth: Content, tmp_path: Path) -> None:
    results = perfect(truth)
    results[1] |= change
    with pytest.raises(D2ZeroError) as caught:
        metrics(truth, results, tmp_path)
    assert "found.json: detection number 1 " in str(caught.value) and message in str(caught.value)


@pytest.mark.parametrize("box", [None, [], ""])
def test_results_in_every_form_of_coco(box: object, truth: Content, tmp_path: Path) -> None:
    """Without boxes, with uncompressed run lengths, with polygons, with whole numbers as 3.0."""
    results = perfect(truth)
    expected = metrics(truth, results, tmp_path)
    for entry in results:
        flat = rle.decode(entry["segmentation"]).T.ravel()
        changes = np.flatnonzero(np.diff(flat, prepend=False))
        entry["segmentation"] = {
            "size": [96, 96], "counts": np.diff(changes, prepend=0, append=flat.size).tolist()
        }  # fmt: skip
        entry |= {"image_id": float(entry["image_id"]), "bbox": box}
    assert metrics(truth, results, tmp_path) == expected
    truth["annotations"][0]["segmentation"] = results[0]["segmentation"] = [[10, 10, 40, 10, 40, 40]]
    truth["annotations"][0]["bbox"] = None
    assert metrics(truth, results, tmp_path)["bbox"]["ap"] == pytest.approx(100)


@pytest.mark.parametrize("number", ["01", "02", "03", "04", "06", "07", "08"])
def test_small_inputs_that_failed(number: str, shared: Path, tmp_path: Path, command: Command) -> None:
    """Every annotation or result file of the shared cases ends in metrics or in one line."""
    folder = next((shared / "cases").glob(f"{number}-*"), None)
    if folder is None:
        pytest.skip("needs ../shared/cases")
    good = {"03", "07"}
    for file in sorted(folder.glob("*.json")):
        if file.name == "train.json":
            continue
        files = ("--detections", file, "--annotations", shared / "cases/_shared/gt.json")
        if number != "08":
            files = ("--detections", shared / "cases/_shared/results.json", "--annotations", file)
        outcome = command("eval", *files, "-v", shared / "cases/_shared/vocabulary.npz")
        assert outcome.code == 0 if number in good else outcome.code in (0, 2), (file, outcome.err)
        assert outcome.err.count("error: ") == outcome.err.count("\n") == (outcome.code == 2), outcome.err
