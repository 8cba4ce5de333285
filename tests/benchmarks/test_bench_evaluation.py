"""The benchmark of the evaluation on tiny drawn files: valid files, equal figures, a report, limits of arguments."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from d2zero.data.coco import read_coco
from d2zero.data.coco_values import decoded
from d2zero.data.splits import find_split
from d2zero_runtime import D2ZeroError
from studies import speed_tables

COCO_48_17 = find_split("coco-48-17")

coco_mask = pytest.importorskip("pycocotools.mask")
evaluation = pytest.importorskip("studies.evaluation")
main, write_drawn = evaluation.main, evaluation.write_drawn
EvaluationReport, Sample = evaluation.EvaluationReport, evaluation.Sample


def test_drawn_files_are_valid_and_reproducible(tmp_path: Path) -> None:
    files = [(tmp_path / f"a{n}.json", tmp_path / f"d{n}.json") for n in range(3)]
    for pair, seed in zip(files, (1, 1, 2), strict=True):
        write_drawn(*pair, COCO_48_17, images=40, detections=20, seed=seed)
    (first, results), (again, same), (other, _) = files
    assert first.read_bytes() == again.read_bytes() != other.read_bytes() and results.read_bytes() == same.read_bytes()
    truth = read_coco(first)
    assert tuple(truth.categories) == COCO_48_17.names and len(truth.images) == 40
    entries = [entry for entries in truth.annotations.values() for entry in entries]
    assert 4 < len(entries) / 40 < 10 and {entry["iscrowd"] for entry in entries} == {0, 1}
    named = {truth.names[entry["category_id"]] for entry in entries}
    assert named & set(COCO_48_17.seen) and named & set(COCO_48_17.unseen)
    for entry in entries:
        image = truth.images[entry["image_id"]]
        mask = decoded(entry["segmentation"], (image["height"], image["width"]))
        assert mask.sum() == entry["area"] > 0
        columns = np.flatnonzero(mask.any(axis=0))
        assert entry["bbox"][0] == columns[0] and entry["bbox"][2] == columns[-1] - columns[0] + 1
    found = json.loads(results.read_text())
    assert Counter(entry["image_id"] for entry in found) == dict.fromkeys(truth.images, 20)
    for entry in found:
        assert coco_mask.toBbox(entry["segmentation"]).tolist() == entry["bbox"] and 0 < entry["score"] < 1


@pytest.mark.slow
def test_both_sides_agree_and_the_report_has_all(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "evaluation/cpu.json"
    words = ["--images", "12,3", "--detections", "10", "--repeats", "1", "--defaults", "--json", str(path)]
    assert main(words) == 0
    assert "pycocotools-defaults" in capsys.readouterr().out
    content = json.loads(path.read_text())
    assert content["kind"] == "evaluation" and content["settings"]["detections an image"] == 10
    assert content["environment"]["command"].startswith("python benchmarks/studies/evaluation.py --images 12,3")
    assert "pycocotools" in content["environment"]["versions"]
    assert content["equality"].keys() == {"3", "12"} and max(content["equality"].values()) < 1e-9
    assert len(content["samples"]) == 6 and content["complete"]
    for sample in content["samples"]:
        assert sample["wall_s"] > 0.1 and sample["cpu_s"] > 0.1 and 20 < sample["peak_mb"] < 500
    words = ["--page", str(tmp_path / "README.md"), "--results", str(tmp_path)]
    assert speed_tables.main(words) == 2 and "no reports" in capsys.readouterr().err  # a folder of its own


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--images 0", "--images must be whole numbers from 1 on"),
        ("--images few", "--images must be whole numbers"),
        ("--detections 0", "--detections and --repeats must be at least 1"),
        ("--repeats 0", "--detections and --repeats must be at least 1"),
    ],
)
def test_bad_arguments(words: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words.split()) == 2
    assert capsys.readouterr().err.startswith(f"error: {message}")


def test_metrics_that_differ_end_it() -> None:
    plain = {("segm", "ap50", "cat"): 50.0}
    assert evaluation._largest_difference({"pycocotools": plain, "d2zero": {("segm", "ap50", "cat"): 50 + 1e-9}}) > 0
    with pytest.raises(D2ZeroError, match="speed does not matter"):
        evaluation._largest_difference({"pycocotools": plain, "d2zero": {("segm", "ap50", "cat"): 50.001}})
    with pytest.raises(D2ZeroError, match="other classes"):
        evaluation._largest_difference({"pycocotools": plain, "d2zero": {("segm", "ap50", "dog"): 50.0}})


def test_a_candidate_that_fails_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(evaluation.sys, "executable", "/bin/false")
    assert main(["--images", "1", "--detections", "1"]) == 2
    assert "failed on 1 images with code 1" in capsys.readouterr().err


def test_what_was_measured_before_a_failure_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(candidate: str, _files: object, images: int) -> tuple[Any, dict]:
        if images == 2 and candidate == "d2zero":
            raise D2ZeroError("d2zero failed")
        return Sample(candidate, images, 1.0, 1.0, 50.0), {("segm", "ap50", "cat"): 5.0}

    monkeypatch.setattr(evaluation, "_run", run)
    words = ["--images", "1,2", "--detections", "1", "--repeats", "2", "--json", str(tmp_path / "cpu.json")]
    assert main(words) == 2
    captured = capsys.readouterr()
    assert "stopped before the end" in captured.out and captured.err.endswith("error: d2zero failed\n")
    content = json.loads((tmp_path / "cpu.json").read_text())
    assert {sample["images"] for sample in content["samples"]} == {1} and not content["complete"]


def test_growth_and_ratios() -> None:
    report = EvaluationReport("plain")
    for images, ours, theirs in ((10, 1.0, 2.0), (110, 2.0, 6.0)):
        for more in (0, 0.5):
            report.samples += [
                Sample("ours", images, ours + more, ours, 10 * ours),
                Sample("plain", images, theirs + 2 * more, theirs, 10 * theirs),
            ]
    assert report.ratio("ours", 10, "wall_s") == 0.5 and report.ratio("ours", 110, "cpu_s") == pytest.approx(1 / 3)
    assert report.growth("plain", "cpu_s") == 0.04 and report.growth("ours", "peak_mb") == 0.1
    assert len(report.table().rows) == 6
    report.samples = [sample for sample in report.samples if sample.images == 10]
    assert report.growth("ours", "cpu_s") is None and [row[1] for row in report.table().rows] == ["10", "10"]
