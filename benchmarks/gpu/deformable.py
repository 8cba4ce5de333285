"""Time the forms of deformable attention on a GPU, against each other and against what the hardware allows.

    python benchmarks/gpu/deformable.py --json deformable_h200.json
    python benchmarks/gpu/deformable.py --json dry.json --rehearsal    # tiny shapes on a CPU, in Triton's interpreter

First every form is compared with `grid_sample` in float64; the Triton form must pass. Then forward, and forward
with backward, are timed with CUDA events at the encoder's shapes (M=8 heads, N=32 channels, L=3 levels, P=4
points, every pixel a query); what matters most first. Calls repeat on the same tensors, so the cache is as warm as it
gets. The file is written after each row.

The floor of a call is the larger of two times: that of its bytes, each input read and each output written
once, at the bandwidth of a large copy on this GPU; and that of its float32 operations at the rate of a large
float32 matmul or convolution. What a form writes between inputs and outputs is its own affair, and why it is slower.

Letters: B batch, S = sum of the levels' H·W, M heads, N channels per head, L levels, P points.
"""

import os
import statistics
import sys
from collections.abc import Callable, Iterator
from itertools import product
from typing import Any

if "--rehearsal" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"  # before torch, which imports Triton

import torch
from stages import exit_code, parser_of, write_json
from timing import milliseconds
from torch import Tensor

from d2zero.model.deformable import DeformableFunction, LevelSizes, gather, grid_sample, triton_sample
from d2zero.model.positions import pixel_centres
from d2zero_bench.environment import environment
from studies.roofline import measured_rates

FORMS = {"grid_sample": grid_sample, "gather": gather, "triton": triton_sample}
TYPES = {"float16": torch.float16, "float32": torch.float32, "bfloat16": torch.bfloat16}
SHAPES: dict[str, LevelSizes] = {
    "800x1216": [(25, 38), (50, 76), (100, 152)],
    "1024x1024": [(32, 32), (64, 64), (128, 128)],
}
TINY: dict[str, LevelSizes] = {"tiny": [(1, 1), (1, 2)]}
HEADS, WIDTH, POINTS = 8, 32, 4
SPREAD = 4.0  # pixels between a query and its samples, standard deviation
STEPS = 4096  # locations are multiples of 1/STEPS: exact coordinates, so float64 agrees on the pixel
OUTPUTS = ("output", "gradient of values", "gradient of locations", "gradient of weights")


def draw(sizes: LevelSizes, batch: int, dtype: torch.dtype, device: str) -> list[Tensor]:
    """Values, locations around each query's own pixel, and weights."""
    generator = torch.Generator(device).manual_seed(0)
    centres = pixel_centres(sizes, torch.device(device))
    pixels, levels = len(centres), len(sizes)
    values = torch.randn(batch, pixels, HEADS, WIDTH, generator=generator, device=device)
    extent = torch.tensor([[width, height] for height, width in sizes], device=device)
    offsets = torch.randn(batch, pixels, HEADS, levels, POINTS, 2, generator=generator, device=device) * SPREAD
    locations = centres[:, None, None, None] + offsets / extent[:, None]
    weights = torch.randn(batch, pixels, HEADS, levels * POINTS, generator=generator, device=device).softmax(-1)
    return [values.to(dtype), (locations * STEPS).round() / STEPS, weights.view(offsets.shape[:-1])]


def outputs(form: DeformableFunction, sizes: LevelSizes, tensors: list[Tensor]) -> list[Tensor]:
    """The output and the gradients of values, locations and weights, the output's gradient being 1."""
    inputs = [tensor.detach().requires_grad_() for tensor in tensors]
    out = form(inputs[0], sizes, inputs[1], inputs[2])
    return [out.detach(), *torch.autograd.grad(out, inputs, torch.ones_like(out))]


def errors(form: DeformableFunction, sizes: LevelSizes, tensors: list[Tensor]) -> dict[str, float]:
    """The largest error of each output, as a share of the largest element that float64 says."""
    exact = outputs(grid_sample, sizes, [tensor.double() for tensor in tensors])
    pairs = zip(OUTPUTS, outputs(form, sizes, tensors), exact, strict=True)
    return {name: ((got - want).abs().max() / want.abs().max()).item() for name, got, want in pairs}


def correctness(shapes: dict[str, LevelSizes], device: str) -> Iterator[dict[str, Any]]:
    """Errors of all forms in all types at batch 1.

    Raises:
        SystemExit: The Triton form is off by more than one rounding of its results.
    """
    for shape, sizes in shapes.items():
        for type_name, dtype in TYPES.items():
            for name, form in FORMS.items():
                found = errors(form, sizes, draw(sizes, 1, dtype, device))
                yield {"shape": shape, "type": type_name, "form": name, "errors": found}
                print(f"{shape:>10} {type_name:>8} {name:>11}  largest error {max(found.values()):.1e}")
                limit = max(torch.finfo(dtype).eps, 1e-5)
                if name == "triton" and not max(found.values()) <= limit:
                    raise SystemExit(f"the Triton form is wrong, expected errors up to {limit:.1e}: {found}")


def measured_limits(device: str, dry: bool) -> dict[str, float]:
    """Bytes per second of a copy and float32 operations per second of a large matmul or convolution."""
    rates = measured_rates(device, "float32", *((256, 1) if dry else (8192, 1024)))
    return {"bytes_a_second": rates.bytes, "float32_operations_a_second": rates.operations}


def work(sizes: LevelSizes, batch: int, dtype: torch.dtype, backward: bool) -> dict[str, int]:
    """Bytes that must move, bytes that the samples ask of the caches, and float32 operations."""
    pixels = batch * sum(height * width for height, width in sizes)
    samples = pixels * HEADS * len(sizes) * POINTS
    values = pixels * HEADS * WIDTH * dtype.itemsize
    places = samples * 3 * 4  # x, y and weight
    moved = 2 * values + places  # values and places in, output out
    corners = samples * 4 * WIDTH * dtype.itemsize
    operations = samples * (8 * WIDTH + 30)  # four multiply-adds per channel; weights and addresses
    if backward:
        moved += 3 * values + 2 * places  # values and output gradient in, their gradient out; places in and out
        corners += corners + samples * 4 * WIDTH * 4  # read again, and added to in float32
        operations += samples * (29 * WIDTH + 45)  # sample and slopes, three dot products, four shares of gradient
    return {"bytes": moved, "corner_bytes": corners, "operations": operations}


def peak_memory(run: Callable[[], object], device: str) -> int | None:
    """Bytes that a call allocates at most beyond what is there already; none on a CPU."""
    if device == "cpu":
        return None
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def forward(form: DeformableFunction, sizes: LevelSizes, tensors: list[Tensor]) -> Tensor:
    """The form without autograd."""
    with torch.no_grad():
        return form(tensors[0], sizes, tensors[1], tensors[2])


PASSES: dict[str, Callable[..., object]] = {"forward": forward, "forward+backward": outputs}


def timings(
    shapes: dict[str, LevelSizes], batches: list[int], limits: dict[str, float], device: str, times: int
) -> Iterator[dict[str, Any]]:
    """Every form in every type at every shape and batch, forward and with backward."""
    for (shape, sizes), batch in product(shapes.items(), batches):
        for (pass_, call), (type_name, dtype) in product(PASSES.items(), TYPES.items()):
            tensors = draw(sizes, batch, dtype, device)
            todo = work(sizes, batch, dtype, pass_ != "forward")
            by_bytes = todo["bytes"] / limits["bytes_a_second"]
            floor = 1000 * max(by_bytes, todo["operations"] / limits["float32_operations_a_second"])
            what = {"shape": shape, "batch": batch, "type": type_name, "pass": pass_}
            for name, form in FORMS.items():
                row = what | {"form": name} | measure(call, form, sizes, tensors, device, times)
                row |= todo | {"floor_ms": floor, "floor_share": floor / row["median_ms"]}
                print(line(row), flush=True)
                yield row


def measure(
    call: Callable[[DeformableFunction, LevelSizes, list[Tensor]], object],
    form: DeformableFunction,
    sizes: LevelSizes,
    tensors: list[Tensor],
    device: str,
    times: int,
) -> dict[str, Any]:
    """Times and memory of one form."""
    memory = peak_memory(lambda: call(form, sizes, tensors), device)
    spans = milliseconds(lambda: call(form, sizes, tensors), device, times)
    return {"median_ms": statistics.median(spans), "least_ms": min(spans), "peak_bytes": memory}


def line(row: dict[str, Any]) -> str:
    """A row for people."""
    return (
        f"{row['shape']:>10} B={row['batch']} {row['type']:>8} {row['pass']:>16} {row['form']:>11}  "
        f"{row['median_ms']:9.3f} ms, floor {row['floor_ms']:.3f} ms ({100 * row['floor_share']:.0f} %)"
    )


def main() -> int:
    """Check, time, write."""
    parser = parser_of(__doc__)
    parser.add_argument("--times", type=int, default=30, help="timed calls of each kind")
    args = parser.parse_args()
    device = "cpu" if args.rehearsal else "cuda"
    if device == "cuda" and not torch.cuda.is_available():
        parser.error("torch sees no CUDA device: run on a machine with one, or give --rehearsal")
    shapes, batches, times = (TINY, [1], 1) if args.rehearsal else (SHAPES, [1, 8], args.times)
    report: dict[str, Any] = {
        "environment": environment(sys.argv[1:], None, "python benchmarks/gpu/deformable.py"),
        "rehearsal": args.rehearsal,
        "correctness": [],
        "timings": [],
    }

    def take(part: str, rows: Iterator[dict[str, Any]]) -> None:
        for row in rows:
            report[part].append(row)
            write_json(args.json, report)

    take("correctness", correctness(dict(list(shapes.items())[:1]), device))
    report["limits"] = measured_limits(device, args.rehearsal)
    take("timings", timings(shapes, batches, report["limits"], device, times))
    return 0


if __name__ == "__main__":
    sys.exit(exit_code(main))
