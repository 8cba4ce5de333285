"""Multi-scale deformable attention as one Triton kernel forward and one backward, for GPUs.

It writes nothing between the values and the sums, where `grid_sample` writes every sample. Values are float32,
bfloat16 or float16; locations, weights and all sums are float32.

To `torch.compile` and `torch.export` the two functions are operators, `d2zero::deformable_attention` and
`d2zero::deformable_attention_backward`, with sizes that may be symbols. They are plain custom operators, not
`triton_op`s: there is nothing around them to fuse, and `wrap_triton` of torch 2.10 refuses Triton's interpreter, in
which the tests run.

Letters: B batch, S = sum of the levels' H·W, M heads, N channels per head, R queries, L levels, P points.
"""

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from d2zero.model.deformable.sampling import LevelSizes
from d2zero.model.triton_launch import FLOAT_TYPES, GRID_LIMIT, load_kernels, next_power_of_two
from d2zero_runtime import D2ZeroError

KERNELS = "d2zero.model.deformable.kernels"
BYTES_PER_THREAD = 16  # the widest read and, on GPUs from Hopper on, the widest atomic addition
FORWARD_WARPS = 4
BACKWARD_WARPS = 1  # sums over channels stay in a warp: no shared memory and no barrier, which halt its reads


def triton_sample(values_BSMN: Tensor, sizes: LevelSizes, locations: Tensor, weights: Tensor) -> Tensor:
    """Sample and add up in one kernel; arguments as in `grid_sample`, on a GPU.

    Args:
        values_BSMN: (B, S, M, N) float32, bfloat16 or float16.
        sizes: (H, W) of each level.
        locations: (B, R, M, L, P, 2) float32.
        weights: (B, R, M, L, P) float32.

    Returns:
        (B, R, M·N) in the type of the values.

    Raises:
        D2ZeroError: Triton is absent, the tensors are not on a GPU, or have another type or shape.
    """
    flat_sizes = [side for size in sizes for side in size]
    out: Tensor = deformable_attention(values_BSMN, flat_sizes, locations, weights)
    return out


@torch.library.custom_op("d2zero::deformable_attention", mutates_args=())
def deformable_attention(values: Tensor, sizes: Sequence[int], locations: Tensor, weights: Tensor) -> Tensor:
    """Run the forward kernel; `sizes` is [H, W, H, W, …]."""
    check(values, sizes, locations, weights)
    kernels = load_kernels(KERNELS, "triton_sample", values, "d2zero.model.deformable.grid_sample")
    values, locations, weights = values.contiguous(), locations.contiguous(), weights.contiguous()
    out = values.new_empty(out_shape(values, locations))
    with torch.cuda.device_of(values):
        tile = constants(values, locations, FORWARD_WARPS, values.element_size())
        kernels.forward_kernel[grid(values, locations, tile)](
            values, locations, weights, out, tuple(map(float, sizes)), values.shape[1], locations.shape[1], **tile
        )
    return out


@torch.library.custom_op("d2zero::deformable_attention_backward", mutates_args=())
def deformable_attention_backward(
    grad: Tensor, values: Tensor, sizes: Sequence[int], locations: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Run the backward kernel: gradients of values, locations and weights, each of its input's type."""
    check(values, sizes, locations, weights)
    kernels = load_kernels(KERNELS, "triton_sample", values, "d2zero.model.deformable.grid_sample")
    refuse_determinism()
    values, locations, weights = values.contiguous(), locations.contiguous(), weights.contiguous()
    grad_values = torch.zeros_like(values, dtype=torch.float32)
    grad_locations, grad_weights = torch.empty_like(locations), torch.empty_like(weights)
    with torch.cuda.device_of(values):
        tile = constants(values, locations, BACKWARD_WARPS, grad_values.element_size())
        kernels.backward_kernel[grid(values, locations, tile)](
            grad.contiguous(), values, locations, weights, grad_values, grad_locations, grad_weights,
            tuple(map(float, sizes)), values.shape[1], locations.shape[1], **tile,
        )  # fmt: skip
    return grad_values.to(values.dtype), grad_locations, grad_weights


@deformable_attention.register_fake
def _(values: Tensor, sizes: Sequence[int], locations: Tensor, weights: Tensor) -> Tensor:
    return values.new_empty(out_shape(values, locations))


@deformable_attention_backward.register_fake
def _(
    grad: Tensor, values: Tensor, sizes: Sequence[int], locations: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return values.new_empty(values.shape), locations.new_empty(locations.shape), weights.new_empty(weights.shape)


def keep_inputs(ctx: Any, inputs: tuple[Tensor, Sequence[int], Tensor, Tensor], output: Tensor) -> None:
    """Save what the backward kernel reads."""
    values, ctx.sizes, locations, weights = inputs
    ctx.save_for_backward(values, locations, weights)


def differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor, None, Tensor, Tensor]:
    """Return the gradients of the four arguments."""
    values, locations, weights = ctx.saved_tensors
    grads = deformable_attention_backward(grad, values, ctx.sizes, locations, weights)
    return grads[0], None, grads[1], grads[2]


deformable_attention.register_autograd(differentiate, setup_context=keep_inputs)


def out_shape(values: Tensor, locations: Tensor) -> tuple[int, int, int]:
    """(B, R, M·N)."""
    return values.shape[0], locations.shape[1], values.shape[2] * values.shape[3]


def constants(values: Tensor, locations: Tensor, warps: int, element_size: int) -> dict[str, int]:
    """What a kernel is compiled for: a model's sizes, none of an image's, and the tile of a program.

    The tile has as many queries as make each thread move `BYTES_PER_THREAD` of a pixel's channels in one access.
    """
    _, _, heads, width = values.shape
    channels = next_power_of_two(width)
    return {
        "HEADS": heads,
        "WIDTH": width,
        "LEVELS": locations.shape[3],
        "POINTS": locations.shape[4],
        "QUERIES": max(1, warps * 32 * BYTES_PER_THREAD // element_size // channels),
        "CHANNELS": channels,
        "num_warps": warps,
    }


def grid(values: Tensor, locations: Tensor, tile: dict[str, int]) -> tuple[int, int, int]:
    """Programs: blocks of queries, heads, images. Images vary slowest, so that one at a time fills the cache."""
    return -(-locations.shape[1] // tile["QUERIES"]), values.shape[2], values.shape[0]


def refuse_determinism() -> None:
    """Speak up where `torch.use_deterministic_algorithms` is on: the order of atomic additions varies.

    Raises:
        D2ZeroError: It is on and does not merely ask for warnings.
    """
    if not torch.are_deterministic_algorithms_enabled():
        return
    message = "the backward of triton_sample is not deterministic; use d2zero.model.deformable.gather"
    if not torch.is_deterministic_algorithms_warn_only_enabled():
        raise D2ZeroError(message)
    warnings.warn(message, stacklevel=2)


def check(values: Tensor, sizes: Sequence[int], locations: Tensor, weights: Tensor) -> None:
    """Compare the arguments with each other: a kernel reads whatever memory it is told to.

    Raises:
        D2ZeroError: A type, shape or device is off.
    """
    if values.dtype not in FLOAT_TYPES or locations.dtype != torch.float32 or weights.dtype != torch.float32:
        raise D2ZeroError(
            "triton_sample takes values of float32, bfloat16 or float16 with locations and weights of float32, got "
            f"{values.dtype}, {locations.dtype}, {weights.dtype}"
        )
    if values.dim() != 4 or locations.dim() != 6 or not values.device == locations.device == weights.device:
        raise D2ZeroError(
            "triton_sample takes values (B, S, M, N), locations (B, R, M, L, P, 2) and weights on one device, got "
            f"{list(values.shape)} on {values.device}, {list(locations.shape)} on {locations.device}, weights on "
            f"{weights.device}"
        )
    batch, total, heads, _ = values.shape
    _, queries, _, levels, points, _ = locations.shape
    pixels = sum(height * width for height, width in zip(sizes[::2], sizes[1::2], strict=True))
    expected = [(batch, queries, heads, levels, points, 2), (batch, queries, heads, levels, points)]
    if [locations.shape, weights.shape] != expected or len(sizes) != 2 * levels or pixels != total:
        raise D2ZeroError(
            f"values {list(values.shape)} and sizes {list(sizes)} do not fit locations {list(locations.shape)} and "
            f"weights {list(weights.shape)}: expected (B, S, M, N), (H, W) of L levels with S pixels together, "
            "(B, R, M, L, P, 2) and (B, R, M, L, P)"
        )
    if max(batch, heads) > GRID_LIMIT:
        raise D2ZeroError(f"triton_sample takes at most {GRID_LIMIT} images and heads, got {batch} and {heads}")
