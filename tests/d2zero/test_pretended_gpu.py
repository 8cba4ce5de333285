"""Inference and training in eager torch on a GPU that is not there: nothing is on the wrong side, little crosses."""

from collections.abc import Iterator
from copy import deepcopy
from dataclasses import replace

import numpy as np
import pytest
import torch
from pretended_gpu import PretendedGpu, on_gpu, pretend

from d2zero.data.targets import Targets
from d2zero.data.training_set import Batch
from d2zero.losses.config import LossConfig
from d2zero.losses.criterion import Criterion
from d2zero.model import D2Zero, HeadOutput, deformable
from d2zero.processes import Processes
from d2zero.training.config import shapes, with_settings
from d2zero.training.optim import ScaleWatch
from d2zero.training.step import TrainingStep
from d2zero_bench.published import PublishedSegmenter
from d2zero_runtime import D2ZeroError
from d2zero_runtime.backends import inputs as device_images
from d2zero_runtime.backends.inputs import PixelBatch
from d2zero_runtime.images import Preprocessing
from d2zero_runtime.masks import device as device_masks
from d2zero_runtime.masks.device import DeviceLogits, Sizes
from d2zero_runtime.segmenter import RawOutput
from studies.training_steps import drawn_batch


@pytest.fixture
def pretended_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[PretendedGpu]:
    monkeypatch.setattr(device_masks, "_triton", lambda: False)  # its kernels need a real one
    yield pretend(monkeypatch)
    device_images._scale.cache_clear()


@pytest.mark.parametrize("form", ["model", "published"])
def test_inference_uploads_pixels_and_downloads_all_but_mask_logits(
    small_model: D2Zero, pretended_gpu: PretendedGpu, form: str
) -> None:
    random = np.random.default_rng(0)
    images = [random.integers(0, 256, (height, width, 3), np.uint8) for height, width in ((64, 96), (50, 70), (64, 96))]
    small_model.set_deformable(deformable.grid_sample)
    segmenter = PublishedSegmenter(small_model) if form == "published" else small_model.segmenter()
    sizes = [image.shape[:2] for image in images]
    raw = segmenter.predict_raw(images)
    expected = segmenter.postprocess(raw, sizes, sizes)
    with pretended_gpu:
        small_model.to("cuda")
        segmenter = PublishedSegmenter(small_model) if form == "published" else small_model.segmenter()
        batch = segmenter.input_of([images[0], images[2]], (64, 96))
        assert isinstance(batch, PixelBatch) and len(batch.filled_up(5)[1:]) == 4
        segmenter.backend.run(batch, None)
        pretended_gpu.uploads.clear(), pretended_gpu.downloads.clear()
        class_logits, mask_logits, queries, background = segmenter.backend.run(batch, None)
        assert (pretended_gpu.uploads, pretended_gpu.downloads) == ({"to": 1}, {"cpu": 3})
        assert not any(isinstance(part, DeviceLogits) for part in (class_logits, queries, background))
        assert isinstance(mask_logits, DeviceLogits)
        found = segmenter.predict_raw(images)
        np.testing.assert_allclose(class_logits[1], raw.class_logits[2], atol=1e-4)
        np.testing.assert_allclose(found.class_logits, raw.class_logits, atol=1e-4)
        np.testing.assert_allclose(found.to_numpy().mask_logits, raw.mask_logits, atol=1e-4)
        there = RawOutput(class_logits, mask_logits.tensor, raw.padded_sizes[::2])
        ours = segmenter.postprocess(there, sizes[::2], sizes[::2])
    for mine, theirs in zip(ours, expected[::2], strict=True):
        assert mine.names == theirs.names and len(mine)
        np.testing.assert_allclose(mine.scores, theirs.scores, atol=1e-4)
        np.testing.assert_array_equal(mine.bitmaps(), theirs.bitmaps())


def test_pixels_are_normalised_to_the_same_numbers(pretended_gpu: PretendedGpu) -> None:
    preprocessing = Preprocessing()
    images = [np.random.default_rng(0).integers(0, 256, (size, 40, 3), np.uint8) for size in (64, 33)]
    with pretended_gpu:
        batches = [PixelBatch.of([image], (64, 64), preprocessing) for image in images]
        found = PixelBatch.joined(batches).filled_up(3).normalised_on(torch.device("cuda", 0), torch)
        assert found.is_cuda and found.is_contiguous()
        np.testing.assert_array_equal(found.cpu().numpy()[:2], preprocessing.batch(images, (64, 64)))
        assert not found[2].any()


@pytest.mark.parametrize("kind", ["rle", "packed"])
def test_masks_cross_as_bits(pretended_gpu: PretendedGpu, kind: str) -> None:
    logits = torch.randn(3, 64, 96, generator=torch.Generator().manual_seed(0)).cumsum(1).cumsum(2)
    way = Sizes(padded=(256, 384), used=(250, 380), output=(100, 300))
    expected = DeviceLogits(logits).upsampled([0, 2], way, kind, 1)
    with pretended_gpu:
        found = DeviceLogits(logits.to("cuda")).upsampled([0, 2], way, kind, 1)
    assert pretended_gpu.downloads == {"cpu": 2}  # boxes and qualities, bits
    for ours, theirs in zip(expected, found, strict=True):
        assert (ours.rle, ours.box, ours.quality) == (theirs.rle, theirs.box, theirs.quality)


@pytest.mark.parametrize("precision", ["float32", "float16"])
def test_training_takes_the_same_steps(small_model: D2Zero, pretended_gpu: PretendedGpu, precision: str) -> None:
    settings = ["deformable=grid_sample", "batch_size=2", "augment.size=64", "model.adaptation_dropout=0.0"]
    config = with_settings(shapes(), settings)
    batch = drawn_batch(config, classes=len(small_model.vocabulary.seen_names), instances=3, device=torch.device("cpu"))
    ours = TrainingStep(config, deepcopy(small_model), Processes(0, 1, torch.device("cpu")))
    expected = [ours(step, batch)[0]["loss"].item() for step in range(2)]
    with pretended_gpu:
        there = Processes(0, 1, torch.device("cuda", 0))
        theirs = TrainingStep(replace(config, precision=precision), small_model, there)
        found = [theirs(step, batch)[0]["loss"].item() for step in range(2)]
    assert all(map(on_gpu, small_model.parameters()))
    np.testing.assert_allclose(found, expected, rtol=1e-3 if precision == "float32" else 0.1)


def training_step(model: D2Zero, *settings: str) -> tuple[TrainingStep, Batch]:
    """On the device that is pretended, and a batch for it."""
    settings = ("deformable=grid_sample", "batch_size=1", "augment.size=64", *settings)
    config = with_settings(shapes(), list(settings))
    batch = drawn_batch(config, classes=len(model.vocabulary.seen_names), instances=2, device=torch.device("cpu"))
    return TrainingStep(config, model, Processes(0, 1, torch.device("cuda", 0))), batch


@pytest.mark.parametrize("tf32", [False, True])
def test_what_a_gpu_computes_with_is_decided_for_the_step(
    small_model: D2Zero, pretended_gpu: PretendedGpu, tf32: bool
) -> None:
    def computing() -> tuple[bool, ...]:
        backends = torch.backends
        return backends.cuda.cudnn_sdp_enabled(), backends.cuda.matmul.allow_tf32, backends.cudnn.allow_tf32

    before, seen = computing(), []
    assert before[0]
    with pretended_gpu:
        step, batch = training_step(small_model, "precision=float32", f"tf32={str(tf32).lower()}")
        small_model.register_forward_pre_hook(lambda *_: seen.append(computing()))
        small_model.decoder.query_features.register_hook(lambda _: seen.append(computing()))
        step(0, batch, lambda part: seen.append(computing()))
        assert computing() == before
        with pytest.raises(D2ZeroError, match="not finite"):
            step(1, replace(batch, images=torch.full_like(batch.images, float("nan"), dtype=torch.float32)))
    assert len(seen) == 2 + 3 + 1 and set(seen) == {(False, tf32, tf32)}
    assert computing() == before
    assert all(group["fused"] for group in step.optimizer.param_groups)


def test_a_collapsed_gradient_scale_stops_the_run_a_step_late(small_model: D2Zero, pretended_gpu: PretendedGpu) -> None:
    with pretended_gpu:
        step, batch = training_step(small_model, "precision=float16")
        step.scaler.load_state_dict({**step.scaler.state_dict(), "scale": 0.1})
        step.scale_watch = ScaleWatch(step.scaler)
        small_model.decoder.query_features.register_hook(lambda gradient: gradient * float("inf"))
        weights = small_model.decoder.query_features.detach().clone()
        step(0, batch)
        with pytest.raises(D2ZeroError, match="overflow at step 1"):
            step(1, batch)
    assert torch.equal(weights, small_model.decoder.query_features)


def test_all_heads_are_matched_in_one_transfer(pretended_gpu: PretendedGpu) -> None:
    drawn = torch.Generator().manual_seed(0)
    with pretended_gpu:
        there = torch.device("cuda", 0)
        nothing = torch.empty(0), torch.empty(0)  # losses read no features
        heads = [
            HeadOutput(torch.randn(2, 6, 6, generator=drawn).to(there), torch.randn(2, 6, 16, 16).to(there), *nothing)
            for _ in range(10)
        ]
        targets = [Targets(torch.arange(count), torch.ones(count, 64, 64) > 0).to(there) for count in (2, 0)]
        criterion = Criterion(LossConfig(num_points=64), torch.eye(5).to(there))
        pretended_gpu.uploads.clear(), pretended_gpu.downloads.clear()
        losses = criterion(heads, targets)
    assert len(losses) == 30
    assert pretended_gpu.downloads == {"cpu": 1} and pretended_gpu.uploads == {"tensor": 1, "to": 1}


def test_the_pretence_refuses_what_a_gpu_refuses(pretended_gpu: PretendedGpu) -> None:
    with pretended_gpu:
        there = torch.ones(3, device="cuda")
        assert there.is_cuda and (there + 1).sum().device.type == "cuda"
        with pytest.raises(RuntimeError, match="same device"):
            there + torch.ones(3)
        with pytest.raises(TypeError, match="convert cuda"):
            there.numpy()
        assert not there.cpu().is_cuda and there.is_cuda
