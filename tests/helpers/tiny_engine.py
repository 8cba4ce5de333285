"""A plan that is none, with its metadata, and the function that replaces the engine."""

import hashlib
from pathlib import Path

import numpy as np
from tiny_model import CLASSES, QUERIES, WIDTH, contract, embeddings

from d2zero_runtime.artifacts.engine import EngineMetadata
from d2zero_runtime.artifacts.profile import Profile, Shape
from d2zero_runtime.backends.base import Raw

PLAN = b"a plan"


def sidecar(
    version: str = "11.4.0.106", baked: bool = False, sdk: str = "tensorrt", query_dim: int = 0
) -> EngineMetadata:
    least, most = (CLASSES, CLASSES) if baked else (1, 40)
    return EngineMetadata(
        contract=contract(baked=baked, query_dim=query_dim),
        embeddings=embeddings(),
        profile=Profile(Shape(1, 32, 32, least), Shape(1, 64, 64, CLASSES), Shape(4, 128, 128, most)),
        gpu="NVIDIA H200",
        compute_capability="9.0",
        tensorrt=version,
        onnx_sha256="1" * 64,
        plan_sha256=hashlib.sha256(PLAN).hexdigest(),
        plan_bytes=len(PLAN),
        sdk=sdk,
    )


def write_engine(path: Path, *about: str | bool | int, **named: str | bool | int) -> Path:
    """Arguments beside the path are those of `sidecar`."""
    path.write_bytes(PLAN)
    sidecar(*about, **named).write(path)  # type: ignore[arg-type]
    return path


def inputs(batch: int, height: int, width: int, classes: int, *, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    shapes = ((batch, 3, height, width), (classes, WIDTH))
    images, words = (random.standard_normal(shape).astype(np.float32) for shape in shapes)
    return images, words


def expected(images: np.ndarray, words: np.ndarray | None, query_dim: int = 0) -> Raw:
    """Any function in which every element of the inputs and every place of the outputs counts."""
    words = embeddings() if words is None else words
    queries = np.arange(QUERIES, dtype=np.float32)
    classes = np.append(words.sum(1), np.float32(-1))
    class_logits = images.mean((1, 2, 3))[:, None, None] + queries[:, None] + classes
    mask_logits = images[:, 1, ::4, ::4][:, None] * (queries[:, None, None] + 1)
    channels = np.arange(query_dim, dtype=np.float32)
    background = images[:, 2].mean((1, 2))[:, None] - channels
    features = background[:, None] * (queries[:, None] + 2)
    return Raw(*(part.astype(np.float32) for part in (class_logits, mask_logits, features, background)))
