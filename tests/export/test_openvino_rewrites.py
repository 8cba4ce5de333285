"""What is rewritten for OpenVINO computes the same, by the operators that it shall use."""

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray
from onnxruntime.quantization import CalibrationDataReader
from tiny_attention import TinyAttention
from torch import Tensor, nn

from d2zero.model.deformable import gather
from d2zero_export.quantize import write_quantized
from d2zero_runtime.backends.openvino.rewrites import convolve_linear_layers, join_row_sums

openvino = pytest.importorskip("openvino", reason="needs the extra 'openvino'")
FLOAT32 = {"INFERENCE_PRECISION_HINT": "f32"}  # without it, OpenVINO lowers where the processor can
SIZES = [(2, 3), (4, 6), (8, 12)]


@pytest.mark.slow
def test_sums_of_rows_are_joined_where_sizes_are_known(tmp_path: Path) -> None:
    torch.manual_seed(0)
    total = sum(height * width for height, width in SIZES)
    model = TinyAttention(gather, SIZES).eval()
    inputs = (torch.randn(2, total, 16), torch.randn(2, total, 16), torch.rand(total, 2))
    path, opened = tmp_path / "fixed.onnx", tmp_path / "open.onnx"
    torch.onnx.export(model, inputs, path, dynamo=True, opset_version=18, verbose=False)
    batch = torch.export.Dim("batch", min=1, max=8)
    shapes = ({0: batch}, {0: batch}, None)
    torch.onnx.export(model, inputs, opened, dynamo=True, opset_version=18, verbose=False, dynamic_shapes=shapes)

    core = openvino.Core()
    fixed = core.read_model(path)
    assert join_row_sums(fixed) == 1 and join_row_sums(core.read_model(opened)) == 0
    compiled = core.compile_model(fixed, "CPU", FLOAT32)
    kinds = [node.get_rt_info()["layerType"].astype(str) for node in compiled.get_runtime_model().get_ordered_ops()]
    assert kinds.count("EmbeddingBagPacked") == 1 and "Gather" not in kinds
    (found,) = compiled([value.numpy() for value in inputs]).values()
    with torch.inference_mode():
        np.testing.assert_allclose(found, model(*inputs).numpy(), atol=1e-5)


def test_other_products_stay() -> None:
    """A gather along columns, more than one row of weights, and a matmul that is not of a gather."""
    operators = pytest.importorskip("openvino.opset13")
    table = operators.parameter([6, 4], np.float32)
    rows = operators.constant(np.array([[0, 1], [2, 3], [1, 3]]))
    several = operators.constant(np.ones((3, 5, 2), np.float32))
    one = operators.constant(np.ones((6, 1, 3), np.float32))
    by_columns = operators.gather(table, rows, operators.constant(1))
    matmuls = [
        operators.matmul(several, operators.gather(table, rows, operators.constant(0)), False, False),
        operators.matmul(one, by_columns, False, False),
        operators.matmul(table, table, False, True),
    ]
    assert join_row_sums(openvino.Model(matmuls, [table])) == 0


class FeedForward(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear1, self.linear2, self.own = nn.Linear(16, 32), nn.Linear(32, 16), nn.Linear(16, 8, bias=False)

    def forward(self, source: Tensor) -> tuple[Tensor, Tensor]:
        return source + self.linear2(self.linear1(source).relu()), self.own(source)


def test_linear_layers_in_eight_bits_are_convolutions(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, source = FeedForward().eval(), torch.randn(2, 5, 16)
    plain, eight_bits = tmp_path / "plain.onnx", tmp_path / "int8.onnx"
    shapes = ({0: torch.export.Dim("batch", min=1, max=8), 1: torch.export.Dim("tokens", min=2, max=99)},)
    torch.onnx.export(model, (source,), plain, dynamo=True, opset_version=18, verbose=False, dynamic_shapes=shapes)
    _quantize(plain, eight_bits, source.numpy())

    core = openvino.Core()
    network = core.read_model(eight_bits)
    assert convolve_linear_layers(core.read_model(plain)) == 0 and convolve_linear_layers(network) == 3
    kinds = [node.get_type_name() for node in network.get_ordered_ops()]
    # Turned over once for the two that read the source, and after the last of two in a row and the one beside them.
    assert kinds.count("Convolution") == 3 and "MatMul" not in kinds and kinds.count("Transpose") == 1 + 2
    compiled = core.compile_model(network, "CPU", FLOAT32)
    running = [node.get_rt_info() for node in compiled.get_runtime_model().get_ordered_ops()]
    types = [info["primitiveType"].astype(str) for info in running if info["layerType"].astype(str) == "Convolution"]
    assert len(types) == 3 and all(name.endswith("I8") for name in types)
    for values in (source, source[:1, :3]):
        found = compiled([values.numpy()])
        with torch.inference_mode():
            for one, other in zip(found.values(), model(values), strict=True):
                np.testing.assert_allclose(one, other.numpy(), atol=0.05)


def _quantize(plain: Path, eight_bits: Path, values: NDArray[np.float32]) -> None:
    """All matmuls with constants, as `d2zero_export.quantize` has them."""

    class Once(CalibrationDataReader):
        batches = iter([{"source": values}])

        def get_next(self) -> dict[str, NDArray[np.float32]] | None:
            return next(self.batches, None)

    proto = onnx.load(plain)
    constants = {tensor.name for tensor in proto.graph.initializer}
    chosen = [node.name for node in proto.graph.node if node.op_type == "MatMul" and node.input[1] in constants]
    write_quantized(plain, eight_bits, chosen, Once())
