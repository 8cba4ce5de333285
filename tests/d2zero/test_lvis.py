"""Files of LVIS and with names and ids as of Open Images: read, split, checked, evaluated by LVIS's rules."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from commands import Command

from d2zero.checkpoints.files import save_model
from d2zero.data.augment import AugmentConfig
from d2zero.data.coco import image_path, missing_images, open_coco, read_coco, read_listed_image
from d2zero.data.splits import Split, find_split
from d2zero.data.training_set import SampleKey, TrainingSet
from d2zero.evaluation.metrics import score_detections
from d2zero.model import D2Zero
from d2zero_runtime import D2ZeroError, Mode, Vocabulary

lvis_files = pytest.importorskip("lvis_files")  # which needs pycocotools

Content = dict[str, Any]


@pytest.fixture(scope="module")
def content(shared: Path) -> Content:
    return lvis_files.lvis_form(shared / "data/coco_tiny/annotations/instances_val2017.json", 16)


@pytest.fixture
def lvis(content: Content, tmp_path: Path) -> Path:
    return written(content, tmp_path)


def written(content: object, tmp_path: Path, name: str = "lvis_v1_val.json") -> Path:
    (tmp_path / name).write_text(json.dumps(content))
    return tmp_path / name


def test_images_are_found_by_their_address(shared: Path, lvis: Path) -> None:
    photos = shared / "data/coco_tiny"
    with open_coco(lvis) as truth:
        first = next(iter(truth.images.values()))
        assert first["file_name"] == first["coco_url"].removeprefix("http://images.cocodataset.org/")
        for folder in (photos, photos / "val2017"):
            assert image_path(folder, first).is_file() and not missing_images(truth, folder, truth.images)
            assert read_listed_image(truth, folder, first["id"]).shape == (first["height"], first["width"], 3)
        assert len(missing_images(truth, photos / "train2017", truth.images)) == len(truth.images)
        assert image_path(photos / "x", {"file_name": "val2017/1.jpg"}) == photos / "x/val2017/1.jpg"


def test_frequencies_are_groups_and_crowds_may_be_missing(lvis: Path) -> None:
    truth = read_coco(lvis)
    assert {group: len(names) for group, names in truth.groups.items()} == {"rare": 26, "common": 27, "frequent": 27}
    assert truth.is_federated and "hot_dog_(thing)" in truth.categories
    assert {entry["iscrowd"] for entries in truth.annotations.values() for entry in entries} == {0}


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("images", {"coco_url": 3}, "has the coco_url 3, expected an address"),
        ("images", {"coco_url": "http://images/"}, "has the coco_url 'http://images/', expected an address"),
        ("images", {"neg_category_ids": None}, "has the neg_category_ids null, expected a list of category ids"),
        ("images", {"neg_category_ids": [1.5]}, r"has the neg_category_ids \[1.5\], expected a list"),
        ("images", {"neg_category_ids": ["1"]}, r"in neg_category_ids the category '1' \(a text\), which the file"),
        ("images", {"not_exhaustive_category_ids": [999]}, "not_exhaustive_category_ids the category 999, which"),
        ("categories", {"frequency": "x"}, "category 1 has the frequency 'x', expected r, c, f"),
    ],
)
def test_values_that_lvis_does_not_have(
    part: str, change: Content, message: str, content: Content, tmp_path: Path
) -> None:
    entries = [{**content[part][0], **change}, *content[part][1:]]
    path = written({**content, part: entries}, tmp_path)
    with pytest.raises(D2ZeroError, match=f"lvis_v1_val.json: .*{message}"):
        read_coco(path)
    with pytest.raises(D2ZeroError, match=message), open_coco(path):
        pass


def test_either_all_images_say_what_was_looked_for_or_none(content: Content, tmp_path: Path) -> None:
    images = [{**content["images"][0]}, *content["images"][1:]]
    del images[0]["neg_category_ids"]
    with pytest.raises(D2ZeroError, match=f"image {images[0]['id']} lacks neg_category_ids, which other images have"):
        read_coco(written({**content, "images": images}, tmp_path))


def test_federated_metrics_equal_a_plain_evaluation(
    content: Content, lvis: Path, tmp_path: Path, command: Command
) -> None:
    found = lvis_files.guesses(content)
    results = written(found, tmp_path, "found.json")
    groups = read_coco(lvis).groups
    split = Split.without("own", list(read_coco(lvis).categories), groups["rare"]).save(tmp_path / "own.yaml")
    outcome = command(
        "eval", "--detections", results, "--annotations", lvis, "--split", split, "--json", tmp_path / "m.json"
    )
    assert outcome.code == 0, outcome.err
    assert "groups of classes" in outcome.out and "frequent" in outcome.out
    ours = json.loads((tmp_path / "m.json").read_text())
    assert f"{ours['unverified']} of {len(found)} detections" in outcome.err and ours["unverified"] > 20
    names = {entry["id"]: entry["name"] for entry in content["categories"]}
    for kind in ("segm", "bbox"):
        plain = {names[number]: values for number, values in lvis_files.plain_lvis(content, found, kind).items()}
        rows = ours[kind]["per_class"]
        assert rows.keys() == plain.keys()
        for name, values in plain.items():
            assert rows[name]["ap"] == pytest.approx(np.mean(values), abs=1e-9), name
            assert rows[name]["ap50"] == pytest.approx(values[0], abs=1e-9), name
        assert ours[kind]["ap"] == pytest.approx(np.mean(list(plain.values())), abs=1e-9)
        for group, members in groups.items():
            values = [np.mean(plain[name]) for name in members if name in plain]
            assert ours[kind]["groups"][group]["ap"] == pytest.approx(np.mean(values), abs=1e-9)
            assert ours[kind]["groups"][group]["classes"] == len(values)
        assert ours[kind]["unseen_ap"] == ours[kind]["groups"]["rare"]["ap"]


def test_rules_matter_and_hold_only_where_images_have_them(content: Content, lvis: Path, tmp_path: Path) -> None:
    found = lvis_files.guesses(content)
    federated = score_detections(read_coco(lvis), found, (), Mode.GZSIS)
    images = [{k: v for k, v in entry.items() if not k.endswith("category_ids")} for entry in content["images"]]
    plain = score_detections(read_coco(written({**content, "images": images}, tmp_path)), found, (), Mode.GZSIS)
    assert federated["segm"]["ap"] > plain["segm"]["ap"] and "unverified" not in plain


def test_groups_of_a_split_come_before_those_of_the_file(lvis: Path, tmp_path: Path, command: Command) -> None:
    names = tuple(read_coco(lvis).categories)
    Split("own", names, (), {"mine": names[:2]}).save(tmp_path / "own.json")
    results = written([], tmp_path, "found.json")
    flags = ("--annotations", lvis, "--split", tmp_path / "own.json", "--json", tmp_path / "m.json")
    assert command("eval", "--detections", results, *flags).code == 0
    assert list(json.loads((tmp_path / "m.json").read_text())["segm"]["groups"]) == ["mine"]


def test_a_split_from_frequencies(shared: Path, lvis: Path, tmp_path: Path, command: Command) -> None:
    flags = ("--unseen-frequency", "rare", "--name", "lvis", "-o", tmp_path / "out")
    outcome = command("data", "split", lvis, *flags)
    assert outcome.code == 0, outcome.err
    split, source = find_split(tmp_path / "out/lvis.yaml"), read_coco(lvis)
    assert split.unseen == source.groups["rare"] and split.groups == source.groups
    assert set(split.seen) == {*source.groups["common"], *source.groups["frequent"]}
    train, unseen = (read_coco(tmp_path / f"out/lvis_v1_val_{part}_lvis.json") for part in ("seen", "unseen"))
    assert train.is_federated and train.groups == {group: source.groups[group] for group in ("common", "frequent")}
    assert unseen.groups == {"rare": source.groups["rare"]}
    data = TrainingSet(train, shared / "data/coco_tiny", split.as_vocabulary(), AugmentConfig(size=64))
    assert not data.missing and len(data[SampleKey(0, 0)].targets.labels)
    for other in ("often", ""):
        outcome = command("data", "split", lvis, "--unseen-frequency", other, "-o", tmp_path / "no")
        assert outcome.code == 2 and "must be one of rare, common, frequent" in outcome.err
    coco = shared / "data/coco_tiny/annotations/instances_val2017.json"
    outcome = command("data", "split", coco, "--unseen-frequency", "rare", "-o", tmp_path / "no")
    assert outcome.code == 2 and "does not say how frequent its classes are" in outcome.err


NAMES = {
    "/m/01g317": "Person",
    "/m/0dt3t": "Fork, knife",
    "/m/07cmd": "Tank / armoured: vehicle",
    "/m/0k4j": "/m/0k4j",
    "/m/03bt1vf": "- 'no' #1",
}


@pytest.fixture
def open_images(shapes_data: Path, tmp_path: Path) -> Path:
    """Drawn images whose ids are texts, and whose classes are called as in Open Images."""
    content = json.loads((shapes_data / "annotations/instances_val_gzsi_shapes.json").read_text())
    ids = list(NAMES)
    for image in content["images"]:
        image["id"] = f"{image['id']:016x}"
    for entry in content["annotations"]:
        entry |= {"image_id": f"{entry['image_id']:016x}", "category_id": ids[entry["category_id"] % len(ids)]}
    content["categories"] = [{"id": number, "name": name} for number, name in NAMES.items()]
    return written(content, tmp_path, "open.json")


def test_names_and_ids_of_open_images(open_images: Path, shapes_data: Path, tmp_path: Path, command: Command) -> None:
    (tmp_path / "unseen.txt").write_text("Fork, knife\n/m/0k4j\n")
    outcome = command("data", "split", open_images, "--unseen", "Fork, knife", "-o", tmp_path / "out")
    assert outcome.code == 2 and "names with commas ('Fork, knife') are given in a file" in outcome.err
    outcome = command("data", "split", open_images, "--unseen", "/m/0k4j", "-o", tmp_path / "one")
    assert outcome.code == 0 and find_split(tmp_path / "one/own.yaml").unseen == ("/m/0k4j",), outcome.err
    outcome = command("data", "split", open_images, "--unseen", tmp_path / "unseen.txt", "-o", tmp_path / "out")
    assert outcome.code == 0, outcome.err
    split = find_split(tmp_path / "out/own.yaml")
    assert split.unseen == ("Fork, knife", "/m/0k4j") and set(split.names) == set(NAMES.values())
    checked = command("data", "check", open_images, "--images", shapes_data / "val", "--for", "evaluation")
    assert checked.code == 0 and "Tank / armoured: vehicle" in checked.out, checked.err
    results = [
        {**{key: entry[key] for key in ("image_id", "category_id", "segmentation")}, "score": 0.9}
        for entry in json.loads(open_images.read_text())["annotations"]
    ]
    found = written(results, tmp_path, "found.json")
    flags = ("--split", tmp_path / "out/own.yaml", "--json", tmp_path / "m.json", "--per-class")
    outcome = command("eval", "--detections", found, "--annotations", open_images, *flags)
    assert outcome.code == 0 and "Fork, knife" in outcome.out, outcome.err
    assert json.loads((tmp_path / "m.json").read_text())["segm"]["hm_ap50"] == pytest.approx(100)
    words = Vocabulary(
        split.names, np.eye(len(split.names), 300, dtype=np.float32), np.array(split.is_seen(split.names))
    )
    words.save(tmp_path / "v.npz")
    outcome = command("eval", "--detections", found, "--annotations", open_images, "-v", tmp_path / "v.npz")
    assert outcome.code == 0, outcome.err


def test_a_models_metrics_by_the_groups_of_a_split(
    small_model: D2Zero, shapes_data: Path, tmp_path: Path, command: Command
) -> None:
    words, checkpoint = small_model.vocabulary, save_model(small_model, tmp_path / "m.safetensors")
    half = words.names[::2]
    Split("shapes", words.seen_names, words.unseen_names, {"half": half}).save(tmp_path / "half.yaml")
    flags = ("--split", tmp_path / "half.yaml", "--limit", "3", "--device", "cpu", "-o", tmp_path / "o")
    outcome = command("eval", checkpoint, "--data", shapes_data, *flags, "--json", tmp_path / "m.json")
    assert outcome.code == 0, outcome.err
    found = json.loads((tmp_path / "m.json").read_text())["segm"]
    members = [row["ap50"] for name, row in found["per_class"].items() if name in half]
    assert found["groups"]["half"]["classes"] == len(members) > 0
    assert found["groups"]["half"]["ap50"] == pytest.approx(np.mean(members))
