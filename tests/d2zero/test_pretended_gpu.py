"""Inference and training in eager torch on a GPU that is not there: nothing is on the wrong side, little crosses."""

from copy import deepcopy
from dataclasses import replace

import numpy as np
import pytest
import torch
from pretended_gpu import PretendedGpu, pretend

from d2zero.inference import TorchBackend
from d2zero.model import D2Zero, deformable
from d2zero.training.config import shapes, with_settings
from d2zero.training.distributed import Processes
from d2zero.training.step import TrainingStep
from d2zero_bench.training_steps import drawn_batch
from d2zero_runtime.device_masks import DeviceLogits, Sizes

IMAGES = np.random.default_rng(0).standard_normal((2, 3, 64, 96)).astype(np.float32)


@pytest.fixture
def pretended_gpu(monkeypatch: pytest.MonkeyPatch) -> PretendedGpu:
    return pretend(monkeypatch)


def test_inference_uploads_images_and_downloads_class_logits(small_model: D2Zero, pretended_gpu: PretendedGpu) -> None:
    small_model.set_deformable(deformable.grid_sample)
    backend = TorchBackend(small_model)
    class_logits, mask_logits = backend.run(IMAGES, None)
    with pretended_gpu:
        small_model.to("cuda")
        pretended_gpu.uploads.clear()
        found = backend.run(IMAGES, None)
        assert (pretended_gpu.uploads, pretended_gpu.downloads) == ({"to": 1}, {"cpu": 1})
        assert isinstance(found[1], DeviceLogits)
        np.testing.assert_allclose(found[0], class_logits, atol=1e-4)
        np.testing.assert_allclose(found[1], mask_logits, atol=1e-4)


@pytest.mark.parametrize("kind", ["rle", "packed"])
def test_masks_cross_as_bits(pretended_gpu: PretendedGpu, kind: str) -> None:
    logits = torch.from_numpy(IMAGES[0].cumsum(1).cumsum(2))
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
    assert all(parameter.pretended for parameter in small_model.parameters())
    np.testing.assert_allclose(found, expected, rtol=1e-3 if precision == "float32" else 0.1)


def test_the_pretence_refuses_what_a_gpu_refuses(pretended_gpu: PretendedGpu) -> None:
    with pretended_gpu:
        there = torch.ones(3, device="cuda")
        assert there.is_cuda and (there + 1).sum().device.type == "cuda"
        with pytest.raises(RuntimeError, match="same device"):
            there + torch.ones(3)
        with pytest.raises(TypeError, match="convert cuda"):
            there.numpy()
        assert not there.cpu().is_cuda and there.is_cuda
