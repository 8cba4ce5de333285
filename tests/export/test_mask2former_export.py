"""A closed model with Mask2Former's Swin, exported: at any size, at one, in float16 and in eight bits."""

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from naming import EVERY_PAIR, require_close, require_equal
from PIL import Image
from tiny_network import tiny_closed
from torch import Tensor, nn
from torch.export import Dim

from d2zero.model import D2Zero
from d2zero.model.closed import closed_vocabulary
from d2zero.model.swin import _axis
from d2zero_export.onnx_export import export_onnx
from d2zero_export.onnx_graph import translate
from d2zero_export.options import OnnxOptions
from d2zero_export.parity import RawParity
from d2zero_runtime import D2ZeroError, Segmenter, load
from d2zero_runtime.images import Preprocessing

NAMES = ("cat", "dog", "car", "tree", "mug")
SIZE = (96, 64)
Exported = tuple[Path, RawParity]


@pytest.fixture(scope="module")
def model() -> D2Zero:
    return tiny_closed(
        NAMES,
        backbone="swin_tiny_patch4_window7_224",
        backbone_options={
            "embed_dim": 16, "depths": [2, 1, 1, 1], "num_heads": [1, 2, 2, 4], "window_size": 3,
            "strict_img_size": False, "always_partition": True,
        },
        backbone_output_norm=True,
        frozen_backbone_norm=False,
        num_queries=8,
        decoder_layers=2,
        softmax_temperature=1.0,
        preprocessing=Preprocessing(shortest_edge=64, longest_edge=96),
    )  # fmt: skip


@pytest.fixture(scope="module")
def image() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (80, 60, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def dynamic(model: D2Zero, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    return exported(model, tmp_path_factory.mktemp("dynamic") / "m.onnx", OnnxOptions())


def exported(model: D2Zero, path: Path, options: OnnxOptions) -> Exported:
    """An exported model that its own verification has compared with the checkpoint."""
    parity = export_onnx(model, path, options)
    assert parity is not None
    return path, parity


def require_two_steps(segmenter: Segmenter, image: np.ndarray, tolerance: float = 0.0) -> None:
    """Segmented first and named afterwards, by all of the model's classes and by some, as in one step.

    Args:
        segmenter: Of an exported file.
        image: What it is shown.
        tolerance: Of scores, where the file's classifier by itself computes in another precision than its network.
    """
    segments = segmenter.segment(image)
    for vocabulary in (segmenter.vocabulary, segmenter.vocabulary.select(["mug", "cat"])):
        found = segmenter(image, vocabulary=vocabulary, **EVERY_PAIR)
        assert set(found.names) == set(vocabulary.names)
        named = segmenter.name(segments, vocabulary, **EVERY_PAIR)
        if tolerance:
            require_close(named, found, tolerance)
        else:
            require_equal(named, found)


@pytest.mark.slow
@pytest.mark.long
def test_a_dynamic_file_is_the_checkpoint(model: D2Zero, dynamic: Exported, image: np.ndarray) -> None:
    path, parity = dynamic
    assert len(parity.differences) == 11  # sizes, batches, other numbers of classes, the classifier
    assert max(entry.class_logits for entry in parity.differences) < 1e-4
    segmenter = load(path)
    assert segmenter.vocabulary.names == NAMES and segmenter.vocabulary.source == model.vocabulary.source
    require_close(segmenter(image, **EVERY_PAIR), model.segmenter()(image, **EVERY_PAIR), 1e-5)
    require_two_steps(segmenter, image)
    with pytest.raises(D2ZeroError, match="that of another closed model"):
        segmenter.set_vocabulary(closed_vocabulary(NAMES[::-1]))


@pytest.mark.slow
@pytest.mark.long
def test_a_static_float16_file_is_the_checkpoint(model: D2Zero, image: np.ndarray, tmp_path: Path) -> None:
    path, parity = exported(model, tmp_path / "m.onnx", OnnxOptions(size=SIZE, batch=1, precision="float16"))
    assert parity.differences
    segmenter = load(path)
    assert segmenter.contract.precision == "float16" and segmenter.preprocessing.static_size == SIZE
    require_two_steps(segmenter, image, tolerance=1e-3)


@pytest.mark.parametrize("shift", [0, 1])
def test_windows_of_maps_of_any_size_are_translated(shift: int, tmp_path: Path) -> None:
    class Windows(nn.Module):
        def forward(self, image: Tensor) -> tuple[Tensor, ...]:
            axis = _axis(image.shape[0], 3, shift, image.device)
            return axis.source, axis.region, axis.shown_at

    program = torch.export.export(
        Windows(), (torch.zeros(32),), dynamic_shapes=({0: 8 * Dim("side", min=1, max=1000)},), strict=False
    )
    names = ["source", "region", "shown_at"]
    session = onnxruntime.InferenceSession(translate(program, ["image"], names).SerializeToString())
    for side in (8, 16, 24, 40):
        found = session.run(names, {"image": np.zeros(side, np.float32)})
        padded = -(-side // 3) * 3
        assert found[0].tolist() == [(pixel + shift) % padded for pixel in range(padded)]
        assert [found[0][at] for at in found[2]] == list(range(side))
        for name, value in zip(names, found, strict=True):
            np.testing.assert_array_equal(value, getattr(_axis(side, 3, shift, torch.device("cpu")), name))


@pytest.mark.slow
@pytest.mark.long
def test_linear_layers_of_a_swin_are_quantized_and_its_additions_are_not(model: D2Zero, tmp_path: Path) -> None:
    for number in range(2):
        pixels = np.random.default_rng(number).integers(0, 256, (80, 60, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{number}.png")
    options = OnnxOptions(precision="int8", verify=False, calibration=tmp_path, size=SIZE, batch=1)
    export_onnx(model, tmp_path / "int8.onnx", options)
    graph = onnx.load(tmp_path / "int8.onnx").graph
    made_by = {output: node for node in graph.node for output in node.output}
    counts = Counter(
        node.op_type
        for node in graph.node
        if any(name in made_by and made_by[name].op_type == "DequantizeLinear" for name in node.input)
    )
    in_backbone = sum(isinstance(module, nn.Linear) for module in model.backbone.modules())
    encoders, decoders = len(model.pixel_decoder.layers), len(model.decoder.layers)
    assert in_backbone == 4 * 5 + 3
    assert counts["MatMul"] == in_backbone + 3 * encoders + 3 * decoders
    assert set(counts) == {"MatMul", "Conv"}
    load(tmp_path / "int8.onnx").predict_raw([np.zeros((64, 64, 3), np.uint8)])
