"""Checkpoint → `.pt2`, a network compiled by torch's AOTInductor: for machines that have torch, CPUs and GPUs.

The stages are those of ONNX, with another end: precision, trace, compile, package, verify. The same traced graph is
compiled for one kind of device, the machine's own. On a GPU, deformable attention and masked attention are our Triton
kernels; all other attention is torch's fused one, and feature maps are channels-last from the input on.
"""

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path

import torch

from d2zero.model import D2Zero
from d2zero.model.deformable import DeformableForm, best_form
from d2zero.model.deformable_attention import DeformableAttention
from d2zero_export.onnx_export import ExportConfig, contract_for, trace, verified
from d2zero_export.parity import RawParity
from d2zero_export.precision import lowered
from d2zero_runtime import D2ZeroError
from d2zero_runtime.artifacts.pt2 import Pt2Metadata
from d2zero_runtime.backends.torch_math import float32_math

DEVICES = ("cpu", "cuda")
HEADERS = ("triton/backends/nvidia/include", "nvidia/cu13/include/cccl")  # of CUDA, beside torch
TRITON_OPERATORS = ("d2zero::deformable_attention", "d2zero::masked_attention")  # pyproject.toml's entry points


@dataclass(frozen=True)
class Pt2Config:
    """How a `.pt2` is compiled.

    Args:
        device: `cpu` or `cuda`, of this machine.
        export: precision, fixed sizes, baked classes, verification; `deform_attn` is chosen by the device.
    """

    device: str = "cpu"
    export: ExportConfig = field(default_factory=ExportConfig)

    def __post_init__(self) -> None:
        if self.device not in DEVICES:
            raise D2ZeroError(f"a .pt2 is compiled for one of {', '.join(DEVICES)}, got {self.device!r}")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise D2ZeroError("torch sees no CUDA device here; a .pt2 is compiled on the machine that it is for")
        if self.export.precision == "int8":
            raise D2ZeroError("a .pt2 is float32, float16 or bfloat16; int8 is for --format onnx")
        if self.device == "cpu" and self.export.precision == "float16":
            raise D2ZeroError("on a CPU a .pt2 is float32 or bfloat16; float16 is for GPUs")


def export_pt2(
    model: D2Zero,
    output: Path,
    config: Pt2Config | None = None,
    checkpoint_hash: str = "",
    stage: Callable[[str], None] = lambda name: None,
) -> RawParity | None:
    """Compile a model; batch, height, width and number of classes stay open unless the configuration fixes them.

    Args:
        model: in evaluation mode, on the CPU; not changed.
        output: ends in `.pt2`. Written only if every stage passed.
        config: how.
        checkpoint_hash: recorded in the contract.
        stage: told each stage's name as it begins.

    Returns:
        What verification measured, or None if it was left out.

    Raises:
        D2ZeroError: torch cannot compile it here, or what it compiled differs from the checkpoint.
    """
    config = config or Pt2Config()
    if output.suffix != ".pt2":
        raise D2ZeroError(f"the compiled model must end in .pt2, got {output.name!r}")
    form = best_form(config.device, gradients=False)
    name = form.__name__.removesuffix("_form")
    contract = replace(contract_for(model, config.export, checkpoint_hash), deform_attn=name)
    stage("precision")
    prepared = _prepared(model, config, form)
    stage("trace")
    program = trace(prepared, config.export, config.device, fused=True)
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent) as folder:
        candidate = Path(folder) / output.name
        stage("compile")
        with float32_math(torch, config.export.tf32):
            _compile(program, candidate)
        stage("package")
        description = Pt2Metadata(
            contract=contract,
            embeddings=model.vocabulary.embeddings,
            device=config.device,
            hardware=hardware(config.device),
            torch=torch.__version__,
            operators=TRITON_OPERATORS if name == "triton" else (),
            channels_last=True,
        )
        description.add_to(candidate)
        parity = None
        if config.export.verify:
            stage("verify")
            parity = verified(model, candidate, config.export)
        candidate.replace(output)
    return parity


def _prepared(model: D2Zero, config: Pt2Config, form: DeformableForm) -> D2Zero:
    prepared = lowered(model, config.export.precision).to(config.device)
    prepared.set_deformable(form)
    for module in prepared.modules():
        if isinstance(module, DeformableAttention):
            module.merge_projections()
    return prepared.to(memory_format=torch.channels_last)


def hardware(device: str) -> str:
    """What code for a device is compiled for: the GPU's name, or the CPU's instruction set."""
    return torch.cuda.get_device_name() if device == "cuda" else torch.backends.cpu.get_cpu_capability()


def _compile(program: torch.export.ExportedProgram, path: Path) -> None:
    from torch._inductor import aoti_compile_and_package  # where torch's documentation has it

    if find_spec("triton") is None and torch.cuda.is_available():
        raise D2ZeroError("compiling for a GPU needs Triton, which comes with a torch for CUDA")
    try:
        with cuda_headers():
            aoti_compile_and_package(program, package_path=str(path))
    except Exception as error:  # the compiler's own, of many kinds
        lines = [text for text in str(error).splitlines() if text.strip()] or [type(error).__name__]
        line = next((text for text in lines if " error: " in text), lines[0])
        raise D2ZeroError(f"torch cannot compile the model here: {line} (is a C++ compiler installed?)") from error


@contextmanager
def cuda_headers() -> Iterator[None]:
    """Let the C++ compiler find CUDA's headers where no toolkit is: what torch from PyPI brings along has them.

    It looks there last, after the toolkit that torch tells it of.
    """
    before = os.environ.get("CPATH")
    brought = [Path(torch.__file__).parents[1] / folder for folder in HEADERS if find_spec("triton")]
    os.environ["CPATH"] = os.pathsep.join(filter(None, [before, *map(str, brought)]))
    try:
        yield
    finally:
        if before is None:
            del os.environ["CPATH"]
        else:
            os.environ["CPATH"] = before
