"""Training on one's own files, and what a researcher does with a run."""

import json
import logging
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from commands import Command

import d2zero
from d2zero.checkpoints.runs import checkpoint_file
from d2zero.data.dataset import Dataset, Named
from d2zero.training.config import (
    coco_48_17,
    config_from_dict,
    config_to_dict,
    default,
    shapes,
    with_batch_size,
    with_length,
    with_settings,
)
from d2zero.training.loop import WORST, best_by, run_state
from d2zero.training.optim import lr_factor
from d2zero.training.start import Inputs, start, start_from
from d2zero_runtime import D2ZeroError

FAST = [
    "batch_size=4",
    "augment.size=64",
    "model.num_queries=6",
    "loss.num_points=64",
    "log_every=1",
    "picture_every=0",
]
FLAGS = [part for setting in (*FAST, "augment.scale_range=[1.0,1.0]") for part in ("--set", setting)]


@pytest.fixture(scope="module")
def own(shapes_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with names of its own, and a YAML file that says what is what."""
    folder = tmp_path_factory.mktemp("own data")
    annotations = shapes_data / "annotations"
    shutil.copy(annotations / "instances_train_seen_shapes.json", folder / "mine.json")
    shutil.copy(annotations / "instances_val_gzsi_shapes.json", folder / "held out.json")
    shutil.copy(shapes_data / "vocabulary.npz", folder / "v.npz")
    for name in ("train", "val"):
        (folder / name).symlink_to(shapes_data / name)
    (folder / "my.yaml").write_text(
        "train: {annotations: mine.json, images: train}\nval: {annotations: held out.json, images: val}\n"
        "vocabulary: v.npz\n"
    )
    return folder


@pytest.fixture(scope="module")
def finished(own: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run over four steps with all that can be kept."""
    run = tmp_path_factory.mktemp("runs") / "run"
    settings = ["steps=4", "eval_every=2", "eval_images=3", "keep_every=2", "checkpoint_every=2", "ema=0.5"]
    start(with_settings(shapes(), [*FAST, *settings]), Inputs(Dataset.of(own / "my.yaml")), run, device="cpu")
    return run


def test_a_run_keeps_what_is_asked_for(finished: Path) -> None:
    entries = [json.loads(line) for line in (finished / "log.jsonl").read_text().splitlines()]
    evaluated = [entry for entry in entries if "evaluation" in entry]
    assert [entry["step"] for entry in evaluated] == [2, 4]
    assert {"seen_ap50", "unseen_ap50", "hm_ap50"} <= evaluated[0]["evaluation"].keys()
    assert sorted(path.name for path in (finished / "checkpoints").iterdir()) == [
        "step_000002.safetensors",
        "step_000004.safetensors",
    ]
    assert not (finished / "evaluation").exists() or not list((finished / "evaluation").iterdir())
    stored = config_from_dict(json.loads((finished / "config.json").read_text()), "config.json")
    assert config_to_dict(stored) == json.loads(run_state(finished)["config"])


def test_a_folder_or_a_state_is_a_checkpoint(finished: Path, own: Path, tmp_path: Path, command: Command) -> None:
    assert checkpoint_file(finished) == finished / "best.safetensors"
    last, model = d2zero.load(finished / "last.pt"), d2zero.load(finished / "model.safetensors")
    assert last.vocabulary.names == model.vocabulary.names
    for name, value in model.state_dict().items():  # both averaged
        torch.testing.assert_close(value, last.state_dict()[name], msg=name)
    weights = run_state(finished)["model"]
    assert not torch.equal(weights["decoder.query_features"], model.decoder.query_features)
    files = ("--annotations", own / "held out.json", "--images", own / "val", "--limit", "2")
    for name in ("", "last.pt"):
        outcome = command("eval", finished / name, *files, "-o", tmp_path / "eval", "--device", "cpu")
        assert outcome.code == 0, outcome.err
        assert (name != "") or "best.safetensors is used" in outcome.err
    with pytest.raises(D2ZeroError, match=r"is a folder without best\.safetensors"):
        checkpoint_file(tmp_path)
    torch.save({"weights": 3}, tmp_path / "other.pt")
    outcome = command("predict", own / "val", "-m", tmp_path / "other.pt", "-o", tmp_path / "found")
    assert outcome.code == 2 and "`d2zero convert`" in outcome.err


@pytest.mark.slow
def test_the_commands_that_a_run_prints_work(own: Path, tmp_path: Path, command: Command) -> None:
    import shlex

    flags = ["--preset", "shapes", "--epochs", "0.2", "--batch-size", "4", "--device", "cpu", *FLAGS]
    files = ["--annotations", own / "mine.json", "--images", own / "train", "-v", own / "v.npz"]
    outcome = command("train", *files, *flags, "-o", tmp_path / "a")
    assert outcome.code == 0, outcome.err
    assert "next: d2zero predict PHOTOS -m" in outcome.out and "(0.167 epochs), lr 0.00025" in outcome.err
    outcome = command("train", "--data", own / "my.yaml", *flags, "-o", tmp_path / "b")
    assert outcome.code == 0, outcome.err
    following = shlex.split(outcome.out.split("next: ")[1])
    outcome = command(*following[1:], "--limit", "2", "--device", "cpu", "-o", tmp_path / "eval")
    assert outcome.code == 0, outcome.err


def test_a_resume_takes_the_stored_settings(
    finished: Path, own: Path, tmp_path: Path, command: Command, caplog: pytest.LogCaptureFixture
) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    more = ("--set", "steps=6", "--set", "optim.lr=5e-4", "--set", "log_every=2", "--device", "cpu")
    with caplog.at_level(logging.WARNING, "d2zero"):
        outcome = command("train", "--data", own / "my.yaml", "-o", run, "--resume", *more)
    assert outcome.code == 0, outcome.err
    assert "the run continues with another steps: now 6, then 4" in outcome.err
    assert "the run continues with another optim.lr: now 0.0005, then 0.001" in outcome.err
    state = run_state(run)
    assert state["step"] == 6 and state["ema"]["updates"] == 6
    assert {group["initial_lr"] for group in state["optimizer"]["param_groups"]} == {5e-4}
    outcome = command("train", "--data", own / "my.yaml", "-o", run, "--resume", "--set", "seed=1", "--device", "cpu")
    assert outcome.code == 2 and "seed: now 1, then 0" in outcome.err


@pytest.mark.slow
@pytest.mark.long
def test_two_processes_evaluate_together(own: Path, tmp_path: Path) -> None:
    settings = [
        part for text in (*FAST, "steps=2", "eval_every=1", "eval_images=5", "ema=0.5") for part in ("--set", text)
    ]
    words = [
        "--preset",
        "shapes",
        "--data",
        str(own / "my.yaml"),
        "-o",
        str(tmp_path / "run"),
        "--device",
        "cpu",
        *settings,
    ]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*torchrun, "-m", "d2zero", "train", *words],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("finished; next: d2zero eval") == 1
    entries = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in entries if "evaluation" in entry] == [1, 2]
    assert (tmp_path / "run/best.safetensors").exists() and not list((tmp_path / "run/evaluation").iterdir())


def test_parts_are_frozen_and_batches_divided(own: Path, tmp_path: Path) -> None:
    inputs = Inputs(Dataset.of(own / "my.yaml"))
    settings = [*FAST, "steps=2", "freeze=backbone,pixel_decoder", "accumulate=2"]
    trained = start(with_settings(shapes(), settings), inputs, tmp_path / "run", device="cpu")
    assert trained is not None
    untouched = start(
        with_settings(shapes(), [*FAST, "steps=1", "optim.lr=1e-9"]), inputs, tmp_path / "b", device="cpu"
    )
    assert untouched is not None
    ours, theirs = d2zero.load(trained), d2zero.load(untouched)
    torch.testing.assert_close(ours.pixel_decoder.state_dict(), theirs.pixel_decoder.state_dict(), atol=1e-7, rtol=0)
    assert not torch.allclose(ours.decoder.query_features, theirs.decoder.query_features, atol=1e-5)
    for freeze, message in (("neck", "freeze names 'neck'"), ('[""]', "freeze names ''")):
        with pytest.raises(D2ZeroError, match=message):
            start(with_settings(shapes(), [*FAST, "steps=1", f"freeze={freeze}"]), inputs, tmp_path / "c", device="cpu")
    with pytest.raises(D2ZeroError, match="batch of 4 images cannot be divided into 3"):
        start(with_settings(shapes(), [*FAST, "steps=1", "accumulate=3"]), inputs, tmp_path / "d", device="cpu")


def test_weights_are_taken_over_except_what_is_skipped(finished: Path) -> None:
    source = d2zero.load(finished / "model.safetensors")
    model = d2zero.build(source.config, source.vocabulary)
    own = {name: value.clone() for name, value in model.state_dict().items()}
    start_from(model, source, ["classifier"])
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, own[name] if name.startswith("classifier.") else source.state_dict()[name])
    with pytest.raises(D2ZeroError, match="--init-skip names head, which neither model has"):
        start_from(model, source, ["head"])


def test_a_recipe_is_scaled() -> None:
    assert default().for_images(800).steps == 5000  # a hundred epochs of fifty batches
    config = with_length(with_settings(shapes(), ["optim.milestones=[1000,1800]"]), steps=500)
    assert (config.steps, config.optim.milestones, config.optim.warmup_steps) == (500, (250.0, 450.0), 50)
    config = with_length(default(), epochs=2).for_images(800)
    assert config.steps == 100
    factors = [lr_factor(step, 100, config.optim) for step in (50, 90, 95)]
    assert factors == pytest.approx([1, 0.1, 0.01])
    assert with_batch_size(default(), 4).optim.lr == pytest.approx(2.5e-5)


def test_milestones_after_the_end_are_not_scaled_to_its_beginning() -> None:
    config = with_length(with_settings(coco_48_17(), ["steps=2000"]), steps=4000)
    assert config.optim.milestones == () and lr_factor(3999, 4000, config.optim) == 1
    assert with_length(shapes(), epochs=1).for_images(64).optim.warmup_steps == pytest.approx(0.4)
    with pytest.raises(D2ZeroError, match="epochs count only without steps"):
        with_settings(coco_48_17(), ["epochs=5"])
    with pytest.raises(D2ZeroError, match="epochs must be positive"):
        with_settings(default(), ["epochs=0"])


def test_of_equally_good_evaluations_the_later_counts() -> None:
    nothing_unseen = best_by({"hm_ap50": 0.0, "unseen_ap50": 0.0, "seen_ap50": 3.0})
    assert best_by({"hm_ap50": 0.0, "unseen_ap50": 0.0, "seen_ap50": 60.0}) > nothing_unseen > WORST
    assert best_by({"seen_ap50": 5.0, "hm_ap50": None, "unseen_ap50": None}) > best_by({"seen_ap50": 4.0})


def test_weights_of_another_text_encoder_are_refused_except_without_the_classifier(finished: Path) -> None:
    source = d2zero.load(finished / "model.safetensors")
    other = replace(source.vocabulary, source={"encoder": "word2vec"})
    model = d2zero.build(source.config, other)
    with pytest.raises(D2ZeroError, match="the two do not mix"):
        start_from(model, source)
    start_from(model, source, ["classifier"])


def test_another_backbone_begins_without_options(caplog: pytest.LogCaptureFixture) -> None:
    config = with_settings(shapes(), ["model.backbone=resnet18"])
    assert config.model.backbone_options == {} and "are dropped" in caplog.text
    config = with_settings(shapes(), ["model.backbone=resnet18", 'model.backbone_options={"in_chans": 3}'])
    assert config.model.backbone_options == {"in_chans": 3}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"stepz": 3}, "c.json has the setting stepz"),
        ({"optim": {"lrs": 1}}, r"c.json has the setting optim\.lrs"),
        ({"steps": "many"}, "c.json is damaged: Expected int"),
        ({"model": {"hidden": 3}}, "unknown model settings hidden"),
        ({"loss": {"dice_weight": -1}}, "loss.dice_weight must not be negative"),
    ],
)
def test_settings_of_a_file_are_checked(values: dict, message: str) -> None:
    with pytest.raises(D2ZeroError, match=message):
        config_from_dict(values, "c.json")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("train: {annotation: a.json}", "unknown fields of train in .* annotation"),
        ("tain: {}", "unknown fields in .* tain"),
        ("- a", "must name train, val and vocabulary, got list"),
        ("train: [a", "is not YAML"),
        ("vocabulary: [v]", "is damaged: Expected str"),
    ],
)
def test_a_wrong_data_file_is_refused(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "my.yaml").write_text(content)
    with pytest.raises(D2ZeroError, match=message):
        Dataset.of(tmp_path / "my.yaml")


def test_a_data_file_names_files_beside_itself(own: Path) -> None:
    data = Dataset.of(own / "my.yaml")
    assert data.train == Named(own / "mine.json", own / "train") and data.vocabulary == own / "v.npz"
    assert data.with_val(None, own / "train").val == Named(own / "held out.json", own / "train")
    with pytest.raises(D2ZeroError, match="does not exist"):
        Dataset.of(own / "none.yaml")
    with pytest.raises(D2ZeroError, match="nothing to evaluate on: give --val-annotations"):
        inputs = Inputs(Dataset(train=data.train), data.vocabulary)
        start(with_settings(shapes(), [*FAST, "steps=1", "eval_every=1"]), inputs, own / "run", device="cpu")
