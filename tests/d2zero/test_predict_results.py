"""What `predict` writes is read by `eval --detections` and by pycocotools."""

import json
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from commands import Command

from d2zero.cli.results import CocoWriter, picture_name
from d2zero_runtime import D2ZeroError, Detections
from d2zero_runtime.masks import rle

coco = pytest.importorskip("pycocotools.coco")
COCOeval = pytest.importorskip("pycocotools.cocoeval").COCOeval


def test_predict_writes_what_eval_and_pycocotools_read(
    exported: Path, shapes_data: Path, tmp_path: Path, command: Command
) -> None:
    """The same metrics from `eval` with the model, from `eval --detections`, and from pycocotools."""
    truth = json.loads((shapes_data / "annotations/instances_val_gzsi_shapes.json").read_text())
    truth["images"] = truth["images"][:4]
    ids = {image["id"] for image in truth["images"]}
    truth["annotations"] = [entry for entry in truth["annotations"] if entry["image_id"] in ids]
    truth["images"].reverse()  # ids are not the order of the files
    del truth["categories"][30:]  # classes that are found and not evaluated
    listed = {category["id"] for category in truth["categories"]}
    truth["annotations"] = [entry for entry in truth["annotations"] if entry["category_id"] in listed]
    path, photos = tmp_path / "truth.json", tmp_path / "photos"
    path.write_text(json.dumps(truth))
    photos.mkdir()
    for image in truth["images"]:
        (photos / image["file_name"]).symlink_to(shapes_data / "val" / image["file_name"])
    made = ("predict", photos, "-m", exported, "-o", tmp_path / "found", "--no-pictures", "--score", "0")
    outcome = command(*made, "--results-for", path)
    assert outcome.code == 0, outcome.err
    plain = coco.COCO(str(tmp_path / "found/detections.json"))
    assert 300 < len(plain.anns) <= 400 and len(plain.imgs) == 4  # of 100 per image, those that have a pixel
    for entry in plain.anns.values():
        assert entry["iscrowd"] == 0 and entry["area"] == coco.maskUtils.area(entry["segmentation"])
    results = tmp_path / "found/results.json"
    words = ("-v", shapes_data / "vocabulary.npz")
    outcome = command(
        "eval", "--detections", results, "--annotations", path, *words, "--json", tmp_path / "theirs.json"
    )
    assert outcome.code == 0, outcome.err
    outcome = command(
        "eval", exported, "--annotations", path, "--images", photos, "-o", tmp_path / "eval",
        "--json", tmp_path / "ours.json",
    )  # fmt: skip
    assert outcome.code == 0, outcome.err
    ours, theirs = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("ours", "theirs"))
    assert ours["segm"] == theirs["segm"] and ours["bbox"] == theirs["bbox"] and ours["segm"]["ap"] > 20
    ground = coco.COCO(str(path))
    for kind in ("segm", "bbox"):
        judged = COCOeval(ground, ground.loadRes(str(results)), kind)
        judged.evaluate()
        judged.accumulate()
        judged.summarize()
        assert judged.stats[0] * 100 == pytest.approx(ours[kind]["ap"])
    outcome = command("eval", "--detections", tmp_path / "found/detections.json", "--annotations", path, *words)
    assert outcome.code == 2 and "`d2zero predict --results-for ANNOTATIONS` writes one" in outcome.err
    truth["images"][0]["file_name"] = "other.png"
    path.write_text(json.dumps(truth))
    outcome = command(*made, "--results-for", path)
    assert outcome.code == 2 and "lists 1 of 4 files not at all or several times" in outcome.err
    assert not [entry.name for entry in (tmp_path / "found").iterdir() if entry.name.startswith(".")]


def instances(count: int) -> Detections:
    mask = np.zeros((40, 60), bool)
    mask[5:20, 5:30] = True
    return Detections(
        boxes=np.tile(np.array([[5, 5, 30, 20]], np.float32), (count, 1)),
        scores=np.linspace(1, 0.5, count).astype(np.float32),
        class_ids=np.zeros(count, np.int64),
        names=("cat",) * count,
        seen=np.ones(count, bool),
        masks=(rle.encode(mask),) * count,
        image_size=(40, 60),
    )


def test_a_full_disk_leaves_what_was_written_as_valid_json(tmp_path: Path) -> None:
    resource = pytest.importorskip("resource")
    path, before = tmp_path / "detections.json", resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        with (
            pytest.raises(D2ZeroError, match=r"cannot write .*detections\.json"),
            CocoWriter(path, ("cat",)) as written,
        ):
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
            for number in range(100):
                written.add(f"{number}.jpg", instances(3))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    content = json.loads(path.read_text())
    assert content["categories"] and 10 < len(content["annotations"]) < 300
    assert [entry["id"] for entry in content["annotations"]] == list(range(1, len(content["annotations"]) + 1))
    assert [entry.name for entry in tmp_path.iterdir()] == ["detections.json"]


def test_names_of_pictures_fit_a_folder() -> None:
    for stem in ("x" * 250, "é" * 120, "猫" * 80):
        name = picture_name(7, Path(f"{stem}.png"))
        assert len(name.encode()) <= 255 and name.startswith("00007-") and name.endswith(".jpg")


def test_duplicates_are_found_by_masks_in_their_boxes() -> None:
    found = instances(2)
    assert isinstance(found.masks, tuple)
    moved = np.zeros((40, 60), bool)
    moved[5:20, 20:45] = True
    far = replace(
        instances(3),
        masks=(*found.masks, rle.encode(moved)),
        boxes=np.array([[5, 5, 30, 20]] * 2 + [[20, 5, 45, 20]], np.float32),
    )
    assert len(far.without_duplicates()) == 2 and len(far.without_duplicates(iou=0.1)) == 1
    assert len(replace(far, masks=None).without_duplicates()) == 2
    large = replace(
        found, masks=tuple(rle.encode_window(np.ones((9, 9), bool), 5, 5, 6000, 8000) for _ in range(2)),
        image_size=(6000, 8000),
    )  # fmt: skip
    assert len(large.without_duplicates()) == 1
