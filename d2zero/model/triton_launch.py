"""What the launchers of our Triton kernels share.

Kernels are imported when one first runs: tracing (`torch.export`, fake tensors) needs neither Triton nor a GPU.
"""

from importlib import import_module
from importlib.util import find_spec
from types import ModuleType

import torch
from torch import Tensor

from d2zero_runtime import D2ZeroError

FLOAT_TYPES = (torch.float32, torch.bfloat16, torch.float16)
GRID_LIMIT = 65535  # programs along the second and third side


def has_triton() -> bool:
    """Whether Triton is installed."""
    return find_spec("triton") is not None


def load_kernels(module: str, operator: str, tensor: Tensor, instead: str = "") -> ModuleType:
    """Import the kernels of an operator.

    Args:
        module: The module of the kernels.
        operator: The operator's name, for errors.
        tensor: One of the tensors that the kernels will read.
        instead: What can be used without a GPU, if anything.

    Raises:
        D2ZeroError: Triton is absent, or the tensor is not where it can run.
    """
    alternative = f", or use {instead}" if instead else ""
    try:
        kernels = import_module(module)
    except ImportError as error:
        raise D2ZeroError(
            f"{operator} needs Triton, which cannot be imported ({error}): install a torch with CUDA, which brings it"
            f"{alternative}"
        ) from error
    from triton.runtime import JITFunction

    interpreted = not any(isinstance(entry, JITFunction) for entry in vars(kernels).values())
    if not tensor.is_cuda and not interpreted:
        raise D2ZeroError(
            f"{operator} needs tensors on a CUDA device, got {tensor.device}: move the model with .to('cuda')"
            f"{alternative}, or set TRITON_INTERPRET=1 before the start to try the kernels slowly without a GPU"
        )
    return kernels


def next_power_of_two(number: int) -> int:
    """The least power of two that is not below a number from 1 on."""
    return 1 << (number - 1).bit_length()
