"""Accuracy metrics: equal to the published evaluator's and to pycocotools', and resumable."""

import contextlib
import io
import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest
from commands import Command, Outcome

from d2zero.checkpoints.files import save_model
from d2zero.data import json_stream
from d2zero.data.coco import open_coco, read_coco
from d2zero.data.splits import find_split
from d2zero.evaluation.matching import IOU_THRESHOLDS
from d2zero.evaluation.metrics import harmonic_mean, score, score_detections
from d2zero.evaluation.result_entries import open_results
from d2zero.evaluation.run import EvaluationRun
from d2zero.model import D2Zero
from d2zero_runtime import D2ZeroError, Mode, Vocabulary

COCO_48_17 = find_split("coco-48-17")

COCO = pytest.importorskip("pycocotools.coco").COCO
COCOeval = pytest.importorskip("pycocotools.cocoeval").COCOeval
evaluate = pytest.importorskip("studies.plain_evaluation").evaluate
write_drawn = pytest.importorskip("studies.drawn_coco").write_drawn

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
        metrics = found[kind]
        for published, ours in NAMES.items() if mode == "gzsis" else ():
            assert metrics[ours] == pytest.approx(recorded[kind][published], abs=1e-6), ours
        ours_printed = [metrics[key] / 100 for key in ("ap40", "ap50", "ap60", "recall40", "recall50", "recall60")]
        assert ours_printed == pytest.approx(printed[start : start + 6], abs=5e-4 + 1e-9)
        if mode == "zsis":
            assert metrics["unseen_recall50"] == metrics["recall50"] and "seen_ap50" not in metrics
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


def test_detections_are_judged_by_a_vocabularys_seen_classes(
    shapes_data: Path, tmp_path: Path, command: Callable[..., Outcome]
) -> None:
    file = shapes_data / "annotations/instances_val_gzsi_shapes.json"
    truth = read_coco(file)
    perfect = [{**entry, "score": 0.9} for entries in truth.annotations.values() for entry in entries]
    made = [
        {key: entry[key] for key in ("image_id", "category_id", "segmentation", "bbox", "score")} for entry in perfect
    ]
    (tmp_path / "d.json").write_text(json.dumps(made, default=lambda value: value.decode()))
    words = shapes_data / "vocabulary.npz"
    asked = ("eval", "--detections", tmp_path / "d.json", "--annotations", file, "--json", tmp_path / "f.json")
    outcome = command(*asked, "--vocabulary", words)
    assert outcome.code == 0, outcome.err
    expected = score_detections(truth, perfect, Vocabulary.load(words).seen_names, Mode.GZSIS)["segm"]
    found = json.loads((tmp_path / "f.json").read_text())["segm"]
    assert found["hm_ap50"] == pytest.approx(expected["hm_ap50"]) and found["hm_ap50"] > 99
    for flags in ((), ("--split", "coco-48-17", "--vocabulary", words)):
        outcome = command(*asked, *flags)
        assert outcome.code == 2 and "--split NAME, or --vocabulary FILE" in outcome.err


def test_perfect_detections_and_none(shapes_data: Path) -> None:
    truth = read_coco(shapes_data / "annotations/instances_val_gzsi_shapes.json")
    seen = [name for name in truth.categories if name not in ("red ring", "blue cross")]
    perfect = [{**entry, "score": 0.9} for entries in truth.annotations.values() for entry in entries]
    metrics = score_detections(truth, perfect, seen, Mode.GZSIS)["segm"]
    assert metrics["ap"] == pytest.approx(100) and metrics["hm_ap50"] == pytest.approx(100)
    metrics = score_detections(truth, [], seen, Mode.GZSIS)["segm"]
    assert metrics["seen_ap50"] == metrics["hm_ap50"] == metrics["unseen_recall50"] == 0


def test_zsis_looks_at_unseen_classes_alone(shapes_data: Path, small_model: D2Zero) -> None:
    """The same detections give the same metrics against the mixed file and the unseen one."""
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


def evaluation(model: D2Zero, data: Path, output: Path, **options: Any) -> EvaluationRun:
    truth = read_coco(data / "annotations/instances_val_gzsi_shapes.json")
    return EvaluationRun(model.segmenter(), truth, data / "val", output, list(Mode), **options)


def test_a_stopped_evaluation_goes_on(small_model: D2Zero, shapes_data: Path, tmp_path: Path) -> None:
    whole = evaluation(small_model, shapes_data, tmp_path / "whole").run()
    stopped = evaluation(small_model, shapes_data, tmp_path / "cut", limit=10)
    stopped.run()
    for mode in Mode:  # in the middle of a line
        with (stopped.folder / f"detections_{mode}.jsonl").open("a") as stream:
            stream.write('{"image_id": 1000099, "detec')
    resuming, calls = evaluation(small_model, shapes_data, tmp_path / "cut"), []
    original = resuming.model.predict_raw
    resuming.model.predict_raw = lambda images: (calls.append(len(images)), original(images))[1]
    resumed = resuming.run()
    assert sum(calls) == 14
    for mode in Mode:
        assert resumed[mode]["images"] == 24
        assert resumed[mode]["segm"] == whole[mode]["segm"] and resumed[mode]["bbox"] == whole[mode]["bbox"]


def test_runs_of_other_things_keep_apart(small_model: D2Zero, shapes_data: Path, tmp_path: Path) -> None:
    words = small_model.vocabulary

    def run(identity: str = "a", vocabulary: Vocabulary = words, part: str = "gzsi") -> EvaluationRun:
        small_model.set_vocabulary(vocabulary)
        truth = read_coco(shapes_data / f"annotations/instances_val_{part}_shapes.json")
        return EvaluationRun(
            small_model.segmenter(), truth, shapes_data / "val", tmp_path, [Mode.GZSIS], 4, identity, limit=4
        )

    runs = [run(), run("b"), run(vocabulary=words.with_active(words.seen_names)), run(part="unseen")]
    assert len({one.folder for one in runs}) == 4
    assert run().folder == runs[0].folder
    run().run()
    lines = (runs[0].folder / "detections_gzsis.jsonl").read_text()
    run("b").run()
    run().run()
    assert (runs[0].folder / "detections_gzsis.jsonl").read_text() == lines


def test_an_image_that_is_mended_is_read_again(small_model: D2Zero, shapes_data: Path, tmp_path: Path) -> None:
    import shutil

    images = tmp_path / "val"
    shutil.copytree(shapes_data / "val", images)
    truth = read_coco(shapes_data / "annotations/instances_val_gzsi_shapes.json")

    def metrics(output: str = "o") -> dict:
        run = EvaluationRun(small_model.segmenter(), truth, images, tmp_path / output, [Mode.GZSIS], limit=6)
        return run.run()[Mode.GZSIS]

    broken = images / next(iter(truth.images.values()))["file_name"]
    content = broken.read_bytes()
    broken.write_bytes(b"")
    first = metrics()
    assert len(first["unreadable"]) == 1 and first["images"] == 6
    broken.write_bytes(content)
    second = metrics()
    assert not second["unreadable"] and second["images"] == 6
    assert second["segm"] == metrics("fresh")["segm"]


def test_batches_do_not_change_the_metrics(small_model: D2Zero, shapes_data: Path, tmp_path: Path) -> None:
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
        assert "1 images could not be read" in outcome.err
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


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_id": 5}, "is of image 5, which"),
        ({"category_id": 99}, "is of category 99, which"),
        ({"score": None}, "needs a finite score"),
        ({"score": float("nan")}, "needs a finite score"),
        ({"bbox": [1, 2]}, r"bbox \[x, y, width, height\]"),
        ({"segmentation": None}, "has no mask"),
        (
            {"segmentation": {"size": [5, 5], "counts": "11"}},
            r"of size \[5, 5\], its image has \[height, width\] \[96, 96\]",
        ),
    ],
)
def test_detections_that_do_not_fit(change: dict, message: str, shapes_data: Path) -> None:
    truth = read_coco(shapes_data / "annotations/instances_val_gzsi_shapes.json")
    entry = {**next(iter(truth.annotations.values()))[0], "score": 0.5}
    with pytest.raises(D2ZeroError, match=message):
        score_detections(truth, [{**entry, **change}], [], Mode.GZSIS)
    del entry["score"]
    with pytest.raises(D2ZeroError, match="detection number 1 lacks score"):
        score_detections(truth, [{**entry, "score": 1}, entry], [], Mode.GZSIS)
    with pytest.raises(D2ZeroError, match="expected COCO result entries"):
        score_detections(truth, [3], [], Mode.GZSIS)  # type: ignore[list-item]


def test_annotations_with_ids_of_any_kind_and_masks_alone(shapes_data: Path, tmp_path: Path) -> None:
    content = json.loads((shapes_data / "annotations/instances_val_gzsi_shapes.json").read_text())
    perfect = [{**entry, "score": 0.9} for entry in content["annotations"]]
    for entry in content["annotations"]:
        entry["id"] = 0
        for key in ("bbox", "area", "iscrowd"):
            del entry[key]
    (tmp_path / "bare.json").write_text(json.dumps(content))
    metrics = score_detections(read_coco(tmp_path / "bare.json"), perfect, [], Mode.GZSIS)
    assert metrics["segm"]["ap"] == pytest.approx(100) and metrics["bbox"]["ap"] == pytest.approx(100)


def test_foreign_classes_are_refused(small_model: D2Zero, shared: Path, tmp_path: Path) -> None:
    truth = read_coco(shared / "reference/evaluation/eval_48_17_gzsi_gt.json")
    with pytest.raises(D2ZeroError, match="classes that the vocabulary lacks"):
        EvaluationRun(small_model.segmenter(), truth, shared / "data/coco_tiny/val2017", tmp_path, [Mode.GZSIS])


def shuffled_results(tmp_path: Path, images: int, detections: int) -> tuple[Path, Path]:
    """Drawn files with many equal scores, whose results are in no order."""
    truth, found = tmp_path / "truth.json", tmp_path / "found.json"
    write_drawn(truth, found, COCO_48_17, images, detections)
    entries = [{**entry, "score": round(entry["score"], 1)} for entry in json.loads(found.read_text())]
    Random(0).shuffle(entries)
    found.write_text(json.dumps(entries))
    return truth, found


def test_results_in_no_order_with_equal_scores_equal_pycocotools(tmp_path: Path, command: Command) -> None:
    """Crowds, polygons, over 100 detections of a class, sizes that do not count, ids of images that do not rise."""
    truth, found = shuffled_results(tmp_path, 12, 150)
    entries = json.loads(found.read_text())
    crowd = next(entry for entry in json.loads(truth.read_text())["annotations"] if entry["iscrowd"])
    some = next(entry for entry in entries if entry["image_id"] == crowd["image_id"])
    for place in range(130):
        entries.append({**some, "category_id": crowd["category_id"], "score": place % 7 / 10})
    for entry in entries[::17]:
        entry["bbox"][2] *= -1
    found.write_text(json.dumps(entries))
    outcome = command(
        "eval", "--detections", found, "--split", "coco-48-17", "--annotations", truth, "--json", tmp_path / "out.json"
    )
    assert outcome.code == 0, outcome.err
    ours = json.loads((tmp_path / "out.json").read_text())
    with contextlib.redirect_stdout(io.StringIO()):
        ground = COCO(str(truth))
        for kind in ("segm", "bbox"):
            plain = evaluate(ground, ground.loadRes(str(found)), kind, list(IOU_THRESHOLDS))
            rows = ours[kind]["per_class"]
            assert rows.keys() == plain.keys() and len(rows) > 10
            for name, row in plain.items():
                assert {key: rows[name][key] for key in row} == pytest.approx(row, abs=1e-9), name
    whole = score_detections(read_coco(truth), entries, COCO_48_17.seen, Mode.GZSIS)
    assert json.loads(json.dumps(whole)) == ours


@pytest.mark.slow
def test_memory_does_not_grow_with_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_stream, "BLOCK", 1 << 14)
    sizes, peaks = [], []
    for images in (40, 100):
        truth, found = shuffled_results(tmp_path, images, 100)
        sizes.append(truth.stat().st_size + found.stat().st_size)
        tracemalloc.start()
        with open_coco(truth) as annotations, open_results(found, annotations) as entries:
            score(annotations, entries, COCO_48_17.seen, Mode.GZSIS)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] - peaks[0] < 0.3 * (sizes[1] - sizes[0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text[: len(text) // 2], "found.json is not JSON or is cut short"),
        (lambda text: "{" + text[1:], "found.json is not JSON"),
        (lambda _: '{"annotations": []}', "found.json must be a list of COCO results, got a dict"),
        (lambda _: "", "is not JSON or is cut short: Expecting value at byte 0"),
        (lambda text: text.replace('"score"', '"scores"', 1), "detection number 0 lacks score"),
        (lambda text: text.replace('"counts": "', '"counts": "é', 1), "has run lengths that are no ASCII text"),
    ],
)
def test_damaged_files_of_detections(
    change: Callable[[str], str], message: str, tmp_path: Path, command: Command
) -> None:
    truth, found = shuffled_results(tmp_path, 2, 10)
    found.write_text(change(found.read_text()))
    for path in (found, tmp_path / "none.json", tmp_path):
        outcome = command("eval", "--detections", path, "--split", "coco-48-17", "--annotations", truth)
        assert outcome.code == 2 and outcome.err.startswith("error: ") and outcome.err.count("\n") == 1
        expected = {"found.json": message, "none.json": "does not exist"}.get(path.name, "is a folder")
        assert expected in outcome.err
