"""Static quantization of an exported float32 graph to eight bits, by onnxruntime's own tools.

Explicit QuantizeLinear/DequantizeLinear around chosen nodes; every runtime fuses them as it can. Ranges are from
photos, weights int8 per channel. For CPUs, activations are uint8, and weights of seven bits: without VNNI, processors
add products of uint8 and int8 in sixteen bits, and those of eight bits would saturate. TensorRT takes only int8 with
zero points of zero, and biases as floats.

Chosen by measurement (docs/decisions/0010): the backbone with its additions, convolutions, the linear layers that run
over all pixels, and the decoder's feed-forward layers. Of a Swin, not measured yet: its linear layers without any
additions, which are of position biases and masks of -100 as well as of residuals. All else stays float32: where
deformable attention looks (its offsets may come from eight bits, in pixels; places are added up in float32), attention
itself, mask embeddings and masks, and the classifier.
"""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import numpy as np
import onnx
from numpy.typing import NDArray
from timm.models.swin_transformer import SwinTransformerBlock
from torch import Tensor, nn

from d2zero.model import D2Zero
from d2zero.model.decoder import DecoderLayer
from d2zero.model.deformable.sampling import ROW_SUMS
from d2zero.model.pixel_decoder import EncoderLayer
from d2zero_export.graph import value_projections
from d2zero_runtime import D2ZeroError, read_image
from d2zero_runtime.artifacts.contract import EMBEDDINGS_INPUT
from d2zero_runtime.images import Preprocessing
from d2zero_runtime.sources import expand

# Percentile was no better, and keeps every activation of every photo in memory; entropy, with the tools' own number of
# bins, is the same as this.
METHOD = "minmax"
WEIGHTED = ("Conv", "MatMul")
QDQ = ("QuantizeLinear", "DequantizeLinear")
QuantizeFor = Literal["cpu", "tensorrt"]
# In the backbone, so that convolutions pass on integers: no faster in ONNX Runtime, but OpenVINO loses less by it.
BETWEEN = ("Add", "AveragePool", "MaxPool", "Relu")


@dataclass(frozen=True)
class Photos:
    """What activations are calibrated on.

    Args:
        images_HWC: uint8 RGB, at network size.
        preprocessing: The exported model's.
        batch: The number of images per run, if the graph takes only one.
    """

    images_HWC: tuple[NDArray[np.uint8], ...]
    preprocessing: Preprocessing
    batch: int | None = None

    @classmethod
    def read(cls, folder: Path, count: int, preprocessing: Preprocessing, batch: int | None = None) -> "Photos":
        """Read at most `count` of a folder's photos, evenly over their sorted names.

        Raises:
            D2ZeroError: There is no such folder, it has no images, or one of them cannot be read.
        """
        if not folder.is_dir():
            raise D2ZeroError(f"--calibration takes a folder of photos, {folder} is none")
        files = [Path(str(entry)) for entry in expand(folder)]
        places = np.linspace(0, len(files) - 1, min(count, len(files))).round().astype(int)
        return cls(tuple(preprocessing.resize(read_image(files[place])) for place in places), preprocessing, batch)

    def batches(self) -> Iterator[NDArray[np.float32]]:
        """Network input, one photo each."""
        for image in self.images_HWC:
            yield self.preprocessing.batch([image] * (self.batch or 1), self.preprocessing.padded_size(image.shape[:2]))

    def recorded(self, quantize_for: QuantizeFor) -> dict[str, Any]:
        """For the contract."""
        import onnxruntime

        tool = f"onnxruntime {onnxruntime.__version__}"
        return {"images": len(self.images_HWC), "method": METHOD, "tool": tool, "for": quantize_for}


def quantized(
    proto: onnx.ModelProto, model: D2Zero, photos: Photos, quantize_for: QuantizeFor = "cpu"
) -> onnx.ModelProto:
    """The graph with its chosen nodes in eight bits.

    Args:
        proto: float32; its class embeddings an input without a default, so that they cannot become a constant.
        model: The model whose weights the graph has.
        photos: Photos to calibrate on.
        quantize_for: What shall run it.
    """
    with TemporaryDirectory() as folder, _quietly(), reductions_early():
        plain, folded, output = (Path(folder) / f"{name}.onnx" for name in ("plain", "folded", "output"))
        onnx.save(proto, plain)
        fold(plain, folded)
        nodes = chosen(onnx.load(folded), model)
        reader = _reader(photos, None if len(proto.graph.input) == 1 else model.vocabulary.embeddings)
        write_quantized(folded, output, nodes, reader, quantize_for)
        return _cleaned(_floats_elsewhere(onnx.load(output), set(nodes)))


def write_quantized(
    folded: Path, output: Path, nodes: list[str], reader: Any, quantize_for: QuantizeFor = "cpu"
) -> None:
    """Write the graph with the named nodes in eight bits; `reader` is onnxruntime's `CalibrationDataReader`."""
    from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static

    symmetric = quantize_for == "tensorrt"
    quantize_static(
        folded,
        output,
        reader,
        quant_format=QuantFormat.QDQ,
        op_types_to_quantize=[*WEIGHTED, *BETWEEN],
        nodes_to_quantize=nodes,
        per_channel=True,
        reduce_range=not symmetric,
        activation_type=QuantType.QInt8 if symmetric else QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        calibrate_method=CalibrationMethod.MinMax,
        extra_options={
            "QDQOpTypePerChannelSupportToAxis": {"MatMul": 1},
            "OpTypesToExcludeOutputQuantization": ["MatMul"],  # what reads them is float32
            "ActivationSymmetric": symmetric,
            "QuantizeBias": not symmetric,
        },
    )


def fold(plain: Path, folded: Path) -> None:
    """Write a graph as the tools want it: weights that are sliced and turned over made constants, types inferred.

    Not by the tools' own preparation: where sizes are known it makes a Gemm of a linear layer and its bias, and
    the layer would stay float32.
    """
    from onnxruntime import GraphOptimizationLevel, InferenceSession, SessionOptions

    options = SessionOptions()
    options.graph_optimization_level = GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.optimized_model_filepath = str(folded)
    InferenceSession(plain, options, ["CPUExecutionProvider"], disabled_optimizers=["MatMulAddFusion"])
    onnx.shape_inference.infer_shapes_path(folded, folded)


def chosen(proto: onnx.ModelProto, model: D2Zero) -> list[str]:
    """Names of the nodes that are quantized.

    Args:
        proto: With its constants folded.
        model: The model whose weights it has.

    Raises:
        D2ZeroError: A linear layer is not in the graph as a matmul of its own, and would stay float32 unnoticed.
    """
    initializers = {entry.name: entry for entry in proto.graph.initializer}
    weights = {_content(weight) for weight in _linear_weights(model)}
    in_backbone = set() if is_swin(model.backbone) else _before_pixel_decoder(proto)
    found = []
    waiting = set(weights)
    for node in proto.graph.node:
        weight = initializers.get(node.input[1]) if node.op_type in WEIGHTED else None
        content = onnx.numpy_helper.to_array(weight).tobytes() if weight and node.op_type == "MatMul" else b""
        convolution = node.op_type == "Conv" and weight
        if content in weights or convolution or (node.op_type in BETWEEN and node.name in in_backbone):
            found.append(node.name)
        waiting.discard(content)
    if waiting:
        raise D2ZeroError(
            f"{len(waiting)} of {len(weights)} linear layers to quantize are not matmuls in the exported graph, as "
            "they should be; this onnxruntime or torch changes it in a way that d2zero does not know"
        )
    return found


def is_swin(backbone: nn.Module) -> bool:
    """Whether a backbone is made of Swin's blocks."""
    return any(isinstance(module, SwinTransformerBlock) for module in backbone.modules())


def _linear_weights(model: D2Zero) -> Iterator[Tensor]:
    """Weights of the linear layers that are quantized, as torch has them; exporters' names say nothing of them."""
    if is_swin(model.backbone):
        yield from (module.weight for module in model.backbone.modules() if isinstance(module, nn.Linear))
    encoder: list[EncoderLayer] = list(model.pixel_decoder.layers)  # type: ignore[arg-type]
    decoder: list[DecoderLayer] = list(model.decoder.layers)  # type: ignore[arg-type]
    for attention in (layer.attention for layer in encoder):
        yield attention.output_proj.weight
        if attention.function in ROW_SUMS:  # grid_sample has its weights first and queries last: not found here
            yield from (attention.value_proj.weight, attention.attention_weights.weight, attention.offsets_apart()[0])
    layers: list[EncoderLayer | DecoderLayer] = [*encoder, *decoder]
    for layer in layers:
        yield from (layer.linear1.weight, layer.linear2.weight)
    yield from value_projections(model.decoder)


def _content(weight: Tensor) -> bytes:
    return np.ascontiguousarray(weight.detach().numpy().T).tobytes()


def _before_pixel_decoder(proto: onnx.ModelProto) -> set[str]:
    """Names of the nodes that the backbone's last convolutions depend on."""
    made_by = {output: node for node in proto.graph.node for output in node.output}
    last = [node for node in proto.graph.node if node.op_type == "Conv" and ".backbone." not in node.input[1]]
    waiting = [node.input[0] for node in last if "input_projections" in node.input[1]]
    found: set[str] = set()
    while waiting:
        node = made_by.get(waiting.pop())
        if node is not None and node.name not in found:
            found.add(node.name)
            waiting.extend(node.input)
    return found


def _reader(photos: Photos, embeddings_KD: NDArray[np.float32] | None) -> Any:
    from onnxruntime.quantization import CalibrationDataReader

    class Reader(CalibrationDataReader):
        batches = photos.batches()

        def get_next(self) -> dict[str, NDArray[np.float32]] | None:
            images = next(self.batches, None)
            if images is None:
                return None
            fed = {} if embeddings_KD is None else {EMBEDDINGS_INPUT: np.asarray(embeddings_KD, np.float32)}
            return {"images": images, **fed}

    return Reader()


def _floats_elsewhere(proto: onnx.ModelProto, quantized: set[str]) -> onnx.ModelProto:
    """Nodes that are not quantized read floats: the tools let them read what was rounded for their neighbours."""
    graph = proto.graph
    made_by = {output: node for node in graph.node for output in node.output}
    for node in graph.node:
        if node.name in quantized or node.op_type in QDQ:
            continue
        for place, name in enumerate(node.input):
            rounded = made_by.get(name)
            if rounded is not None and rounded.op_type == "DequantizeLinear":
                node.input[place] = made_by[rounded.input[0]].input[0]
    for kind in reversed(QDQ):  # what nothing reads any more, from the end
        read = {name for node in graph.node for name in node.input}
        for node in [node for node in graph.node if node.op_type == kind and node.output[0] not in read]:
            graph.node.remove(node)
    return proto


def _cleaned(proto: onnx.ModelProto) -> onnx.ModelProto:
    """Without the tools' marks, and without operator sets that no node is of."""
    used = {node.domain for node in proto.graph.node}
    kept: Sequence[Any] = [entry for entry in proto.opset_import if entry.domain in used]
    del proto.opset_import[:], proto.metadata_props[:]
    proto.opset_import.extend(kept)
    return proto


@contextmanager
def reductions_early() -> Iterator[None]:
    """Calibration runs each node as soon as it can be run.

    In onnxruntime's usual order the smallest and largest values are taken last, and all tensors wait for it: 2.9 GB
    instead of 0.6 for the published architecture at 480×640. The tool takes no options for its session.
    """
    from onnxruntime import ExecutionOrder, GraphOptimizationLevel, InferenceSession, SessionOptions
    from onnxruntime.quantization.calibrate import CalibraterBase

    def create(calibrater: Any) -> None:
        options = SessionOptions()
        options.graph_optimization_level = GraphOptimizationLevel.ORT_DISABLE_ALL  # as the tool has it
        options.execution_order = ExecutionOrder.PRIORITY_BASED
        path, providers = calibrater.augmented_model_path, calibrater.execution_providers
        calibrater.infer_session = InferenceSession(path, options, providers=providers)

    before = CalibraterBase.create_inference_session
    CalibraterBase.create_inference_session = create
    try:
        yield
    finally:
        CalibraterBase.create_inference_session = before


@contextmanager
def _quietly() -> Iterator[None]:
    """The tools recommend on the root logger what was done already."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)
