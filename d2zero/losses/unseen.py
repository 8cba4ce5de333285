"""Unseen-constrained training (D2Zero §3.1; not in the released code).

Matched queries are pulled towards unseen classes that resemble their seen class: a pseudo unseen label is
drawn at every step, likelier the closer the text embeddings are, and a cross-entropy over the unseen
classes only is added. Neither the temperature nor the weight is published.

Letters: S seen and U unseen classes, D text width, M matched queries.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from d2zero.losses.points import Generators


def log_similarity(seen_SD: Tensor, unseen_UD: Tensor, temperature: float) -> Tensor:
    """Log softmax over the unseen classes of the cosine similarity: (S, U)."""
    cosine = F.normalize(seen_SD, dim=-1) @ F.normalize(unseen_UD, dim=-1).T
    return (cosine / temperature).log_softmax(-1)


def draw_uniform(counts: Sequence[int], classes: int, device: torch.device, generators: Generators) -> Tensor:
    """Uniform numbers (sum(counts), classes), each image's rows a draw of their own."""
    sources = [None] * len(counts) if generators is None else generators
    return torch.cat(
        [
            torch.rand(count, classes, device=device, generator=generator)
            for count, generator in zip(counts, sources, strict=True)
        ]
    )


def draw_pseudo_labels(log_similarity_SU: Tensor, labels_M: Tensor, uniform_MU: Tensor) -> Tensor:
    """One unseen class (M,) for each matched query, by the Gumbel-max trick.

    Args:
        log_similarity_SU: The result of `log_similarity`.
        labels_M: Seen labels of the matched queries.
        uniform_MU: The result of `draw_uniform`.
    """
    gumbel_MU = -(-uniform_MU.clamp(min=1e-20).log()).clamp(min=1e-20).log()
    return (log_similarity_SU[labels_M] + gumbel_MU).argmax(-1)
