"""The benchmark of the training step: variants on the demo's architecture, small, and its loading."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from d2zero.losses.config import LossConfig
from d2zero.model.deformable import DeformableAttention
from d2zero.processes import Processes
from d2zero.training.config import coco_48_17, shapes, with_settings
from d2zero.training.step import PARTS
from d2zero_bench.published import published_sampling
from d2zero_runtime import D2ZeroError
from studies import training, training_steps
from studies.training import Result, TrainingReport
from studies.training_data import loading_rate, training_set
from studies.training_steps import EXACT, FirstStep, Variant, compare, drawn_batch, drawn_model, variant_config

SMALL = ["--preset", "shapes", "--size", "64", "--set", "model.num_queries=6", "--instances", "3", "--classes", "5"]
SMALL += ["--set", "loss.num_points=64", "--set", "model.decoder_layers=1", "--rounds", "2", "--warmup", "0"]
CONFIG = with_settings(shapes(), ["augment.size=64", "batch_size=2", "model.num_queries=6", "loss.num_points=64"])
CPU = torch.device("cpu")
on_gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and torch sees none"),
]


@pytest.fixture(autouse=True)
def allocator_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    """It cannot be set back, and other tests of this process watch memory return."""
    monkeypatch.setattr(training, "keep_freed_memory", lambda: None)


@pytest.mark.slow
def test_variants_are_compared_then_timed_in_pairs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "training.json"
    options = ["--device", "cpu", "--batch", "2", "--variants", "amp,published,model", "--workers", "1"]
    assert training.main([*SMALL, *options, "--seconds", "0.05", "--json", str(file)]) == 0
    content = json.loads(file.read_text())
    results = {entry["variant"]: entry for entry in content["results"]}
    assert list(results) == ["amp", "published", "model"] and not content["notes"]
    for entry in results.values():
        assert [sorted(sample) for sample in entry["samples"]] == [sorted(PARTS)] * 2
        assert all(value > 0 for sample in entry["samples"] for value in sample.values())
        totals = [sum(sample.values()) for sample in entry["samples"]]
        assert entry["figures"]["images_per_second"] == pytest.approx(1000 * 2 * 2 / sum(totals))
        assert entry["peak_mb"] > 20  # the weights, their gradients and two averages of each
    assert results["published"]["figures"]["ratio"]["p50"] == 1 and results["published"]["equality"] is None
    assert len(results["published"]["first_step"]["losses"]) == 1 + 3 * 2  # `loss`, and three at each head
    assert set(results["model"]["equality"]["gradient_norms"]) == {
        "backbone", "pixel_decoder", "decoder", "classifier"
    }  # fmt: skip
    assert 0 < results["model"]["equality"]["losses"] < 1e-5 < results["amp"]["equality"]["losses"]
    assert results["amp"]["precision"] == "bfloat16"
    assert sorted(content["loading"]) == ["0", "1"] and all(len(rates) == 3 for rates in content["loading"].values())
    out = capsys.readouterr().out
    assert "keep" in content["keeps_up"] and content["keeps_up"] in out and "amp" in out
    assert str(tmp_path) not in json.dumps(content["environment"])


def test_a_wrong_variant_is_named_and_not_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(training_steps.PARTS_OF_VARIANTS, "wrong", {"loss": LossConfig(num_points=64, mask_weight=6)})
    file = tmp_path / "training.json"
    options = ["--device", "cpu", "--only", "steps", "--variants", "wrong,kernel,model", "--json", str(file)]
    assert training.main([*SMALL, *options]) == 1
    content = json.loads(file.read_text())
    samples = {entry["variant"]: len(entry["samples"]) for entry in content["results"]}
    assert samples == {"published": 2, "wrong": 0, "kernel": 0, "model": 2}
    assert "not the published step, not timed: losses: loss" in content["notes"]["wrong"]
    assert "on a CUDA device, got cpu" in content["notes"]["kernel"]
    assert content["keeps_up"] is None and set(content["notes"]) == {"wrong", "kernel"}


def test_variants_are_the_trainers_settings() -> None:
    config = coco_48_17()
    assert variant_config("model", config) == config
    plain = replace(config, precision="float32", deformable="grid_sample", compile=False)
    assert variant_config("published", config) == replace(plain, channels_last=False)
    assert variant_config("published+amp", config) == replace(plain, channels_last=False, precision="bfloat16")
    fastest = replace(plain, precision="bfloat16", deformable="triton", compile=True)
    assert variant_config("kernel+amp+compiled", config) == fastest
    assert variant_config("published+tf32", config) == replace(plain, channels_last=False, tf32=True)
    assert variant_config("published", replace(config, tf32=True)) == replace(plain, channels_last=False)
    for name in ("fast", "kernel+fast", "kernel+published", ""):
        with pytest.raises(D2ZeroError, match="parts joined by"):
            variant_config(name, config)


def test_the_published_variant_samples_as_published() -> None:
    model = drawn_model(CONFIG, 5)
    forms = {
        name: {
            m.function
            for m in Variant(name, CONFIG, model, CPU).step.model.modules()
            if isinstance(m, DeformableAttention)
        }
        for name in ("published", "model")
    }
    assert forms == {"published": {published_sampling}, "model": {None}}


def test_what_is_not_finite_or_off_is_not_equal() -> None:
    base = FirstStep({"loss": 3.0, "loss_ce": 2.0}, {"decoder": 1.0}, 0.1)
    assert compare(replace(base, losses={"loss": 3.0, "loss_ce": 2.001}), base, EXACT).failures == ()
    for losses, norms, failing in (
        ({"loss": 3.0, "loss_ce": 2.01}, {"decoder": 1.0}, "loss_ce"),
        ({"loss": float("nan"), "loss_ce": 2.0}, {"decoder": 1.0}, "loss"),
        ({"loss": 3.0, "loss_ce": 2.0}, {"decoder": 1.1}, "decoder"),
        ({"loss": 3.0, "loss_ce": 2.0}, {"decoder": float("inf")}, "decoder"),
    ):
        found = compare(FirstStep(losses, norms, 0.1), base, EXACT)
        assert [failure.split(": ")[1].split()[0] for failure in found.failures] == [failing]


@pytest.mark.parametrize(
    ("rates", "sentence"),
    [
        ({0: [9.0], 2: [30.0], 4: [50.0]}, "loading keeps up: fast takes 20.0 images per second, 2 workers read 30.0"),
        ({0: [9.0], 2: [12.0]}, "loading does NOT keep up: fast takes 20.0 images per second, the best, 2 workers"),
    ],
)
def test_loading_is_compared_with_the_fastest_variant(rates: dict[int, list[float]], sentence: str) -> None:
    step = dict.fromkeys(PARTS, 0.0)
    results = [
        Result("published", "float32", samples=[step | {"forward": 400.0}] * 2),
        Result("fast", "bfloat16", samples=[step | {"forward": 100.0}] * 2),
    ]
    report = TrainingReport(2, results, rates)
    assert (report.keeps_up() or "").startswith(sentence)
    ratio = report.ratio(results[1])
    assert ratio is not None and ratio.p50 == 0.25


def test_a_coco_folder_without_zero_shot_files_is_loaded(shared: Path) -> None:
    config = replace(coco_48_17(), batch_size=2, workers=0)
    with training_set(config, "coco-48-17", shared / "data/coco_tiny") as data:
        assert len(data) == 45
        assert loading_rate(data, config, Processes(0, 1, CPU), 0.0) > 0


@pytest.mark.parametrize("option", [["--variants", "fast"], ["--rounds", "0"], ["--size", "100"], ["--workers", "x"]])
def test_wrong_options_are_refused(option: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert training.main([*SMALL, "--device", "cpu", *option]) == 2
    assert capsys.readouterr().err.startswith("error: ")


class TestOnGpu:
    pytestmark = on_gpu

    @pytest.mark.parametrize(
        "names", ["model,kernel,amp,kernel+amp", pytest.param("compiled,kernel+amp+compiled", marks=pytest.mark.slow)]
    )
    def test_every_variant_is_right_and_timed(self, names: str, tmp_path: Path) -> None:
        file = tmp_path / "training.json"
        options = ["--device", "cuda", "--batch", "2", "--only", "steps", "--variants", names, "--json", str(file)]
        assert training.main([*SMALL, *options]) == 0
        assert all(len(entry["samples"]) == 2 for entry in json.loads(file.read_text())["results"])

    def test_the_kernel_needs_less_memory(self) -> None:
        config, device = replace(CONFIG, augment=replace(CONFIG.augment, size=480)), torch.device("cuda")
        model, batch = drawn_model(config, 5), drawn_batch(config, 5, 3, device)
        peaks = []
        for name in ("published", "kernel"):
            variant = Variant(name, config, model, device)
            variant.first_step(batch)
            peaks.append(variant.peak_mb(batch))
        published, kernel = peaks
        assert published is not None and kernel is not None and kernel < published

    @pytest.mark.slow
    @pytest.mark.timed
    def test_the_step_is_twice_as_fast_as_published(self, tmp_path: Path) -> None:
        file = tmp_path / "training.json"
        options = [
            "--device",
            "cuda",
            "--batch",
            "4",
            "--only",
            "steps",
            "--variants",
            "kernel+amp,kernel+amp+compiled",
        ]
        assert training.main([*options, "--json", str(file)]) == 0
        results = json.loads(file.read_text())["results"]
        assert min(entry["figures"]["ratio"]["p50"] for entry in results) <= 0.5
