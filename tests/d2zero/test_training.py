"""Training runs: resuming after a kill, many processes, what stops a run, what it leaves behind."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from copy import deepcopy
from pathlib import Path

import pytest
import torch

import d2zero
from d2zero.data.dataset import Dataset
from d2zero.data.splits import find_split
from d2zero.data.targets import Targets
from d2zero.data.training_set import Batch
from d2zero.model import build
from d2zero.model.deformable import gather, grid_sample, triton_sample
from d2zero.training.config import (
    OptimConfig,
    coco_48_17,
    config_to_dict,
    find_preset,
    shapes,
    with_settings,
)
from d2zero.training.loop import Run, run_state
from d2zero.training.optim import MOST_SKIPPED, ScaleWatch, build_optimizer, load_optimizer, lr_factor
from d2zero.training.start import Inputs, start
from d2zero.training.step import TrainingStep, deformable_function, without_cudnn_attention
from d2zero_runtime import D2ZeroError, Vocabulary
from d2zero_runtime.backends.torch_math import float32_math

FAST = ["batch_size=4", "augment.size=64", "model.num_queries=6", "loss.num_points=64", "log_every=1"]


def train(data: Path, output: Path, *settings: str, resume: bool = False) -> Path:
    config = with_settings(shapes(), [*FAST, *settings])
    finished = start(config, Inputs(Dataset(data), data / "vocabulary.npz"), output, resume=resume, device="cpu")
    assert finished is not None
    return finished


def losses(output: Path) -> dict[int, float]:
    lines = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    return {line["step"]: line["loss"] for line in lines}


@pytest.mark.slow
def test_loss_falls_and_the_run_leaves_what_it_should(shapes_data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    finished = train(shapes_data, run, "steps=30", "picture_every=15", "optim.warmup_steps=5")
    found = losses(run)
    assert list(found) == list(range(1, 31))
    assert sum(found[step] for step in range(26, 31)) < 0.85 * sum(found[step] for step in range(1, 6))
    entry = json.loads((run / "log.jsonl").read_text().splitlines()[-1])
    assert {"loss_ce", "loss_mask_2", "loss_dice", "gradient_norm", "lr", "steps_per_second"} <= entry.keys()
    assert sorted(path.name for path in (run / "pictures").iterdir()) == ["step_000015.png", "step_000030.png"]
    assert list((run / "tensorboard").iterdir())
    model = d2zero.load(finished)
    assert model.vocabulary.names == Vocabulary.load(shapes_data / "vocabulary.npz").names
    assert run_state(run)["step"] == 30


def command_line(data: Path, run: Path, *more: str) -> list[str]:
    sets = [part for setting in (*FAST, "steps=14", "checkpoint_every=4") for part in ("--set", setting)]
    return [
        "train", "--preset", "shapes", "--data", str(data), "--vocabulary", str(data / "vocabulary.npz"),
        "--output", str(run), "--device", "cpu", *sets, *more,
    ]  # fmt: skip


@pytest.mark.slow
def test_a_killed_run_goes_on_as_if_nothing_had_happened(shapes_data: Path, tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for run in (whole, killed):
        process = subprocess.Popen(
            [sys.executable, "-m", "d2zero", *command_line(shapes_data, run)],
            env=environment,
            stderr=subprocess.DEVNULL,
        )
        if run == killed:
            log = killed / "log.jsonl"
            while process.poll() is None and not (log.exists() and len(log.read_text().splitlines()) >= 6):
                time.sleep(0.01)
            assert process.poll() is None, "the run ended before it could be killed"
            process.send_signal(signal.SIGKILL)
        process.wait()
    step = run_state(killed)["step"]
    assert 4 <= step < 14 and not (killed / "model.safetensors").exists()
    again = [sys.executable, "-m", "d2zero", *command_line(shapes_data, killed, "--resume")]
    subprocess.run(again, env=environment, check=True, stderr=subprocess.DEVNULL)
    assert losses(killed) == pytest.approx(losses(whole), rel=1e-6)
    left, right = (d2zero.load(run / "model.safetensors").state_dict() for run in (whole, killed))
    for name, value in left.items():
        torch.testing.assert_close(value, right[name], msg=name)


@pytest.mark.slow
def test_two_processes_have_the_losses_of_one(shapes_data: Path, tmp_path: Path) -> None:
    """Gloo on the CPU; frozen batch norm, since statistics of half a batch are others."""
    settings = ["--set", "model.frozen_backbone_norm=true", "--set", "steps=5"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for name, launcher in (
        ("one", [sys.executable, "-m", "d2zero"]),
        ("two", [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "d2zero"]),
    ):
        arguments = command_line(shapes_data, tmp_path / name, *settings)
        subprocess.run([*launcher, *arguments], env=environment, check=True, capture_output=True)
    one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert list(two) == [1, 2, 3, 4, 5]
    for step in one:
        assert two[step] == pytest.approx(one[step], rel=1e-3)
    left, right = (d2zero.load(tmp_path / name / "model.safetensors").state_dict() for name in ("one", "two"))
    for name, value in left.items():
        torch.testing.assert_close(value, right[name], atol=2e-3, rtol=2e-2, msg=name)


def test_resume_refuses_other_settings_and_a_new_run_refuses_the_folder(shapes_data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    with pytest.raises(D2ZeroError, match="has no checkpoint"):
        train(shapes_data, run, "steps=2", resume=True)
    train(shapes_data, run, "steps=2")
    with pytest.raises(D2ZeroError, match="already holds a run"):
        train(shapes_data, run, "steps=2")
    with pytest.raises(D2ZeroError, match=r"batch_size: now 8, then 4"):
        train(shapes_data, run, "steps=2", "batch_size=8", resume=True)
    words = Vocabulary.load(shapes_data / "vocabulary.npz")
    other = dataclasses.replace(words, embeddings=words.embeddings[::-1]).save(tmp_path / "other.npz")
    inputs = Inputs(Dataset(shapes_data), other)
    with pytest.raises(D2ZeroError, match="begun with another vocabulary"):
        start(with_settings(shapes(), [*FAST, "steps=2"]), inputs, run, resume=True, device="cpu")
    whole = (run / "last.pt").read_bytes()
    torch.save({"weights": 3}, run / "last.pt")
    with pytest.raises(D2ZeroError, match="it lacks bad_files, config"):
        train(shapes_data, run, "steps=2", resume=True)
    (run / "last.pt").write_bytes(whole[:999])
    with pytest.raises(D2ZeroError, match="damaged or cut short"):
        train(shapes_data, run, "steps=2", resume=True)


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_batch(
    shapes_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    normalised, step = TrainingStep._normalised, TrainingStep.__call__
    seen: list[Batch] = []

    def poisoned(self: TrainingStep, images: torch.Tensor) -> torch.Tensor:
        found = normalised(self, images)
        return found * float("nan") if len(seen) == 3 else found

    monkeypatch.setattr(TrainingStep, "_normalised", poisoned)
    monkeypatch.setattr(TrainingStep, "__call__", lambda self, n, batch: (seen.append(batch), step(self, n, batch))[1])
    with pytest.raises(D2ZeroError, match="not finite at step 3") as stopped:
        train(shapes_data, tmp_path / "run", "steps=5", "checkpoint_every=1")
    assert all(name in str(stopped.value) for name in seen[-1].file_names)
    assert run_state(tmp_path / "run")["step"] == 2


@pytest.mark.slow
def test_log_entries_over_several_steps_survive_a_resume(shapes_data: Path, tmp_path: Path) -> None:
    settings = ["steps=6", "log_every=3", "checkpoint_every=2"]
    train(shapes_data, tmp_path / "whole", *settings)

    class Stop(Exception):
        pass

    class Stopping(Run):
        def save_state(self) -> None:
            super().save_state()
            if self.step == 4:
                raise Stop

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stop):
        patch.setattr("d2zero.training.start.Run", Stopping)
        train(shapes_data, tmp_path / "cut", *settings)
    train(shapes_data, tmp_path / "cut", *settings, resume=True)
    assert losses(tmp_path / "cut") == pytest.approx(losses(tmp_path / "whole"), rel=1e-6)


def test_a_worker_that_finds_no_image_says_so_in_one_line(shapes_data: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    shutil.copytree(shapes_data, data)
    for file in (data / "train").iterdir():
        file.write_bytes(b"")
    with pytest.raises(D2ZeroError, match=r"^50 images in a row could not be used; [^\n]*not an image[^\n]*$"):
        train(data, tmp_path / "run", "steps=2", "workers=1", "cache=false")


def test_unseen_constrained_training_runs(shapes_data: Path, tmp_path: Path) -> None:
    train(shapes_data, tmp_path / "run", "steps=3", "loss.unseen_weight=0.1")
    entry = json.loads((tmp_path / "run/log.jsonl").read_text().splitlines()[-1])
    assert entry["loss_unseen"] > 0 and entry["loss_unseen_0"] > 0


def test_bfloat16_and_workers(shapes_data: Path, tmp_path: Path) -> None:
    train(shapes_data, tmp_path / "run", "steps=3", "precision=bfloat16", "workers=2", "cache=false")
    assert all(loss > 0 for loss in losses(tmp_path / "run").values())


def test_the_kernel_is_chosen_on_a_gpu_and_other_forms_by_name(shapes_data: Path, tmp_path: Path) -> None:
    assert [deformable_function(name) for name in ("auto", "triton", "gather", "grid_sample")] == [
        None,
        triton_sample,
        gather,
        grid_sample,
    ]
    train(shapes_data, tmp_path / "auto", "steps=2")
    train(shapes_data, tmp_path / "gather", "steps=2", "deformable=gather")
    assert losses(tmp_path / "gather") == pytest.approx(losses(tmp_path / "auto"), rel=1e-3)
    with pytest.raises(D2ZeroError, match="on a CUDA device, got cpu"):
        train(shapes_data, tmp_path / "triton", "steps=2", "deformable=triton")


@pytest.mark.slow
def test_the_whole_network_compiles_into_one_graph_with_the_same_losses(
    shapes_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Traced, not built: building takes minutes. A run begun without goes on from its checkpoint as it was."""
    settings = ["steps=2", "model.decoder_layers=1", "checkpoint_every=1"]
    train(shapes_data, tmp_path / "eager", *settings)
    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda net, **kw: compile_(net, backend="eager", fullgraph=True, **kw))
    train(shapes_data, tmp_path / "compiled", *settings, "compile=true")
    assert losses(tmp_path / "compiled") == pytest.approx(losses(tmp_path / "eager"), rel=1e-5)
    left, right = (run_state(tmp_path / name)["model"].keys() for name in ("eager", "compiled"))
    assert left == right
    with pytest.raises(D2ZeroError, match="compile: now True, then False"):
        train(shapes_data, tmp_path / "eager", *settings, "compile=true", resume=True)


def test_a_run_from_before_these_settings_is_resumed(shapes_data: Path, tmp_path: Path) -> None:
    train(shapes_data, tmp_path / "run", "steps=1")
    state = run_state(tmp_path / "run")
    config = json.loads(state["config"])
    del config["compile"], config["deformable"], config["tf32"], state["scale_watch"]
    torch.save({**state, "config": json.dumps(config)}, tmp_path / "run/last.pt")
    with pytest.raises(D2ZeroError, match="tf32: now True, then False"):
        train(shapes_data, tmp_path / "run", "steps=1", "tf32=true", resume=True)
    train(shapes_data, tmp_path / "run", "steps=1", "deformable=gather", resume=True)


def test_a_run_begun_without_float16_is_resumed_where_there_is(
    shapes_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As `precision=auto` does when a run moves from a CPU to a GPU."""
    train(shapes_data, tmp_path / "run", "steps=1")
    assert run_state(tmp_path / "run")["scaler"] == {}
    scaler = torch.amp.GradScaler("cpu")
    monkeypatch.setattr(torch.amp, "GradScaler", lambda *_, **__: scaler)
    train(shapes_data, tmp_path / "run", "steps=1", resume=True)
    assert scaler.is_enabled() and scaler.get_scale() == 65536


def scaled_step(scaler: torch.amp.GradScaler, parameter: torch.nn.Parameter, gradient: float) -> None:
    optimizer = torch.optim.SGD([parameter], lr=0.0)
    optimizer.zero_grad()
    scaler.scale(gradient * parameter.sum()).backward()
    scaler.step(optimizer)
    scaler.update()


def test_a_collapsed_gradient_scale_stops_the_run() -> None:
    scaler, parameter = (
        torch.amp.GradScaler("cpu", init_scale=0.25, growth_interval=1),
        torch.nn.Parameter(torch.ones(1)),
    )
    watch = ScaleWatch(scaler)
    for step, gradient in enumerate((float("inf"), 1.0, float("nan"), float("inf"))):
        watch.check(step)
        scaled_step(scaler, parameter, gradient)
    watch.check(4)  # the scale is 1/16
    scaled_step(scaler, parameter, float("inf"))
    with pytest.raises(
        D2ZeroError, match=r"at step 5 \(.* in a row: 3, gradient scale: 0\.03125\).*precision=bfloat16"
    ):
        watch.check(5)


def test_steps_skipped_in_a_row_stop_the_run_across_a_resume() -> None:
    parameter = torch.nn.Parameter(torch.ones(1))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**30)
    watch = ScaleWatch(scaler)
    for step in range(MOST_SKIPPED):
        watch.check(step)
        if step == 5:
            saved, seen = scaler.state_dict(), watch.state_dict()
            scaler = torch.amp.GradScaler("cpu")
            watch = ScaleWatch(scaler)
            scaler.load_state_dict(saved)
            watch.load_state_dict(seen)
        scaled_step(scaler, parameter, float("inf"))
    with pytest.raises(D2ZeroError, match=r"at step 20 \(steps skipped in a row: 20, gradient scale: 1024\)"):
        watch.check(MOST_SKIPPED)


def test_no_scale_is_watched_without_float16() -> None:
    watch = ScaleWatch(torch.amp.GradScaler("cpu", enabled=False))
    for step in range(2 * MOST_SKIPPED):
        watch.check(step)


@pytest.mark.parametrize("saved_fused", [None, True])
@pytest.mark.parametrize("fused", [None, True])
def test_the_optimiser_goes_on_from_any_device_as_it_was_built(saved_fused: bool | None, fused: bool | None) -> None:
    """A GPU's is fused, a CPU's and those of before are not."""

    def optimizer(fused: bool | None) -> tuple[torch.nn.Parameter, torch.optim.AdamW]:
        parameter = torch.nn.Parameter(torch.ones(5))
        return parameter, torch.optim.AdamW([parameter], lr=0.1, fused=fused)

    def step(parameter: torch.nn.Parameter, optimizer: torch.optim.AdamW, number: int) -> None:
        parameter.grad = torch.arange(5.0) - number
        optimizer.step()

    parameter, saved = optimizer(saved_fused)
    step(parameter, saved, 1)
    resumed, loaded = optimizer(fused)
    load_optimizer(loaded, deepcopy(saved.state_dict()))
    resumed.data.copy_(parameter.data)
    for each in ((parameter, saved), (resumed, loaded)):
        step(*each, 2)
    assert loaded.param_groups[0]["fused"] is fused and saved.param_groups[0]["fused"] is saved_fused
    assert loaded.state[resumed]["step"] == 2
    torch.testing.assert_close(resumed, parameter)


@pytest.mark.slow
def test_attention_compiles_without_cudnns() -> None:
    attention = torch.nn.MultiheadAttention(8, 2, batch_first=True)
    queries, keys = torch.randn(1, 3, 8), torch.randn(1, 64, 8)
    expected = attention(queries, keys, keys, need_weights=False)[0]
    compiled = torch.compile(attention, backend="aot_eager", fullgraph=True)
    with float32_math(torch, True), without_cudnn_attention():
        found = compiled(queries, keys, keys, need_weights=False)[0]
        found.sum().backward()
    torch.testing.assert_close(found, expected)


def test_a_batch_is_pinned_as_a_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """DataLoader pins what has this method, and passes by what has not."""
    masks = [torch.zeros(count, 4, 4, dtype=torch.bool) for count in (2, 0)]
    targets = [Targets(torch.zeros(len(mask), dtype=torch.int64), mask) for mask in masks]
    batch = Batch(torch.zeros(2, 3, 4, 4, dtype=torch.uint8), targets, ["a", "b"], [1, 2], ["c is missing"])
    copies: dict[int, torch.Tensor] = {}
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: copies.setdefault(id(self), self.clone()))
    found = batch.pin_memory()
    assert found.images is copies[id(batch.images)]
    for pinned, target in zip(found.targets, targets, strict=True):
        assert pinned.labels is copies[id(target.labels)] and pinned.masks is copies[id(target.masks)]
    assert (found.file_names, found.seeds, found.problems) == (batch.file_names, batch.seeds, batch.problems)


def test_starting_from_a_checkpoint(shapes_data: Path, tmp_path: Path) -> None:
    first = train(shapes_data, tmp_path / "a", "steps=1")
    config = with_settings(shapes(), [*FAST, "steps=1", "optim.lr=1e-12"])
    inputs = Inputs(Dataset(shapes_data), shapes_data / "vocabulary.npz", init=first)
    second = start(config, inputs, tmp_path / "b", device="cpu")
    assert second is not None
    left, right = d2zero.load(first), d2zero.load(second)
    torch.testing.assert_close(left.decoder.query_features, right.decoder.query_features)


def test_vocabulary_without_the_classes_of_a_split_is_refused(shapes_data: Path, tmp_path: Path) -> None:
    inputs = Inputs(Dataset(shapes_data), shapes_data / "vocabulary.npz", find_split("coco-48-17"))
    with pytest.raises(D2ZeroError, match="lack 65 classes of split coco-48-17"):
        start(coco_48_17(), inputs, tmp_path / "run", device="cpu")


def test_parameter_groups() -> None:
    model = build(shapes().model, d2zero.Vocabulary(("a", "b"), torch.eye(2, 64).numpy()))
    optimizer = build_optimizer(model, OptimConfig())
    group_of = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    assert len(group_of) == len(list(model.parameters()))
    for name, parameter in model.named_parameters():
        group = group_of[id(parameter)]
        assert group["lr"] == pytest.approx(1e-5 if name.startswith("backbone") else 1e-4)
        undecayed = "norm" in name or ".bn" in name or name.endswith(("query_features", "level_embedding"))
        if undecayed:
            assert group["weight_decay"] == 0, name
    assert group_of[id(model.decoder.get_parameter("layers.0.linear1.weight"))]["weight_decay"] == 0.05
    assert group_of[id(model.pixel_decoder.level_embedding)]["weight_decay"] == 0
    assert group_of[id(model.pixel_decoder.lateral[1].weight)]["weight_decay"] == 0


def test_schedules() -> None:
    published = coco_48_17()
    assert [lr_factor(s, published.steps, published.optim) for s in (0, 9, 126_314, 126_315, 133_333)] == pytest.approx(
        [0.1, 1, 1, 0.1, 0.01]
    )
    cosine = OptimConfig(schedule="cosine", warmup_steps=0, final_factor=0.02)
    assert [lr_factor(s, 100, cosine) for s in (0, 50, 100)] == pytest.approx([1, 0.51, 0.02])


def test_settings() -> None:
    changed = with_settings(
        find_preset("coco-65-15"),
        [
            "optim.lr=1",
            "model.backbone=convnext_tiny",
            "augment.scale_range=[0.5, 1.5]",
            "cache=True",
            "optim.milestones=[3]",
        ],
    )
    assert changed.optim.lr == 1.0 and changed.model.backbone == "convnext_tiny" and changed.cache is True
    assert changed.augment.scale_range == (0.5, 1.5) and changed.optim.milestones == (3,)
    assert config_to_dict(changed)["optim"]["milestones"] == [3]  # as JSON has it
    assert changed.workers <= (os.cpu_count() or 1)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("steps", "takes key=value"),
        ("speed=9", "no setting 'speed'"),
        ("optim.speed=9", r"no setting 'optim.speed'; here there are lr"),
        ("steps.more=9", "steps has no parts"),
        ("steps=many", "of type int"),
        ("steps=1.5", "of type int"),
        ("optim=3", "a group of settings"),
        ("steps=-1", "steps must not be negative"),
        ("epochs=0", "epochs count only without steps"),
        ("accumulate=0", "accumulate must be at least 1"),
        ("ema=1", "ema must be from 0 to below 1"),
        ("loss.mask_weight=-1", "loss.mask_weight must not be negative"),
        ("precision=int4", "auto, float32"),
        ("deformable=magic", "auto or one of gridsample, gather, triton"),
        ("optim.schedule=wavy", "steps, cosine"),
        ("optim.lr=-1", "must be positive"),
        ("augment.size=100", "multiple of 32"),
        ("augment.scale_range=[2,1]", "two rising positive numbers"),
        ("model.num_heads=5", "multiple of 32 and of num_heads"),
    ],
)
def test_wrong_settings_are_refused(setting: str, message: str) -> None:
    with pytest.raises(D2ZeroError, match=message):
        with_settings(shapes(), [setting])
