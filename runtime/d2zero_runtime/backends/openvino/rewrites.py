"""What OpenVINO's CPU plugin computes faster in another form, rewritten between reading a graph and compiling it.

- Weighted sums of gathered rows, as `--deform-attn gather` has them, to the one operator for that. It takes no dynamic
  shapes, so this is for files of static shape.
- Linear layers in eight bits to 1×1 convolutions: without VNNI, OpenVINO multiplies matrices of bytes slower than
  matrices of floats, but convolves them twice as fast.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray


def join_row_sums(model: Any) -> int:
    """Rewrite sums of weights (X, 1, J) @ table[rows (X, J)], X known, to EmbeddingBagPackedSum: the same sums.

    Returns:
        The number of sums rewritten; those of several matmuls with one table count once.
    """
    sums: dict[str, _RowSum] = {}  # by the name of the node that has it
    for node in model.get_ordered_ops():
        if _is_sum_of_rows(node):
            table, rows, _ = node.input_value(1).get_node().input_values()
            sums[node.get_name()] = _RowSum(node, table, [rows], [node.input_value(0)])
        elif node.get_type_name() == "Add":
            one, other = (sums.get(value.get_node().get_name()) for value in node.input_values())
            if one and other and one.node.get_name() != other.node.get_name() and one.table == other.table:
                del sums[one.node.get_name()], sums[other.node.get_name()]
                sums[node.get_name()] = _RowSum(node, one.table, one.rows + other.rows, one.weights + other.weights)
    for found in sums.values():
        found.rewrite()
    return len(sums)


@dataclass(frozen=True)
class _RowSum:
    """A node that is a weighted sum of a table's rows, (X, 1, N), and what it is made of."""

    node: Any
    table: Any
    rows: list[Any]
    weights: list[Any]

    def rewrite(self) -> None:
        from openvino import opset13 as operators

        rows = operators.convert(operators.concat(self.rows, 1), "i32")
        weights = operators.squeeze(operators.concat(self.weights, 2), operators.constant([1]))
        summed = operators.embedding_bag_packed_sum(self.table, rows, weights)
        result = operators.unsqueeze(summed, operators.constant([1]))
        for user in self.node.output(0).get_target_inputs():
            user.replace_source_output(result.output(0))


def _is_sum_of_rows(product: Any) -> bool:
    """Whether a node is a MatMul of weights (X, 1, J) and rows gathered from a table (T, N), X and J known."""
    if not _is_plain_product(product):
        return False
    gathered = product.input_value(1).get_node()
    if gathered.get_type_name() != "Gather":
        return False
    table, rows, axis = gathered.input_values()
    shares_shape, rows_shape = product.input_value(0).get_partial_shape(), rows.get_partial_shape()
    if not (shares_shape.is_static and rows_shape.is_static) or axis.get_node().get_type_name() != "Constant":
        return False
    known, counts = list(shares_shape.to_shape()), list(rows_shape.to_shape())
    by_rows = int(axis.get_node().get_data()) == 0 and table.get_partial_shape().rank.get_max_length() == 2
    return by_rows and len(counts) == 2 and known == [counts[0], 1, counts[1]]


def _is_plain_product(node: Any) -> bool:
    plain = {"transpose_a": False, "transpose_b": False}
    return bool(node.get_type_name() == "MatMul" and node.get_attributes() == plain)


class _Linear(NamedTuple):
    """A product in eight bits of (B, T, C) by a constant."""

    product: Any
    kernel_NC: NDArray[np.int8]
    scales_N: NDArray[np.float32]


def convolve_linear_layers(model: Any) -> int:
    """Rewrite matmuls of (B, T, C) with constants (C, N), both in eight bits, to 1×1 convolutions of (B, C, T, 1).

    Their biases and elementwise operators between two of them move along, so that all of it becomes one operator.
    Channels stay innermost in memory: turning the tensors over costs nothing.

    Returns:
        The number of matmuls rewritten.
    """
    from openvino import opset13 as operators

    layers = [layer for node in model.get_ordered_ops() if (layer := _linear(node))]
    pictures: dict[str, Any] = {}  # by the name of the node that has it as (B, T, C): the same value as (B, C, T, 1)
    for layer in layers:
        kernel = operators.convert(operators.constant(layer.kernel_NC[:, :, None, None]), "f32")
        kernel = operators.multiply(kernel, operators.constant(layer.scales_N[:, None, None, None]))
        picture = operators.convolution(
            _picture(layer.product.input_value(0), pictures), kernel, [1, 1], [0, 0], [0, 0], [1, 1]
        )
        last, bias = layer.product, _bias(layer.product)
        if bias:
            last, bias_N = bias
            picture = operators.add(picture, operators.constant(bias_N[:, None, None]))
        value = operators.squeeze(
            operators.transpose(picture, operators.constant([0, 2, 3, 1])), operators.constant([2])
        )
        pictures[value.get_name()] = picture.output(0)
        for user in last.output(0).get_target_inputs():
            user.replace_source_output(value.output(0))
    return len(layers)


def _linear(product: Any) -> _Linear | None:
    """What a node is, if it is a product that can be rewritten."""
    if not _is_plain_product(product):
        return None
    value, weight = product.input_values()
    weights, activations = _dequantized(weight), _dequantized(value)
    rank = value.get_partial_shape().rank
    if not weights or not activations or rank.is_dynamic or rank.get_length() != 3:
        return None
    stored, zero, scale = (_stored(part) for part in weights)
    if stored is None or scale is None or stored.dtype != np.int8 or stored.ndim != 2 or zero is None or zero.any():
        return None
    scales_N = np.broadcast_to(scale.reshape(-1), stored.shape[1])
    return _Linear(product, np.ascontiguousarray(stored.T), np.ascontiguousarray(scales_N, np.float32))


def _dequantized(value: Any) -> tuple[Any, Any, Any] | None:
    """The integers, zero point and scale of (integers - zero point) * scale."""
    scaled = value.get_node()
    if scaled.get_type_name() != "Multiply":
        return None
    shifted = scaled.input_value(0).get_node()
    if shifted.get_type_name() != "Subtract" or shifted.input_value(0).get_node().get_type_name() != "Convert":
        return None
    return shifted.input_value(0), shifted.input_value(1), scaled.input_value(1)


def _stored(value: Any) -> NDArray[Any] | None:
    """The constant that a value is, except for its type and shape."""
    node = value.get_node()
    while node.get_type_name() in ("Convert", "Reshape"):
        node = node.input_value(0).get_node()
    return np.asarray(node.get_data()) if node.get_type_name() == "Constant" else None


def _bias(product: Any) -> tuple[Any, NDArray[Any]] | None:
    """The only reader of a product and what it adds to it, (N,), if it is that."""
    readers = product.output(0).get_target_inputs()
    adds = [user.get_node() for user in readers if user.get_node().get_type_name() == "Add"]
    if len(readers) != 1 or len(adds) != 1:
        return None
    for value in adds[0].input_values():
        if value.get_node().get_type_name() == "Constant" and value.get_partial_shape().rank.get_length() == 1:
            return adds[0], np.asarray(value.get_node().get_data())
    return None


def _picture(value: Any, pictures: dict[str, Any]) -> Any:
    """A value (B, T, C) as (B, C, T, 1): as it was convolved and then changed value by value, or turned over."""
    from openvino import opset13 as operators

    name = value.get_node().get_name()
    known = _known(value, pictures)
    if known is None:  # turned over as bytes: OpenVINO moves scales behind it
        rows = operators.unsqueeze(value, operators.constant([2]))
        known = operators.transpose(rows, operators.constant([0, 3, 1, 2])).output(0)
    pictures[name] = known
    return known


def _known(value: Any, pictures: dict[str, Any]) -> Any | None:
    """The picture that there is of a value, or of what it was made from value by value, changed in the same way."""
    from openvino.utils.node_factory import NodeFactory

    node = value.get_node()
    if node.get_name() in pictures:
        return pictures[node.get_name()]
    inputs = node.input_values()
    by_value = node.get_type_name() in ("Convert", "FakeQuantize", "Multiply", "Relu", "Subtract")
    if not by_value or not all(_is_number(other) for other in inputs[1:]):
        return None
    known = _known(inputs[0], pictures)
    if known is None:
        return None
    return NodeFactory().create(node.get_type_name(), [known, *inputs[1:]], node.get_attributes()).output(0)


def _is_number(value: Any) -> bool:
    shape = value.get_partial_shape()
    return bool(shape.is_static) and int(np.prod(list(shape.to_shape()))) == 1
