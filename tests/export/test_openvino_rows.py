"""OpenVINO's operator for weighted sums of rows takes the place of gathers and products, with the same sums."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from d2zero.model.deformable import gather
from d2zero.model.deformable_attention import DeformableAttention
from d2zero_runtime.openvino_backend import join_row_sums

openvino = pytest.importorskip("openvino", reason="needs the extra 'openvino'")
SIZES = [(2, 3), (4, 6), (8, 12)]


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = DeformableAttention(16, heads=2, levels=3, points=2, form=gather)
        nn.init.normal_(self.attention.sampling_offsets.weight, std=0.5)

    def forward(self, query: Tensor, source: Tensor, reference: Tensor) -> Tensor:
        found: Tensor = self.attention(query, source, reference, SIZES)
        return found


def test_sums_of_rows_are_joined_where_sizes_are_known(tmp_path: Path) -> None:
    torch.manual_seed(0)
    total = sum(height * width for height, width in SIZES)
    model, inputs = Attention().eval(), (torch.randn(2, total, 16), torch.randn(2, total, 16), torch.rand(total, 2))
    path, opened = tmp_path / "fixed.onnx", tmp_path / "open.onnx"
    torch.onnx.export(model, inputs, path, dynamo=True, opset_version=18, verbose=False)
    batch = torch.export.Dim("batch", min=1, max=8)
    shapes = ({0: batch}, {0: batch}, None)
    torch.onnx.export(model, inputs, opened, dynamo=True, opset_version=18, verbose=False, dynamic_shapes=shapes)

    core = openvino.Core()
    fixed = core.read_model(path)
    assert join_row_sums(fixed) == 1 and join_row_sums(core.read_model(opened)) == 0
    compiled = core.compile_model(fixed, "CPU")
    kinds = [node.get_rt_info()["layerType"].astype(str) for node in compiled.get_runtime_model().get_ordered_ops()]
    assert kinds.count("EmbeddingBagPacked") == 1 and "Gather" not in kinds
    (found,) = compiled([value.numpy() for value in inputs]).values()
    with torch.inference_mode():
        np.testing.assert_allclose(found, model(*inputs).numpy(), atol=1e-5)


def test_other_products_stay() -> None:
    """A gather along columns, more than one row of shares, and a product that is not of a gather."""
    operators = pytest.importorskip("openvino.opset13")
    table = operators.parameter([6, 4], np.float32)
    rows = operators.constant(np.array([[0, 1], [2, 3], [1, 3]]))
    several = operators.constant(np.ones((3, 5, 2), np.float32))
    one = operators.constant(np.ones((6, 1, 3), np.float32))
    by_columns = operators.gather(table, rows, operators.constant(1))
    products = [
        operators.matmul(several, operators.gather(table, rows, operators.constant(0)), False, False),
        operators.matmul(one, by_columns, False, False),
        operators.matmul(table, table, False, True),
    ]
    assert join_row_sums(openvino.Model(products, [table])) == 0
