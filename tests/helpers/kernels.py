"""Triton's kernels where there is no GPU: in Triton's interpreter, and in its compiler for one that is not there."""

import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton, which is absent")


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """New tensors without content are full of NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        assert torch.empty(3).isnan().all()
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def assert_pass_in_the_interpreter(tests: Path) -> None:
    """Run a file of tests in a process of its own: the interpreter must be on before Triton is imported."""
    command = [sys.executable, "-m", "pytest", "--noconftest", str(tests)]
    done = subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def compiled_for_hopper(kernel: Any, types: Sequence[Any], constants: dict[str, Any], warps: int, aligned: Any) -> Any:
    """What Triton compiles for a GPU that is not there, by stage; what the interpreter tolerates need not compile.

    Args:
        kernel: A Triton kernel.
        types: Types of the arguments that are no constants, in order.
        constants: The last arguments.
        warps: Warps per program.
        aligned: Attributes by argument, as Triton's `ASTSource` has them; None for none.
    """
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    signature = dict(zip(kernel.arg_names, [*types, *["constexpr"] * len(constants)], strict=True))
    source = ASTSource(kernel, signature, constants, aligned)
    return compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps}).asm
