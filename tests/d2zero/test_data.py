"""Splits, annotation files, training samples and their order."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from models import published_vocabulary
from PIL import Image
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional as transforms

from d2zero.data.augment import AugmentConfig, JitterOnto, training_transform
from d2zero.data.coco import find_annotations, find_image_folder, read_coco
from d2zero.data.coco_values import decoded
from d2zero.data.shapes import SPLIT, ShapesConfig, draw_image, vocabulary, write_dataset
from d2zero.data.splits import COCO_IDS, find_split
from d2zero.data.training_set import SampleKey, StepSampler, TrainingSet, collate
from d2zero.data.zero_shot import test_part as unseen_part
from d2zero.data.zero_shot import training_part, write_split
from d2zero_runtime import D2ZeroError, Preprocessing, Vocabulary, read_image

COCO_48_17 = find_split("coco-48-17")
COCO_65_15 = find_split("coco-65-15")

AUGMENT = AugmentConfig(size=96, scale_range=(1.0, 1.0))


def test_splits_are_the_published_ones(shared: Path) -> None:
    assert (len(COCO_48_17.seen), len(COCO_48_17.unseen)) == (48, 17)
    assert (len(COCO_65_15.seen), len(COCO_65_15.unseen)) == (65, 15)
    assert len(COCO_IDS) == 80 and COCO_IDS["toothbrush"] == 90
    for split in (COCO_48_17, COCO_65_15):
        assert len(set(split.names)) == len(split.names) and set(split.names) <= COCO_IDS.keys()
    content = json.loads((shared / "reference/evaluation/eval_48_17_gzsi_gt.json").read_text())
    assert tuple(entry["name"] for entry in content["categories"]) == COCO_48_17.names
    assert all(COCO_IDS[entry["name"]] == entry["id"] for entry in content["categories"])


def test_embedding_files_hold_the_same_vector_for_a_name(shared: Path) -> None:
    """Were the order of either split wrong, names would carry different vectors in the two files."""
    left, right = published_vocabulary(shared, "48_17"), published_vocabulary(shared, "65_15")
    for name, row in zip(left.names, left.embeddings, strict=True):
        np.testing.assert_array_equal(row, right.embeddings[right.names.index(name)])


def test_split_names() -> None:
    assert find_split("48_17") is find_split("coco-48-17") is COCO_48_17
    with pytest.raises(D2ZeroError, match=r"coco-48-17, coco-65-15 or a file .*, got '50_50'"):
        find_split("50_50")


def test_split_files_equal_the_recorded_ones(shared: Path, tmp_path: Path) -> None:
    annotations = shared / "data/coco_tiny/annotations"
    train, val = (read_coco(annotations / f"instances_{part}2017.json") for part in ("train", "val"))
    parts = write_split(train, val, COCO_48_17, tmp_path)
    with pytest.raises(D2ZeroError, match=r"exist already; replace them with --force"):
        write_split(train, val, COCO_48_17, tmp_path)
    assert write_split(train, val, COCO_48_17, tmp_path, replace=True) == parts
    assert [part.path.name for part in parts] == [
        "instances_train2017_seen_48_17.json",
        "instances_val2017_gzsi_48_17.json",
        "instances_val2017_unseen_48_17.json",
    ]
    for part, ours in (("gzsi", parts[1]), ("unseen", parts[2])):
        recorded = json.loads((shared / f"reference/evaluation/eval_48_17_{part}_gt.json").read_text())
        found = json.loads(ours.path.read_text())
        for key in ("images", "annotations"):
            assert {e["id"] for e in found[key]} == {e["id"] for e in recorded[key]}
        assert [c["id"] for c in found["categories"]] == [c["id"] for c in recorded["categories"]]


def test_training_files_hold_nothing_unseen(shared: Path) -> None:
    train = read_coco(shared / "data/coco_tiny/annotations/instances_train2017.json")
    for split in (COCO_48_17, COCO_65_15):
        unseen = {COCO_IDS[name] for name in split.unseen}
        content = training_part(train, split)
        assert content["images"] and content["annotations"]
        for entry in content["images"]:
            assert not unseen & {a["category_id"] for a in train.annotations[entry["id"]]}
        tested = unseen_part(train, split, split.unseen)
        assert {e["id"] for e in tested["images"]}.isdisjoint(e["id"] for e in content["images"])


def test_shapes_are_zero_shot_and_composable(shapes_data: Path) -> None:
    train = read_coco(find_annotations(shapes_data, "shapes", "seen"))
    names = {train.names[a["category_id"]] for entries in train.annotations.values() for a in entries}
    assert names <= set(SPLIT.seen)
    for attribute in (0, 1):
        seen = {name.split()[attribute] for name in SPLIT.seen}
        assert {name.split()[attribute] for name in SPLIT.unseen} <= seen
    mixed = read_coco(find_annotations(shapes_data, "shapes", "gzsi"))
    for entries in mixed.annotations.values():
        assert {mixed.names[a["category_id"]] for a in entries} & set(SPLIT.unseen)
    words = Vocabulary.load(shapes_data / "vocabulary.npz")
    assert words.unseen_names == SPLIT.unseen
    np.testing.assert_array_equal(words.embeddings, vocabulary().embeddings)


def test_drawn_masks_fit_the_picture(shapes_data: Path) -> None:
    truth = read_coco(find_annotations(shapes_data, "shapes", "gzsi"))
    folder = find_image_folder(shapes_data, truth.path)
    for image_id, entries in list(truth.annotations.items())[:8]:
        image = read_image(folder / truth.images[image_id]["file_name"]).astype(float)
        masks = [decoded(entry["segmentation"], (96, 96)) for entry in entries]
        assert np.sum(masks, axis=0).max() == 1  # visible parts do not overlap
        for entry, mask in zip(entries, masks, strict=True):
            assert mask.sum() == entry["area"] >= 16
            inside = image[mask].mean(0)
            assert inside.max() - inside.min() > 50  # colourful, as classes are and backgrounds are not


def test_drawing_is_reproducible() -> None:
    config = ShapesConfig()
    left, right = (draw_image(config, SPLIT.seen, np.random.default_rng(5)) for _ in range(2))
    np.testing.assert_array_equal(left[0], right[0])
    hidden = [1 - entry.mask.sum() / entry.area for entry in left[1]]
    assert max(hidden) <= config.max_occlusion


def training_set(data: Path, **options: Any) -> TrainingSet:
    path = find_annotations(data, "shapes", "seen")
    words = Vocabulary.load(data / "vocabulary.npz")
    return TrainingSet(read_coco(path), data / "train", words, AUGMENT, **options)


def test_samples_depend_on_their_key_alone(shapes_data: Path) -> None:
    data = training_set(shapes_data)
    torch.manual_seed(1)
    first = data[SampleKey(3, 17)]
    torch.manual_seed(2)
    again = training_set(shapes_data, cache=True)[SampleKey(3, 17)]
    assert torch.equal(first.image, again.image) and torch.equal(first.targets.masks, again.targets.masks)
    assert any(not torch.equal(first.image, data[SampleKey(3, seed)].image) for seed in range(8))
    assert first.image.dtype == torch.uint8 and first.image.shape == (3, 96, 96)
    assert first.targets.masks.shape == (len(first.targets.labels), 96, 96)


def test_sampling_does_not_touch_the_global_generator(shapes_data: Path) -> None:
    data = training_set(shapes_data)
    torch.manual_seed(1)
    expected = torch.rand(1)
    torch.manual_seed(1)
    _ = data[SampleKey(0, 5)]
    assert torch.equal(torch.rand(1), expected)


def test_bad_files_are_replaced_and_named(shapes_data: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    shutil.copytree(shapes_data, data)
    files = sorted((data / "train").iterdir())
    files[0].unlink()
    files[1].write_bytes(files[1].read_bytes()[:300])
    Image.new("RGB", (40, 40)).save(files[2])
    found = training_set(data)
    assert found.missing == [files[0].name] and len(found) == 47
    batch = collate([found[SampleKey(0, 1)], found[SampleKey(5, 1)]])
    assert batch.file_names == [files[3].name, files[6].name]
    assert len(batch.problems) == 2
    assert files[1].name in batch.problems[0] and "damaged" in batch.problems[0]
    assert "(40, 40)" in batch.problems[1] and "(96, 96)" in batch.problems[1]


def test_a_folder_of_damaged_files_ends_with_an_error(shapes_data: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    shutil.copytree(shapes_data, data)
    for file in (data / "train").iterdir():
        file.write_bytes(b"")
    with pytest.raises(D2ZeroError, match=r"50 images in a row.*not an image"):
        _ = training_set(data)[SampleKey(0, 0)]
    shutil.rmtree(data / "train")
    with pytest.raises(D2ZeroError, match="none of the 48 images"):
        training_set(data)


def test_training_on_unseen_classes_is_refused(shapes_data: Path) -> None:
    words = Vocabulary.load(shapes_data / "vocabulary.npz")
    mixed = read_coco(find_annotations(shapes_data, "shapes", "gzsi"))
    with pytest.raises(D2ZeroError, match="would not be zero-shot"):
        TrainingSet(mixed, shapes_data / "val", words, AUGMENT)
    with pytest.raises(D2ZeroError, match="no instance of the vocabulary's seen classes"):
        others = Vocabulary(("a", "b"), np.eye(2, 4, dtype=np.float32))
        TrainingSet(read_coco(find_annotations(shapes_data, "shapes", "seen")), shapes_data, others, AUGMENT)


def test_order_covers_every_image_once_an_epoch() -> None:
    keys = [key for step in StepSampler(10, 4, seed=1, start=0, stop=5) for key in step]
    assert sorted(key.place for key in keys[:10]) == sorted(key.place for key in keys[10:]) == list(range(10))
    assert [key.place for key in keys[:10]] != [key.place for key in keys[10:]]
    assert len({key.seed for key in keys}) == 20


def test_order_does_not_depend_on_where_it_starts_or_who_reads_it() -> None:
    whole = list(StepSampler(10, 4, seed=1, start=0, stop=6))
    assert list(StepSampler(10, 4, seed=1, start=4, stop=6)) == whole[4:]
    halves = [list(StepSampler(10, 4, 1, 0, 6, rank, 2)) for rank in (0, 1)]
    assert [left + right for left, right in zip(*halves, strict=True)] == whole
    with pytest.raises(D2ZeroError, match="multiple of the 3 processes"):
        StepSampler(10, 4, 1, 0, 6, 0, 3)


@pytest.mark.parametrize("scale", [0.1, 0.37, 0.5, 1.0, 1.3, 1.999])
@pytest.mark.parametrize("side", [(40, 57), (96, 48), (130, 131)])
def test_masks_are_placed_as_torchvision_would(side: tuple[int, int], scale: float) -> None:
    jitter = JitterOnto(96, (scale, scale), 128)
    masks = tv_tensors.Mask((torch.rand(3, *side, generator=torch.Generator().manual_seed(0)) > 0.5).to(torch.uint8))
    torch.manual_seed(int(1000 * scale))
    params = jitter.make_params([masks])
    resized = transforms.resize(masks, list(params["size"]))
    kept = [min(length, 96) for length in params["size"]]
    expected = transforms.crop(resized, params["top"], params["left"], *kept)
    expected = transforms.pad(expected, [0, 0, 96 - kept[1], 96 - kept[0]], fill=0)
    assert expected.any() and torch.equal(jitter.transform(masks, params), expected)


def augmented(config: AugmentConfig, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    image = torch.randint(1, 255, (3, 60, 90), dtype=torch.uint8)
    torch.manual_seed(seed)
    mask = tv_tensors.Mask(torch.ones(1, 60, 90, dtype=torch.uint8))
    found, masks = training_transform(config)(tv_tensors.Image(image), mask)
    return found.as_subclass(torch.Tensor), masks.as_subclass(torch.Tensor)


@pytest.mark.parametrize("scale", [0.2, 0.7, 1.0, 1.6])
def test_scale_jitter_pads_right_and_bottom_or_crops(scale: float) -> None:
    image, mask = augmented(AugmentConfig(size=96, scale_range=(scale, scale)))
    assert image.shape == (3, 96, 96) and mask.shape == (1, 96, 96)
    height, width = min(96, round(64 * scale)), min(96, round(96 * scale))
    assert int(mask.sum()) == height * width and bool(mask[0, :height, :width].all())
    assert bool((image[:, height:] == 128).all()) and bool((image[:, :, width:] == 128).all())


def test_image_and_masks_move_together() -> None:
    config = AugmentConfig(size=64, scale_range=(0.5, 1.5), vertical_flip=True, quarter_turns=True)
    for seed in range(12):
        image = torch.zeros(3, 64, 64, dtype=torch.uint8)
        image[:, 10:30, 34:60] = 255
        torch.manual_seed(seed)
        mask = tv_tensors.Mask((image[:1] > 0).to(torch.uint8))
        moved, masks = training_transform(config)(tv_tensors.Image(image), mask)
        inside = masks[0].bool()
        if inside.any():
            assert moved[0][inside].float().mean() > 230 > 60 > moved[0][~inside].float().mean() - 70


def test_polygons_and_both_kinds_of_rle() -> None:
    square = [[2.0, 1.0, 6.0, 1.0, 6.0, 5.0, 2.0, 5.0]]
    mask = decoded(square, (8, 10))
    assert mask.shape == (8, 10) and mask[2, 3] and not mask[6, 3]
    flat = mask.T.ravel().astype(int)
    counts = [len(run) for run in np.split(flat, np.flatnonzero(np.diff(flat)) + 1)]
    assert np.array_equal(decoded({"size": [8, 10], "counts": counts}, (8, 10)), mask)


def test_writing_a_data_set_without_training_images(tmp_path: Path) -> None:
    write_dataset(tmp_path, ShapesConfig(train_images=0, val_images=2))
    assert not (tmp_path / "train").exists() and len(list((tmp_path / "val").iterdir())) == 2
    assert replace(Preprocessing(), shortest_edge=96).network_size((96, 96)) == (96, 96)
