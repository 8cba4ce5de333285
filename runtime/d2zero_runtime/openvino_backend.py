"""Running an exported `.onnx` with OpenVINO: CPUs, in float32 or bfloat16, and what is eight bits in the file as such.

A file of one size and batch, exported with `--deform-attn gather`, is the fastest: its weighted sums of gathered rows
are rewritten to OpenVINO's one operator for that, which takes no open sizes.

bfloat16 pays on processors that compute in it (AVX512-BF16, AMX); elsewhere OpenVINO would compute in float32
and say nothing, so it is refused there. What it does to a model's accuracy is for `d2zero verify` to say.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from d2zero_runtime.contract import EMBEDDINGS_INPUT
from d2zero_runtime.errors import D2ZeroError
from d2zero_runtime.onnx_file import read_contract, without_default_embeddings

HINTS = {"float32": "f32", "bfloat16": "bf16"}
_OUTPUTS = ("class_logits", "mask_logits")


class OpenVinoBackend:
    """A network compiled by OpenVINO for the CPU.

    Args:
        path: the `.onnx` file.
        precision: `float32`, or `bfloat16` for the whole graph; of a float32 graph.
        threads: OpenVINO's choice if left out.

    Raises:
        D2ZeroError: openvino is not installed, the processor has no bfloat16, or the file cannot be run.
    """

    def __init__(self, path: Path, precision: str = "float32", threads: int | None = None) -> None:
        import openvino

        core = openvino.Core()
        if precision == "bfloat16" and "BF16" not in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
            raise D2ZeroError("this processor does not compute in bfloat16; use the provider openvino (float32)")
        contract, vocabulary = read_contract(path)
        settings: dict[str, Any] = {"INFERENCE_PRECISION_HINT": HINTS[precision], "PERFORMANCE_HINT": "LATENCY"}
        if threads:
            settings["INFERENCE_NUM_THREADS"] = threads
        try:
            # OpenVINO would make a constant of an input with a default.
            model = core.read_model(without_default_embeddings(path))
            join_row_sums(model)
            compiled = core.compile_model(model, "CPU", settings)
        except RuntimeError as error:
            raise D2ZeroError(f"openvino cannot load {path}: {str(error).strip().splitlines()[-1]}") from error
        self._request = compiled.create_infer_request()
        self._default = None if contract.baked else vocabulary.embeddings
        self.precision = precision if contract.precision == "float32" else contract.precision
        self.name = f"openvino {openvino.__version__.split('-')[0]} (CPU, {self.precision})"

    def run(
        self, images_B3HW: NDArray[np.float32], embeddings_KD: NDArray[np.float32] | None
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Run the network; see `d2zero_runtime.segmenter.Backend`."""
        feed = {"images": images_B3HW}
        if self._default is not None:
            feed[EMBEDDINGS_INPUT] = self._default if embeddings_KD is None else embeddings_KD
        found = self._request.infer(feed)
        class_logits, mask_logits = (np.array(found[name], np.float32) for name in _OUTPUTS)
        return class_logits, mask_logits


def join_row_sums(model: Any) -> int:
    """Rewrite sums of shares (X, 1, J) @ table[rows (X, J)], X known, to EmbeddingBagPackedSum: the same sums.

    Returns:
        how many sums were rewritten, those of several products of one table counted once.
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
                sums[node.get_name()] = _RowSum(node, one.table, one.rows + other.rows, one.shares + other.shares)
    for found in sums.values():
        found.rewrite()
    return len(sums)


@dataclass(frozen=True)
class _RowSum:
    """A node that is a weighted sum of a table's rows, (X, 1, N), and what it is made of."""

    node: Any
    table: Any
    rows: list[Any]
    shares: list[Any]

    def rewrite(self) -> None:
        from openvino import opset13 as operators

        rows = operators.convert(operators.concat(self.rows, 1), "i32")
        shares = operators.squeeze(operators.concat(self.shares, 2), operators.constant([1]))
        summed = operators.embedding_bag_packed_sum(self.table, rows, shares)
        result = operators.unsqueeze(summed, operators.constant([1]))
        for user in self.node.output(0).get_target_inputs():
            user.replace_source_output(result.output(0))


def _is_sum_of_rows(product: Any) -> bool:
    """Whether a node is a MatMul of shares (X, 1, J) and rows gathered from a table (T, N), X and J known."""
    plain = {"transpose_a": False, "transpose_b": False}
    if product.get_type_name() != "MatMul" or product.get_attributes() != plain:
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
