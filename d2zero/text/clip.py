"""Class embeddings from a CLIP text encoder (open_clip), averaged over prompt templates.

As published: each template's feature is L2-normalised, their mean is L2-normalised; a name with synonyms
(`sofa|couch`, or `, ` as in LVIS) averages over those as well.
"""

import re
from pathlib import Path

import numpy as np
import torch

from d2zero_runtime import D2ZeroError, Vocabulary
from d2zero_runtime.errors import join_truncated

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


def encode_names(names: list[str], model: str, weights: Path) -> Vocabulary:
    """Embed class names with a CLIP model's text encoder.

    Args:
        names: Class names; `a|b` are synonyms, the first of which names the class.
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
        encoder = open_clip.create_model(model, pretrained=str(weights)).eval()
    except Exception as error:  # torch and open_clip raise many kinds
        reason = str(error).strip().splitlines()[0]
        raise D2ZeroError(f"{weights} does not fit {model}, or is damaged: {reason}") from error
    tokenizer = open_clip.get_tokenizer(model)
    rows = []
    with torch.inference_mode():
        for name in names:
            prompts = [template.format(word) for word in _synonyms(name) for template in TEMPLATES]
            features = torch.nn.functional.normalize(encoder.encode_text(tokenizer(prompts)).float(), dim=-1)
            rows.append(torch.nn.functional.normalize(features.mean(0), dim=-1).numpy())
    return Vocabulary(
        names=tuple(_synonyms(name)[0] for name in names),
        embeddings=np.stack(rows) if rows else np.zeros((0, 0), np.float32),
        source={"encoder": f"clip:{model}", "templates": list(TEMPLATES)},
    )


def _synonyms(name: str) -> list[str]:
    return [word.strip() for word in re.split(r"\||, ", name) if word.strip()] or [name]
