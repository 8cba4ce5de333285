"""An exported network with everything around it in the same graph: from pixels to detections.

Before the network: uint8 pixels are normalised and padded. After it: classes compete, the best instances are chosen,
their masks are upsampled, scored and packed, as in `d2zero_runtime.masks.postprocess`, at the size of the input. Only
standard operators of opset 18, so that any runtime runs it, in any language, without code of ours.

Masks at full size are made for all queries at once, which takes several times 4·Q·H·W bytes of memory; the runtime's
own post-processing makes only the masks that survive.

Letters: B batch, Q queries, K classes, N instances, H and W the sides of the input, h and w of the mask logits.
"""

from typing import Any

import numpy as np
import onnx
import onnx.parser
from onnx import TensorProto, helper, numpy_helper

from d2zero_runtime.artifacts.contract import ACTIVE_INPUT, EMBEDDINGS_INPUT, EndToEnd, ModelContract

_BEFORE = """
before (uint8[batch, height, width, 3] pixels, float[3] mean, float[3] std, int64[2] step)
    => (float images, int64[2] sides)
<int64[6] no_padding = {0, 0, 0, 0, 0, 0}>
{
    values = Cast <to = 1> (pixels)
    centred = Sub (values, mean)
    normalised = Div (centred, std)
    channels_first = Transpose <perm = [0, 3, 1, 2]> (normalised)
    sides = Shape <start = 1, end = 3> (pixels)
    PADDING
    pads = Concat <axis = 0> (no_padding, padding)
    images = Pad (channels_first, pads)
}
"""
# Not as (-sides) modulo step: TensorRT-RTX 1.7 makes negative sizes of that, and builds nothing.
_TO_MULTIPLES = """one = Constant <value_ints = [1]> ()
    almost = Sub (step, one)
    reaching = Add (sides, almost)
    steps = Div (reaching, step)
    padded = Mul (steps, step)
    padding = Sub (padded, sides)"""
_TO_STATIC = "padding = Sub (step, sides)"

_AFTER = """
after (float class_logits, float mask_logits, int64[2] sides, bool active, float temperature, int64[1] limit)
    => (
        float[images, instances, 4] boxes, float[images, instances] scores, int64[images, instances] class_ids,
        TYPE masks
    )
<
    float minus_infinity = {-inf}, bool[1] yes = {1}, float zero = {0}, float one = {1},
    int64[1] i0 = {0}, int64[1] i1 = {1}, int64[1] i2 = {2}, int64[1] i3 = {3}, int64[1] i7 = {7}, int64[1] i8 = {8},
    int64[1] rest = {-1}, int64[2] from_start = {0, 0}, int64[2] sides_axes = {2, 3}, float[4] fourfold = {1, 1, 4, 4},
    int64 first = {0}, int64 second = {1}, int64[3] no_padding = {0, 0, 0},
    float[1, 1, 1, 8] powers = {128, 64, 32, 16, 8, 4, 2, 1},
    float small = {0.000001}
>
{
    competing = Concat <axis = 0> (active, yes)
    tempered = Mul (class_logits, temperature)
    masked = Where (competing, tempered, minus_infinity)
    softmax = Softmax <axis = 2> (masked)
    probabilities = Slice (softmax, i0, rest, i2)
    batch = Shape <start = 0, end = 1> (probabilities)
    queries = Shape <start = 1, end = 2> (probabilities)
    classes = Shape <start = 2, end = 3> (probabilities)
    pairs = Mul (queries, classes)
    count = Min (limit, pairs)
    flat_shape = Concat <axis = 0> (batch, rest)
    flat = Reshape (probabilities, flat_shape)
    best, place = TopK <axis = 1> (flat, count)
    query = Div (place, classes)
    class_id = Mod (place, classes)

    upsampled = Resize <mode = "linear", coordinate_transformation_mode = "half_pixel"> (mask_logits, , fourfold)
    cropped = Slice (upsampled, from_start, sides, sides_axes)
    positive = Greater (cropped, zero)
    bits = Cast <to = 1> (positive)
    certainty = Sigmoid (cropped)
    inside = Mul (certainty, bits)
    total = ReduceSum <keepdims = 0> (inside, sides_axes)
    area = ReduceSum <keepdims = 0> (bits, sides_axes)
    some = Add (area, small)
    quality = Div (total, some)

    quality_of = GatherElements <axis = 1> (quality, query)
    score = Mul (best, quality_of)
    scores, order = TopK <axis = 1> (score, count)
    chosen = GatherElements <axis = 1> (query, order)
    class_ids = GatherElements <axis = 1> (class_id, order)
    chosen_rows = Unsqueeze (chosen, i2)

    by_column = ReduceMax <keepdims = 0> (bits, i2)
    by_row = ReduceMax <keepdims = 0> (bits, i3)
    height = Gather (sides, first)
    width = Gather (sides, second)
    float_height = Cast <to = 1> (height)
    float_width = Cast <to = 1> (width)
    columns = Range (first, width, second)
    rows = Range (first, height, second)
    x = Cast <to = 1> (columns)
    y = Cast <to = 1> (rows)
    x_next = Add (x, one)
    y_next = Add (y, one)
    x_left = Sub (float_width, x)
    y_left = Sub (float_height, y)
    right = Mul (by_column, x_next)
    bottom = Mul (by_row, y_next)
    left = Mul (by_column, x_left)
    top = Mul (by_row, y_left)
    x2 = ReduceMax <keepdims = 1> (right, i2)
    y2 = ReduceMax <keepdims = 1> (bottom, i2)
    most_left = ReduceMax <keepdims = 1> (left, i2)
    most_top = ReduceMax <keepdims = 1> (top, i2)
    x1_or_width = Sub (float_width, most_left)
    y1_or_height = Sub (float_height, most_top)
    any_pixel = Greater (x2, zero)
    x1 = Where (any_pixel, x1_or_width, zero)
    y1 = Where (any_pixel, y1_or_height, zero)
    query_boxes = Concat <axis = 2> (x1, y1, x2, y2)
    boxes = GatherND <batch_dims = 1> (query_boxes, chosen_rows)

    MASKS
}
"""
_PACKED = """width_1 = Reshape (width, i1)
    reaching = Add (width_1, i7)
    packed_width = Div (reaching, i8)
    padded_width = Mul (packed_width, i8)
    missing = Sub (padded_width, width_1)
    pads = Concat <axis = 0> (no_padding, no_padding, i0, missing)
    whole_bytes = Pad (bits, pads)
    height_1 = Reshape (height, i1)
    as_images = Concat <axis = 0> (rest, i1, height_1, padded_width)
    lines = Reshape (whole_bytes, as_images)
    bytes = Conv <kernel_shape = [1, 8], strides = [1, 8]> (lines, powers)
    by_query = Concat <axis = 0> (batch, queries, height_1, packed_width)
    packed = Reshape (bytes, by_query)
    float_masks = GatherND <batch_dims = 1> (packed, chosen_rows)
    masks = Cast <to = 2> (float_masks)"""
_LOGITS = "masks = GatherND <batch_dims = 1> (mask_logits, chosen_rows)"


def end_to_end(network: onnx.ModelProto, contract: ModelContract, options: EndToEnd) -> onnx.ModelProto:
    """The network with its pre- and post-processing.

    Args:
        network: What `graph_of` made, quantized or not, without a vocabulary inside; not changed.
        contract: The model's contract: mean, std, static size, softmax temperature.
        options: What comes after the network.

    Returns:
        A model with the inputs `pixels` (B, H, W, 3) uint8 and, unless classes are baked, `class_embeddings` (K, D)
        float32 and `active` (K,) bool; their defaults are to be added as initializers. Its outputs are `boxes`
        (B, N, 4), `scores` (B, N), falling, 0 past the last instance, `class_ids` (B, N) and `masks`.
    """
    sizes = contract.preprocessing
    step = sizes.static_size or (sizes.size_divisor, sizes.size_divisor)
    constants: dict[str, Any] = {
        "mean": np.array(sizes.mean, np.float32),
        "std": np.array(sizes.std, np.float32),
        "step": np.array(step, np.int64),
        "temperature": np.float32(contract.softmax_temperature),
        "limit": np.array([options.max_detections], np.int64),
    }
    before = _part(_BEFORE.replace("PADDING", _TO_STATIC if sizes.static_size else _TO_MULTIPLES), constants)
    masks, kind = (_PACKED, "uint8[images, instances, height, bytes]")
    if options.masks == "logits":
        masks, kind = _LOGITS, "float[images, instances, quarter_height, quarter_width]"
    after = _part(_AFTER.replace("MASKS", masks).replace("TYPE", kind), constants)
    model = onnx.ModelProto()
    model.CopyFrom(network)
    graph = model.graph
    nodes, inputs = list(graph.node), [entry for entry in graph.input if entry.name == EMBEDDINGS_INPUT]
    classes = inputs[0].type.tensor_type.shape.dim[0].dim_param if inputs else len(contract.class_names)
    if inputs:
        inputs.append(helper.make_tensor_value_info(ACTIVE_INPUT, TensorProto.BOOL, [classes]))
    inputs = [before.input[0], *inputs]
    _set_batch(inputs[0], network.graph.input[0])
    for field, entries in (
        (graph.node, [*before.node, *nodes, *after.node]),
        (graph.input, inputs),
        (graph.output, after.output),
    ):
        del field[:]
        field.extend(entries)
    graph.initializer.extend([*before.initializer, *after.initializer])
    return model


def _part(text: str, constants: dict[str, Any]) -> onnx.GraphProto:
    """A graph from its text; names inside are made distinct from the network's."""
    graph = onnx.parser.parse_graph(text)
    own = [entry.name for entry in graph.input if entry.name in constants]
    graph.initializer.extend(numpy_helper.from_array(np.asarray(constants[name]), name) for name in own)
    kept = [entry for entry in graph.input if entry.name not in constants]
    del graph.input[:]
    graph.input.extend(kept)
    outside = {entry.name for entry in (*graph.input, *graph.output)}
    for tensor in graph.initializer:
        tensor.name = _inside(graph, tensor.name, outside)
    for node in graph.node:
        node.name = f"{graph.name}/{node.output[0]}"
        for names in (node.input, node.output):
            names[:] = [_inside(graph, name, outside) for name in names]
    return graph


def _inside(graph: onnx.GraphProto, name: str, outside: set[str]) -> str:
    return name if name in outside or not name else f"{graph.name}/{name}"


def _set_batch(pixels: onnx.ValueInfoProto, images: onnx.ValueInfoProto) -> None:
    """Give `pixels` the batch of the network."""
    target, source = (entry.type.tensor_type.shape.dim[0] for entry in (pixels, images))
    if source.dim_value:
        target.dim_value = source.dim_value
