"""bfloat16 in OpenVINO: matmuls compute in it, sampling locations do not."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from tiny_attention import TinyAttention

from d2zero.model.deformable import DeformableFunction, gather, grid_sample
from d2zero_runtime.backends.openvino.backend import computes_in_bfloat16
from d2zero_runtime.backends.openvino.precision import lower_to_bfloat16
from d2zero_runtime.backends.openvino.rewrites import join_row_sums

openvino = pytest.importorskip("openvino", reason="needs the extra 'openvino'")
HAS_BFLOAT16 = computes_in_bfloat16(openvino.Core())
SIZES = [(1, 75), (2, 150), (4, 300)]  # bfloat16 has no whole numbers between 256 and 258
TOTAL = sum(height * width for height, width in SIZES)
FORMS = pytest.mark.parametrize("impl", [gather, grid_sample])


@pytest.fixture
def inputs() -> list[NDArray[np.float32]]:
    random = np.random.default_rng(0)
    query, source = (random.standard_normal((1, TOTAL, 16), np.float32) for _ in range(2))
    return [query, source, random.random((TOTAL, 2), np.float32)]


def written(
    impl: DeformableFunction, inputs: list[NDArray[np.float32]], folder: Path
) -> tuple[Path, NDArray[np.float32]]:
    """An attention as ONNX, and what it computes."""
    torch.manual_seed(0)
    model, tensors = TinyAttention(impl, SIZES).eval(), tuple(torch.from_numpy(values) for values in inputs)
    torch.onnx.export(model, tensors, folder / "m.onnx", dynamo=True, opset_version=18, verbose=False)
    with torch.inference_mode():
        return folder / "m.onnx", model(*tensors).numpy()


def lowered(path: Path) -> Any:
    network = openvino.Core().read_model(path)
    join_row_sums(network)
    assert lower_to_bfloat16(network) == 4  # offsets, weights, values, output
    return network


@pytest.mark.slow
@FORMS
def test_types(impl: DeformableFunction, inputs: list[NDArray[np.float32]], tmp_path: Path) -> None:
    network = lowered(written(impl, inputs, tmp_path)[0])
    by_kind: dict[str, list[list[str]]] = {}
    for node in network.get_ordered_ops():
        types = [value.get_element_type().to_string() for value in node.input_values()]
        by_kind.setdefault(node.get_type_name(), []).append(types)
    assert by_kind["MatMul"] == [["bf16", "bf16"]] * 4
    assert by_kind["Result"] == [["f32"]]
    if impl is gather:
        assert by_kind["EmbeddingBagPackedSum"] == [["f32", "i32", "f32"]]
        assert by_kind["Floor"] == [["f32"]] * 2
    else:
        assert by_kind["GridSample"] == [["bf16", "f32"]] * 3


@pytest.mark.skipif(not HAS_BFLOAT16, reason="this processor has no bfloat16")
@FORMS
def test_places_are_not_rounded(impl: DeformableFunction, inputs: list[NDArray[np.float32]], tmp_path: Path) -> None:
    path, right = written(impl, inputs, tmp_path)
    core = openvino.Core()

    def error(network: Any, hint: str) -> float:
        compiled = core.compile_model(network, "CPU", {"INFERENCE_PRECISION_HINT": hint})
        running = [node.get_rt_info() for node in compiled.get_runtime_model().get_ordered_ops()]
        matmuls = [info for info in running if info["layerType"].astype(str) == "FullyConnected"]
        assert {info["runtimePrecision"].astype(str) for info in matmuls} == {"bf16"}
        (found,) = compiled(inputs).values()
        return float(np.abs(found - right).mean() / np.abs(right).mean())

    assert error(lowered(path), "dynamic") < 0.02
    if impl is grid_sample:  # the other form fails as a whole there: rows that no table has
        assert error(core.read_model(path), "bf16") > 0.1
