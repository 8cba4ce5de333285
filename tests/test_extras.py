"""The extras of pyproject.toml bring what the code that needs them asks for."""

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
EXTRAS: dict[str, list[Requirement]] = {
    extra: [Requirement(line) for line in lines]
    for extra, lines in tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"].items()
}


def names(extra: str) -> set[str]:
    """What an extra installs by name, through the extras of ours that it includes."""
    ours = [requirement for requirement in EXTRAS[extra] if requirement.name == "d2zero"]
    return {other.name for other in EXTRAS[extra] if other not in ours}.union(
        *(names(inner) for requirement in ours for inner in requirement.extras)
    )


def test_gpu_brings_cuda_and_cudnn() -> None:
    (onnxruntime,) = EXTRAS["gpu"]
    assert onnxruntime.name == "onnxruntime-gpu" and onnxruntime.extras == {"cuda", "cudnn"}


@pytest.mark.parametrize("extra", EXTRAS)
def test_no_extra_installs_both_onnxruntimes(extra: str) -> None:
    assert not {"onnxruntime", "onnxruntime-gpu"} <= names(extra)


def test_tensorrt_rtx_brings_bindings_and_libraries_of_one_version() -> None:
    found = {requirement.name: requirement.specifier for requirement in EXTRAS["tensorrt-rtx"]}
    assert found["tensorrt-rtx-cu13-libs"] == found["tensorrt-rtx-cu13-bindings"]
    assert "cuda-bindings" in found and "cuda-bindings" in names("tensorrt")


def test_every_install_line_names_extras_that_exist() -> None:
    folders = ("d2zero", "runtime", "export", "benchmarks", "docs")
    files = [ROOT / "README.md", *(path for folder in folders for path in (ROOT / folder).rglob("*.[pm][yd]"))]
    named = {
        extra: path.name
        for path in files
        for group in re.findall(r"d2zero\[([a-z,-]+)\]", path.read_text())
        for extra in group.split(",")
    }
    assert {"gpu", "tensorrt", "train"} <= set(named)
    unknown = {extra: where for extra, where in named.items() if extra not in EXTRAS}
    assert not unknown
