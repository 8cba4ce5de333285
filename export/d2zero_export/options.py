"""How a checkpoint is exported: one frozen options class per format, checked when it is made.

Those of an engine are in `engine_options`, which needs no torch.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import torch

from d2zero.model.deformable import DeformableImpl
from d2zero_export.precision import PRECISIONS
from d2zero_export.quantize import QuantizeFor
from d2zero_runtime import D2ZeroError
from d2zero_runtime.artifacts.contract import EndToEnd
from d2zero_runtime.images import Size

PT2_DEVICES = ("cpu", "cuda")
ONNX_IMPLS = (DeformableImpl.GRID_SAMPLE, DeformableImpl.GATHER)


@dataclass(frozen=True, kw_only=True)
class GraphOptions:
    """What every exported graph has.

    Args:
        precision: What the graph computes in.
        size: (height, width), multiples of 32: the one size that the graph takes; any if left out.
        batch: The one number of images that the graph takes; any if left out.
        bake: Make the class embeddings constants: a little faster, and the classes cannot be changed.
        verify: Run the file and compare it with the checkpoint.
        decoder_layers: Stop after so many of the decoder's layers, which were all trained with heads; all if left out.
        tf32: Let GPUs round the factors of float32 matmuls and convolutions to ten bits; recorded, and judged by limits
            of its own.
        max_logits: Largest difference of class and mask logits that passes; by precision if left out.
    """

    precision: str = "float32"
    size: Size | None = None
    batch: int | None = None
    bake: bool = False
    verify: bool = True
    decoder_layers: int | None = None
    tf32: bool = False
    max_logits: float | None = None

    def __post_init__(self) -> None:
        if self.precision not in PRECISIONS:
            raise D2ZeroError(f"precision must be one of {', '.join(PRECISIONS)}, got {self.precision!r}")
        if self.size and any(side < 32 or side % 32 for side in self.size):
            raise D2ZeroError(f"size must be multiples of 32, got {self.size[0]}x{self.size[1]}")
        if self.batch is not None and self.batch < 1:
            raise D2ZeroError(f"batch must be at least 1, got {self.batch}")


@dataclass(frozen=True, kw_only=True)
class OnnxOptions(GraphOptions):
    """How an `.onnx` is made: in float32, float16 or int8.

    Args:
        deform_attn: `gridsample` (fast in ONNX Runtime) or `gather` (no operator that an engine gets wrong).
        calibration: For int8: a folder of photos such as the model will see, for the ranges of activations.
        calibration_images: For int8: at most this many of them.
        end_to_end: Pre- and post-processing in the graph, too, from pixels to detections.
        quantize_for: For int8: `cpu` (ONNX Runtime, OpenVINO) or `tensorrt`, which takes only symmetric ranges.
    """

    deform_attn: str = DeformableImpl.GRID_SAMPLE
    calibration: Path | None = None
    calibration_images: int = 32
    quantize_for: QuantizeFor = "cpu"
    end_to_end: EndToEnd | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        DeformableImpl.parse(self.deform_attn, ONNX_IMPLS, "deform-attn must be one of")
        if self.precision == "bfloat16":
            raise D2ZeroError(
                "an .onnx is float32 or float16; bfloat16 is for --format pt2, or the provider openvino-bf16"
            )
        if self.quantize_for not in get_args(QuantizeFor):
            raise D2ZeroError(f"quantize-for must be cpu or tensorrt, got {self.quantize_for!r}")
        if self.precision != "int8":
            if self.calibration is not None or self.quantize_for != "cpu":
                raise D2ZeroError(
                    f"--calibration and --quantize-for are for --precision int8, got precision {self.precision}"
                )
            return
        if self.calibration is None:
            raise D2ZeroError("--precision int8 needs photos to calibrate on; give their folder with --calibration")
        if self.calibration_images < 1:
            raise D2ZeroError(f"calibration-images must be at least 1, got {self.calibration_images}")

    @property
    def impl(self) -> DeformableImpl:
        """How the graph computes deformable attention."""
        return DeformableImpl(self.deform_attn)


def local_device() -> str:
    """What a `.pt2` is compiled for on this machine, unless told otherwise."""
    return "cuda" if torch.cuda.is_available() else "cpu"


@dataclass(frozen=True, kw_only=True)
class Pt2Options(GraphOptions):
    """How a `.pt2` is compiled: in float32, bfloat16, or on a GPU float16; the device decides on deformable attention.

    Args:
        device: `cpu` or `cuda`, of this machine.
    """

    device: str = "cpu"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.device not in PT2_DEVICES:
            raise D2ZeroError(f"a .pt2 is compiled for one of {', '.join(PT2_DEVICES)}, got {self.device!r}")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise D2ZeroError("torch sees no CUDA device here; a .pt2 is compiled on the machine that it is for")
        if self.precision == "int8":
            raise D2ZeroError("a .pt2 is float32, float16 or bfloat16; int8 is for --format onnx")
        if self.device == "cpu" and self.precision == "float16":
            raise D2ZeroError("on a CPU a .pt2 is float32 or bfloat16; float16 is for GPUs")
