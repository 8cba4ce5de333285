"""Checkpoint → ONNX, in named stages: precision, trace, rewrite, (for int8) quantize, contract, check, verify.

The class embeddings become an input with a default (an overridable initializer): ONNX Runtime runs the file
as it is, and takes other embeddings, of another number of classes, when they are fed. Baked, they are
constants.
"""

import logging
import platform
import tempfile
import warnings
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from torch.export import Dim

import d2zero
from d2zero.model import D2Zero, deformable
from d2zero_export import plugin
from d2zero_export.graph import ATTENTION_MASK, InferenceGraph
from d2zero_export.norms import in_stages
from d2zero_export.parity import LIMITS, RawParity
from d2zero_export.precision import PRECISIONS, lowered
from d2zero_export.quantize import Photos, quantized
from d2zero_export.verify import open_exported, raw_parity
from d2zero_runtime import D2ZeroError
from d2zero_runtime.artifacts.contract import CONTRACT_KEY, EMBEDDINGS_INPUT, ModelContract
from d2zero_runtime.images import Size

OPSET = 18  # below 20: there GridSample silently becomes nearest in TensorRT (NVIDIA/TensorRT#4646)
FORMS: dict[str, deformable.DeformableForm] = {
    "gridsample": deformable.grid_sample,
    "gather": deformable.gather,
    "plugin": plugin.plugin,
}
FORBIDDEN = frozenset({"If", "Loop", "NonZero", "Scan", "SequenceAt"})  # control flow that depends on data
_TRACED_CLASSES = 41  # any number but 1 that no other size of the graph has
_OUTPUTS = ["class_logits", "mask_logits"]


@dataclass(frozen=True)
class ExportConfig:
    """How a model is exported.

    Args:
        precision: `float32`, `float16` or `int8`; of a `.pt2` also `bfloat16`.
        deform_attn: `gridsample` (fast in ONNX Runtime), `gather` (no operator that an engine gets wrong) or
            `plugin` (TensorRT's own operator; nothing else runs it).
        size: (height, width), multiples of 32: the one size that the graph takes; any if left out.
        batch: the one number of images that the graph takes; any if left out.
        bake: make the class embeddings constants: a little faster, and the classes cannot be changed.
        verify: run the file and compare it with the checkpoint.
        tf32: let GPUs round the factors of float32 matmuls and convolutions to ten bits; recorded, and judged by limits
            of its own.
        max_logits: largest difference of class and mask logits that passes; by precision if left out.
        calibration: of int8: a folder of photos, as the model will see them, for the ranges of activations.
        calibration_images: at most so many of them.
    """

    precision: str = "float32"
    deform_attn: str = "gridsample"
    size: Size | None = None
    batch: int | None = None
    bake: bool = False
    verify: bool = True
    tf32: bool = False
    max_logits: float | None = None
    calibration: Path | None = None
    calibration_images: int = 32

    def __post_init__(self) -> None:
        if self.deform_attn not in FORMS:
            raise D2ZeroError(f"deform-attn must be one of {', '.join(FORMS)}, got {self.deform_attn!r}")
        if self.precision not in PRECISIONS:
            raise D2ZeroError(f"precision must be one of {', '.join(PRECISIONS)}, got {self.precision!r}")
        if self.size and any(side < 32 or side % 32 for side in self.size):
            raise D2ZeroError(f"size must be multiples of 32, got {self.size[0]}x{self.size[1]}")
        if self.batch is not None and self.batch < 1:
            raise D2ZeroError(f"batch must be at least 1, got {self.batch}")
        self._check_calibration()

    def _check_calibration(self) -> None:
        if self.precision != "int8":
            if self.calibration is not None:
                raise D2ZeroError(f"--calibration is for --precision int8, got precision {self.precision}")
            return
        if self.calibration is None:
            raise D2ZeroError("--precision int8 needs photos to calibrate on; give their folder with --calibration")
        if self.calibration_images < 1:
            raise D2ZeroError(f"calibration-images must be at least 1, got {self.calibration_images}")
        if self.deform_attn == "plugin":
            raise D2ZeroError(
                "--precision int8 is for ONNX Runtime and OpenVINO, which do not run --deform-attn plugin; use"
                " gridsample or gather"
            )


def export_onnx(
    model: D2Zero,
    output: Path,
    config: ExportConfig | None = None,
    checkpoint_hash: str = "",
    stage: Callable[[str], None] = lambda name: None,
    traced: onnx.ModelProto | None = None,
) -> RawParity | None:
    """Export a model; batch, height, width and number of classes stay open unless the configuration fixes them.

    Args:
        model: in evaluation mode, on the CPU; not changed.
        output: ends in `.onnx`. Written only if every stage passed.
        config: how.
        checkpoint_hash: recorded in the contract.
        stage: told each stage's name as it begins.
        traced: what `graph_of` made of this model for a configuration that differs in calibration, verification or
            float32 against int8 alone, so that both are traced once; not changed.

    Returns:
        What verification measured, or None if it was left out.

    Raises:
        D2ZeroError: the exported graph is not what it must be, or differs from the checkpoint.
    """
    config = config or ExportConfig()
    if output.suffix != ".onnx":
        raise D2ZeroError(f"the exported model must end in .onnx, got {output.name!r}")
    if config.precision == "bfloat16":
        raise D2ZeroError("an .onnx is float32 or float16; bfloat16 is for --format pt2, or the provider openvino-bf16")
    contract = contract_for(model, config, checkpoint_hash)  # refuses what does not fit before any work
    photos = _photos(contract, config)
    proto = graph_of(model, config, stage) if traced is None else deepcopy(traced)
    if photos:
        stage("quantize")
        proto = quantized(proto, _prepared(model, config), photos)
        contract = replace(contract, calibration=photos.recorded())
    stage("contract")
    _add_vocabulary(proto, model)
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
            parity = verified(model, candidate, config)
        candidate.replace(output)
    return parity


def graph_of(model: D2Zero, config: ExportConfig, stage: Callable[[str], None] = lambda name: None) -> onnx.ModelProto:
    """The network as an ONNX graph, float32 where int8 is asked for: what `export_onnx` makes a file of."""
    stage("precision")
    prepared = _prepared(model, config)
    stage("trace")
    program = trace(prepared, config)
    stage("rewrite")
    return _rewritten(_translate(program))


def _prepared(model: D2Zero, config: ExportConfig) -> D2Zero:
    prepared = lowered(model, config.precision)
    prepared.set_deformable(FORMS[config.deform_attn])
    if PRECISIONS[config.precision] == torch.float32:  # squares of float16 may be no numbers
        in_stages(prepared)
    return prepared


def _photos(contract: ModelContract, config: ExportConfig) -> Photos | None:
    if config.calibration is None:
        return None
    return Photos.read(config.calibration, config.calibration_images, contract.preprocessing, contract.batch)


def trace(
    model: D2Zero, config: ExportConfig, device: str = "cpu", fused: bool = False
) -> torch.export.ExportedProgram:
    """The network as a graph; sizes that the configuration does not fix stay open.

    Args:
        model: prepared: of the precision, form of deformable attention and device that the graph shall have.
        config: fixed sizes and baked classes.
        device: of the model.
        fused: for what torch itself compiles (`InferenceGraph`); images come in channels-last.
    """
    generator = torch.Generator().manual_seed(0)
    height, width = config.size or (96, 128)
    inputs = [torch.randn(config.batch or 2, 3, height, width, generator=generator)]
    if fused:
        inputs = [inputs[0].contiguous(memory_format=torch.channels_last)]
    sides = {} if config.size else {2: 32 * Dim("h32", min=1, max=256), 3: 32 * Dim("w32", min=1, max=256)}
    batch = {} if config.batch else {0: Dim("batch", min=1, max=1024)}
    shapes: list[dict[int, Any]] = [{**batch, **sides}]
    if not config.bake:
        inputs.append(torch.randn(_TRACED_CLASSES, model.config.text_dim, generator=generator))
        shapes.append({0: Dim("classes", min=1, max=100_000)})
    graph = InferenceGraph(model, baked=config.bake, fused=fused).eval()
    with torch.no_grad():
        given = tuple(entry.to(device) for entry in inputs)
        return torch.export.export(graph, given, dynamic_shapes=tuple(shapes), strict=False)


def _translate(program: torch.export.ExportedProgram) -> onnx.ModelProto:
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    inputs = ["images", EMBEDDINGS_INPUT][: len(program.graph_signature.user_inputs)]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            translated: Any = torch.onnx.export(
                program,
                dynamo=True,
                opset_version=OPSET,
                input_names=inputs,
                output_names=_OUTPUTS,
                verbose=False,
            )
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
    proto: onnx.ModelProto = translated.model_proto
    return proto


def _rewritten(proto: onnx.ModelProto) -> onnx.ModelProto:
    """Names for people, and no traces of the machine that made the file."""
    for node in proto.graph.node:
        del node.metadata_props[:]
        node.doc_string = ""
    names = (("batch", "", "height", "width"), ("classes", ""))
    for entry, dims in zip(proto.graph.input, names, strict=False):
        for dim, name in zip(entry.type.tensor_type.shape.dim, dims, strict=True):
            if name and dim.dim_param:
                dim.dim_param = name
    _name_attention_masks(proto)
    return proto


def _name_attention_masks(proto: onnx.ModelProto) -> None:
    """`blocked and not all blocked` is the one conjunction with a negation; `verify` looks at it by name."""
    negated = {node.output[0] for node in proto.graph.node if node.op_type == "Not"}
    masks = [node.output[0] for node in proto.graph.node if node.op_type == "And" and negated & set(node.input)]
    renamed = {name: f"{ATTENTION_MASK}{layer}" for layer, name in enumerate(masks)}
    for node in proto.graph.node:
        for names in (node.input, node.output):
            for position, name in enumerate(names):
                names[position] = renamed.get(name, name)
    for value in proto.graph.value_info:
        value.name = renamed.get(value.name, value.name)


def _add_vocabulary(proto: onnx.ModelProto, model: D2Zero) -> None:
    """As the input's default; of a baked model to be read by people alone."""
    embeddings = np.ascontiguousarray(model.vocabulary.embeddings, np.float32)
    proto.graph.initializer.append(onnx.numpy_helper.from_array(embeddings, EMBEDDINGS_INPUT))


def contract_for(model: D2Zero, config: ExportConfig, checkpoint_hash: str) -> ModelContract:
    """What the exported file shall say of itself."""
    return model.contract(
        preprocessing=replace(model.config.preprocessing, canvas=config.size),
        precision=config.precision,
        deform_attn=config.deform_attn,
        batch=config.batch,
        baked=config.bake,
        tf32=config.tf32,
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


def verified(model: D2Zero, candidate: Path, config: ExportConfig) -> RawParity:
    """Hold an exported file against the checkpoint's model.

    Raises:
        D2ZeroError: it is another model.
    """
    exported = open_exported(candidate)
    limits = LIMITS[exported.precision]
    if config.max_logits is not None:
        limits = replace(limits, logits=config.max_logits)
    parity = raw_parity(model.segmenter(), exported)
    parity.require(limits)
    return parity
