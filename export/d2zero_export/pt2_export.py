"""Checkpoint → `.pt2`, a network compiled by torch's AOTInductor: for machines that have torch, CPUs and GPUs.

The stages are those of ONNX, with another end: precision, trace, compile, package, verify. The same traced graph is
compiled for one kind of device, the machine's own. On a GPU, deformable attention and masked attention are our Triton
kernels; all other attention is torch's fused one, and feature maps are channels-last from the input on.
"""

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from d2zero.model import D2Zero
from d2zero.model.deformable import FUNCTIONS, DeformableAttention, DeformableImpl, best_impl
from d2zero.model.triton_launch import has_triton
from d2zero_export.classifier import classifier_onnx
from d2zero_export.onnx_export import contract_for, shortened, trace, verified
from d2zero_export.options import Pt2Options
from d2zero_export.parity import RawParity
from d2zero_export.precision import cast_to
from d2zero_runtime import D2ZeroError
from d2zero_runtime.artifacts.pt2 import Pt2Metadata
from d2zero_runtime.backends.torch_math import float32_math

HEADERS = ("triton/backends/nvidia/include", "nvidia/cu13/include/cccl")  # of CUDA, beside torch
TRITON_OPERATORS = ("d2zero::deformable_attention", "d2zero::masked_attention")  # pyproject.toml's entry points


def export_pt2(
    model: D2Zero,
    output: Path,
    options: Pt2Options | None = None,
    checkpoint_hash: str = "",
    stage: Callable[[str], None] = lambda name: None,
) -> RawParity | None:
    """Compile a model; batch, height, width and number of classes are dynamic unless the options fix them.

    Args:
        model: In evaluation mode, on the CPU; not changed.
        output: Ends in `.pt2`. Written only if every stage passed.
        options: How.
        checkpoint_hash: Recorded in the contract; the model's own (`D2Zero.checkpoint`) if left out.
        stage: Told each stage's name as it begins.

    Returns:
        What verification measured, or None if it was left out.

    Raises:
        D2ZeroError: It cannot be compiled here, or what was compiled differs from the checkpoint.
    """
    options = options or Pt2Options()
    if output.suffix != ".pt2":
        raise D2ZeroError(f"the compiled model must end in .pt2, got {output.name!r}")
    model = shortened(model, options)
    impl = best_impl(options.device, gradients=False)
    contract = contract_for(model, options, impl, checkpoint_hash)
    stage("precision")
    prepared = _prepared(model, options, impl)
    stage("trace")
    program = trace(prepared, options, options.device, fused=True)
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent) as folder:
        candidate = Path(folder) / output.name
        stage("compile")
        with float32_math(torch, options.tf32):
            _compile(program, candidate)
        stage("package")
        description = Pt2Metadata(
            contract=contract,
            embeddings=model.vocabulary.embeddings,
            classifier=classifier_onnx(model),
            device=options.device,
            hardware=hardware(options.device),
            torch=torch.__version__,
            operators=TRITON_OPERATORS if impl == DeformableImpl.TRITON else (),
            channels_last=True,
        )
        description.add_to(candidate)
        parity = None
        if options.verify:
            stage("verify")
            parity = verified(model, candidate, options)
        candidate.replace(output)
    return parity


def _prepared(model: D2Zero, options: Pt2Options, impl: DeformableImpl) -> D2Zero:
    prepared = cast_to(model, options.precision).to(options.device)
    prepared.set_deformable(FUNCTIONS[impl])
    for module in prepared.modules():
        if isinstance(module, DeformableAttention):
            module.merge_projections()
    return prepared.to(memory_format=torch.channels_last)


def hardware(device: str) -> str:
    """What code for a device is compiled for: the GPU's name, or the CPU's instruction set."""
    return torch.cuda.get_device_name() if device == "cuda" else torch.backends.cpu.get_cpu_capability()


def _compile(program: torch.export.ExportedProgram, path: Path) -> None:
    from torch._inductor import aoti_compile_and_package  # where torch's documentation has it

    if not has_triton() and torch.cuda.is_available():
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
    brought = [Path(torch.__file__).parents[1] / folder for folder in HEADERS if has_triton()]
    os.environ["CPATH"] = os.pathsep.join(filter(None, [before, *map(str, brought)]))
    try:
        yield
    finally:
        if before is None:
            del os.environ["CPATH"]
        else:
            os.environ["CPATH"] = before
