"""Checkpoint → ONNX, in named stages: trace, translate, contract, check, verify.

The class embeddings become an input with a default (an overridable initializer): ONNX Runtime runs the file
as it is, and takes other embeddings, of another number of classes, when they are fed.
"""

import logging
import platform
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from torch.export import Dim

import d2zero
from d2zero.model import D2Zero, deformable
from d2zero_export.graph import InferenceGraph
from d2zero_export.verify import RawParity, raw_parity
from d2zero_runtime import D2ZeroError
from d2zero_runtime.contract import CONTRACT_KEY, EMBEDDINGS_INPUT, ModelContract
from d2zero_runtime.segmenter import load

OPSET = 18  # below 20: there GridSample silently becomes nearest in TensorRT (NVIDIA/TensorRT#4646)
FORMS: dict[str, deformable.DeformableForm] = {
    "gridsample": deformable.grid_sample,
    "gather": deformable.gather,
}
FORBIDDEN = frozenset({"If", "Loop", "NonZero", "Scan", "SequenceAt"})  # control flow that depends on data
TOLERANCE = 1e-3  # of logits and mask logits, float32
_TRACED_CLASSES = 41  # any number but 1 that no other size of the graph has


@dataclass(frozen=True)
class ExportConfig:
    """How a model is exported.

    Args:
        deform_attn: `gridsample` (fast in ONNX Runtime) or `gather` (no operator that an engine gets wrong).
        tolerance: largest difference of class and mask logits that passes.
        verify: run the file and compare it with the checkpoint.
    """

    deform_attn: str = "gridsample"
    tolerance: float = TOLERANCE
    verify: bool = True

    def __post_init__(self) -> None:
        if self.deform_attn not in FORMS:
            raise D2ZeroError(f"deform-attn must be one of {', '.join(FORMS)}, got {self.deform_attn!r}")


def export_onnx(
    model: D2Zero,
    output: Path,
    config: ExportConfig | None = None,
    checkpoint_hash: str = "",
    stage: Callable[[str], None] = lambda name: None,
) -> RawParity | None:
    """Export a model, with batch, height, width and number of classes left open.

    Args:
        model: in evaluation mode, on the CPU.
        output: ends in `.onnx`. Written only if every stage passed.
        config: how.
        checkpoint_hash: recorded in the contract.
        stage: told each stage's name as it begins.

    Returns:
        What verification measured, or None if it was left out.

    Raises:
        D2ZeroError: the exported graph is not what it must be, or differs from the checkpoint.
    """
    config = config or ExportConfig()
    if output.suffix != ".onnx":
        raise D2ZeroError(f"the exported model must end in .onnx, got {output.name!r}")
    model.set_deformable(FORMS[config.deform_attn])
    stage("trace")
    program = _trace(model)
    stage("translate")
    proto = _translate(program)
    stage("contract")
    _add_vocabulary(proto, model)
    contract = _contract(model, config, checkpoint_hash)
    proto.metadata_props.append(onnx.StringStringEntryProto(key=CONTRACT_KEY, value=contract.to_json()))
    stage("check")
    _check(proto)
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent) as folder:
        candidate = Path(folder) / output.name
        onnx.save(proto, candidate)
        parity = None
        if config.verify:
            stage("verify")
            parity = raw_parity(model, load(candidate))
            parity.require(config.tolerance)
        candidate.replace(output)
    return parity


def _trace(model: D2Zero) -> torch.export.ExportedProgram:
    graph = InferenceGraph(model).eval()
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(2, 3, 96, 128, generator=generator)
    text = torch.randn(_TRACED_CLASSES, model.config.text_dim, generator=generator)
    height, width = Dim("h32", min=1, max=256), Dim("w32", min=1, max=256)
    shapes = (
        {0: Dim("batch", min=1, max=1024), 2: 32 * height, 3: 32 * width},
        {0: Dim("classes", min=1, max=100_000)},
    )
    with torch.no_grad():
        return torch.export.export(graph, (images, text), dynamic_shapes=shapes, strict=False)


def _translate(program: torch.export.ExportedProgram) -> onnx.ModelProto:
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            translated: Any = torch.onnx.export(
                program,
                dynamo=True,
                opset_version=OPSET,
                input_names=["images", EMBEDDINGS_INPUT],
                output_names=["class_logits", "mask_logits"],
                verbose=False,
            )
    finally:
        logger.setLevel(level)
    proto: onnx.ModelProto = translated.model_proto
    for node in proto.graph.node:  # traces of this machine's files
        del node.metadata_props[:]
        node.doc_string = ""
    for entry, names in (
        (proto.graph.input[0], ("batch", "", "height", "width")),
        (proto.graph.input[1], ("classes", "")),
    ):
        for dim, name in zip(entry.type.tensor_type.shape.dim, names, strict=True):
            if name:
                dim.dim_param = name
    return proto


def _add_vocabulary(proto: onnx.ModelProto, model: D2Zero) -> None:
    embeddings = np.ascontiguousarray(model.vocabulary.embeddings, np.float32)
    proto.graph.initializer.append(onnx.numpy_helper.from_array(embeddings, EMBEDDINGS_INPUT))


def _contract(model: D2Zero, config: ExportConfig, checkpoint_hash: str) -> ModelContract:
    words = model.vocabulary
    return ModelContract(
        class_names=words.names,
        seen=tuple(words.seen.tolist()),
        active=tuple(words.active.tolist()),
        vocabulary_source=words.source,
        text_dim=model.config.text_dim,
        num_queries=model.config.num_queries,
        preprocessing=model.config.preprocessing,
        softmax_temperature=model.config.softmax_temperature,
        deform_attn=config.deform_attn,
        opset=OPSET,
        checkpoint=checkpoint_hash,
        tools={
            "d2zero": d2zero.__version__,
            "python": platform.python_version(),
            **{name: version(name) for name in ("torch", "onnx", "onnxscript")},
        },
    )


def _check(proto: onnx.ModelProto) -> None:
    onnx.checker.check_model(proto)
    operators = {node.op_type for node in proto.graph.node}
    wrong = sorted(operators & FORBIDDEN)
    if wrong:
        raise D2ZeroError(f"the exported graph depends on data through {', '.join(wrong)}; this is a defect of d2zero")
    opsets = {entry.domain: entry.version for entry in proto.opset_import}
    if opsets.get("", 0) >= 20:
        raise D2ZeroError(f"the exported graph is of opset {opsets['']}, it must be below 20")
