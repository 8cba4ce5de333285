"""How an engine is built, and for which shapes: those given, what the model fixes, and defaults from its contract."""

import math
import re
from collections.abc import Callable
from dataclasses import astuple, dataclass, fields
from pathlib import Path

from d2zero_runtime.artifacts.contract import ACTIVE_INPUT, EMBEDDINGS_INPUT, IMAGES_INPUT, PIXELS_INPUT, ModelContract
from d2zero_runtime.artifacts.profile import STEP, Profile, Shape
from d2zero_runtime.backends.tensorrt.environment import SDKS, TENSORRT
from d2zero_runtime.errors import D2ZeroError, join_truncated

MANY_CLASSES = 1203  # LVIS: vocabularies of this size fit every engine, unless told otherwise
MAX_BATCH = 4
SMALLEST_SIDE = 2 * STEP  # panoramas, and the drawn images of `verify`
Inputs = dict[str, tuple[int | None, ...]]


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """How an engine is built.

    Args:
        min: Smallest shape; from the model's contract if left out.
        opt: Shape that the engine is tuned for; likewise.
        max: Largest shape; likewise.
        timing_cache: File of measured kernels, read if present and written after the build; later builds are
            faster with it. It belongs to one GPU model and one TensorRT version.
        workspace_gb: Most scratch memory that a layer may use, in GiB; all of the GPU's if left out.
        optimization_level: 0 (fast to build) to 5 (long search); TensorRT's own choice, 3, if left out.
        tf32: Let float32 matmuls be rounded to ten bits. TensorRT does so by default, here it is off: a
            float32 model stays float32, unless its file allows it.
        device: CUDA's number of the GPU.
        sdk: `tensorrt`, built on the GPU that it shall run on, or `tensorrt-rtx`, built on any machine.
        compute_capabilities: For `tensorrt-rtx`: of the GPUs to build for, such as `8.9`; its default, Ampere and
            later, if left out. Turing, `7.5`, is not among those.
        verify: Compare the engine with its checkpoint, or with the ONNX file.
        max_logits: Largest difference of class and mask logits that passes; by precision if left out.
    """

    min: Shape | None = None
    opt: Shape | None = None
    max: Shape | None = None
    timing_cache: Path | None = None
    workspace_gb: float | None = None
    optimization_level: int | None = None
    tf32: bool = False
    device: int = 0
    sdk: str = TENSORRT.name
    compute_capabilities: tuple[str, ...] = ()
    verify: bool = True
    max_logits: float | None = None

    def __post_init__(self) -> None:
        if self.sdk not in SDKS:
            raise D2ZeroError(f"sdk must be one of {', '.join(SDKS)}, got {self.sdk!r}")
        if SDKS[self.sdk].portable and (self.timing_cache or self.device):
            raise D2ZeroError(
                "--timing-cache and --device are for --format tensorrt: TensorRT-RTX measures nothing while it builds,"
                " and needs no GPU"
            )
        for text in self.compute_capabilities:
            if not re.fullmatch(r"\d+\.\d", text):
                raise D2ZeroError(f"a compute capability is written as 8.9, got {text!r}")
        if len(set(self.compute_capabilities)) < len(self.compute_capabilities):
            raise D2ZeroError(f"a compute capability is given twice: {', '.join(self.compute_capabilities)}")
        if self.compute_capabilities and not SDKS[self.sdk].portable:
            raise D2ZeroError(
                "--compute-capability is for --format tensorrt-rtx; TensorRT builds for this machine's GPU"
            )
        if self.workspace_gb is not None and self.workspace_gb <= 0:
            raise D2ZeroError(f"workspace_gb must be above 0, got {self.workspace_gb}")
        if self.optimization_level is not None and not 0 <= self.optimization_level <= 5:
            raise D2ZeroError(f"optimization_level must be 0 to 5, got {self.optimization_level}")


def profile_for(options: EngineOptions, contract: ModelContract, inputs: Inputs) -> Profile:
    """The shapes that an engine is built for: those given, the model's fixed sizes, and defaults from its contract.

    Raises:
        D2ZeroError: A given shape differs from a size that the model fixes, or the shapes do not grow.
    """
    low, best, high = _defaults(contract)
    fixed = _fixed(contract, inputs)
    _check_fixed(options, fixed)
    high = options.max or _with(high, fixed)
    best = options.opt or _with(_bounded(best, high, min), fixed)
    if not options.max:
        high = _bounded(high, best, max)
    low = options.min or _with(_bounded(low, best, min), fixed)
    static = contract.preprocessing.static_size
    if static and (high.height > static[0] or high.width > static[1]):
        raise D2ZeroError(f"the model takes images of up to {static[0]}x{static[1]}, got {high}; give a smaller --max")
    return Profile(low, best, high)


def dimensions(shape: Shape, text_dim: int, inputs: Inputs) -> dict[str, tuple[int, ...]]:
    """A shape as the dimensions of the model's inputs."""
    found: dict[str, tuple[int, ...]] = {IMAGES_INPUT: (shape.batch, 3, shape.height, shape.width)}
    if PIXELS_INPUT in inputs:
        found = {PIXELS_INPUT: (shape.batch, shape.height, shape.width, 3)}
    if EMBEDDINGS_INPUT in inputs:
        found[EMBEDDINGS_INPUT] = (shape.classes, text_dim)
    if ACTIVE_INPUT in inputs:
        found[ACTIVE_INPUT] = (shape.classes,)
    return found


def _defaults(contract: ModelContract) -> tuple[Shape, Shape, Shape]:
    """A photo of 3:2 at best; any that the preprocessing can give, up to four per batch, at most."""
    sizes, classes = contract.preprocessing, len(contract.class_names)
    wide = min(sizes.longest_edge, sizes.shortest_edge * 3 // 2)
    height, width = (_padded(edge, sizes.size_divisor) for edge in (sizes.shortest_edge, wide))
    tallest = widest = _padded(sizes.longest_edge, sizes.size_divisor)
    if sizes.static_size:
        height, width = tallest, widest = sizes.static_size
    smallest = min(SMALLEST_SIDE, height, width)
    return (
        Shape(1, smallest, smallest, 1),
        Shape(1, height, width, classes),
        Shape(MAX_BATCH, tallest, widest, max(MANY_CLASSES, classes)),
    )


def _padded(side: int, divisor: int) -> int:
    step = math.lcm(STEP, divisor)
    return -(-side // step) * step


def _fixed(contract: ModelContract, inputs: Inputs) -> dict[str, int]:
    """The sizes that the model's graph fixes, by the name of a shape's field."""
    images = inputs.get(IMAGES_INPUT) or inputs.get(PIXELS_INPUT) or ()
    if len(images) != 4:
        raise D2ZeroError(
            f"expected a model with an input `images` or `pixels` of four dimensions, got {join_truncated(inputs)}"
        )
    batch = images[0]
    height, width = images[2:] if IMAGES_INPUT in inputs else (None, None)  # pixels are padded inside
    classes = inputs[EMBEDDINGS_INPUT][0] if EMBEDDINGS_INPUT in inputs else len(contract.class_names)
    sizes = {"batch": batch, "height": height, "width": width, "classes": classes}
    return {name: size for name, size in sizes.items() if size is not None}


def _check_fixed(options: EngineOptions, fixed: dict[str, int]) -> None:
    for name in ("min", "opt", "max"):
        shape = getattr(options, name)
        for field, size in fixed.items():
            if shape and getattr(shape, field) != size:
                raise D2ZeroError(
                    f"the model's {field} is fixed at {size}, got {getattr(shape, field)} in --{name} {shape};"
                    f" give {size}, or export the model with a dynamic {field}"
                )


def _with(shape: Shape, fixed: dict[str, int]) -> Shape:
    return Shape(*(fixed.get(entry.name, getattr(shape, entry.name)) for entry in fields(Shape)))


def _bounded(shape: Shape, limit: Shape, choose: Callable[[int, int], int]) -> Shape:
    return Shape(*(choose(ours, theirs) for ours, theirs in zip(astuple(shape), astuple(limit), strict=True)))
