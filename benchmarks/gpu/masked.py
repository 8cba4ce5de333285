"""Times `d2zero::masked_attention` against torch's scaled dot product attention with a mask.

    python benchmarks/gpu/masked.py --json masked.json
    python benchmarks/gpu/masked.py --json masked.json --rehearsal   # tiny, on a CPU, in Triton's interpreter

At the decoder's three levels (100 queries, 8 heads of 32 channels), first checked against float64. torch's attention
is timed with a boolean mask that is ready, by its memory-efficient kernels, and with making the mask from logits, which
ours has in its kernel. Then ours with other tiles and other numbers of splits. Times are of CUDA graphs' replays.

Letters: B batch, Q queries, N keys, C channels.
"""

import os
import sys
from collections.abc import Callable
from importlib import import_module
from typing import Any

if "--rehearsal" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"  # before torch, which imports Triton

import torch
import torch.nn.functional as F
from stages import exit_code, parser_of, told, write_json
from timing import graphed_ms
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

ours = import_module("d2zero.model.masked_attention.operator")
HEADS, QUERIES, CHANNELS = 8, 100, 256
KEYS = (15_200, 3_800, 950)
TYPES = {"float16": torch.float16, "float32": torch.float32, "bfloat16": torch.bfloat16}
LIMITS = {"float32": 2e-6, "float16": 2e-3, "bfloat16": 1.6e-2}  # of the largest value
SWEEP = [(keys, programs) for keys in (32, 64, 128) for programs in (1, 2, 4, 8)]
Inputs = tuple[Tensor, Tensor, Tensor, Tensor]


def draw(queries: int, keys: int, dtype: torch.dtype, device: str) -> Inputs:
    """Queries, keys, values and mask logits; query 0 is blocked everywhere."""
    generator = torch.Generator(device).manual_seed(keys)
    sides = (queries, CHANNELS), (keys, CHANNELS), (keys, CHANNELS), (queries, keys)
    asked, read, found, logits = (torch.randn(1, *side, generator=generator, device=device) for side in sides)
    logits[0, 0] = -logits[0, 0].abs() - 0.1
    return asked.to(dtype), read.to(dtype), found.to(dtype), logits.to(dtype)


def mask_of(logits_BQN: Tensor) -> Tensor:
    """Where attention may look, (B, 1, Q, N): everywhere for a query that may look nowhere."""
    allowed = logits_BQN >= 0
    return (allowed | ~allowed.any(2, keepdim=True))[:, None]


def exact(inputs: Inputs) -> Tensor:
    """By matmuls and a softmax in float64."""
    asked, read, found = (entry.double().unflatten(2, (HEADS, -1)).transpose(1, 2) for entry in inputs[:3])
    scores = (asked @ read.transpose(2, 3)) / asked.shape[3] ** 0.5
    shares = scores.masked_fill(~mask_of(inputs[3]), -torch.inf).softmax(-1)
    return (shares @ found).transpose(1, 2).flatten(2)


def fused(inputs: Inputs, mask: Tensor | None = None) -> Tensor:
    """Torch's attention, with the mask made here or given."""
    asked, read, found = (entry.unflatten(2, (HEADS, -1)).transpose(1, 2) for entry in inputs[:3])
    allowed = mask_of(inputs[3]) if mask is None else mask
    return F.scaled_dot_product_attention(asked, read, found, allowed.expand(-1, HEADS, -1, -1))


def timed(inputs: Inputs, device: str, times: int) -> dict[str, float | str]:
    """Milliseconds of ours and of torch's."""
    mask = mask_of(inputs[3])
    calls: dict[str, Callable[[], object]] = {
        "ours": lambda: ours.masked_attention(*inputs, HEADS),
        "torch, mask ready": lambda: fused(inputs, mask),
        "torch, with making the mask": lambda: fused(inputs),
    }
    found: dict[str, float | str] = {}
    for name, call in calls.items():
        try:
            with sdpa_kernel([SDPBackend.EFFICIENT_ATTENTION] if device == "cuda" else [SDPBackend.MATH]):
                found[name] = graphed_ms(call, device, times)
        except Exception as error:  # no such kernel for these inputs, none can be captured, and Triton's own
            found[name] = " ".join(str(error).split())[:200]
    return found


def swept(inputs: Inputs, device: str, times: int) -> list[dict[str, Any]]:
    """Ours by keys of a tile and programs per processor."""
    before, rows = (ours.KEYS, ours.PROGRAMS_PER_PROCESSOR), []
    try:
        for ours.KEYS, ours.PROGRAMS_PER_PROCESSOR in SWEEP if device == "cuda" else SWEEP[:2]:
            row: dict[str, Any] = {"tile": ours.KEYS, "programs": ours.PROGRAMS_PER_PROCESSOR}
            try:
                row["ms"] = graphed_ms(lambda: ours.masked_attention(*inputs, HEADS), device, times)
            except Exception as error:  # shared memory may not suffice
                row["error"] = " ".join(str(error).split())[:200]
            rows.append(row)
    finally:
        ours.KEYS, ours.PROGRAMS_PER_PROCESSOR = before
    return rows


def main() -> int:
    """Check, time, write after each level; 1 if a result is wrong."""
    given = parser_of(__doc__).parse_args()
    device, levels, queries, times = ("cpu", (70, 40), 5, 1) if given.rehearsal else ("cuda", KEYS, QUERIES, 20)
    types = ["float16", "float32"] if given.rehearsal else list(TYPES)  # bfloat16 is wrong in the interpreter
    found: dict[str, Any] = {"levels": [], "sweeps": {}}
    drawn = [(name, keys, draw(queries, keys, TYPES[name], device)) for name in types for keys in levels]
    for name, keys, inputs in drawn:
        row = {"type": name, "keys": keys, **checked(inputs, LIMITS[name])}
        found["levels"].append(row | ({"ms": timed(inputs, device, times)} if "error" in row else {}))
        write_json(given.json, found)
        print(f"{name}, {keys} keys: {found['levels'][-1]}"[:400], flush=True)
    for name, keys, inputs in drawn:
        if name != "bfloat16":
            rows = found["sweeps"][f"{name}, {keys} keys"] = swept(inputs, device, times)
            write_json(given.json, found)
            best = min(rows, key=lambda row: row.get("ms", float("inf")))
            print(f"{name}, {keys} keys: best {best}", flush=True)
    return int(not all(row["good"] for row in found["levels"]))


def checked(inputs: Inputs, limit: float) -> dict[str, Any]:
    """The largest error as a share of the largest value."""
    expected = exact(inputs)
    try:
        error = (ours.masked_attention(*inputs, HEADS).double() - expected).abs().max() / expected.abs().max()
    except Exception as failure:  # Triton's are of many kinds
        return {"failure": told(failure), "good": False}
    return {"error": error.item(), "good": bool(error <= limit)}


if __name__ == "__main__":
    sys.exit(exit_code(main))
