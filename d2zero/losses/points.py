"""Masks as point samples: losses look at a few thousand points of each mask instead of every pixel.

After PointRend (Kirillov et al. 2020). Coordinates are (x, y) in 0..1 of the padded image.

Letters: T target masks, P points, h and w a mask's sides.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

Generators = Sequence[torch.Generator] | None  # one per image; None is torch's global generator


def draw_points(counts: Sequence[int], points: int, device: torch.device, generators: Generators) -> Tensor:
    """Uniform points (sum(counts), P, 2), each image's rows from its own generator.

    An image's points then depend only on that image, however a batch is cut into processes.
    """
    if generators is None:
        return torch.rand(sum(counts), points, 2, device=device)
    return torch.cat(
        [
            torch.rand(count, points, 2, device=device, generator=generator)
            for count, generator in zip(counts, generators, strict=True)
        ]
    )


def sample(masks_Thw: Tensor, points_TP2: Tensor) -> Tensor:
    """Bilinear values (T, P) of each mask at its own points, zero outside."""
    grid = 2 * points_TP2[:, None] - 1
    return F.grid_sample(masks_Thw[:, None], grid, align_corners=False)[:, 0, 0]


def sample_chosen(masks_Thw: Tensor, chosen_N: Tensor, points_NP2: Tensor) -> Tensor:
    """Bilinear values (N, P) of the masks of these numbers, none twice, each at its own points.

    Where all are chosen the points are put in the masks' order, not the masks in the points': masks are large.
    """
    if len(chosen_N) < len(masks_Thw):
        return sample(masks_Thw[chosen_N], points_NP2)
    return sample(masks_Thw, points_NP2[chosen_N.argsort()])[chosen_N]


def sample_shared(masks_BThw: Tensor, points_BP2: Tensor) -> Tensor:
    """Bilinear values (B, T, P) of all masks of an image at the same points, zero outside."""
    grid = 2 * points_BP2[:, None] - 1
    return F.grid_sample(masks_BThw, grid, align_corners=False)[:, :, 0]


@torch.no_grad()
def uncertain_points(mask_logits_Thw: Tensor, candidates_TC2: Tensor, uniform_TR2: Tensor, points: int) -> Tensor:
    """Points (T, P, 2): the candidates where the sampled logit is nearest to zero, then the R uniform ones.

    Args:
        mask_logits_Thw: (T, h, w).
        candidates_TC2: Points to choose P - R from.
        uniform_TR2: Taken as they are.
        points: P.
    """
    uncertainty = -sample(mask_logits_Thw, candidates_TC2).abs()
    chosen = uncertainty.topk(points - uniform_TR2.shape[1], dim=1).indices
    picked = candidates_TC2.gather(1, chosen[..., None].expand(-1, -1, 2))
    return torch.cat([picked, uniform_TR2], dim=1)
