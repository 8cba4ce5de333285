"""The rooms' doors: imports go one way, and what must be light is."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MAY_IMPORT = {  # package -> folder, and which of ours it may import
    "d2zero_runtime": ("runtime/d2zero_runtime", set()),
    "d2zero": ("d2zero", {"d2zero_runtime"}),
    "d2zero_export": ("export/d2zero_export", {"d2zero", "d2zero_runtime"}),
    "d2zero_bench": ("benchmarks/d2zero_bench", {"d2zero", "d2zero_runtime", "d2zero_export"}),
}
OURS = {"d2zero", "d2zero_runtime", "d2zero_export", "d2zero_bench", "studies"}


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_imports_go_one_way(package: str) -> None:
    folder, allowed = MAY_IMPORT[package]
    files = list((ROOT / folder).rglob("*.py"))
    assert len(files) > 3
    for path in files:
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            roots = {name.split(".")[0] for name in names}
            assert roots & OURS <= allowed | {package}, f"{path} imports {roots & OURS}"


@pytest.mark.parametrize(
    "statement", ["import d2zero", "import d2zero_runtime", "import d2zero.cli.main", "import d2zero_runtime.draw"]
)
def test_without_torch(statement: str) -> None:
    heavy = ["torch", "torchvision", "timm", "scipy", "pycocotools", "onnxruntime"]
    code = f"{statement}; import sys; print([name for name in {heavy} if name in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_lazy_names_are_all_there() -> None:
    import d2zero

    for name in d2zero.__all__:
        assert getattr(d2zero, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = d2zero.nothing
