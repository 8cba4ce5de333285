"""D2Zero: zero-shot instance segmentation in PyTorch.

`load(path)` gives a model; `d2zero.model`, `d2zero.data`, `d2zero.losses`, `d2zero.training`,
`d2zero.evaluation` and `d2zero.checkpoints` hold the rest. Importing `d2zero` itself imports no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from d2zero.checkpoints.files import load_model as load
    from d2zero.checkpoints.files import save_model as save
    from d2zero.model import D2Zero, ModelConfig, RawOutput, build
    from d2zero_runtime import D2ZeroError, Detections, Mode, Vocabulary

_WHERE = {
    "load": ("d2zero.checkpoints.files", "load_model"),
    "save": ("d2zero.checkpoints.files", "save_model"),
    "D2Zero": ("d2zero.model", "D2Zero"),
    "ModelConfig": ("d2zero.model", "ModelConfig"),
    "RawOutput": ("d2zero.model", "RawOutput"),
    "build": ("d2zero.model", "build"),
    "D2ZeroError": ("d2zero_runtime", "D2ZeroError"),
    "Detections": ("d2zero_runtime", "Detections"),
    "Mode": ("d2zero_runtime", "Mode"),
    "Vocabulary": ("d2zero_runtime", "Vocabulary"),
}

__version__ = "0.1.0"
__all__ = [
    "D2Zero",
    "D2ZeroError",
    "Detections",
    "Mode",
    "ModelConfig",
    "RawOutput",
    "Vocabulary",
    "build",
    "load",
    "save",
]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'd2zero' has no attribute {name!r}")
    module, attribute = _WHERE[name]
    return getattr(import_module(module), attribute)
