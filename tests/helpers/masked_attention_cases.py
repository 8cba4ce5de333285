"""Cases of masked attention and what float64 says about them, for the tests of kernels."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from d2zero.model.masked_attention import masked_attention

TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}  # of the largest value


class Case(NamedTuple):
    queries: Tensor
    keys: Tensor
    values: Tensor
    mask_logits: Tensor
    heads: int


def case(
    *,
    batch: int = 1,
    queries: int = 5,
    keys: int = 200,
    heads: int = 2,
    width: int = 4,
    scale: float = 1.0,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> Case:
    """Random tensors; a third of the mask logits is not negative, query 0 of image 0 is blocked everywhere."""
    generator = torch.Generator(device).manual_seed(batch + queries + keys + heads + width)
    options: dict[str, Any] = {"generator": generator, "device": device}
    asked, read, found = (
        torch.randn(batch, count, heads * width, **options) * factor
        for count, factor in ((queries, scale), (keys, 1.0), (keys, 1.0))
    )
    logits = torch.randn(batch, queries, keys, **options) - 0.4
    logits[0, 0] = -logits[0, 0].abs() - 0.1
    return Case(asked.to(dtype), read.to(dtype), found.to(dtype), logits.to(dtype), heads)


def exact(case: Case) -> Tensor:
    """By matmuls and a softmax in float64, of the same rounded inputs."""
    asked, read, found = (entry.double().unflatten(2, (case.heads, -1)).transpose(1, 2) for entry in case[:3])
    blocked = case.mask_logits < 0
    blocked = blocked & ~blocked.all(2, keepdim=True)
    scores = (asked @ read.transpose(2, 3)) / asked.shape[3] ** 0.5
    return (scores.masked_fill(blocked[:, None], -torch.inf).softmax(-1) @ found).transpose(1, 2).flatten(2)


def assert_equals_float64(case: Case, attention: Callable[..., Tensor] = masked_attention) -> None:
    """Compare with `exact`."""
    found, expected = attention(*case), exact(case)
    assert found.dtype == case.queries.dtype and found.is_contiguous()
    limit = TOLERANCE[found.dtype] * max(1.0, case.values.abs().max().item())
    torch.testing.assert_close(found.double(), expected, atol=limit, rtol=0)
