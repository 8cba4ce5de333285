"""Equality with the published implementation, as recorded in the reference cases."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from models import SMALL_REFERENCE, placeholder_vocabulary, published_model, published_vocabulary
from published import published_shapes, reference_weights
from recorded import require_recorded_detections
from torch import Tensor

from d2zero.data.targets import Targets
from d2zero.losses.config import LossConfig
from d2zero.losses.criterion import Criterion
from d2zero.model import D2Zero, deformable
from d2zero_runtime import Preprocessing, read_image

TOLERANCE = 1e-3  # of logits; noise of 1e-4 grey levels on the input moves them by 8e-5


def tensors(model: D2Zero, image: np.ndarray) -> dict[str, np.ndarray]:
    """Everything the reference recorded of one forward pass."""
    padded = model.config.preprocessing.padded_size(image.shape[:2])
    with torch.inference_mode():
        images = torch.from_numpy(model.config.preprocessing.batch([image], padded))
        features = model.backbone(images)
        mask_features, memory = model.pixel_decoder(features)
        heads = model(images, all_heads=True)
    found = {f"backbone_res{i}_first8ch": f[0, :8] for i, f in enumerate(features, 2)}
    found |= {"mask_features_first8ch": mask_features[0, :8]}
    found |= {f"multi_scale_{i}_first8ch": level[0, :8] for i, level in enumerate(memory)}
    found |= {"pred_logits": heads[-1].class_logits[0], "pred_masks": heads[-1].mask_logits[0]}
    for i, head in enumerate(heads[:-1]):
        found[f"aux{i}_pred_logits"] = head.class_logits[0]
        found[f"aux{i}_mask_positive_fraction"] = (head.mask_logits[0] > 0).float().mean((1, 2))
    return {name: value.numpy() for name, value in found.items()}


def test_weights_rule_is_the_recorded_one(shared: Path) -> None:
    for split, seen in (("48_17", 48), ("65_15", 65)):
        recorded = json.loads((shared / f"reference/state_dict_{split}.json").read_text())
        assert {name: tuple(shape) for name, shape in recorded.items()} == published_shapes(seen)
    assert len(reference_weights(published_shapes(48))) == 583


def test_small_reference_without_text() -> None:
    """Backbone, pixel decoder and masks of all heads, from only what is committed."""
    recorded = np.load(SMALL_REFERENCE)
    found = tensors(published_model(placeholder_vocabulary()), recorded["image_u8"])
    sampled = [name.removesuffix("_index") for name in recorded.files if name.endswith("_index")]
    assert len(sampled) == 9
    for name in sampled:
        assert found[name].shape == tuple(recorded[f"{name}_shape"])
        values = found[name].ravel()[recorded[f"{name}_index"]]
        np.testing.assert_allclose(values, recorded[f"{name}_value"], atol=TOLERANCE, rtol=0, err_msg=name)
    for head in range(9):
        name = f"aux{head}_mask_positive_fraction"
        np.testing.assert_allclose(found[name], recorded[name], atol=1e-3, err_msg=name)  # a pixel may flip


@pytest.mark.slow
@pytest.mark.parametrize("split", ["48_17", pytest.param("65_15", marks=pytest.mark.long)])
def test_all_tensors_and_detections(shared: Path, split: str) -> None:
    recorded = np.load(shared / f"reference/reference_{split}.npz")
    model = published_model(published_vocabulary(shared, split))
    image = recorded["image_u8"]
    found = tensors(model, image)
    names = [name for name in recorded.files if name in found]
    assert len(names) == 8 + 2 + 18
    for name in names:
        atol = 1e-3 if name.endswith("fraction") else TOLERANCE  # of 4032 pixels, a few may flip
        np.testing.assert_allclose(found[name], recorded[name], atol=atol, rtol=0, err_msg=name)
    for impl in (deformable.grid_sample, deformable.gather):
        model.set_deformable(impl)
        out = model.predict_raw([image])
        assert out.padded_sizes == (tuple(recorded["padded_hw"]),)
        np.testing.assert_allclose(out.class_logits[0], recorded["pred_logits"], atol=TOLERANCE, rtol=0)
        np.testing.assert_allclose(out.mask_logits[0], recorded["pred_masks"], atol=TOLERANCE, rtol=0)
    require_recorded_detections(model, out, recorded)


def training_case(recorded: np.lib.npyio.NpzFile, model: D2Zero) -> tuple[Tensor, list[Targets]]:
    """The recorded two-image batch: an image, and the same flipped left-right."""
    image = recorded["image_u8"]
    height, width = map(int, recorded["padded_hw"])
    images = torch.from_numpy(model.config.preprocessing.batch([image, image[:, ::-1]], (height, width)))
    targets = []
    for index in (0, 1):
        shape = tuple(recorded[f"train{index}_masks_shape"])
        bits = np.unpackbits(recorded[f"train{index}_masks"])[: np.prod(shape)].reshape(shape)
        masks = np.zeros((shape[0], height, width), bool)
        masks[:, : shape[1], : shape[2]] = bits
        targets.append(Targets(torch.from_numpy(recorded[f"train{index}_labels"]), torch.from_numpy(masks)))
    return images, targets


def published_background(mask_features: Tensor, mask_logits: Tensor) -> Tensor:
    """The published code's rule: whether there is no background is asked of the whole batch."""
    claimed = (mask_logits > 0).any(dim=1)
    background = ~claimed if (~claimed).any() else claimed
    mean = (mask_features * background[:, None]).mean(dim=(2, 3))
    return torch.nn.functional.normalize(mean, dim=-1, eps=1e-5).detach()


@pytest.mark.slow
@pytest.mark.parametrize("split", ["48_17", pytest.param("65_15", marks=pytest.mark.long)])
def test_training_losses_and_gradients(shared: Path, split: str, monkeypatch: pytest.MonkeyPatch) -> None:
    recorded = np.load(shared / f"reference/reference_{split}.npz")
    model = published_model(published_vocabulary(shared, split)).train()
    text = model.class_embeddings[torch.from_numpy(model.vocabulary.seen)]
    criterion = Criterion(LossConfig(), text)
    images, targets = training_case(recorded, model)

    def losses(seed: int, backward: bool = False) -> dict[str, float]:
        torch.manual_seed(seed)
        with torch.set_grad_enabled(backward):
            found = criterion(model(images, text, all_heads=True), targets)
            if backward:
                torch.stack(list(found.values())).sum().backward()
        return {name: float(value.detach()) for name, value in found.items()}

    mean4 = json.loads(str(recorded["train_mean4_losses_json"]))
    ours = losses(1)
    # In the 48/17 case, head 3 leaves one of the two images without background: there the published rule,
    # which asks the whole batch, differs from ours. All else is equal under either rule.
    apart = {name for name in mean4 if abs(ours[name] - mean4[name]) > 0.03 * mean4[name]}
    assert apart <= ({"loss_ce_3"} if split == "48_17" else set())

    monkeypatch.setattr("d2zero.model.d2zero.background_embedding", published_background)
    seeds = [losses(0, backward=True), *(losses(seed) for seed in (1, 2, 3))]
    assert set(seeds[0]) == set(mean4)
    for name, value in json.loads(str(recorded["train_seed0_losses_json"])).items():
        assert seeds[0][name] == pytest.approx(value, rel=1e-3), name
    for name, value in mean4.items():
        assert np.mean([seed[name] for seed in seeds]) == pytest.approx(value, rel=0.01), name
    norms = json.loads(str(recorded["train_seed0_grad_norms_json"]))
    for part, modules in (
        ("backbone", [model.backbone]),
        ("sem_seg_head.pixel_decoder", [model.pixel_decoder]),
        ("sem_seg_head.predictor", [model.decoder, model.classifier]),
    ):
        gradients = [p.grad for module in modules for p in module.parameters()]
        assert all(gradient is not None for gradient in gradients)
        norm = torch.stack([gradient.norm() for gradient in gradients if gradient is not None]).norm()
        assert float(norm) == pytest.approx(norms[part], rel=0.03), part


def test_resize_equals_the_recorded_one(shared: Path) -> None:
    recorded = json.loads((shared / "reference/preprocess_800_1333.json").read_text())
    assert len(recorded) == 6
    for name, case in recorded.items():
        image = read_image(shared / "data/coco_tiny/val2017" / name)
        assert list(image.shape[:2]) == case["in_hw"]
        resized = Preprocessing().resize(image)
        assert list(resized.shape[:2]) == case["out_hw"]
        difference = np.abs(resized[case["ys"], case["xs"]].astype(int) - np.array(case["rgb"]))
        assert difference.max() <= 1, name
