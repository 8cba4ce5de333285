"""How cost grows: the fit, the verdicts, a run from end to end, what is refused."""

import json
import shutil
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from d2zero_bench.plan import Plan
from d2zero_export.graph import InferenceGraph
from d2zero_runtime import D2ZeroError
from studies import growth, pages
from studies.growth_curves import MEMORY, Curve, Point, exponent, figures, page, table

QUICK = ["--sizes", "64,96", "--classes", "17,34", "--batches", "1,2", "--images", "2,4", "--rounds", "1"]
WORK = (17.0, 65.0, 256.0, 1203.0, 4000.0, 10000.0)


def curve(quantity: str, cost: Callable[[float], float], limit: float = 1.0, why: str = "") -> Curve:
    points = tuple(Point(f"{work:g}", work, {quantity: (cost(work) * 1.5, cost(work))}) for work in WORK)
    return Curve("classes", "classes", "drawn", points, {quantity: limit}, {quantity: why})


def content(*curves: Curve) -> dict:
    """What `growth.py` writes, through JSON."""
    written = {
        "title": "growth <of cost>",
        "environment": {"processor": "a"},
        "settings": {"rounds": 1},
        "curves": [curve.to_dict() for curve in curves],
    }
    return json.loads(json.dumps(written))


@pytest.mark.parametrize("slope", [-0.5, 0.0, 1.0, 1.37, 2.0])
def test_the_exponent_of_a_power_is_found_exactly(slope: float) -> None:
    assert exponent(WORK, [3.5 * work**slope for work in WORK]) == pytest.approx(slope, abs=1e-12)


def test_the_exponent_is_the_least_squares_slope() -> None:
    costs = np.random.default_rng(0).lognormal(3, 1, len(WORK))
    expected = np.polyfit(np.log(WORK), np.log(costs), 1)[0]
    assert exponent(WORK, costs.tolist()) == pytest.approx(expected, rel=1e-9)


def test_one_amount_of_work_has_no_exponent() -> None:
    with pytest.raises(D2ZeroError, match="two different amounts of work"):
        exponent([5.0, 5.0], [1.0, 2.0])


@pytest.mark.parametrize(
    ("cost", "worse"),
    [
        (lambda work: 2 * work, False),
        (lambda work: 50 + 0.01 * work, False),
        (lambda work: 7.0, False),
        (lambda work: work**1.05, False),
        (lambda work: work**1.3, True),
        (lambda work: 20 + 8e-6 * work**2, True),  # the fit by itself would pass it: nearly all of it is constant
    ],
)
def test_verdicts_of_times(cost: Callable[[float], float], worse: bool) -> None:
    (found,) = curve("network", cost).growths
    assert found.worse is worse and found.verdict == ("grows worse than its work" if worse else "within")


def test_a_square_behind_a_constant_is_seen_in_the_last_step_alone() -> None:
    (found,) = curve("network", lambda work: 20 + 8e-6 * work**2).growths
    assert found.exponent < 1 < 1.5 < found.last and found.worse


def test_memory_that_creeps_is_worse_than_flat() -> None:
    (flat,) = curve(MEMORY, lambda work: 160.0, limit=0.0).growths
    (creeping,) = curve(MEMORY, lambda work: 120 + 0.05 * work, limit=0.0).growths
    assert not flat.worse and creeping.worse


def test_the_median_counts() -> None:
    point = Point("1", 1.0, {"network": (5.0, 3.0, 9.0), MEMORY: (6.0, 3.0, 9.0)})
    assert (point.cost("network"), point.cost(MEMORY)) == (5.0, 6.0)


def test_a_machine_that_slows_down_between_rounds_changes_no_exponent() -> None:
    slowness = (1.0, 1.4, 0.9, 1.5, 1.2)
    points = [Point(f"{work:g}", work, {"total": tuple(work * slow for slow in slowness)}) for work in (80.0, 160.0)]
    points[0].samples["total"] = (80 * 0.75, *points[0].samples["total"][1:])  # and one lucky moment
    (found,) = Curve("images", "images", "", tuple(points), {"total": 1.0}, {}).growths
    assert found.last == pytest.approx(1.0) and not found.worse


def test_what_was_not_measured_everywhere_has_no_verdict() -> None:
    points = (Point("1", 1.0, {"network": (1.0,), MEMORY: (1.0,)}), Point("2", 2.0, {"network": (2.0,)}))
    found = Curve("batch", "images", "", points, {"network": 1.0, MEMORY: 1.0}, {})
    assert [entry.quantity for entry in found.growths] == ["network"]


def test_a_verdict_and_its_reason_are_shown() -> None:
    square = curve("network", lambda work: work**2, why="each meets <each>")
    text = page(content(square))
    ElementTree.fromstring(text.partition("\n")[2])
    assert "grows worse than its work" in text and "each meets &lt;each&gt;" in text
    assert square.relative("network")[-1] == pytest.approx(10000 / 17)
    fine = page(content(curve("network", lambda work: work, why="each meets each")))
    assert "worse than its work" not in fine and "each meets" not in fine
    assert [row[-1] for row in table(square).rows] == ["grows worse than its work"]


def test_a_quantity_has_one_colour_in_both_plots() -> None:
    samples: dict[str, tuple[float, ...]] = {"network": (1.0,), MEMORY: (2.0,), "vocabulary": (3.0,)}
    points = tuple(Point(f"{work:g}", work, samples) for work in WORK)
    drawn = figures(Curve("classes", "classes", "", points, dict.fromkeys(samples, 1.0), {}))
    times, relative = ({line.get_label(): line.get_color() for line in plot.axes[0].lines} for plot in drawn)
    assert list(times) == ["network", "vocabulary"] and len(relative) == len(set(relative.values())) == 3
    assert times.items() <= relative.items()


@pytest.mark.slow
def test_committed_results_become_pages(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = Path(__file__).parents[2] / "benchmarks/results"
    files = [results / "demo-cpu.json", results / "growth/demo-cpu.json"]
    assert pages.main([*map(str, files), "--output", str(tmp_path)]) == 0
    for name, heading in (("demo-cpu.html", "Latency by stage"), ("growth/demo-cpu.html", "Against classes")):
        text = (tmp_path / name).read_text(encoding="utf-8")
        ElementTree.fromstring(text.partition("\n")[2])
        assert heading in text
    (tmp_path / "other.json").write_text("[]")
    assert pages.main([str(tmp_path / "other.json")]) == 2 and "other.json: expected" in capsys.readouterr().err


@pytest.mark.slow
def test_a_quick_run(exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert growth.main([*QUICK, "--model", str(exported), "--output", str(tmp_path)]) == 0
    content = json.loads((tmp_path / f"{exported.stem}-cpu.json").read_text(encoding="utf-8"))
    curves = {entry["name"]: entry for entry in content["curves"]}
    assert list(curves) == ["image size", "classes", "batch", "images in a folder"]
    assert [point["work"] for point in curves["image size"]["points"]] == [64 * 64, 96 * 96]
    for entry in curves.values():
        quantities = [growth["quantity"] for growth in entry["growth"]]
        assert MEMORY in quantities and all(set(quantities) <= set(point["samples"]) for point in entry["points"])
        assert all(min(values) > 0 for point in entry["points"] for values in point["samples"].values())
    assert "vocabulary" in curves["classes"]["points"][0]["samples"]
    text = page(content)
    ElementTree.fromstring(text.partition("\n")[2])
    assert "Against images in a folder" in text and str(tmp_path) not in text
    assert "should be" in capsys.readouterr().out


def test_each_number_of_queries_has_a_model(exported: Path, tmp_path: Path) -> None:
    models = {count: Path(shutil.copy(exported, tmp_path / f"{count}.onnx")) for count in (5, 10)}
    plan = Plan((exported,), providers=("cpu",), sizes=((64, 64),), rounds=2, warmup=0)
    found = growth.against_queries(plan, models)
    assert [point.work for point in found.points] == [5, 10]
    assert all(len(point.samples["network"]) == 2 for point in found.points)


def test_a_model_of_so_many_queries() -> None:
    with torch.inference_mode():
        class_logits, *_ = InferenceGraph(growth._model(False, 7))(torch.zeros(1, 3, 64, 64))
    assert class_logits.shape[:2] == (1, 7)


def test_an_interrupted_run_keeps_what_was_measured(
    exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> Curve:
        raise KeyboardInterrupt

    monkeypatch.setattr(growth, "against_size", lambda *_: curve("network", lambda work: work))
    monkeypatch.setattr(growth, "against_classes", interrupted)
    assert growth.main([*QUICK, "--model", str(exported), "--output", str(tmp_path)]) == 130
    assert len(json.loads((tmp_path / f"{exported.stem}-cpu.json").read_text(encoding="utf-8"))["curves"]) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--sizes", "480"], "--sizes must be two ascending numbers or more"),
        (["--sizes", "480,500"], "--sizes must be multiples of 32"),
        (["--classes", "65,17"], "--classes must be two ascending numbers"),
        (["--batches", "1,many"], "--batches must be whole numbers"),
        (["--rounds", "0"], "--rounds must be at least 1"),
        (["--only", "sizes,colours"], "got 'colours'"),
        (["--only", "queries"], "--only must be among sizes, classes, batches, images here; got 'queries'"),
        (["--model", "absent.onnx"], "--model must be an exported model"),
    ],
)
def test_refused(
    arguments: list[str], message: str, exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["--model", str(exported), "--output", str(tmp_path), *arguments]
    assert growth.main(given) == 2
    assert message in capsys.readouterr().err and not list(tmp_path.iterdir())
