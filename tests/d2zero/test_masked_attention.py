"""The GPU's masked attention: its kernels in the interpreter and the compiler, and how keys are split."""

import re
import sys
from pathlib import Path

import pytest
from kernels import assert_pass_in_the_interpreter, compiled_for_hopper, needs_triton
from masked_attention_cases import case

from d2zero.model.masked_attention.operator import KEYS, MOST_SPLITS, masked_attention, split
from d2zero_runtime import D2ZeroError


@pytest.mark.slow
@needs_triton
@pytest.mark.long
def test_kernels_in_the_interpreter() -> None:
    assert_pass_in_the_interpreter(Path(__file__).parent / "interpreted_masked_attention.py")


@pytest.mark.slow
@needs_triton
@pytest.mark.parametrize("values", ["fp32", "fp16", "bf16"])
def test_split_kernel_compiles_for_hopper(values: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    from d2zero.model.masked_attention.kernels import split_kernel

    types = [f"*{kind}" for kind in (*[values] * 4, "i1", *["fp32"] * 3)] + ["i32"] * 9 + ["fp32"]
    tile = {"HEADS": 8, "WIDTH": 32, "QUERIES": 64, "KEYS": KEYS, "CHANNELS": 32, "PRECISION": "ieee"}
    strides = {(place,): [["tt.divisibility", 16]] for place in (*range(8), 11, 12, 14, 16)}
    asm = compiled_for_hopper(split_kernel, types, tile, 4, strides)
    assert ("wgmma" in asm["ptx"] or "mma.sync" in asm["ptx"]) == (values != "fp32")  # float32 is not rounded to TF32
    assert re.search(r"ld\.global\S*\.v4|cp\.async\S* .*0x10", asm["ptx"])  # sixteen bytes per thread


@needs_triton
def test_combine_kernel_compiles_for_hopper(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    from d2zero.model.masked_attention.kernels import combine_kernel

    types = ["*fp32", "*fp32", "*fp32", "*fp16", "i32", "i32", "i32"]
    tile = {"HEADS": 8, "WIDTH": 32, "ROWS": 4, "SPLITS": 16, "CHANNELS": 32}
    assert compiled_for_hopper(combine_kernel, types, tile, 4, None)["ptx"]


@pytest.mark.parametrize("keys", [1, 63, 64, 65, 950, 3800, 15_200, 120_000])
@pytest.mark.parametrize("programs", [1, 16, 128, 1000])
def test_splits_cover_all_keys_once(keys: int, programs: int) -> None:
    splits, each = split(keys, programs, processors=132)
    assert each % KEYS == 0 and 1 <= splits <= MOST_SPLITS
    assert (splits - 1) * each < keys <= splits * each


def test_published_layers_fill_a_gpu() -> None:
    assert [split(keys, 16, 132)[0] for keys in (950, 3800, 15_200)] == [30, 30, 32]  # each 16 programs


def test_says_what_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    with pytest.raises(D2ZeroError, match="CUDA device, got cpu"):
        masked_attention(*case())
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, "d2zero.model.masked_attention.kernels", raising=False)
    with pytest.raises(D2ZeroError, match="needs Triton"):
        masked_attention(*case())
