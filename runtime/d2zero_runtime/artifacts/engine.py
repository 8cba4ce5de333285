"""What an engine says about itself: JSON beside the plan.

A TensorRT plan has no room for a contract (a header inside breaks every other tool that reads plans), so
`model.engine` comes with `model.engine.json`: the model's contract, the default vocabulary's embeddings, and
what the plan was built from, with and for.
"""

import hashlib
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from d2zero_runtime.artifacts.contract import ModelContract, embeddings_from_json, embeddings_to_json
from d2zero_runtime.artifacts.profile import Profile
from d2zero_runtime.checked_json import checked, parse_object, refuse_newer
from d2zero_runtime.errors import D2ZeroError
from d2zero_runtime.files import whole_file
from d2zero_runtime.vocabulary import Vocabulary

SIDECAR_VERSION = 1
_TEXTS = ("gpu", "compute_capability", "tensorrt", "onnx_sha256", "plan_sha256")


@dataclass(frozen=True)
class _Written:
    """The fields in JSON."""

    version: int
    gpu: str
    compute_capability: str
    tensorrt: str
    onnx_sha256: str
    plan_sha256: str
    plan_bytes: int
    tf32: bool
    profile: dict[str, str]
    contract: dict[str, Any]
    embeddings: dict[str, Any]


@dataclass(frozen=True, eq=False)
class Sidecar:
    """All that running an engine needs to know beside the plan.

    Args:
        contract: of the model.
        embeddings: (K, D) float32, of the default vocabulary.
        profile: the shapes that the plan runs.
        gpu: name of the GPU that it was built on.
        compute_capability: of that GPU, such as `9.0`; the plan runs on no other.
        tensorrt: version that built it; no other reads it.
        onnx_sha256: of the ONNX file that it was built from.
        plan_sha256: of the plan.
        plan_bytes: size of the plan.
        tf32: whether float32 products may have been rounded to ten bits.
        version: of the sidecar.
    """

    contract: ModelContract
    embeddings: NDArray[np.float32]
    profile: Profile
    gpu: str
    compute_capability: str
    tensorrt: str
    onnx_sha256: str
    plan_sha256: str
    plan_bytes: int
    tf32: bool = False
    version: int = SIDECAR_VERSION

    @property
    def vocabulary(self) -> Vocabulary:
        """The default vocabulary."""
        return self.contract.vocabulary(self.embeddings)

    def to_json(self) -> str:
        """For the file."""
        return json.dumps(
            {
                "version": self.version,
                **{name: getattr(self, name) for name in _TEXTS},
                "plan_bytes": self.plan_bytes,
                "tf32": self.tf32,
                "profile": self.profile.to_json(),
                "contract": json.loads(self.contract.to_json()),
                "embeddings": embeddings_to_json(self.embeddings),
            },
            indent=1,
        )

    @classmethod
    def from_json(cls, text: str | bytes, where: str) -> "Sidecar":
        """Read and check a sidecar.

        Args:
            text: what `to_json` wrote.
            where: the file, for error messages.

        Raises:
            D2ZeroError: it is damaged, of a newer version, or lacks a field.
        """
        values = parse_object(text, where)
        refuse_newer(values.get("version", 0), SIDECAR_VERSION, where, "the sidecar")
        written = checked(_Written, values, where, remedy="build the engine again")
        try:
            profile = Profile.from_json(written.profile)
        except D2ZeroError as error:
            raise D2ZeroError(f"{where} is damaged: {error}; build the engine again") from error
        return cls(
            contract=ModelContract.from_json(json.dumps(written.contract), where),
            embeddings=embeddings_from_json(written.embeddings, where),
            profile=profile,
            **{name: getattr(written, name) for name in (*_TEXTS, "plan_bytes", "tf32", "version")},
        )

    @classmethod
    def read(cls, engine: Path) -> "Sidecar":
        """The sidecar of an engine.

        Raises:
            D2ZeroError: it is absent, damaged, of a newer version, or lacks a field.
        """
        path = sidecar_path(engine)
        if not path.is_file():
            raise D2ZeroError(
                f"{path} is missing; an engine and its .json belong together: copy both, or build the engine again"
            )
        return cls.from_json(path.read_bytes(), str(path))

    def write(self, engine: Path) -> Path:
        """Write the sidecar beside an engine, atomically, and return its path."""
        path = sidecar_path(engine)
        with whole_file(path) as partial:
            partial.write_bytes(self.to_json().encode())
        return path

    def require_plan(self, engine: Path) -> bytes:
        """The plan, if it is the one that this sidecar describes.

        Raises:
            D2ZeroError: it is absent, empty, or another one.
        """
        if not engine.is_file():
            raise D2ZeroError(f"engine {engine} does not exist")
        plan = engine.read_bytes()
        if not plan:
            raise D2ZeroError(f"{engine} is empty; build the engine again")
        if len(plan) != self.plan_bytes or hashlib.sha256(plan).hexdigest() != self.plan_sha256:
            raise D2ZeroError(
                f"{engine} ({len(plan)} bytes) is not the plan that {sidecar_path(engine).name} describes"
                f" ({self.plan_bytes} bytes): it was cut short or exchanged; copy both again, or build the engine again"
            )
        return plan


def sidecar_path(engine: Path) -> Path:
    """`model.engine` → `model.engine.json`."""
    return engine.with_name(f"{engine.name}.json")


def replace_engine_vocabulary(engine: Path, vocabulary: Vocabulary) -> None:
    """Replace the default vocabulary of an engine: its sidecar changes, atomically, the plan does not.

    Raises:
        D2ZeroError: the vocabulary's width or encoder does not fit, the engine was not built for so many
            classes, or its vocabulary is part of the plan.
    """
    sidecar = Sidecar.read(engine)
    sidecar.contract.require_fit(vocabulary, sidecar.vocabulary)
    low, high = sidecar.profile.min.classes, sidecar.profile.max.classes
    if not low <= len(vocabulary) <= high:
        raise D2ZeroError(
            f"{engine} runs vocabularies of {low} to {high} classes, got {len(vocabulary)};"
            " build another engine with another --max"
        )
    contract = sidecar.contract.with_vocabulary(vocabulary)
    replace(sidecar, contract=contract, embeddings=vocabulary.embeddings).write(engine)
