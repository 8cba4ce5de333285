"""End-to-end files made of exported models, without tracing again."""

from dataclasses import asdict, replace
from pathlib import Path

import onnx
from onnx import numpy_helper

from d2zero_export.end_to_end import EndToEnd, end_to_end
from d2zero_runtime.artifacts.contract import ACTIVE_INPUT, CONTRACT_KEY, EMBEDDINGS_INPUT
from d2zero_runtime.artifacts.onnx import read_contract


def end_to_end_file(exported: Path, path: Path, options: EndToEnd | None = None) -> Path:
    """What `export_onnx` writes with these options, from the file that it writes without."""
    options = options or EndToEnd()
    contract, vocabulary = read_contract(exported)
    contract = replace(contract, end_to_end=asdict(options))
    network = onnx.load(exported)
    kept = [tensor for tensor in network.graph.initializer if tensor.name != EMBEDDINGS_INPUT]
    del network.graph.initializer[:], network.metadata_props[:]
    network.graph.initializer.extend(kept)
    whole = end_to_end(network, contract, options)
    whole.graph.initializer.append(numpy_helper.from_array(vocabulary.embeddings, EMBEDDINGS_INPUT))
    whole.graph.initializer.append(numpy_helper.from_array(contract.competing, ACTIVE_INPUT))
    whole.metadata_props.append(onnx.StringStringEntryProto(key=CONTRACT_KEY, value=contract.to_json()))
    onnx.checker.check_model(whole, full_check=True)
    onnx.save(whole, path)
    return path
