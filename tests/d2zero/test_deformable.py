"""The implementations of deformable attention compute the same, which is what the definition says."""

import math

import pytest
import torch
from torch import Tensor

from d2zero.model.deformable import DeformableAttention, DeformableFunction, embedding_bag, gather, grid_sample
from d2zero.model.positions import pixel_centres

FUNCTIONS = (grid_sample, gather, embedding_bag)


def case(seed: int, spread: float = 0.3) -> tuple[Tensor, list[tuple[int, int]], Tensor, Tensor]:
    """Random values, locations (some of them outside the maps) and weights."""
    generator = torch.Generator().manual_seed(seed)
    sizes = [(2, 3), (4, 7), (8, 5)]
    batch, heads, width, queries, points = 2, 2, 3, 6, 4
    values = torch.randn(batch, sum(h * w for h, w in sizes), heads, width, generator=generator)
    locations = torch.randn(batch, queries, heads, len(sizes), points, 2, generator=generator) * spread + 0.5
    weights = torch.rand(batch, queries, heads, len(sizes), points, generator=generator)
    return values, sizes, locations, weights / weights.sum((-2, -1), keepdim=True)


def by_definition(values: Tensor, sizes: list[tuple[int, int]], locations: Tensor, weights: Tensor) -> Tensor:
    """One sample at a time, in Python floats."""
    batch, queries, heads, levels, points, _ = locations.shape
    out = torch.zeros(batch, queries, heads, values.shape[-1], dtype=torch.float64)
    starts = [sum(h * w for h, w in sizes[:level]) for level in range(levels)]
    for b, q, m, level, p in torch.cartesian_prod(*(torch.arange(n) for n in (batch, queries, heads, levels, points))):
        height, width = sizes[level]
        x = float(locations[b, q, m, level, p, 0]) * width - 0.5
        y = float(locations[b, q, m, level, p, 1]) * height - 0.5
        for row in (math.floor(y), math.floor(y) + 1):
            for column in (math.floor(x), math.floor(x) + 1):
                if 0 <= row < height and 0 <= column < width:
                    share = (1 - abs(x - column)) * (1 - abs(y - row)) * float(weights[b, q, m, level, p])
                    out[b, q, m] += share * values[b, starts[level] + row * width + column, m].double()
    return out.flatten(2)


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("spread", [0.1, 0.5, 3.0])
def test_equals_the_definition(function: DeformableFunction, spread: float) -> None:
    values, sizes, locations, weights = case(1, spread)
    expected = by_definition(values, sizes, locations, weights)
    torch.testing.assert_close(function(values, sizes, locations, weights).double(), expected, atol=1e-5, rtol=1e-5)


def test_gradients_are_equal() -> None:
    gradients = []
    for function in FUNCTIONS:
        values, sizes, locations, weights = case(2)
        inputs = [tensor.clone().requires_grad_() for tensor in (values, locations, weights)]
        (function(inputs[0], sizes, inputs[1], inputs[2]) ** 2).sum().backward()
        gradients.append([tensor.grad for tensor in inputs])
    for others in gradients[1:]:
        torch.testing.assert_close(others, gradients[0], atol=1e-4, rtol=1e-4)


def test_sampling_a_pixel_centre_returns_the_pixel() -> None:
    values, sizes = torch.arange(6.0).view(1, 6, 1, 1), [(2, 3)]
    locations = torch.tensor([[0.5 / 3, 0.5 / 2], [2.5 / 3, 1.5 / 2]]).view(1, 2, 1, 1, 1, 2)
    for function in FUNCTIONS:
        out = function(values, sizes, locations, torch.ones(1, 2, 1, 1, 1))
        torch.testing.assert_close(out.flatten(), torch.tensor([0.0, 5.0]))


def test_a_merged_projection_is_the_same_attention() -> None:
    torch.manual_seed(0)
    sizes = [(2, 3), (4, 5)]
    attention = DeformableAttention(8, heads=2, levels=2, points=3, function=lambda *given: grid_sample(*given))
    torch.nn.init.normal_(attention.sampling_offsets.weight)
    torch.nn.init.normal_(attention.attention_weights.weight)
    source, reference = torch.randn(2, 26, 8), pixel_centres(sizes, torch.device("cpu"))
    expected = attention(source, source, reference, sizes)
    attention.merge_projections()
    for part in (attention.sampling_offsets, attention.attention_weights):
        torch.nn.init.zeros_(part.weight)  # no longer read
    torch.testing.assert_close(attention(source, source, reference, sizes), expected)
