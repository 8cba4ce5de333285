"""Masked cross-attention by two Triton kernels, over splits of the keys and over their sums.

To `torch.export` it is the operator `d2zero::masked_attention`, with sizes that may be symbols. For inference: it has
no gradient.

Letters: B batch, Q queries, N keys, C channels, H heads, W channels per head.
"""

import math

import torch
from torch import Tensor

from d2zero.model.triton_launch import FLOAT_TYPES, GRID_LIMIT, load_kernels, next_power_of_two
from d2zero_runtime import D2ZeroError

KERNELS = "d2zero.model.masked_attention.kernels"
QUERIES, KEYS, WARPS = 64, 32, 4  # of a program's tile; with 64 keys, float32 spills registers
ROWS = 4  # of a program that combines
MOST_SPLITS = 32
PROGRAMS_PER_PROCESSOR = 4
LEAST_WIDTH = 16  # of what the matrix units multiply


@torch.library.custom_op("d2zero::masked_attention", mutates_args=())
def masked_attention(queries: Tensor, keys: Tensor, values: Tensor, mask_logits: Tensor, heads: int) -> Tensor:
    """Attend to the keys whose mask logit is not negative; a query that has none attends to all.

    Args:
        queries: (B, Q, C) projected queries, float32, bfloat16 or float16.
        keys: (B, N, C) projected keys of the same type; rows may be strided, channels may not.
        values: (B, N, C), likewise.
        mask_logits: (B, Q, N) of any of the types.
        heads: H; head h is channels W·h to W·(h + 1).

    Returns:
        (B, Q, C), of the queries' type, before the output projection.

    Raises:
        D2ZeroError: Triton or a GPU is absent, or the tensors do not fit together.
    """
    check(queries, keys, values, mask_logits, heads)
    kernels = load_kernels(KERNELS, "masked_attention", queries)
    queries, keys, values = (
        entry if entry.stride(-1) == 1 else entry.contiguous() for entry in (queries, keys, values)
    )
    mask_logits = mask_logits.contiguous()
    everywhere = mask_logits.amax(2) < 0
    batch, asking, channels = queries.shape
    width = channels // heads
    blocks = -(-asking // QUERIES)
    splits, split_keys = split(keys.shape[1], batch * heads * blocks, processors(queries.device))
    sums = queries.new_empty((splits, batch, heads, asking, width), dtype=torch.float32)
    tops, powers = queries.new_empty((2, splits, batch, heads, asking), dtype=torch.float32)
    out = torch.empty_like(queries, memory_format=torch.contiguous_format)
    tile = {"HEADS": heads, "WIDTH": width, "CHANNELS": max(LEAST_WIDTH, next_power_of_two(width))}
    with torch.cuda.device_of(queries):
        kernels.split_kernel[(splits, heads * blocks, batch)](
            queries, keys, values, mask_logits, everywhere, sums, tops, powers, asking, keys.shape[1], split_keys,
            *queries.stride()[:2], *keys.stride()[:2], *values.stride()[:2], math.log2(math.e) / math.sqrt(width),
            **tile, QUERIES=QUERIES, KEYS=KEYS, PRECISION=float32_precision(), num_warps=WARPS,
        )  # fmt: skip
        rows = batch * heads * asking
        kernels.combine_kernel[(-(-rows // ROWS),)](
            sums, tops, powers, out, rows, splits, asking, **tile, ROWS=ROWS, SPLITS=next_power_of_two(splits),
            num_warps=WARPS,
        )  # fmt: skip
    return out


@masked_attention.register_fake
def _(queries: Tensor, keys: Tensor, values: Tensor, mask_logits: Tensor, heads: int) -> Tensor:
    return torch.empty_like(queries, memory_format=torch.contiguous_format)


def split(keys: int, programs: int, processors: int) -> tuple[int, int]:
    """How many splits there are, and how many keys each has: a multiple of `KEYS`, the last one perhaps fewer.

    Args:
        keys: N.
        programs: Their number without splitting.
        processors: The GPU's number of multiprocessors.
    """
    tiles = -(-keys // KEYS)
    wanted = max(1, min(MOST_SPLITS, tiles, PROGRAMS_PER_PROCESSOR * processors // programs))
    each = -(-tiles // wanted)
    return -(-tiles // each), each * KEYS


def processors(device: torch.device) -> int:
    """Multiprocessors of a GPU; one of a CPU, on which Triton's interpreter runs."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def float32_precision() -> str:
    """How the kernels multiply float32, as torch's own matmuls do now: exactly, or rounded to TF32."""
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def check(queries: Tensor, keys: Tensor, values: Tensor, mask_logits: Tensor, heads: int) -> None:
    """Compare the arguments with each other: a kernel reads whatever memory it is told to.

    Raises:
        D2ZeroError: A type, shape or device is off.
    """
    tensors = (queries, keys, values, mask_logits)
    if any(entry.dim() != 3 or entry.device != queries.device or entry.dtype not in FLOAT_TYPES for entry in tensors):
        found = ", ".join(f"{list(entry.shape)} {entry.dtype} on {entry.device}" for entry in tensors)
        raise D2ZeroError(
            "masked_attention takes queries (B, Q, C), keys and values (B, N, C) and mask logits (B, Q, N) on one"
            f" device, float32, bfloat16 or float16, got {found}"
        )
    batch, asking, channels = queries.shape
    read = keys.shape[1]
    expected = [(batch, read, channels), (batch, read, channels), (batch, asking, read)]
    alike = queries.dtype == keys.dtype == values.dtype
    if [entry.shape for entry in tensors[1:]] != expected or not alike or not read or channels % heads:
        raise D2ZeroError(
            f"queries {list(queries.shape)} in {heads} heads do not fit keys {list(keys.shape)}, values"
            f" {list(values.shape)} and mask logits {list(mask_logits.shape)}: expected one type, (B, Q, C), (B, N, C)"
            " twice and (B, Q, N), N at least 1, C a multiple of the heads"
        )
    if max(batch, heads * -(-asking // QUERIES)) > GRID_LIMIT:
        raise D2ZeroError(f"masked_attention takes at most {GRID_LIMIT} images, got {batch}")
