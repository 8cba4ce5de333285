"""Accuracy figures: equal to the published evaluator's and to pycocotools', and resumable."""

import contextlib
import io
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Outcome
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from d2zero.checkpoints.files import save_model
from d2zero.data.coco import read_coco
from d2zero.data.splits import COCO_48_17
from d2zero.evaluation.metrics import harmonic_mean, score_detections
from d2zero.evaluation.run import EvaluationRun
from d2zero.model import D2Zero
from d2zero_runtime import D2ZeroError, Mode

Command = Callable[..., Outcome]
NAMES = {"seen_ap": "seen_ap50", "unseen_ap": "unseen_ap50", "hm_ap": "hm_ap50"}
NAMES |= {key.replace("ap", "recall"): value.replace("ap", "recall") for key, value in NAMES.items()}


@pytest.mark.parametrize("mode", ["gzsis", "zsis"])
def test_command_equals_the_published_evaluator(mode: str, shared: Path, tmp_path: Path, command: Command) -> None:
    folder, part = shared / "reference/evaluation", "gzsi" if mode == "gzsis" else "unseen"
    outcome = command(
        "eval", "--detections", folder / f"eval_48_17_{part}_detections.json", "--split", "coco-48-17",
        "--annotations", folder / f"eval_48_17_{part}_gt.json", "--mode", mode, "--json", tmp_path / "out.json",
        "--per-class",
    )  # fmt: skip
    assert outcome.code == 0, outcome.err
    found = json.loads((tmp_path / "out.json").read_text())
    recorded = json.loads((folder / "expected_48_17.json").read_text())[part]
    printed = [float(line.rsplit("=", 1)[1]) for line in recorded["stdout"] if line.startswith("Average")]
    for kind, start in (("segm", 0), ("bbox", 6)):
        figures = found[kind]
        for published, ours in NAMES.items() if mode == "gzsis" else ():
            assert figures[ours] == pytest.approx(recorded[kind][published], abs=1e-6), ours
        ours_printed = [figures[key] / 100 for key in ("ap40", "ap50", "ap60", "recall40", "recall50", "recall60")]
        assert ours_printed == pytest.approx(printed[start : start + 6], abs=5e-4 + 1e-9)
        if mode == "zsis":
            assert figures["unseen_recall50"] == figures["recall50"] and "seen_ap50" not in figures
    assert "unseen" in outcome.out and "cow" in outcome.out


def test_equals_pycocotools(shared: Path) -> None:
    folder = shared / "reference/evaluation"
    truth = folder / "eval_48_17_gzsi_gt.json"
    detections = json.loads((folder / "eval_48_17_gzsi_detections.json").read_text())
    ours = score_detections(read_coco(truth), detections, COCO_48_17.seen, Mode.GZSIS)
    with contextlib.redirect_stdout(io.StringIO()):
        ground = COCO(str(truth))
        for kind in ("segm", "bbox"):
            plain = COCOeval(ground, ground.loadRes(detections), kind)
            plain.evaluate()
            plain.accumulate()
            plain.summarize()
            assert ours[kind]["ap"] == pytest.approx(100 * plain.stats[0], abs=1e-9)
            assert ours[kind]["ap50"] == pytest.approx(100 * plain.stats[1], abs=1e-9)
            number = plain.params.catIds.index(ground.getCatIds(catNms=["person"])[0])
            precision = plain.eval["precision"][:, :, number, 0, -1]
            assert ours[kind]["per_class"]["person"]["ap"] == pytest.approx(100 * precision.mean(), abs=1e-9)


def test_perfect_detections_and_none(shapes_data: Path) -> None:
    truth = read_coco(shapes_data / "annotations/instances_val_gzsi_shapes.json")
    seen = [name for name in truth.categories if name not in ("red ring", "blue cross")]
    perfect = [{**entry, "score": 0.9} for entries in truth.annotations.values() for entry in entries]
    figures = score_detections(truth, perfect, seen, Mode.GZSIS)["segm"]
    assert figures["ap"] == pytest.approx(100) and figures["hm_ap50"] == pytest.approx(100)
    figures = score_detections(truth, [], seen, Mode.GZSIS)["segm"]
    assert figures["seen_ap50"] == figures["hm_ap50"] == figures["unseen_recall50"] == 0


def test_zsis_looks_at_unseen_classes_alone(shapes_data: Path, small_model: D2Zero) -> None:
    """The same detections give the same figures against the mixed file and the unseen one."""
    found = []
    for part in ("gzsi", "unseen"):
        truth = read_coco(shapes_data / f"annotations/instances_val_{part}_shapes.json")
        entries = [entry for entries in truth.annotations.values() for entry in entries]
        unseen = {truth.categories[name] for name in small_model.vocabulary.unseen_names}
        guesses = [{**e, "score": (e["id"] % 7) / 7} for e in entries if e["category_id"] in unseen and e["id"] % 3]
        found.append(score_detections(truth, guesses, small_model.vocabulary.seen_names, Mode.ZSIS)["segm"])
    assert found[0] == found[1] and 0 < found[0]["unseen_ap50"] < 100


def test_harmonic_mean() -> None:
    assert harmonic_mean(60, 40) == 48
    assert harmonic_mean(0, 0) == 0 and harmonic_mean(None, 3) is None


def evaluation(model: D2Zero, data: Path, output: Path, **options: object) -> EvaluationRun:
    truth = read_coco(data / "annotations/instances_val_gzsi_shapes.json")
    return EvaluationRun(model, truth, data / "val", output, list(Mode), **options)


def test_a_stopped_evaluation_goes_on(small_model: D2Zero, shapes_data: Path, tmp_path: Path) -> None:
    whole = evaluation(small_model, shapes_data, tmp_path / "whole").run()
    evaluation(small_model, shapes_data, tmp_path / "cut", limit=10).run()
    for mode in Mode:  # stopped in the middle of a line
        with (tmp_path / f"cut/detections_{mode}.jsonl").open("a") as stream:
            stream.write('{"image_id": 1000099, "detec')
    calls = []
    original = small_model.predict_raw
    small_model.predict_raw = lambda images: (calls.append(len(images)), original(images))[1]  # type: ignore[method-assign]
    resumed = evaluation(small_model, shapes_data, tmp_path / "cut").run()
    assert sum(calls) == 14
    for mode in Mode:
        assert resumed[mode]["images"] == 24
        assert resumed[mode]["segm"] == whole[mode]["segm"] and resumed[mode]["bbox"] == whole[mode]["bbox"]


def test_another_model_does_not_go_on_with_old_detections(
    small_model: D2Zero, shapes_data: Path, tmp_path: Path
) -> None:
    evaluation(small_model, shapes_data, tmp_path, limit=4, identity="a").run()
    lines = (tmp_path / "detections_gzsis.jsonl").read_text()
    evaluation(small_model, shapes_data, tmp_path, limit=4, identity="a").run()
    assert (tmp_path / "detections_gzsis.jsonl").read_text() == lines
    summary = evaluation(small_model, shapes_data, tmp_path, limit=2, identity="b").run()
    assert len((tmp_path / "detections_gzsis.jsonl").read_text().splitlines()) == 2
    assert summary[Mode.GZSIS]["images"] == 2


def test_batches_do_not_change_the_figures(small_model: D2Zero, shapes_data: Path, tmp_path: Path) -> None:
    one = evaluation(small_model, shapes_data, tmp_path / "1", limit=6).run()[Mode.GZSIS]["segm"]
    four = evaluation(small_model, shapes_data, tmp_path / "4", limit=6, batch_size=4).run()[Mode.GZSIS]["segm"]
    assert four["ap50"] == pytest.approx(one["ap50"], abs=1e-3)


def test_command_with_a_checkpoint_an_unreadable_image_and_pictures(
    small_model: D2Zero, shapes_data: Path, tmp_path: Path, command: Command
) -> None:
    import shutil

    images = tmp_path / "val"
    shutil.copytree(shapes_data / "val", images)
    broken = sorted(images.iterdir())[2]
    broken.write_bytes(b"no image")
    checkpoint = save_model(small_model, tmp_path / "m.safetensors")
    for _ in ("first", "again"):
        outcome = command(
            "eval", checkpoint, "--data", shapes_data, "--images", images, "--mode", "zsis", "--limit", "5",
            "--json", tmp_path / "o.json", "-o", tmp_path / "eval", "--device", "cpu",
            "--pictures", tmp_path / "sheet.png",
        )  # fmt: skip
        assert outcome.code == 0, outcome.err
        assert "1 images could not be read" in outcome.out.replace("\n", " ")
        summary = json.loads((tmp_path / "o.json").read_text())
        assert summary["images"] == 5 and broken.name in summary["unreadable"][0]
    assert (tmp_path / "sheet.png").stat().st_size > 1000


def test_several_modes_share_a_pass(small_model: D2Zero, shapes_data: Path, tmp_path: Path, command: Command) -> None:
    checkpoint = save_model(small_model, tmp_path / "m.safetensors")
    common = ("--data", shapes_data, "--limit", "4", "--device", "cpu", "--json", tmp_path / "o.json")
    outcome = command("eval", checkpoint, *common, "--mode", "gzsis, zsis", "-o", tmp_path / "both")
    assert outcome.code == 0, outcome.err
    both = json.loads((tmp_path / "o.json").read_text())
    assert list(both) == ["gzsis", "zsis"]
    assert command("eval", checkpoint, *common, "--mode", "zsis", "-o", tmp_path / "one").code == 0
    assert json.loads((tmp_path / "o.json").read_text())["segm"] == both["zsis"]["segm"]


def test_detections_that_do_not_fit(shapes_data: Path) -> None:
    truth = read_coco(shapes_data / "annotations/instances_val_gzsi_shapes.json")
    entry = next(iter(truth.annotations.values()))[0]
    good = {**entry, "score": 0.5}
    for change, message in (
        ({"image_id": 5}, "does not list: ids 5"),
        ({"category_id": 99}, "does not have: ids 99"),
    ):
        with pytest.raises(D2ZeroError, match=message):
            score_detections(truth, [{**good, **change}], [], Mode.GZSIS)
    with pytest.raises(D2ZeroError, match="lacks score"):
        score_detections(truth, [entry], [], Mode.GZSIS)


def test_foreign_classes_are_refused(small_model: D2Zero, shared: Path, tmp_path: Path) -> None:
    truth = read_coco(shared / "reference/evaluation/eval_48_17_gzsi_gt.json")
    with pytest.raises(D2ZeroError, match="classes that the vocabulary lacks"):
        EvaluationRun(small_model, truth, shared / "data/coco_tiny/val2017", tmp_path, [Mode.GZSIS])
