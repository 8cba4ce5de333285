"""The model: `D2Zero`, its parts in a module each, and `build`, which composes them from a `ModelConfig`."""

from d2zero.model.config import ModelConfig
from d2zero.model.d2zero import D2Zero, HeadOutput, build
from d2zero_runtime.segmenter import RawOutput

__all__ = ["D2Zero", "HeadOutput", "ModelConfig", "RawOutput", "build"]
