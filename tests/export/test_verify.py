"""`d2zero verify` passes what is the same model, and names what is not."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from commands import Command
from exported_files import changed, older, with_classifier, with_constant_classes, without_mask_names

import d2zero
from d2zero.checkpoints.files import load_model
from d2zero.data.coco import read_coco
from d2zero.demo.run import packaged_checkpoint
from d2zero.evaluation.run import EvaluationRun
from d2zero_export.instances import instance_agreement
from d2zero_export.parity import LIMITS
from d2zero_export.verify import parity_with, raw_parity
from d2zero_runtime import Detections, Mode, load
from d2zero_runtime.masks import rle


def scaled(source: Path, target: Path, tensor_name: str, factor: float) -> Path:
    """A copy whose tensor was multiplied: another model in the same clothes."""
    proto = onnx.load(source)
    tensor = next(t for t in proto.graph.initializer if t.name.endswith(tensor_name))
    tensor.CopyFrom(onnx.numpy_helper.from_array(factor * onnx.numpy_helper.to_array(tensor), tensor.name))
    onnx.save(proto, target)
    return target


@pytest.mark.slow
def test_the_same_model_passes_on_photos_and_annotations(
    exported: Path, shapes_data: Path, tmp_path: Path, command: Command
) -> None:
    outcome = command(
        "verify", packaged_checkpoint(), exported, "--images", shapes_data / "val", "--limit", "6",
        "--annotations", shapes_data / "annotations/instances_val_gzsi_shapes.json", "--json", tmp_path / "v.json",
    )  # fmt: skip
    assert outcome.code == 0 and "the same model" in outcome.out, outcome.out + outcome.err
    found = json.loads((tmp_path / "v.json").read_text())
    assert found["failures"] == [] and set(found["accuracy"]) == set(Mode)
    left, right = found["accuracy"]["gzsis"]["segm unseen_ap50"]
    assert left == pytest.approx(right, abs=0.1) and left > 30
    same = found["parity"]["same_attention"]
    assert [entry["case"] for entry in same] == [
        "one image, 96 x 160, same attention",
        "its classifier, 9 classes, same attention",
        "padded images, same attention",
        "its classifier, 9 classes, same attention",
    ]
    for entry in same:
        assert 0 < entry["class_most"] == entry["class_logits"] < 1e-4 and entry["mask_most"] < 1e-3
    assert found["attention_flipped"] < 1e-4 and found["limits"]["logits"] == 1e-3
    assert found["instances"]["instances"] > 10 and found["instances"]["matched"] == 1.0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("tensor", "factor", "message"),
    [
        ("background_projection.weight", 1.5, "class_logits differ by"),
        ("mask_mlp.4.bias", 1.05, "mask_logits differ by"),
    ],
)
def test_another_model_fails_with_the_tensor_the_value_and_the_limit(
    tensor: str, factor: float, message: str, exported: Path, tmp_path: Path, command: Command
) -> None:
    other = scaled(exported, tmp_path / "other.onnx", tensor, factor)
    outcome = command("verify", packaged_checkpoint(), other)
    assert outcome.code == 1 and "not the same model" in outcome.out
    assert f"FAILED: {message}" in outcome.err and "(limit 1e-03)" in outcome.err
    limits = ("--max-logits", "1000", "--max-relative", "1000", "--min-matched", "0")
    lenient = command("verify", packaged_checkpoint(), other, *limits)
    assert lenient.code == 0


def scale_background(classifier: onnx.ModelProto) -> None:
    tensor = next(t for t in classifier.graph.initializer if t.name.endswith("background_projection.weight"))
    tensor.CopyFrom(onnx.numpy_helper.from_array(1.5 * onnx.numpy_helper.to_array(tensor), tensor.name))


def test_another_classifier_beside_the_network_fails(exported: Path, tmp_path: Path) -> None:
    path = changed(exported, tmp_path / "m.onnx", with_classifier(scale_background))
    segmenter, limits = load(path), LIMITS["float32"]
    parity, _ = parity_with(load_model(packaged_checkpoint()), path, segmenter)
    first, second, mean = parity.failures(limits)
    for failure in (first, second):
        assert failure.startswith("class_logits differ by ") and "(limit 1e-03) for its classifier" in failure
    assert "on average" in mean and mean.endswith("for the classifier by itself, 9 classes")
    (by_own_masks,) = replace(parity, same_attention=()).failures(limits)  # as of what cannot be asked for its masks
    assert "(limit 1e-03) for the classifier by itself" in by_own_masks


def test_single_logits_are_compared_with_the_same_attention_where_the_file_says_it(
    exported: Path, tmp_path: Path
) -> None:
    pytest.importorskip("openvino")
    model = load_model(packaged_checkpoint())

    def compared(path: Path, *providers: str) -> tuple[int, bool]:
        parity, flipped = parity_with(model, path, load(path, providers or None))
        assert not parity.failures(LIMITS["float32"])
        return len(parity.same_attention), flipped is not None

    assert compared(exported) == (4, True)
    assert compared(exported, "openvino") == (0, True)  # whose single logits are its own
    assert compared(older(exported, tmp_path / "older.onnx")) == (2, True)  # without features
    unnamed = changed(exported, tmp_path / "unnamed.onnx", without_mask_names)
    assert compared(unnamed) == (0, False)


def test_a_classifier_is_compared_where_there_is_one(exported: Path, tmp_path: Path) -> None:
    reference = load_model(packaged_checkpoint()).segmenter()
    baked = load(changed(exported, tmp_path / "baked.onnx", with_constant_classes, baked=True))
    for left, right, cases in (
        (reference, load(exported), ["the classifier by itself, 9 classes"]),
        (reference, load(older(exported, tmp_path / "older.onnx")), []),
        (baked, baked, ["the classifier by itself, 36 classes"]),  # an engine and the file that it was built from
    ):
        parity = raw_parity(left, right)
        assert [entry.case for entry in parity.differences if "classifier" in entry.case] == cases
        assert parity.failures(LIMITS["float32"]) == [] and len(left.vocabulary) == len(right.vocabulary) == 36


def test_exported_models_are_evaluated_as_checkpoints_are(
    exported: Path, shapes_data: Path, tmp_path: Path, command: Command
) -> None:
    truth = read_coco(shapes_data / "annotations/instances_val_gzsi_shapes.json")
    expected = EvaluationRun(
        d2zero.load(packaged_checkpoint()).segmenter(), truth, shapes_data / "val", tmp_path, [Mode.GZSIS]
    ).run()
    outcome = command(
        "eval",
        exported,
        "--data",
        shapes_data,
        "-o",
        tmp_path / "o",
        "--json",
        tmp_path / "o.json",
        "--batch-size",
        "4",
    )
    assert outcome.code == 0, outcome.err
    found = json.loads((tmp_path / "o.json").read_text())["segm"]
    for figure in ("seen_ap50", "unseen_ap50", "hm_ap50", "ap"):
        assert found[figure] == pytest.approx(expected[Mode.GZSIS]["segm"][figure], abs=0.1)


@pytest.mark.slow
def test_what_another_provider_found_is_not_taken_for_this_one(
    exported: Path, shapes_data: Path, tmp_path: Path, command: Command
) -> None:
    pytest.importorskip("openvino")

    def evaluate(provider: str) -> str:
        outcome = command(
            "eval", exported, "--data", shapes_data, "-o", tmp_path, "--limit", "5", "--provider", provider
        )
        assert outcome.code == 0
        return outcome.err

    assert "evaluated before" not in evaluate("cpu") and "evaluated before" not in evaluate("openvino")
    assert len(list(tmp_path.iterdir())) == 2
    assert "5 of 5 images were evaluated before, and not again: their detections are in" in evaluate("openvino")


def test_annotations_need_images(exported: Path, command: Command) -> None:
    outcome = command("verify", packaged_checkpoint(), exported, "--annotations", "x.json")
    assert outcome.code == 2 and "give --images" in outcome.err


def boxes(*places: tuple[int, int, int], scores: list[float]) -> Detections:
    masks = np.zeros((len(places), 40, 40), bool)
    for mask, (top, left, _) in zip(masks, places, strict=True):
        mask[top : top + 10, left : left + 10] = True
    class_ids = np.array([place[2] for place in places])
    return Detections(
        boxes=np.array([[left, top, left + 10, top + 10] for top, left, _ in places], np.float32),
        scores=np.array(scores, np.float32),
        class_ids=class_ids,
        names=tuple(f"c{i}" for i in class_ids),
        seen=np.ones(len(places), bool),
        masks=tuple(rle.encode(mask) for mask in masks),
        image_size=(40, 40),
    )


def test_agreement_is_of_sets() -> None:
    ours = boxes((0, 0, 1), (0, 20, 2), (20, 0, 3), scores=[0.9, 0.8, 0.7])
    same = instance_agreement([ours], [ours[[2, 0, 1]]])
    assert (same.instances, same.matched, same.mean_iou, same.same_label) == (3, 1.0, 1.0, 1.0)
    other = boxes((20, 0, 3), (0, 1, 1), (30, 30, 2), scores=[0.6, 0.9, 0.8])
    found = instance_agreement([ours], [other])
    assert found.matched == pytest.approx(2 / 3) and found.same_label == 1.0
    assert found.mean_iou == pytest.approx((1 + 90 / 110) / 2)
    assert found.score_difference == pytest.approx(0.1)
    renamed = replace(ours, class_ids=np.array([9, 2, 3]))
    assert instance_agreement([ours], [renamed]).same_label == pytest.approx(2 / 3)
    twice = boxes((0, 0, 1), (0, 0, 2), scores=[0.9, 0.8])
    assert instance_agreement([twice], [twice[[1, 0]]]).same_label == 1.0
    nothing = instance_agreement([ours[:0]], [ours])
    assert nothing.instances == 0 and nothing.matched == 1.0
