"""The operators outside torch that a compiled model may call; importing this module registers them with torch."""

from d2zero.model.deformable.operator import deformable_attention
from d2zero.model.masked_attention import masked_attention

__all__ = ["deformable_attention", "masked_attention"]
