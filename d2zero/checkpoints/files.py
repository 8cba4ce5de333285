"""Our own checkpoints: weights as safetensors, with configuration and vocabulary in the metadata."""

import hashlib
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from d2zero.checkpoints.published import load_exactly, require_exactly
from d2zero.model import D2Zero, ModelConfig, build
from d2zero_runtime import D2ZeroError, Vocabulary
from d2zero_runtime.checked_json import checked, parse_object, refuse_newer
from d2zero_runtime.files import atomic_write

FORMAT_VERSION = 1
_KEY = "d2zero"  # of the JSON contract in the file's metadata


def save_model(model: D2Zero, path: str | os.PathLike[str], notes: dict[str, Any] | None = None) -> Path:
    """Write a model as one `.safetensors` file, atomically.

    Args:
        model: The model to save.
        path: Ends in `.safetensors`.
        notes: Plain data about how the model came to be, kept in the metadata.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise D2ZeroError(f"a checkpoint is saved as .safetensors, got {path.name!r}")
    vocabulary = model.vocabulary
    contract = {
        "format_version": FORMAT_VERSION,
        "config": model.config.to_dict(),
        "vocabulary": {
            "names": list(vocabulary.names),
            "seen": vocabulary.seen.tolist(),
            "active": vocabulary.active.tolist(),
            "source": vocabulary.source,
            "synonyms": vocabulary.synonyms,
        },
        "notes": notes or {},
    }
    arrays = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
    with atomic_write(path) as partial:
        save_file(arrays, partial, metadata={_KEY: json.dumps(contract)})
    return path


def load_model(path: str | os.PathLike[str], device: str | torch.device = "cpu") -> D2Zero:
    """Load a checkpoint as a model in evaluation mode.

    Raises:
        D2ZeroError: The file is absent, damaged, of a newer version, or no checkpoint of ours.
    """
    path = Path(path)
    description, arrays = _read(path)
    try:
        config = ModelConfig.from_dict(description.config)
        if "class_embeddings" not in arrays:
            raise D2ZeroError("it lacks the class embeddings")
        words = description.vocabulary
        vocabulary = Vocabulary(
            names=words.names,
            embeddings=arrays["class_embeddings"].float().numpy(),
            seen=np.array(words.seen, bool),
            active=np.array(words.active, bool),
            source=words.source,
            synonyms=words.synonyms,
        )
        _require_described(config, vocabulary, arrays)
        model = build(config, vocabulary)
        load_exactly(model, arrays)
    except D2ZeroError as error:
        raise D2ZeroError(f"{path}: {error}") from error
    return model.eval().to(device)


def _require_described(config: ModelConfig, vocabulary: Vocabulary, arrays: dict[str, torch.Tensor]) -> None:
    """Compare what is described with the arrays before memory is taken for it.

    Raises:
        D2ZeroError: They do not fit.
    """
    layers = config.encoder_layers + config.decoder_layers + config.adaptation_layers
    if layers > len(arrays):
        raise D2ZeroError(f"it describes {layers} layers and holds {len(arrays)} arrays; it is damaged")
    with torch.device("meta"):
        require_exactly(build(config, vocabulary), arrays)


def read_notes(path: str | os.PathLike[str]) -> dict[str, Any]:
    """How a checkpoint came to be, as `save_model` was told."""
    return _read(Path(path))[0].notes


@dataclass(frozen=True)
class _Words:
    """The vocabulary in a checkpoint's metadata; its embeddings are among the arrays."""

    names: tuple[str, ...]
    seen: tuple[bool, ...]
    active: tuple[bool, ...]
    source: dict[str, Any]
    synonyms: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class _Description:
    """A checkpoint's metadata."""

    format_version: int
    config: dict[str, Any]
    vocabulary: _Words
    notes: dict[str, Any]


def _read(path: Path) -> tuple[_Description, dict[str, torch.Tensor]]:
    if not path.exists():
        raise D2ZeroError(f"checkpoint {path} does not exist")
    if path.suffix in (".pth", ".pt", ".pkl"):
        raise D2ZeroError(
            f"{path} is not a .safetensors checkpoint; turn a published one into it with `d2zero convert`"
        )
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no iterator)
    except Exception as error:  # SafetensorError, OSError, torch's and Python's for odd headers
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise D2ZeroError(f"{path} is damaged, cut short, or no .safetensors file: {reason}") from error
    if _KEY not in metadata:
        raise D2ZeroError(
            f"{path} holds weights but no d2zero model description; turn it into one with `d2zero convert`"
        )
    where = f"{path}: the model description"
    values = parse_object(metadata[_KEY], where)
    refuse_newer(values.get("format_version", 0), FORMAT_VERSION, str(path), "the checkpoint's format")
    return checked(_Description, values, where), arrays


def file_hash(path: str | os.PathLike[str]) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with Path(path).open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
