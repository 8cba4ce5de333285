"""Masked cross-attention of the decoder on a GPU: keys in splits, the mask made where it is used.

Fused attention of torch gives a head's hundred queries to two programs, sixteen for eight heads, and a GPU has more
than a hundred processors; with a mask only its slower kernels remain. Here keys are split over as many programs as the
GPU has room for, and combined exactly. `operator` checks arguments and launches the Triton `kernels`.
"""

from d2zero.model.masked_attention.operator import masked_attention

__all__ = ["masked_attention"]
