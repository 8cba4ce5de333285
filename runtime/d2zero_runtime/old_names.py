"""Modules and classes by the names that they had before 2026-11-28, for code written then; to go with version 0.2."""

import sys
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

MODULES = {
    "contract": "artifacts.contract",
    "onnx_file": "artifacts.onnx",
    "profile": "artifacts.profile",
    "pt2_file": "artifacts.pt2",
    "rle": "masks.rle",
    "sidecar": "artifacts.engine",
}
CLASSES = {"Sidecar": "EngineMetadata", "Pt2Description": "Pt2Metadata"}


class OldNames(MetaPathFinder, Loader):
    """Finds a module of ours by its old name, with what the new one holds."""

    def find_spec(self, name: str, *arguments: object) -> ModuleSpec | None:
        """See `MetaPathFinder`."""
        package, _, module = name.rpartition(".")
        return ModuleSpec(name, self) if package == "d2zero_runtime" and module in MODULES else None

    def create_module(self, spec: ModuleSpec) -> None:
        """An ordinary module."""

    def exec_module(self, module: ModuleType) -> None:
        """Fill it with what the new module holds."""
        content = vars(import_module(f"d2zero_runtime.{MODULES[module.__name__.rpartition('.')[2]]}"))
        module.__dict__.update({name: value for name, value in content.items() if not name.startswith("__")})
        module.__dict__.update({old: content[new] for old, new in CLASSES.items() if new in content})


sys.meta_path.append(OldNames())
