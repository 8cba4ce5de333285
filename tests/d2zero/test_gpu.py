"""What must hold on a GPU: run with `pytest -m gpu` on a machine that has one."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import published_model, published_vocabulary

from d2zero.model import D2Zero, deformable
from d2zero.training.config import shapes, with_settings
from d2zero.training.start import Inputs, start

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and torch sees none"),
]


@pytest.fixture(autouse=True)
def exact_float32() -> None:
    """TF32 would round away what these tests compare."""
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False


@pytest.mark.parametrize("form", [deformable.grid_sample, deformable.gather])
def test_published_model_equals_the_recorded_outputs(shared: Path, form: deformable.DeformableForm) -> None:
    recorded = np.load(shared / "reference/reference_48_17.npz")
    model = published_model(published_vocabulary(shared, "48_17")).to("cuda")
    model.set_deformable(form)
    out = model.predict_raw([recorded["image_u8"]])
    np.testing.assert_allclose(out.class_logits[0].cpu(), recorded["pred_logits"], atol=1e-3, rtol=0)
    np.testing.assert_allclose(out.mask_logits[0].cpu(), recorded["pred_masks"], atol=1e-3, rtol=0)


def test_a_batch_equals_its_images_one_by_one(small_model: D2Zero) -> None:
    model = small_model.to("cuda")
    images = [np.random.default_rng(i).integers(0, 256, (96, 96, 3), np.uint8) for i in range(3)]
    together = model.predict_raw(images)
    for row, image in enumerate(images):
        alone = model.predict_raw([image])
        torch.testing.assert_close(together.class_logits[row], alone.class_logits[0], atol=1e-4, rtol=0)


@pytest.mark.parametrize("precision", ["float16", "bfloat16", "float32"])
def test_training_in_every_precision(shapes_data: Path, tmp_path: Path, precision: str) -> None:
    settings = [f"precision={precision}", "steps=30", "log_every=1", "optim.warmup_steps=5"]
    inputs = Inputs(shapes_data, shapes_data / "vocabulary.npz")
    start(with_settings(shapes(), settings), inputs, tmp_path / "run", device="cuda")
    losses = [json.loads(line)["loss"] for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    assert np.isfinite(losses).all() and np.mean(losses[-5:]) < 0.85 * np.mean(losses[:5])
