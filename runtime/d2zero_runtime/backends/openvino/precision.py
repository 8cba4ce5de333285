"""bfloat16 where it does no harm, in OpenVINO: what says where deformable attention looks stays float32.

bfloat16 has eight bits: a place in a map of 300 columns would be a pixel off, a row of a table another row. OpenVINO's
hint lowers all of a graph, and marks on nodes do not survive its own rewriting. So types in the graph say what is
bfloat16, and it runs with the hint `dynamic`, which leaves them as they are.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

_PRODUCTS = ("Convolution", "MatMul")
_TYPED = ("Convert", "EmbeddingBagPackedSum", "Result")  # give the type that they say, or are read by us


def lower_to_bfloat16(model: Any) -> int:
    """Let a float32 graph compute in bfloat16, except for what is little work and must be exact:

    - what comes from no matmul: sizes, reference points, position embeddings;
    - what is between matmuls and samples: locations, rows of tables, weights; and weighted sums of rows;
    - what is between matmuls and outputs.

    Returns:
        The number of matmuls and convolutions; they all read bfloat16.
    """
    nodes = model.get_ordered_ops()
    kept = _without_products(nodes) | _back_from(nodes, _says_where) | _back_from(nodes, _leaves)
    kept |= {node.get_name() for node in nodes if node.get_type_name() in _TYPED}
    converted: dict[tuple[str, int], Any] = {}
    for node in nodes:
        stays = node.get_name() in kept
        for port in node.inputs():
            value = port.get_source_output()
            stayed = value.get_node().get_name() in kept
            if stays != stayed and _is_float32(value) and not _is_setting(node, port):
                _convert(port, "f32" if stays else "bf16", converted)
    model.validate_nodes_and_infer_types()
    return sum(node.get_type_name() in _PRODUCTS for node in nodes)


def _convert(port: Any, to: str, converted: dict[tuple[str, int], Any]) -> None:
    """Let an input read its value in the other type; all that read it so share the conversion."""
    from openvino import opset13 as operators

    value = port.get_source_output()
    key = (value.get_node().get_name(), value.get_index())
    if key not in converted:
        converted[key] = operators.convert(value, to).output(0)
    port.replace_source_output(converted[key])


def _is_float32(value: Any) -> bool:
    """Whether it was, before any type changed: nodes learn of new types at the end."""
    return bool(value.get_element_type().to_string() == "f32")


def _is_setting(node: Any, port: Any) -> bool:
    """Whether an input may be float32 whatever its operator works in: scales, and the grid of samples."""
    return node.get_type_name() in ("Interpolate", "GridSample") and port.get_index() > 0


def _without_products(nodes: Sequence[Any]) -> set[str]:
    """Names of the nodes that no matmul comes before, except for its shape."""
    found: set[str] = set()
    for node in nodes:  # each after what it reads
        kind = node.get_type_name()
        read = (value.get_node().get_name() for value in node.input_values())
        if kind == "ShapeOf" or (kind not in _PRODUCTS and found.issuperset(read)):
            found.add(node.get_name())
    return found


def _back_from(nodes: Iterable[Any], ends: Callable[[Any], list[Any]]) -> set[str]:
    """Names of the nodes between some inputs and the matmuls, or softmax, before them."""
    found: set[str] = set()
    waiting = [value for node in nodes for value in ends(node)]
    while waiting:
        node = waiting.pop().get_node()
        if node.get_name() not in found and node.get_type_name() not in (*_PRODUCTS, "Softmax"):
            found.add(node.get_name())
            waiting += node.input_values()
    return found


def _says_where(node: Any) -> list[Any]:
    """The inputs of a node that say where to look or how much to take."""
    inputs = node.input_values()
    if node.get_type_name() in ("GridSample", "Gather"):
        return [inputs[1]]
    return list(inputs[1:]) if node.get_type_name() == "EmbeddingBagPackedSum" else []


def _leaves(node: Any) -> list[Any]:
    return list(node.input_values()) if node.get_type_name() == "Result" else []
