"""Multi-scale deformable attention: interchangeable implementations of the sampling, and the module around them.

Each query samples P points on each of L levels for each of M heads, bilinearly, with zeros outside, and
sums the samples by attention weight (Deformable DETR, Zhu et al. 2021, equation 3).

`sampling` has what torch's operators can do, `operator` launches the Triton `kernels`, `implementations` names
them and picks one, `attention` is the module.

Letters: B batch, S = sum of the levels' H·W, M heads, N channels per head, R queries, L levels, P points.
"""

from d2zero.model.deformable.attention import DeformableAttention
from d2zero.model.deformable.implementations import FUNCTIONS, DeformableImpl, best_impl
from d2zero.model.deformable.operator import triton_sample
from d2zero.model.deformable.sampling import DeformableFunction, LevelSizes, embedding_bag, gather, grid_sample

__all__ = [
    "FUNCTIONS",
    "DeformableAttention",
    "DeformableFunction",
    "DeformableImpl",
    "LevelSizes",
    "best_impl",
    "embedding_bag",
    "gather",
    "grid_sample",
    "triton_sample",
]
