"""Published checkpoints and backbone weights: every array accounted for, nothing executed."""

import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from commands import Command
from models import placeholder_vocabulary
from published import published_shapes, reference_weights

import d2zero
from d2zero.checkpoints.files import load_model
from d2zero.checkpoints.published import our_name, read_arrays


@pytest.fixture(scope="module")
def arrays() -> dict[str, np.ndarray]:
    return reference_weights(published_shapes(48))


@pytest.fixture
def words(tmp_path: Path) -> Path:
    return placeholder_vocabulary().save(tmp_path / "v.npz")


def as_tensors(arrays: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


def test_every_published_name_has_one_of_ours() -> None:
    names = [name for name in published_shapes(48) if name != "criterion.empty_weight"]
    ours = [our_name(name) for name in names]
    assert None not in ours and len(set(ours)) == len(names) == 582
    assert our_name("sem_seg_head.surprise.weight") is None


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["pth", "pkl", "older"])
def test_published_files(
    layout: str, arrays: dict[str, np.ndarray], words: Path, tmp_path: Path, command: Command
) -> None:
    source = tmp_path / ("m.pkl" if layout == "pkl" else "m.pth")
    if layout == "older":
        arrays = {name.replace("sem_seg_head.pixel_decoder.", "sem_seg_head."): a for name, a in arrays.items()}
    if layout == "pkl":
        source.write_bytes(pickle.dumps({"model": arrays, "__author__": "someone", "matching_heuristics": True}))
    else:
        torch.save({"model": as_tensors(arrays), "iteration": 7}, source)
    outcome = command("convert", source, "-v", words, "-o", tmp_path / "m.safetensors")
    assert outcome.code == 0 and "583 arrays, all accounted for" in outcome.out, outcome.err
    model = d2zero.load(tmp_path / "m.safetensors")
    assert not model.training
    assert float(model.classifier.get_buffer("logit_scale")) == pytest.approx(100)
    expected = next(a for name, a in arrays.items() if name.endswith("mask_embed.layers.1.weight"))
    np.testing.assert_array_equal(model.decoder.get_parameter("mask_mlp.2.weight").detach(), expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a.pop("sem_seg_head.predictor.query_feat.weight"), "1 missing: decoder.query_features"),
        (lambda a: a.update({"extra.thing": np.zeros(2, np.float32)}), "1 unexpected: extra.thing"),
        (
            lambda a: a.update({"sem_seg_head.predictor.query_feat.weight": np.zeros((50, 256), np.float32)}),
            r"1 misshapen: decoder.query_features (50, 256) instead of (100, 256)",
        ),
        (
            lambda a: a.update({"criterion.empty_weight": np.ones(66, np.float32)}),
            "trained on 65 seen classes, the vocabulary has 48",
        ),
    ],
)
def test_what_does_not_fit_is_listed(
    change: Callable, message: str, arrays: dict[str, np.ndarray], words: Path, tmp_path: Path, command: Command
) -> None:
    changed = dict(arrays)
    change(changed)
    torch.save({"model": as_tensors(changed)}, tmp_path / "m.pth")
    outcome = command("convert", tmp_path / "m.pth", "-v", words, "-o", tmp_path / "m.safetensors")
    assert outcome.code == 2 and message in outcome.err
    assert outcome.err.count("\n") == 1 and not (tmp_path / "m.safetensors").exists()


class Malicious:
    def __init__(self, trap: Path) -> None:
        self.trap = trap

    def __reduce__(self) -> tuple:
        return (Path.touch, (self.trap,))


@pytest.mark.parametrize("core", [b"numpy.core", b"numpy._core"])  # of NumPy 1 and 2
def test_arrays_pickled_by_either_numpy(core: bytes, tmp_path: Path) -> None:
    pickled = re.sub(rb"numpy\._?core", core, pickle.dumps({"model": {"a": np.arange(3.0)}}, protocol=2))
    assert core + b".multiarray\n_reconstruct" in pickled
    path = tmp_path / "m.pkl"
    path.write_bytes(pickled)
    found = read_arrays(path)
    np.testing.assert_array_equal(found["a"], np.arange(3.0))


@pytest.mark.parametrize("suffix", [".pth", ".pkl"])
def test_pickled_code_is_not_executed(suffix: str, words: Path, tmp_path: Path, command: Command) -> None:
    trap = tmp_path / "executed"
    source = tmp_path / f"m{suffix}"
    if suffix == ".pkl":
        source.write_bytes(pickle.dumps({"model": Malicious(trap)}))
    else:
        torch.save({"model": Malicious(trap)}, source)
    outcome = command("convert", source, "-v", words, "-o", tmp_path / "m.safetensors")
    assert outcome.code == 2 and "plain arrays" in outcome.err
    assert not trap.exists()


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["torchvision", "detectron2"])
def test_backbone_weights(layout: str, words: Path, tmp_path: Path, command: Command) -> None:
    torch.manual_seed(1)
    net: Any = timm.create_model("resnet50")
    state = net.state_dict()  # torchvision's names are the same
    if layout == "detectron2":
        state = {detectron2_name(name): value.numpy() for name, value in state.items()}
        source = tmp_path / "R-50.pkl"
        source.write_bytes(pickle.dumps({"model": state, "matching_heuristics": True}))
    else:
        source = tmp_path / "resnet50.pth"
        torch.save(state, source)
    outcome = command("convert", source, "-v", words, "-o", tmp_path / "init.safetensors")
    assert outcome.code == 0 and "265 backbone arrays; the rest of the model is fresh" in outcome.out, outcome.err
    model = load_model(tmp_path / "init.safetensors")
    image = torch.randn(1, 3, 64, 64)
    expected = net.eval().forward_features(image)
    torch.testing.assert_close(model.backbone(image)[-1], expected, atol=1e-4, rtol=1e-4)


def detectron2_name(name: str) -> str:
    """The names that detectron2's conversion of torchvision weights gives."""
    name = name if name.startswith("layer") else f"stem.{name}"
    for layer in range(1, 5):
        name = name.replace(f"layer{layer}", f"res{layer + 1}")
    for norm in range(1, 4):
        name = name.replace(f"bn{norm}", f"conv{norm}.norm")
    return name.replace("downsample.0", "shortcut").replace("downsample.1", "shortcut.norm")


def test_incomplete_backbone_weights_are_refused(words: Path, tmp_path: Path, command: Command) -> None:
    state = timm.create_model("resnet50").state_dict()
    del state["layer3.2.conv2.weight"]
    state["layer9.weight"] = torch.zeros(1)
    torch.save(state, tmp_path / "r.pth")
    outcome = command("convert", tmp_path / "r.pth", "-v", words, "-o", tmp_path / "init.safetensors")
    assert outcome.code == 2
    assert "1 missing: layer3.2.conv2.weight; 1 unexpected: layer9.weight" in outcome.err
