"""Deformable attention in Triton: its kernels in the interpreter and the compiler, and its operators."""

import importlib.util
import re
import sys
from pathlib import Path

import pytest
import torch
from deformable_cases import case
from kernels import assert_pass_in_the_interpreter, compiled_for_hopper, needs_triton
from torch import Tensor, nn
from torch.export import Dim

from d2zero.model.deformable import DeformableAttention, DeformableImpl, best_impl, triton_sample
from d2zero.model.positions import pixel_centres
from d2zero_runtime import D2ZeroError


@pytest.mark.slow
@needs_triton
@pytest.mark.long
def test_the_kernels_in_the_interpreter() -> None:
    assert_pass_in_the_interpreter(Path(__file__).parent / "interpreted_deformable.py")


@pytest.mark.slow
@needs_triton
@pytest.mark.parametrize("values", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("pass_", ["forward", "backward"])
def test_the_kernels_compile_for_hopper(
    values: str, pass_: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    from d2zero.model.deformable import kernels

    kernel = getattr(kernels, f"{pass_}_kernel")
    pointers = {"forward": [values, "fp32", "fp32", values], "backward": [values, values, *["fp32"] * 5]}[pass_]
    tile = {"HEADS": 8, "WIDTH": 32, "LEVELS": 1, "POINTS": 1, "QUERIES": 4, "CHANNELS": 32}
    types = [f"*{pointer}" for pointer in pointers] + [("fp32", "fp32"), "i32", "i32"]
    aligned = {(index,): [["tt.divisibility", 16]] for index in range(len(pointers))}
    ptx = compiled_for_hopper(kernel, types, tile, 1, aligned)["ptx"]
    width = "v4" if values == "fp32" else "v2"
    assert re.search(rf"ld\.global\S*\.{width}\.", ptx)  # four channels a thread in one read
    assert bool(re.search(r"(red|atom)\.global\S*\.add\S*\.v4\.f32", ptx)) == (pass_ == "backward")


@needs_triton
def test_no_image_size_compiles_anew() -> None:
    # What Triton would key its compiled kernels by, for sizes that differ in being 1 and multiples of 16.
    jit = pytest.importorskip("triton.runtime.jit")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend

    from d2zero.model.deformable.kernels import forward_kernel

    backend = make_backend(GPUTarget("cuda", 90, 32))
    bind = jit.create_function_from_signature(forward_kernel.signature, forward_kernel.params, backend)
    tensor = torch.zeros(16)
    calls = [((1.0, 2.0), 2, 1), ((16.0, 16.0), 256, 16), ((3.0, 5.0), 15, 77)]
    keys = {str(bind(*[tensor] * 4, *call, 8, 32, 1, 4, 16, 32)[1]) for call in calls}
    assert len(keys) == 1


class TwoLevels(nn.Module):
    """Deformable attention over two maps whose sizes are symbols."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = DeformableAttention(dim=8, heads=2, levels=2, points=3, function=triton_sample)

    def forward(self, coarse: Tensor, fine: Tensor) -> Tensor:
        sizes = [(level.shape[2], level.shape[3]) for level in (coarse, fine)]
        source = torch.cat([level.flatten(2).transpose(1, 2) for level in (coarse, fine)], dim=1)
        return self.attention(source, source, pixel_centres(sizes, source.device), sizes)


def test_exports_as_one_operator_with_dynamic_sizes() -> None:
    dynamic = {0: Dim.AUTO, 2: Dim.AUTO, 3: Dim.AUTO}
    maps = (torch.randn(2, 8, 3, 5), torch.randn(2, 8, 6, 7))
    program = torch.export.export(TwoLevels().eval(), maps, dynamic_shapes=(dynamic, dynamic))
    targets = [str(node.target) for node in program.graph.nodes]
    assert targets.count("d2zero.deformable_attention.default") == 1
    assert not any("grid_sampler" in target for target in targets)
    (node,) = (node for node in program.graph.nodes if "deformable_attention" in str(node.target))
    batch, pixels, channels = node.meta["val"].shape
    assert isinstance(batch, torch.SymInt) and isinstance(pixels, torch.SymInt) and channels == 8


def test_says_what_to_do_without_a_gpu() -> None:
    pytest.importorskip("triton")
    with pytest.raises(D2ZeroError, match=r"CUDA device, got cpu.*grid_sample"):
        triton_sample(*case([(2, 3)])[:4])


def test_says_what_to_do_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, "d2zero.model.deformable.kernels", raising=False)
    with pytest.raises(D2ZeroError, match=r"needs Triton.*install.*grid_sample"):
        triton_sample(*case([(2, 3)])[:4])


def test_best_implementation() -> None:
    assert best_impl("cpu", gradients=False) == DeformableImpl.EMBEDDING_BAG
    assert best_impl("cpu", gradients=True) == DeformableImpl.GRID_SAMPLE
    if importlib.util.find_spec("triton"):
        assert best_impl(torch.device("cuda", 0), gradients=True) == DeformableImpl.TRITON
