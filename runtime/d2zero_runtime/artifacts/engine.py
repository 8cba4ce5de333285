"""What an engine says about itself: JSON beside the plan.

A TensorRT plan has no room for a contract (a header inside breaks every other tool that reads plans), so
`model.engine` comes with `model.engine.json`: the model's contract, the default vocabulary's embeddings, and
what the plan was built from, with and for.
"""

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

from d2zero_runtime.artifacts.contract import ModelContract
from d2zero_runtime.artifacts.metadata import Metadata
from d2zero_runtime.artifacts.profile import Profile
from d2zero_runtime.errors import D2ZeroError
from d2zero_runtime.files import atomic_write
from d2zero_runtime.vocabulary import Vocabulary


@dataclass(frozen=True)
class _Fields:
    """The engine's own fields as JSON has them."""

    gpu: str
    compute_capability: str
    tensorrt: str
    onnx_sha256: str
    plan_sha256: str
    plan_bytes: int
    tf32: bool
    profile: dict[str, str]
    sdk: Literal["tensorrt", "tensorrt-rtx"] = "tensorrt"  # descriptions from before lack it


@dataclass(frozen=True, eq=False)
class EngineMetadata(Metadata):
    """All that running an engine needs to know beside the plan.

    Args:
        profile: The shapes that the plan runs.
        gpu: The name of the GPU that it was built on; of TensorRT-RTX empty, as it needs none.
        compute_capability: Of the GPUs that the plan runs on: that GPU's, such as `9.0`, or several, `8.6, 8.9`.
        tensorrt: The version that built it; no other reads it.
        onnx_sha256: The hash of the ONNX file that it was built from.
        plan_sha256: The hash of the plan.
        plan_bytes: The size of the plan.
        tf32: Whether factors of float32 matmuls and convolutions may have been rounded to ten bits.
        sdk: What built it and runs it, `tensorrt` or `tensorrt-rtx`.
    """

    profile: Profile
    gpu: str
    compute_capability: str
    tensorrt: str
    onnx_sha256: str
    plan_sha256: str
    plan_bytes: int
    tf32: bool = False
    sdk: str = "tensorrt"

    FIELDS: ClassVar[type[Any]] = _Fields
    REMEDY: ClassVar[str] = "build the engine again"

    @property
    def runnable_contract(self) -> ModelContract:
        """The model's contract, with the size and batch that the plan allows if it allows only one."""
        low, high = self.profile.min, self.profile.max
        contract = self.contract
        if (low.height, low.width) == (high.height, high.width):
            contract = replace(
                contract, preprocessing=replace(contract.preprocessing, static_size=(low.height, low.width))
            )
        return replace(contract, batch=low.batch) if low.batch == high.batch else contract

    def _own_fields(self) -> dict[str, Any]:
        return {**super()._own_fields(), "profile": self.profile.to_json()}

    @classmethod
    def _arguments(cls, own: dict[str, Any], where: str) -> dict[str, Any]:
        try:
            return {**own, "profile": Profile.from_json(own["profile"])}
        except D2ZeroError as error:
            raise D2ZeroError(f"{where} is damaged: {error}; {cls.REMEDY}") from error

    @classmethod
    def read(cls, engine: Path) -> "EngineMetadata":
        """The description of an engine.

        Raises:
            D2ZeroError: It is absent, damaged, of a newer version, or lacks a field.
        """
        path = metadata_path(engine)
        if not path.is_file():
            raise D2ZeroError(
                f"{path} is missing; an engine and its .json belong together: copy both, or build the engine again"
            )
        return cls.from_json(path.read_bytes(), str(path))

    def write(self, engine: Path) -> Path:
        """Write the description beside an engine, atomically, and return its path."""
        path = metadata_path(engine)
        with atomic_write(path) as partial:
            partial.write_bytes(self.to_json(indent=1).encode())
        return path

    def require_plan(self, engine: Path) -> bytes:
        """The plan, if it is the one that this describes.

        Raises:
            D2ZeroError: It is absent, empty, or another one.
        """
        if not engine.is_file():
            raise D2ZeroError(f"engine {engine} does not exist")
        plan = engine.read_bytes()
        if not plan:
            raise D2ZeroError(f"{engine} is empty; build the engine again")
        if len(plan) != self.plan_bytes or hashlib.sha256(plan).hexdigest() != self.plan_sha256:
            raise D2ZeroError(
                f"{engine} ({len(plan)} bytes) is not the plan that {metadata_path(engine).name} describes"
                f" ({self.plan_bytes} bytes): it was cut short or exchanged; copy both again, or build the engine again"
            )
        return plan


def metadata_path(engine: Path) -> Path:
    """`model.engine` → `model.engine.json`."""
    return engine.with_name(f"{engine.name}.json")


def replace_engine_vocabulary(engine: Path, vocabulary: Vocabulary) -> None:
    """Replace the default vocabulary of an engine: its description changes, atomically, the plan does not.

    Raises:
        D2ZeroError: The vocabulary's width or encoder does not fit, the engine was not built for so many
            classes, or its vocabulary is part of the plan.
    """
    metadata = EngineMetadata.read(engine)
    changed = metadata.with_vocabulary(vocabulary)
    low, high = metadata.profile.min.classes, metadata.profile.max.classes
    if not low <= len(vocabulary) <= high:
        raise D2ZeroError(
            f"{engine} runs vocabularies of {low} to {high} classes, got {len(vocabulary)};"
            " build another engine with another --max"
        )
    changed.write(engine)
