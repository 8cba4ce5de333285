"""Imports between packages go one way, and what must be light is."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MAY_IMPORT = {  # package -> folder, and which of ours it may import
    "d2zero_runtime": ("runtime/d2zero_runtime", set()),
    "d2zero": ("d2zero", {"d2zero_runtime"}),
    "d2zero_export": ("export/d2zero_export", {"d2zero", "d2zero_runtime"}),
    "d2zero_bench": ("benchmarks/d2zero_bench", {"d2zero", "d2zero_runtime", "d2zero_export"}),
}
ROOMS = ["masks", "artifacts", "backends", "segmenter", "end_to_end", "formats", "loading"]  # of the runtime, in order
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


def on_import(body: list[ast.stmt]) -> Iterator[str]:
    """Names of what a module imports when it is imported itself."""
    for statement in body:
        if isinstance(statement, ast.Import):
            yield from (alias.name for alias in statement.names)
        elif isinstance(statement, ast.ImportFrom):
            yield from (f"{statement.module}.{alias.name}" for alias in statement.names)
        elif isinstance(statement, ast.If) and "TYPE_CHECKING" in ast.unparse(statement.test):
            continue
        elif not isinstance(statement, (ast.FunctionDef, ast.AsyncFunctionDef)):
            for part in ("body", "orelse", "finalbody", "handlers"):
                yield from on_import(getattr(statement, part, []))


def dependencies() -> dict[str, set[str]]:
    """Our modules that each of our modules imports when it is imported itself."""
    modules = {}
    for package, (folder, _) in MAY_IMPORT.items():
        for path in (ROOT / folder).rglob("*.py"):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            modules[".".join((package, *(part for part in parts if part != "__init__")))] = path
    found = {}
    for name, path in modules.items():
        names = on_import(ast.parse(path.read_text()).body)
        targets = {target if target in modules else target.rpartition(".")[0] for target in names}
        found[name] = {target for target in targets if target in modules and target != name}
    return found


def test_no_module_imports_itself_through_others() -> None:
    order = list(TopologicalSorter(dependencies()).static_order())  # which fails where there is a circle
    assert len(order) > 100


def test_rooms_of_the_runtime_import_only_earlier_ones() -> None:
    for name, targets in dependencies().items():
        package, room, *_ = (*name.split("."), "")
        if package == "d2zero_runtime" and room in ROOMS:
            later = ROOMS[ROOMS.index(room) + 1 :]
            assert not [t for t in targets if t.startswith("d2zero_runtime.") and t.split(".")[1] in later], name


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


def test_old_names_of_modules_lead_to_the_new_ones() -> None:
    code = (
        "from d2zero_runtime.sidecar import Sidecar; from d2zero_runtime.pt2_file import Pt2Description;"
        "from d2zero_runtime.onnx_file import read_contract; from d2zero_runtime import profile, rle;"
        "from d2zero_runtime.artifacts.engine import EngineMetadata; assert Sidecar is EngineMetadata;"
        "from d2zero_runtime.masks import rle as new; assert rle.encode is new.encode"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
