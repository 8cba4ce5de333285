"""Exports of models that were exported before, without tracing again, which takes most of the time."""

from pathlib import Path

import onnx

from d2zero.model import D2Zero
from d2zero_export.onnx_export import export_onnx
from d2zero_export.options import OnnxOptions
from d2zero_runtime.artifacts.contract import EMBEDDINGS_INPUT, EndToEnd
from d2zero_runtime.artifacts.onnx import read_contract


def traced_network(exported: Path) -> onnx.ModelProto:
    """The network of an exported file, as `graph_of` made it: without vocabulary and contract."""
    network = onnx.load(exported)
    kept = [tensor for tensor in network.graph.initializer if tensor.name != EMBEDDINGS_INPUT]
    del network.graph.initializer[:], network.metadata_props[:]
    network.graph.initializer.extend(kept)
    return network


def end_to_end_file(model: D2Zero, exported: Path, path: Path, options: EndToEnd | None = None) -> Path:
    """The end-to-end file of a model, from its float32 file without."""
    size = read_contract(exported)[0].preprocessing.static_size
    wanted = OnnxOptions(verify=False, size=size, end_to_end=options or EndToEnd())
    export_onnx(model, path, wanted, traced=traced_network(exported))
    onnx.checker.check_model(onnx.load(path), full_check=True)
    return path
