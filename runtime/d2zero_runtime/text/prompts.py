"""Class names as prompts, and the prompts' features as a vocabulary, whatever runs the text encoder.

As published: each prompt's feature is L2-normalised, and so is the mean over the templates; a name with synonyms
(`sofa|couch`, or `, ` as in LVIS) averages over those as well.

Letters: P prompts, K classes, D text width.
"""

import re
from collections.abc import Callable, Collection, Iterator, Sequence
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray

from d2zero_runtime.vocabulary import Vocabulary, check_names

TEMPLATES = (
    "itap of a {}.",
    "a bad photo of the {}.",
    "a origami {}.",
    "a photo of the large {}.",
    "a {} in a video game.",
    "art of the {}.",
    "a photo of the small {}.",
    "A photo of a {} in the scene",
)
BATCH = 16  # prompts per run; larger ones take more memory and, on a CPU, no less time

Encode = Callable[[Sequence[str]], NDArray[np.float32]]  # prompts -> (P, D), L2-normalised
Progress = Callable[[Iterator[Any], int, str], Iterator[Any]]  # shows how far items have come, of how many, and what


def synonyms_of(name: str) -> list[str]:
    """The words for a class, `sofa|couch` or `sofa, couch`; the first names it."""
    return [word.strip() for word in re.split(r"\||, ", name) if word.strip()] or [name]


def class_names(names: Sequence[str]) -> tuple[str, ...]:
    """What classes are called: the first of each one's synonyms.

    Raises:
        D2ZeroError: There are none, or one is empty, given twice, or no text.
    """
    check_names(tuple(names))
    first = tuple(synonyms_of(name)[0] for name in names)
    check_names(first)
    return first


def embed_names(
    names: Sequence[str],
    encode: Encode,
    encoder: str,
    templates: Sequence[str] = TEMPLATES,
    seen: Collection[str] | None = None,
    progress: Progress | None = None,
) -> Vocabulary:
    """A vocabulary of class names, their prompts encoded in batches.

    Args:
        names: Class names; `a|b` are synonyms, the first of which names the class.
        encode: The text encoder.
        encoder: Its name, recorded in the vocabulary.
        templates: Prompts with `{}` for the name.
        seen: Names of classes that training saw, others among them are ignored; all are seen if left out.
        progress: Shows how far it has come.

    Raises:
        D2ZeroError: The names cannot be those of a vocabulary.
    """
    classes = class_names(names)
    prompts = [[text.replace("{}", word) for word in synonyms_of(name) for text in templates] for name in names]
    flat = list(chain.from_iterable(prompts))
    starts: Iterator[int] = iter(range(0, len(flat), BATCH))
    if progress:
        starts = progress(starts, -(-len(flat) // BATCH), "encoding prompts")
    features_PD = np.concatenate([encode(flat[start : start + BATCH]) for start in starts])
    parts = np.split(features_PD, np.cumsum([len(group) for group in prompts])[:-1])
    known = None if seen is None else set(seen)
    return Vocabulary(
        names=classes,
        embeddings=normalised(np.stack([part.mean(axis=0) for part in parts])),
        seen=np.zeros(0, bool) if known is None else np.array([name in known for name in classes]),
        source={"encoder": encoder, "templates": list(templates)},
    )


def normalised(rows: NDArray[np.float32]) -> NDArray[np.float32]:
    """Rows of length 1; a row of zeros stays one."""
    lengths = np.linalg.norm(rows, axis=-1, keepdims=True)
    scaled: NDArray[np.float32] = (rows / np.maximum(lengths, 1e-12)).astype(np.float32)
    return scaled
