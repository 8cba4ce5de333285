"""Deformable attention as TensorRT's own operator, `MultiscaleDeformableAttnPlugin_TRT`.

The exported graph then has one node where the other implementations have many. Only TensorRT runs it, in float32
(half coordinates lose 1/8 pixel beyond 128). To check such a file elsewhere, `with_body` gives the operator
a body of standard operators, which any ONNX runtime inlines.

Inputs and output of the operator: TensorRT's README of the plugin; version 2 is the one that is kept.
"""

import onnx
import onnx.parser
import torch
from torch import Tensor

from d2zero.model.config import LEVELS
from d2zero.model.deformable import LevelSizes

DOMAIN = "trt.plugins"  # where ONNX Runtime's TensorRT provider looks for plugins; TensorRT itself ignores it
OPERATOR = "MultiscaleDeformableAttnPlugin_TRT"


def plugin(values_BSMN: Tensor, sizes: LevelSizes, locations: Tensor, weights: Tensor) -> Tensor:
    """Deformable attention as one operator, only for tracing; arguments as of `d2zero.model.deformable.grid_sample`."""
    batch, _, heads, width = values_BSMN.shape
    device = locations.device
    extents = torch.tensor([[height, width_] for height, width_ in sizes], device=device, dtype=torch.int32)
    starts = torch.tensor([0, *(height * width_ for height, width_ in sizes)][:-1], device=device).cumsum(0)
    attended: Tensor = torch.onnx.ops.symbolic(
        f"{DOMAIN}::{OPERATOR}",
        (values_BSMN.float(), extents, starts.int(), locations, weights),
        {"plugin_version": "2", "plugin_namespace": ""},
        dtype=torch.float32,
        shape=(batch, locations.shape[1], heads, width),
        version=1,
    )
    return attended.flatten(2)


def with_body(proto: onnx.ModelProto) -> onnx.ModelProto:
    """A copy in which the operator is a function of standard operators: for checking, not for TensorRT."""
    copied = onnx.ModelProto()
    copied.CopyFrom(proto)
    for node in copied.graph.node:
        if node.op_type == OPERATOR:
            del node.attribute[:]
    copied.functions.append(onnx.parser.parse_function(_body()))
    return copied


def _body() -> str:
    """B batch, S values, M heads, N channels per head, R queries, L levels, P points; G = B·M."""
    sampling = "\n".join(_level(level) for level in range(LEVELS))
    return f"""
    <opset_import: ["" : 18], domain: "{DOMAIN}">
    {OPERATOR} (values, sizes, starts, locations, weights) => (attended) {{
        one = Constant <value_ints = [1]> ()
        two = Constant <value_float = 2.0> ()
        unit = Constant <value_float = 1.0> ()
        rest = Constant <value_ints = [-1]> ()
        last = Constant <value_ints = [3]> ()
        sizes64 = Cast <to = 7> (sizes)
        areas = ReduceProd <keepdims = 0> (sizes64, one)
        batch = Shape <start = 0, end = 1> (values)
        heads = Shape <start = 2, end = 3> (values)
        width = Shape <start = 3, end = 4> (values)
        queries = Shape <start = 1, end = 2> (locations)
        points = Shape <start = 4, end = 5> (locations)
        groups = Mul (batch, heads)
        ahead = Transpose <perm = [0, 2, 3, 1]> (values)
        shape_GNS = Concat <axis = 0> (groups, width, rest)
        values_GNS = Reshape (ahead, shape_GNS)
        doubled = Mul (locations, two)
        centred = Sub (doubled, unit)
        grids_LBMRP2 = Transpose <perm = [3, 0, 2, 1, 4, 5]> (centred)
        pair = Constant <value_ints = [2]> ()
        levels = Constant <value_ints = [{LEVELS}]> ()
        shape_LGRP2 = Concat <axis = 0> (levels, groups, queries, points, pair)
        grids = Reshape (grids_LBMRP2, shape_LGRP2)
        {sampling}
        sampled = Concat <axis = 3> ({", ".join(f"sampled{level}" for level in range(LEVELS))})
        weights_BMRLP = Transpose <perm = [0, 2, 1, 3, 4]> (weights)
        shape_G1RK = Concat <axis = 0> (groups, one, queries, rest)
        shares = Reshape (weights_BMRLP, shape_G1RK)
        weighted = Mul (sampled, shares)
        summed = ReduceSum <keepdims = 0> (weighted, last)
        shape_BMNR = Concat <axis = 0> (batch, heads, width, queries)
        attended_BMNR = Reshape (summed, shape_BMNR)
        attended = Transpose <perm = [0, 3, 1, 2]> (attended_BMNR)
    }}"""


def _level(level: int) -> str:
    """Sample one level's map: (G, N, R, P)."""
    i = level
    return f"""
        index{i} = Constant <value_ints = [{i}]> ()
        number{i} = Constant <value_int = {i}> ()
        starts64_{i} = Cast <to = 7> (starts)
        start{i} = Gather (starts64_{i}, index{i})
        area{i} = Gather (areas, index{i})
        stop{i} = Add (start{i}, area{i})
        axis{i} = Constant <value_ints = [2]> ()
        slice{i} = Slice (values_GNS, start{i}, stop{i}, axis{i})
        size{i} = Gather (sizes64, number{i})
        shape{i} = Concat <axis = 0> (groups, width, size{i})
        map{i} = Reshape (slice{i}, shape{i})
        grid{i} = Gather (grids, number{i})
        sampled{i} = GridSample <mode = "bilinear"> (map{i}, grid{i})
    """
