"""Checkpoint → ONNX, in named stages: precision, trace, rewrite, (for int8) quantize, contract, check, verify.

The class embeddings become an input with a default (an overridable initializer): ONNX Runtime runs the file
as it is, and takes other embeddings, of another number of classes, when they are fed. Baked, they are
constants.
"""

import base64
import platform
import tempfile
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from torch.export import Dim

import d2zero
from d2zero.model import D2Zero
from d2zero.model.deformable import FUNCTIONS, DeformableImpl
from d2zero_export.classifier import classifier_onnx
from d2zero_export.end_to_end import end_to_end
from d2zero_export.end_to_end_parity import end_to_end_difference
from d2zero_export.graph import ATTENTION_MASK, InferenceGraph
from d2zero_export.norms import in_stages
from d2zero_export.onnx_graph import OPSET, TRACED_CLASSES, check_graph, translate
from d2zero_export.options import GraphOptions, OnnxOptions
from d2zero_export.parity import RawParity, limits_for
from d2zero_export.precision import PRECISIONS, cast_to
from d2zero_export.quantize import Photos, quantized
from d2zero_export.verify import parity_with
from d2zero_runtime import D2ZeroError, load
from d2zero_runtime.artifacts.contract import (
    ACTIVE_INPUT,
    CONTRACT_KEY,
    EMBEDDINGS_INPUT,
    FEATURES,
    OUTPUTS,
    ModelContract,
)
from d2zero_runtime.artifacts.onnx import CLASSIFIER_KEY


def export_onnx(
    model: D2Zero,
    output: Path,
    options: OnnxOptions | None = None,
    checkpoint_hash: str = "",
    stage: Callable[[str], None] = lambda name: None,
    traced: onnx.ModelProto | None = None,
) -> RawParity | None:
    """Export a model; batch, height, width and number of classes are dynamic unless the options fix them.

    Args:
        model: In evaluation mode, on the CPU; not changed.
        output: Ends in `.onnx`. Written only if every stage passed.
        options: How.
        checkpoint_hash: Recorded in the contract; the model's own (`D2Zero.checkpoint`) if left out.
        stage: Told each stage's name as it begins.
        traced: What `graph_of` made of this model for options that differ only in calibration, verification, what is
            done end to end, or int8 instead of float32, so that both are traced once; not changed.

    Returns:
        What verification measured, or None if it was left out.

    Raises:
        D2ZeroError: The exported graph is not what it must be, or differs from the checkpoint.
    """
    options = options or OnnxOptions()
    if output.suffix != ".onnx":
        raise D2ZeroError(f"the exported model must end in .onnx, got {output.name!r}")
    model = shortened(model, options)
    contract = contract_for(model, options, options.impl, checkpoint_hash)  # refuses what does not fit before any work
    if options.end_to_end:
        whole = replace(contract, end_to_end=options.end_to_end, query_dim=0)
        whole.check_compatible(model.vocabulary, model.vocabulary)
    photos = _photos(contract, options)
    proto = graph_of(model, options, stage) if traced is None else traced
    if photos:
        stage("quantize")
        proto = quantized(proto, _prepared(model, options), photos, options.quantize_for)
        contract = replace(contract, calibration=photos.recorded(options.quantize_for))
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent) as folder:
        candidate, parity = Path(folder) / output.name, None
        stage("contract")
        _write(proto, model, contract, candidate)
        if options.verify:
            stage("verify")
            parity = verified(model, candidate, options)
        if options.end_to_end:
            stage("end to end")
            network, candidate = candidate, Path(folder) / "end_to_end.onnx"
            contract = replace(contract, end_to_end=options.end_to_end, query_dim=0)
            _write(end_to_end(proto, contract, options.end_to_end), model, contract, candidate)
            if options.verify:
                _verify_end_to_end(network, candidate)
        candidate.replace(output)
    return parity


def _write(proto: onnx.ModelProto, model: D2Zero, contract: ModelContract, path: Path) -> None:
    """Write a graph with its vocabulary and contract, if it is what it must be."""
    written = onnx.ModelProto()
    written.CopyFrom(proto)
    _add_vocabulary(written, model, contract)
    metadata = {}
    if contract.query_dim:
        metadata[CLASSIFIER_KEY] = base64.b64encode(classifier_onnx(model)).decode()
    metadata[CONTRACT_KEY] = contract.to_json()  # last: a file that was cut short has none, and is known by that
    onnx.helper.set_model_props(written, metadata)
    check_graph(written)
    onnx.save(written, path)


def _verify_end_to_end(network: Path, candidate: Path) -> None:
    """Compare with the file of the network only, which has been verified.

    Raises:
        D2ZeroError: The instances are others.
    """
    reference = load(network)
    if failures := end_to_end_difference(reference, candidate).failures(reference.contract.precision):
        raise D2ZeroError(f"what the file finds end to end is not what the runtime finds: {'; '.join(failures)}")


def graph_of(model: D2Zero, options: OnnxOptions, stage: Callable[[str], None] = lambda name: None) -> onnx.ModelProto:
    """The network as an ONNX graph, float32 where int8 is asked for: what `export_onnx` makes a file of."""
    stage("precision")
    prepared = _prepared(model, options)
    stage("trace")
    program = trace(prepared, options)
    stage("rewrite")
    inputs = ["images", EMBEDDINGS_INPUT][: len(program.graph_signature.user_inputs)]
    return _rewritten(translate(program, inputs, [*OUTPUTS, *FEATURES]))


def shortened(model: D2Zero, options: GraphOptions) -> D2Zero:
    """The model with as many decoder layers as are exported."""
    return model if options.decoder_layers is None else model.with_decoder_layers(options.decoder_layers)


def _prepared(model: D2Zero, options: OnnxOptions) -> D2Zero:
    prepared = cast_to(shortened(model, options), options.precision)
    prepared.set_deformable(FUNCTIONS[options.impl])
    if PRECISIONS[options.precision] == torch.float32:  # squares of float16 may overflow
        in_stages(prepared)
    return prepared


def _photos(contract: ModelContract, options: OnnxOptions) -> Photos | None:
    if options.calibration is None:
        return None
    return Photos.read(options.calibration, options.calibration_images, contract.preprocessing, contract.batch)


def trace(
    model: D2Zero, options: GraphOptions, device: str = "cpu", fused: bool = False
) -> torch.export.ExportedProgram:
    """The network as a graph; sizes that the options do not fix are dynamic.

    Args:
        model: Prepared: of the precision, deformable attention and device that the graph shall have.
        options: Fixed sizes and baked classes.
        device: The model's.
        fused: For what torch itself compiles (`InferenceGraph`); images come in channels-last.
    """
    generator = torch.Generator().manual_seed(0)
    height, width = options.size or (96, 128)
    inputs = [torch.randn(options.batch or 2, 3, height, width, generator=generator)]
    if fused:
        inputs = [inputs[0].contiguous(memory_format=torch.channels_last)]
    sides = {} if options.size else {2: 32 * Dim("h32", min=1, max=256), 3: 32 * Dim("w32", min=1, max=256)}
    batch = {} if options.batch else {0: Dim("batch", min=1, max=1024)}
    shapes: list[dict[int, Any]] = [{**batch, **sides}]
    if not options.bake:
        inputs.append(torch.randn(TRACED_CLASSES, model.config.text_dim, generator=generator))
        shapes.append({0: Dim("classes", min=1, max=100_000)})
    graph = InferenceGraph(model, baked=options.bake, fused=fused).eval()
    with torch.no_grad():
        given = tuple(entry.to(device) for entry in inputs)
        return torch.export.export(graph, given, dynamic_shapes=tuple(shapes), strict=False)


def _rewritten(proto: onnx.ModelProto) -> onnx.ModelProto:
    """Readable names."""
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


def _add_vocabulary(proto: onnx.ModelProto, model: D2Zero, contract: ModelContract) -> None:
    """As the input's default; of a baked model only to be read."""
    embeddings = np.ascontiguousarray(model.vocabulary.embeddings, np.float32)
    proto.graph.initializer.append(onnx.numpy_helper.from_array(embeddings, EMBEDDINGS_INPUT))
    if contract.end_to_end:
        active = contract.end_to_end.competing(model.vocabulary)
        proto.graph.initializer.append(onnx.numpy_helper.from_array(active, ACTIVE_INPUT))


def contract_for(model: D2Zero, options: GraphOptions, impl: DeformableImpl, checkpoint_hash: str) -> ModelContract:
    """What the exported file shall say of itself."""
    return model.contract(
        preprocessing=replace(model.config.preprocessing, static_size=options.size),
        precision=options.precision,
        deform_attn=impl.value,
        batch=options.batch,
        baked=options.bake,
        tf32=options.tf32,
        opset=OPSET,
        checkpoint=checkpoint_hash or model.checkpoint,
        tools=tools("torch", "onnx", "onnxscript"),
    )


def tools(*packages: str) -> dict[str, str]:
    """Versions of what makes a file."""
    versions = {name: version(name) for name in packages}
    return {"d2zero": d2zero.__version__, "python": platform.python_version(), **versions}


def verified(model: D2Zero, candidate: Path, options: GraphOptions) -> RawParity:
    """Compare an exported file with the checkpoint's model.

    Raises:
        D2ZeroError: It is another model.
    """
    exported = load(candidate)
    parity, _ = parity_with(model, candidate, exported)
    parity.require(limits_for(exported.precision, options.max_logits))
    return parity
