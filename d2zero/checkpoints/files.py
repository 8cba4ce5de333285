"""Our own checkpoints: weights as safetensors, with configuration and vocabulary in the metadata."""

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from d2zero.checkpoints.published import build_exactly
from d2zero.checkpoints.runs import checkpoint_file
from d2zero.model import D2Zero, ModelConfig
from d2zero_runtime import D2ZeroError, Vocabulary
from d2zero_runtime.checked_json import checked, parse_object, refuse_newer
from d2zero_runtime.errors import join_truncated
from d2zero_runtime.files import atomic_write, file_hash

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
    contract = description(model, notes)
    arrays = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
    with atomic_write(path) as partial:
        save_file(arrays, partial, metadata={_KEY: json.dumps(contract)})
    return path


def description(model: D2Zero, notes: dict[str, Any] | None = None) -> dict[str, Any]:
    """What a checkpoint says of its model beside the arrays, as plain data."""
    vocabulary = model.vocabulary
    return {
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


def load_model(path: str | os.PathLike[str], device: str | torch.device = "cpu") -> D2Zero:
    """Load a checkpoint as a model in evaluation mode.

    Args:
        path: A `.safetensors` file, a run's `last.pt`, or its folder (see `checkpoint_file`).
        device: Where the model shall be.

    Raises:
        D2ZeroError: The file is absent, damaged, of a newer version, or no checkpoint of ours.
    """
    path = checkpoint_file(path)
    described, arrays = _read(path)
    try:
        config = ModelConfig.from_dict(described.config)
        vocabulary = _vocabulary(described.vocabulary, arrays)
        _require_layers(config, arrays)
        model = build_exactly(config, vocabulary, arrays)
    except D2ZeroError as error:
        raise D2ZeroError(f"{path}: {error}") from error
    model.checkpoint = file_hash(path)
    return model.eval().to(device)


def load_vocabulary(path: str | os.PathLike[str]) -> Vocabulary:
    """The classes of a checkpoint, without its model.

    Args:
        path: As for `load_model`.

    Raises:
        D2ZeroError: The file is absent, damaged, of a newer version, or no checkpoint of ours.
    """
    path = checkpoint_file(path)
    described, arrays = _read(path)
    try:
        return _vocabulary(described.vocabulary, arrays)
    except D2ZeroError as error:
        raise D2ZeroError(f"{path}: {error}") from error


def _vocabulary(words: "_Words", arrays: dict[str, torch.Tensor]) -> Vocabulary:
    if "class_embeddings" not in arrays:
        raise D2ZeroError("it lacks the class embeddings")
    return Vocabulary(
        names=words.names,
        embeddings=arrays["class_embeddings"].float().numpy(),
        seen=np.array(words.seen, bool),
        active=np.array(words.active, bool),
        source=words.source,
        synonyms=words.synonyms,
    )


def _require_layers(config: ModelConfig, arrays: dict[str, torch.Tensor]) -> None:
    """Refuse more layers than arrays, before any are made.

    Raises:
        D2ZeroError: There are more.
    """
    layers = config.encoder_layers + config.decoder_layers + config.adaptation_layers
    if layers > len(arrays):
        raise D2ZeroError(f"it describes {layers} layers and holds {len(arrays)} arrays; it is damaged")


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
    if path.suffix == ".pt":
        return _read_state(path)
    if path.suffix in (".pth", ".pkl"):
        raise D2ZeroError(
            f"{path} is not a .safetensors checkpoint; turn a published one into it with `d2zero convert`"
        )
    metadata, arrays = read_safetensors(path)
    if _KEY not in metadata:
        raise D2ZeroError(
            f"{path} holds weights but no d2zero model description; turn it into one with `d2zero convert`"
        )
    return _described(metadata[_KEY], path), arrays


def read_safetensors(path: Path) -> tuple[dict[str, str], dict[str, torch.Tensor]]:
    """Metadata and arrays of a `.safetensors` file, anyone's.

    Raises:
        D2ZeroError: It is absent, damaged, or no such file.
    """
    try:
        with safe_open(path, framework="pt") as file:
            return file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no iterator)
    except Exception as error:  # SafetensorError, OSError, torch's and Python's for odd headers
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise D2ZeroError(f"{path} is damaged, cut short, or no .safetensors file: {reason}") from error


def _described(text: str, path: Path) -> _Description:
    where = f"{path}: the model description"
    values = parse_object(text, where)
    refuse_newer(values.get("format_version", 0), FORMAT_VERSION, str(path), "the checkpoint's format")
    return checked(_Description, values, where)


def read_state(path: Path, mmap: bool = False) -> dict[str, Any]:
    """The content of a training run's state, of which nothing is executed.

    Args:
        path: The file.
        mmap: Read arrays only when they are used.

    Raises:
        D2ZeroError: The file is damaged, or no state of a run.
    """
    try:
        state: dict[str, Any] = torch.load(path, "cpu", weights_only=True, mmap=mmap)
    except Exception as error:  # torch raises many kinds on damaged files
        raise D2ZeroError(f"{path} is damaged or cut short: {str(error).splitlines()[0]}") from error
    wanted = {"step", "config", "model", "optimizer", "scaler", "inputs", "bad_files", "pending"}
    missing = wanted - state.keys() if isinstance(state, dict) else wanted
    if missing:
        raise D2ZeroError(
            f"{path} is not the state of a training run of d2zero: it lacks {join_truncated(sorted(missing))};"
            " turn a published checkpoint into .safetensors with `d2zero convert`"
        )
    return state


def _read_state(path: Path) -> tuple[_Description, dict[str, torch.Tensor]]:
    """The model in a run's state, averaged if the run averages it."""
    state = read_state(path)
    if "description" not in state:
        raise D2ZeroError(f"{path} is of an older d2zero, and names no classes; continue its run with --resume first")
    return _described(state["description"], path), state["ema"]["model"] if state.get("ema") else state["model"]
