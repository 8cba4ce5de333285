"""What `predict` writes is read by `eval --detections` and by pycocotools."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Outcome

coco = pytest.importorskip("pycocotools.coco")
COCOeval = pytest.importorskip("pycocotools.cocoeval").COCOeval

Command = Callable[..., Outcome]


def test_predict_writes_what_eval_and_pycocotools_read(
    exported: Path, shapes_data: Path, tmp_path: Path, command: Command
) -> None:
    """The same figures from `eval` with the model, from `eval --detections`, and from pycocotools."""
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
    assert len(plain.anns) == 400 and len(plain.imgs) == 4
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
