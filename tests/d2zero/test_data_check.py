"""`d2zero data check` finds what is wrong with a data set, and says whether training would refuse it."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from commands import Command
from PIL import Image

from d2zero.data.splits import Split
from d2zero.evaluation.data_check import Options, Purpose, check_data, open_data
from d2zero_runtime import Vocabulary

pytest.importorskip("pycocotools")

Content = dict[str, Any]
SEEN_FILE, MIXED_FILE = "instances_train_seen_shapes.json", "instances_val_gzsi_shapes.json"


class Planted:
    """A copy of the drawn data set, to plant faults in."""

    def __init__(self, source: Path, folder: Path) -> None:
        shutil.copytree(source, folder)
        self.images, self.path = folder / "train", folder / "annotations" / SEEN_FILE
        self.content: Content = json.loads(self.path.read_text())

    @property
    def annotations(self) -> list[Content]:
        return self.content["annotations"]

    def file(self, place: int) -> Path:
        return self.images / self.content["images"][place]["file_name"]

    def save(self) -> None:
        self.path.write_text(json.dumps(self.content))


@pytest.fixture
def planted(shapes_data: Path, tmp_path: Path) -> Planted:
    return Planted(shapes_data, tmp_path / "data")


def findings(planted: Planted, **options: Any) -> dict[str, list[Any]]:
    planted.save()
    with open_data(planted.path) as annotations:
        report = check_data(annotations, planted.images, None, Options(**options))
    return {finding.kind: finding.items for finding in report.findings}


def test_a_sound_data_set(shapes_data: Path, tmp_path: Path, command: Command) -> None:
    outcome = command(
        "data", "check", shapes_data / "annotations" / SEEN_FILE, "--images", shapes_data / "train",
        "-v", shapes_data / "vocabulary.npz", "--json", tmp_path / "o.json", "--sheet", tmp_path / "s.png",
    )  # fmt: skip
    assert outcome.code == 0, outcome.err
    content = json.loads((shapes_data / "annotations" / SEEN_FILE).read_text())
    assert f"48 images, {len(content['annotations'])} instances of 27 classes" in outcome.out
    assert "and 7 more; --json writes all" in outcome.out and "training would take this" in outcome.out
    assert "error:" not in outcome.out and "warning:" not in outcome.out and "everything" in outcome.err
    found = json.loads((tmp_path / "o.json").read_text())
    assert found["images"] == 48 and found["sizes"] == [{"width": 96, "height": 96, "images": 48}]
    names = {entry["id"]: entry["name"] for entry in content["categories"]}
    for row in found["classes"]:
        held = [entry["image_id"] for entry in content["annotations"] if names[entry["category_id"]] == row["name"]]
        assert (row["seen"], row["instances"], row["images"]) == (True, len(held), len(set(held)))
    assert found["small"] + found["medium"] + found["large"] == found["instances"] == len(content["annotations"])
    assert Image.open(tmp_path / "s.png").size[0] > 1000


def corrupt(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-300])


def shrink(file: Path) -> None:
    Image.new("RGB", (40, 50)).save(file)


@pytest.mark.parametrize(("spoil", "by_size"), [(corrupt, False), (shrink, True), (Path.unlink, True)])
def test_image_files_that_cannot_be_used(spoil: Callable[[Path], None], by_size: bool, planted: Planted) -> None:
    spoil(planted.file(3))
    for decode in (True, False):
        found = findings(planted, decode=decode, threads=2)
        problems = found.get("unusable-files", []) + found.get("missing-files", [])
        assert len(problems) == (decode or by_size) and "refused" not in found
        assert all(planted.file(3).name in problem for problem in problems)


def test_annotations_that_look_like_mistakes(planted: Planted) -> None:
    assert not findings(planted)
    first, second, third, fourth, fifth, sixth = planted.annotations[:6]
    x, y, _, height = first["bbox"]
    first["bbox"] = [x, y, 96, height]  # beyond the image
    second["bbox"] = [0, 0, 96, 96]
    planted.annotations.append({**third, "id": 90_001})
    other = next(e["id"] for e in planted.content["categories"] if e["id"] != fourth["category_id"])
    planted.annotations.append({**fourth, "id": 90_002, "category_id": other})
    fifth |= {"segmentation": {"size": [96, 96], "counts": [0, 5, 9211]}, "bbox": [0, 0, 1, 5]}
    sixth["iscrowd"] = 1
    planted.content["images"].append({**planted.content["images"][0], "id": 90_003})
    found = findings(planted)
    assert found["box-outside"] == [first["id"]] and found["box-apart"] == [second["id"]]
    assert found["repeated"] == [90_001] and found["relabelled"] == [90_002] and found["tiny"] == [fifth["id"]]
    assert found["empty"] == [90_003] and found["same-file"] == [planted.file(0).name] and "crowds" in found


def test_annotations_that_cannot_be_used(planted: Planted, command: Command) -> None:
    planted.annotations[2]["segmentation"] = []
    planted.annotations[5]["segmentation"] = {"size": [96, 96], "counts": [9216]}
    planted.save()
    asked = ("data", "check", planted.path, "--images", planted.images)
    outcome = command(*asked)
    assert outcome.code == 0 and "warning: 2 of" in outcome.out and "training leaves them out" in outcome.out
    outcome = command(*asked, "--for", "evaluation")
    assert outcome.code == 1 and "error: " in outcome.out and "evaluation refuses the file" in outcome.out


def test_masks_of_no_pixel_alone_are_kept_by_evaluation(planted: Planted) -> None:
    planted.annotations[5]["segmentation"] = {"size": [96, 96], "counts": [9216]}
    assert findings(planted, purpose=Purpose.EVALUATION)["no-pixel"] == [planted.annotations[5]["id"]]


def test_what_training_refuses(planted: Planted, shapes_data: Path, tmp_path: Path, command: Command) -> None:
    words = ("-v", shapes_data / "vocabulary.npz")
    mixed = shapes_data / "annotations" / MIXED_FILE
    outcome = command("data", "check", mixed, "--images", shapes_data / "val", *words)
    assert outcome.code == 1 and "would not be zero-shot" in outcome.out and "training would refuse" in outcome.out
    outcome = command("data", "check", mixed, "--images", shapes_data / "val", *words, "--for", "evaluation")
    assert outcome.code == 0 and "evaluation would take this" in outcome.out, outcome.out
    assert "unseen: " in outcome.out
    outcome = command("data", "check", planted.path, "--images", tmp_path, *words)
    assert outcome.code == 1 and "none of the 48 images" in outcome.out
    unseen = Vocabulary(("a",), np.ones((1, 4), np.float32), np.zeros(1, bool)).save(tmp_path / "u.npz")
    outcome = command("data", "check", planted.path, "--images", planted.images, "-v", unseen)
    assert outcome.code == 1 and "no seen classes to train on" in outcome.out
    for file in planted.images.iterdir():
        file.write_bytes(b"")
    outcome = command("data", "check", planted.path, "--images", planted.images)
    assert outcome.code == 1 and "error: 48 of 48 image files cannot be used" in outcome.out


def test_classes_without_instances_and_unknown_ones(planted: Planted, tmp_path: Path, command: Command) -> None:
    names = [entry["name"] for entry in planted.content["categories"]]
    Split("own", ("mug", *names[1:]), ("cat",)).save(tmp_path / "own.yaml")
    asked = ("data", "check", planted.path, "--images", planted.images, "--split", tmp_path / "own.yaml")
    outcome = command(*asked, "--json", tmp_path / "o.json")
    assert outcome.code == 0, outcome.out
    found = {entry["kind"]: entry["items"] for entry in json.loads((tmp_path / "o.json").read_text())["findings"]}
    assert found == {"unknown-classes": [names[0]], "classes-without-instances": ["mug"]}
    outcome = command(*asked, "--for", "evaluation")
    assert outcome.code == 1 and f"has classes that the vocabulary lacks: {names[0]}" in outcome.out


def test_what_the_user_can_fix_exits_with_2(shapes_data: Path, tmp_path: Path, command: Command) -> None:
    file, images = shapes_data / "annotations" / SEEN_FILE, shapes_data / "train"
    for flags, message in (
        ((tmp_path / "none.json", "--images", images), "none.json does not exist"),
        ((file, "--images", tmp_path / "none"), "does not exist"),
        ((file, "--images", images, "--split", "x", "-v", "y"), "either --split or --vocabulary"),
        ((file, "--images", images, "--for", "fun"), "--for must be training or evaluation, got 'fun'"),
        ((file, "--images", images, "--sheet", tmp_path / "s.txt"), "--sheet must end in"),
        ((file,), "--images"),
    ):
        outcome = command("data", "check", *flags)
        assert outcome.code == 2 and message in outcome.err and outcome.err.count("\n") == 1, outcome.err


def test_pictures_are_a_function_of_the_seed(shapes_data: Path, tmp_path: Path, command: Command) -> None:
    asked = ("data", "check", shapes_data / "annotations" / SEEN_FILE, "--images", shapes_data / "train", "--fast")
    sheets = []
    for seed in (1, 1, 2):
        assert command(*asked, "--sheet", tmp_path / "s.png", "--seed", seed).code == 0
        sheets.append((tmp_path / "s.png").read_bytes())
    assert sheets[0] == sheets[1] != sheets[2]


def test_sizes_are_those_of_upright_images(planted: Planted) -> None:
    exif = Image.Exif()
    exif[274] = 6  # on its side
    planted.content["images"] = planted.content["images"][:2]
    planted.content["annotations"] = []
    for image, suffix in zip(planted.content["images"], (".jpg", ".png"), strict=True):
        image |= {"file_name": f"turned{suffix}", "width": 30, "height": 50}
        Image.new("RGB", (50, 30)).save(planted.images / image["file_name"], exif=exif)
    for decode in (True, False):
        assert "unusable-files" not in findings(planted, decode=decode)


def test_masks_without_a_pixel_are_left_out_as_training_leaves_them_out(planted: Planted, tmp_path: Path) -> None:
    height, width = (planted.content["images"][0][side] for side in ("height", "width"))
    empty = {"size": [height, width], "counts": [height * width]}
    for entry in planted.annotations:
        entry["segmentation"] = empty
    planted.content["annotations"] = planted.annotations[:5]
    found = findings(planted)
    assert "refused" in found and "no-pixel" in found


def test_a_file_of_unseen_classes_is_drawn(shapes_data: Path, tmp_path: Path, command: Command) -> None:
    outcome = command(
        "data", "check", shapes_data / "annotations/instances_val_unseen_shapes.json", "--images", shapes_data / "val",
        "-v", shapes_data / "vocabulary.npz", "--for", "evaluation", "--sheet", tmp_path / "s.png",
    )  # fmt: skip
    assert outcome.code == 0 and (tmp_path / "s.png").exists(), outcome.err
