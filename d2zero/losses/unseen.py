"""Unseen-constrained training (D2Zero §3.1; not in the released code).

Matched queries are pulled towards unseen classes that resemble their seen class: a pseudo unseen label is
drawn at every step, likelier the closer the text embeddings are, and a cross-entropy over the unseen
classes alone is added. Neither the temperature nor the weight is published.

Letters: S seen and U unseen classes, D text width, M matched queries.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from d2zero.losses.points import Generators


def log_similarity(seen_SD: Tensor, unseen_UD: Tensor, temperature: float) -> Tensor:
    """Log softmax over the unseen classes of the cosine similarity: (S, U)."""
    cosine = F.normalize(seen_SD, dim=-1) @ F.normalize(unseen_UD, dim=-1).T
    return (cosine / temperature).log_softmax(-1)


def draw_pseudo_labels(log_similarity_SU: Tensor, labels: list[Tensor], generators: Generators) -> Tensor:
    """One unseen class (M,) for each matched query, by the Gumbel-max trick.

    Args:
        log_similarity_SU: of `log_similarity`.
        labels: seen labels of the matched queries, an image each.
        generators: an image each.
    """
    drawn = []
    for image, label in enumerate(labels):
        generator = generators[image] if generators is not None else None
        scores = log_similarity_SU[label]
        uniform = torch.rand(scores.shape, device=scores.device, generator=generator)
        gumbel = -(-uniform.clamp(min=1e-20).log()).clamp(min=1e-20).log()
        drawn.append((scores + gumbel).argmax(-1))
    return torch.cat(drawn)
