"""Cases of deformable attention and what float64 says about them, for the tests of kernels."""

from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from d2zero.model.deformable import DeformableFunction, LevelSizes, grid_sample

ROUNDING = 4e-6  # of float32 sums, of a tensor's largest element: 32 units in the last place
STEPS = 4096  # a location is a multiple of 1/STEPS: coordinates are exact in float32, so all agree on the pixel


class Case(NamedTuple):
    values: Tensor
    sizes: LevelSizes
    locations: Tensor
    weights: Tensor
    grad: Tensor  # of the output, (B, R, M·N)


def case(
    sizes: LevelSizes,
    *,
    batch: int = 1,
    heads: int = 2,
    width: int = 4,
    queries: int = 5,
    points: int = 2,
    spread: float = 0.4,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> Case:
    """Random values, locations (some of them outside the maps), weights and output gradients."""
    generator = torch.Generator(device).manual_seed(batch + heads + width + queries + points)
    samples = (batch, queries, heads, len(sizes), points)
    options: dict[str, Any] = {"generator": generator, "device": device}
    values = torch.randn(batch, sum(h * w for h, w in sizes), heads, width, **options)
    grad = torch.randn(batch, queries, heads * width, **options)
    locations = ((torch.randn(*samples, 2, **options) * spread + 0.5) * STEPS).round() / STEPS
    weights = torch.rand(*samples, **options)
    weights = weights / weights.sum((-2, -1), keepdim=True)
    return Case(values.to(dtype), sizes, locations, weights, grad.to(dtype))


def outputs(function: DeformableFunction, case: Case) -> list[Tensor]:
    """The output and the gradients of values, locations and weights."""
    inputs = [tensor.detach().clone().requires_grad_() for tensor in (case.values, case.locations, case.weights)]
    out = function(inputs[0], case.sizes, inputs[1], inputs[2])
    return [out.detach(), *torch.autograd.grad(out, inputs, case.grad)]


def assert_equals_float64(function: DeformableFunction, case: Case, ulps: float = 0.5) -> None:
    """Compare all outputs with those of `grid_sample` in float64, fed with the same rounded inputs.

    Args:
        function: What to test.
        case: With values of any precision.
        ulps: Allowed error of one rounding to half precision, in units of the last place.
    """
    exact = [tensor.double() for tensor in (case.values, case.locations, case.weights, case.grad)]
    expected = outputs(grid_sample, Case(exact[0], case.sizes, *exact[1:]))
    names = ("output", "gradient of values", "gradient of locations", "gradient of weights")
    for name, got, want in zip(names, outputs(function, case), expected, strict=True):
        atol = ROUNDING * max(1.0, want.abs().max().item()) if want.numel() else 0.0
        rtol = 0.0 if got.dtype == torch.float32 else torch.finfo(got.dtype).eps * ulps
        torch.testing.assert_close(got.double(), want, atol=atol, rtol=rtol, msg=partial("{}: {}".format, name))
