"""Traced graphs as ONNX, and what all ONNX graphs of ours are.

Letters: K classes.
"""

import logging
import warnings
from typing import Any

import onnx
import torch

from d2zero_runtime import D2ZeroError

OPSET = 18  # below 20: there GridSample silently becomes nearest in TensorRT (NVIDIA/TensorRT#4646)
FORBIDDEN = frozenset({"If", "Loop", "NonZero", "Scan", "SequenceAt"})  # control flow that depends on data
TRACED_CLASSES = 41  # K while tracing: any number but 1 that no other size of the graph has


def translate(program: torch.export.ExportedProgram, inputs: list[str], outputs: list[str]) -> onnx.ModelProto:
    """A traced graph as ONNX, without traces of the machine that made it.

    Args:
        program: The graph.
        inputs: Names for its inputs.
        outputs: Names for its outputs.
    """
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            translated: Any = torch.onnx.export(
                program,
                dynamo=True,
                opset_version=OPSET,
                input_names=inputs,
                output_names=outputs,
                verbose=False,
            )
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
    proto: onnx.ModelProto = translated.model_proto
    del proto.metadata_props[:], proto.graph.metadata_props[:]
    for node in proto.graph.node:
        del node.metadata_props[:]
        node.doc_string = ""
    return proto


def check_graph(proto: onnx.ModelProto) -> None:
    """Refuse a graph that not every backend can run.

    Raises:
        D2ZeroError: Names what is wrong.
    """
    onnx.checker.check_model(proto)
    operators = {node.op_type for node in proto.graph.node}
    wrong = sorted(operators & FORBIDDEN)
    if wrong:
        raise D2ZeroError(f"the exported graph depends on data through {', '.join(wrong)}; this is a defect of d2zero")
    opsets = {entry.domain: entry.version for entry in proto.opset_import}
    if opsets.get("", 0) >= 20:
        raise D2ZeroError(f"the exported graph is of opset {opsets['']}, it must be below 20")
