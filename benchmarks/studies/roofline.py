"""How much work a network is, and how long the hardware needs for it at least.

Counted on tensors without content (torch's `FakeTensorMode`): floating-point operations of matmuls, convolutions and
attention, as torch's own counter has them, and of deformable attention; and the bytes that those operators read and
write once each, everything between them being taken as fused away. The floor is the larger of two times: operations
at the rate of a large matmul or convolution on this device, bytes at the rate of a large copy. What is measured is
above it by what is not fused, by small operators that do not fill the device, and by waiting. Rates are those of what
is run: float32 does not become TF32, unless that is the precision.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from d2zero_bench.candidates import elapsed_ms
from d2zero_bench.cases import Case
from d2zero_runtime.backends.torch_math import float32_math

TYPES = {"float32": torch.float32, "tf32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_CHANNELS = 256  # of the convolution that is measured
SAMPLING_FLOPS = 8  # of a sample's channel: four corners, each a multiplication and an addition


@dataclass(frozen=True)
class Work:
    """What a network does for one batch.

    Args:
        operations: Floating-point operations; a multiplication with its addition counts two.
        bytes: Read and written by the operators that count.
    """

    operations: int
    bytes: int


@dataclass(frozen=True)
class Rates:
    """What a device does per second, the best of several tries.

    Args:
        operations: Floating-point operations of a large matmul or a large convolution, whichever is faster.
        bytes: Read and written by a large copy.
    """

    operations: float
    bytes: float

    def floors(self, work: Work) -> tuple[float, float]:
        """Milliseconds that the operations and the bytes need at least."""
        return 1000 * work.operations / self.operations, 1000 * work.bytes / self.bytes


class _Traffic(TorchDispatchMode):
    """Adds up inputs and outputs of the operators that have operations to count."""

    def __init__(self, counted: Any) -> None:
        super().__init__()
        self._counted, self.bytes, self.sampling = counted, 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        samples = func._overloadpacket is torch.ops.aten.grid_sampler_2d
        if samples:
            self.sampling += SAMPLING_FLOPS * out.numel()
        if samples or func._overloadpacket in self._counted:
            tensors = [leaf for leaf in tree_leaves((args, kwargs, out)) if isinstance(leaf, Tensor)]
            self.bytes += sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        return out


def count(network: Callable[..., Any], make_inputs: Callable[[], tuple[Tensor, ...]]) -> Work:
    """Count a network's work.

    Args:
        network: On the CPU; nothing is computed.
        make_inputs: Makes its inputs; called where tensors have no content.
    """
    counter = FlopCounterMode(display=False)
    traffic = _Traffic(counter.flop_registry)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad(), counter, traffic:
        network(*make_inputs())
    return Work(counter.get_total_flops() + traffic.sampling, traffic.bytes)


def work_of(checkpoint: Path, case: Case, precision: str = "float32") -> Work:
    """The work of a checkpoint's exported graph at a case's size.

    Args:
        checkpoint: A `.safetensors` file.
        case: Size, batch, number of classes.
        precision: The graph's, one of `TYPES`.
    """
    from d2zero.checkpoints.files import load_model
    from d2zero_export.graph import InferenceGraph
    from d2zero_export.precision import cast_to

    model = load_model(checkpoint)
    stored = "float32" if precision == "tf32" else precision
    graph: nn.Module = InferenceGraph(cast_to(model, stored), fused=True).eval().requires_grad_(False)
    height, width = (-(-side // 32) * 32 for side in (case.height, case.width))
    classes = case.classes or len(model.vocabulary)

    def inputs() -> tuple[Tensor, ...]:
        return torch.empty(case.batch, 3, height, width), torch.empty(classes, model.config.text_dim)

    return count(graph, inputs)


def measured_rates(device: str, precision: str = "float32", side: int = 4096, megabytes: int = 512) -> Rates:
    """Measure a device.

    Args:
        device: `cpu` or `cuda`.
        precision: The matmul's and the convolution's, one of `TYPES`.
        side: Of the matmul's square matrices; a sixteenth of it is the side of what is convolved.
        megabytes: The size of the copy.
    """
    matrix = torch.randn(side, side, device=device).to(TYPES[precision])
    source = torch.empty(megabytes << 20, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    shapes = (1, _CHANNELS, side // 16, side // 16), (_CHANNELS, _CHANNELS, 3, 3)
    maps, kernel = (
        torch.randn(shape, device=device).to(TYPES[precision]).contiguous(memory_format=torch.channels_last)
        for shape in shapes
    )
    with torch.inference_mode(), float32_math(torch, precision == "tf32"):
        product = 2 * side**3 / _best(lambda: matrix @ matrix, device)
        spent = _best(lambda: F.conv2d(maps, kernel, padding=1), device)
        convolved = 2 * kernel.numel() * maps[0, 0].numel() / spent
        copy = _best(lambda: target.copy_(source), device)
    # A library's matmuls may miss what the processor can do: torch's on an AMD one, 0.2 of its 0.5 trillion per second.
    return Rates(max(product, convolved), 2 * source.numel() / copy)


def _best(run: Callable[[], object], device: str, times: int = 6) -> float:
    """Seconds of the fastest call."""

    def complete() -> None:
        run()
        if device == "cuda":
            torch.cuda.synchronize()

    return min(elapsed_ms(complete) for _ in range(times)) / 1000


def described(work: Work, rates: Rates) -> str:
    """A line for the report."""
    by_operations, by_bytes = rates.floors(work)
    return (
        f"{work.operations / 1e9:.1f} billion operations and {work.bytes / 1e9:.2f} GB per batch; at"
        f" {rates.operations / 1e12:.3g} trillion operations and {rates.bytes / 1e9:.3g} GB per second, both measured,"
        f" at least {by_operations:.3g} and {by_bytes:.3g} ms"
    )
