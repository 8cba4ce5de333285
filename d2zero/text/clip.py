"""Class embeddings from a CLIP text encoder in torch (open_clip); prompts and averages are the runtime's."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from d2zero_runtime import D2ZeroError, Vocabulary
from d2zero_runtime.errors import join_truncated
from d2zero_runtime.text.prompts import Progress, embed_names


@dataclass(frozen=True, eq=False)
class Clip:
    """A CLIP model of open_clip, in evaluation mode.

    Args:
        name: Its architecture.
        model: Has `encode_text`.
        tokenizer: Makes token ids (P, L) of P texts.
    """

    name: str
    model: Any
    tokenizer: Any

    @property
    def encoder(self) -> str:
        """Its name in vocabularies."""
        return f"clip:{self.name}"

    def encode(self, prompts: Sequence[str]) -> NDArray[np.float32]:
        """Features of texts, (P, D) float32, L2-normalised."""
        with torch.inference_mode():
            features_PD = self.model.encode_text(self.tokenizer(list(prompts))).float()
            normalised: NDArray[np.float32] = torch.nn.functional.normalize(features_PD, dim=-1).numpy()
            return normalised


def load_clip(model: str, weights: Path) -> Clip:
    """Load a CLIP model.

    Args:
        model: An architecture that open_clip knows.
        weights: Its weights; loaded without executing pickled code.

    Raises:
        D2ZeroError: The architecture is unknown, or the weights are absent or do not fit.
    """
    import open_clip

    if model not in open_clip.list_models():
        close = [known for known in open_clip.list_models() if known.lower().startswith(model.lower()[:5])]
        raise D2ZeroError(f"open_clip has no model {model!r}; close names: {join_truncated(close) or 'none'}")
    if not weights.is_file():
        raise D2ZeroError(f"CLIP weights {weights} do not exist")
    try:
        loaded = open_clip.create_model(model, pretrained=str(weights)).eval()
    except Exception as error:  # torch and open_clip raise many kinds
        reason = str(error).strip().splitlines()[0]
        raise D2ZeroError(f"{weights} does not fit {model}, or is damaged: {reason}") from error
    return Clip(model, loaded, open_clip.get_tokenizer(model))


def encode_names(names: list[str], model: str, weights: Path, progress: Progress | None = None) -> Vocabulary:
    """Embed class names with a CLIP model's text encoder.

    Args:
        names: Class names; `a|b` are synonyms, the first of which names the class.
        model: As `load_clip` takes it.
        weights: As `load_clip` takes them.
        progress: Shows how far it has come.

    Raises:
        D2ZeroError: The names cannot be those of a vocabulary, the architecture is unknown, or the weights are absent
            or do not fit.
    """
    clip = load_clip(model, weights)
    return embed_names(names, clip.encode, clip.encoder, progress=progress)
