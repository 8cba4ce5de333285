"""Vocabularies from arrays of embeddings and lists of names."""

import json
from pathlib import Path

import numpy as np

from d2zero.data.splits import COCO_IDS
from d2zero_runtime import D2ZeroError, Vocabulary
from d2zero_runtime.vocabulary import damage


def read_names(text: str) -> list[str]:
    """Names from a `.txt` file (one per line), a `.json` list, `a, b, c`, or `coco` for COCO's 80.

    Raises:
        D2ZeroError: The file is absent or holds no names.
    """
    if text == "coco":
        return list(COCO_IDS)
    path = Path(text)
    if path.suffix not in (".txt", ".json"):
        return [name.strip() for name in text.split(",") if name.strip()]
    if not path.is_file():
        raise D2ZeroError(f"file of names {path} does not exist")
    try:
        text = path.read_text(encoding="utf-8-sig")
        if path.suffix == ".txt":
            return [line.strip() for line in text.splitlines() if line.strip()]
        names = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise D2ZeroError(f"{path} is not UTF-8 text, or not JSON: {error}") from error
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise D2ZeroError(f"{path} must be a JSON list of names")
    return names


def read_array(path: Path, names: list[str], encoder: str = "") -> Vocabulary:
    """A vocabulary from a `.npy` file (K, D).

    Raises:
        D2ZeroError: The file is absent or no array, or its rows do not match the names.
    """
    if not path.is_file():
        raise D2ZeroError(f"embedding file {path} does not exist")
    try:
        array = np.load(path, allow_pickle=False)
    except Exception as error:  # NumPy's, of many kinds, for a damaged file
        raise D2ZeroError(f"{path} is not a NumPy array of numbers (.npy), or is damaged: {damage(error)}") from error
    if not isinstance(array, np.ndarray) or array.ndim != 2 or array.dtype.kind not in "fiu":
        raise D2ZeroError(f"{path} must hold one (K, D) array of numbers, got shape {np.shape(array)}")
    if len(array) != len(names):
        raise D2ZeroError(
            f"{path} has {len(array)} rows, but {len(names)} names were given (names with commas need a .txt or .json"
            " file)"
        )
    return Vocabulary(tuple(names), array.astype(np.float32), source={"encoder": encoder} if encoder else {})
