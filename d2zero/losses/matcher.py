"""Hungarian matching of queries to targets, an image at a time.

Letters: B batch, Q queries, K classes without background, T targets of one image, P points.
"""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from d2zero.losses.config import LossConfig
from d2zero.losses.points import sample_shared


@torch.no_grad()
def matching_costs(
    class_logits_BQK: Tensor,
    mask_logits_BQhw: Tensor,
    labels: Sequence[Tensor],
    masks: Sequence[Tensor],
    points_BP2: Tensor,
    config: LossConfig,
) -> list[Tensor]:
    """What pairing each query with each target would cost: class probability, point cross-entropy and dice.

    Args:
        class_logits_BQK: (B, Q, K + 1), the background last.
        mask_logits_BQhw: (B, Q, h, w).
        labels: One tensor per image, the classes of its T targets.
        masks: (T, H, W) float32 of the same, 0 and 1.
        points_BP2: Points (x, y) in 0..1 that all masks of an image share.
        config: The cost's weights.

    Returns:
        For each image (Q, T), on the logits' device.
    """
    probabilities_BQK = class_logits_BQK.float().softmax(-1)
    logits_BQP = sample_shared(mask_logits_BQhw.float(), points_BP2)
    costs = []
    for image, label in enumerate(labels):
        truth_TP = sample_shared(masks[image][None], points_BP2[image][None])[0]
        costs.append(
            config.class_weight * -probabilities_BQK[image][:, label]
            + config.mask_weight * _bce_cost(logits_BQP[image], truth_TP)
            + config.dice_weight * _dice_cost(logits_BQP[image], truth_TP)
        )
    return costs


def assign(costs: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """The assignment of least total cost for each (Q, T) matrix; neither Q nor T need be the same in all.

    All matrices travel to the host together, and all assignments back: one wait for the device.

    Returns:
        For each matrix queries and targets, int64, min(Q, T) each; pair i is (queries[i], targets[i]).
    """
    on_host = torch.cat([cost_QT.flatten() for cost_QT in costs]).nan_to_num(1e6, 1e6, -1e6).cpu()
    parts = on_host.split([cost_QT.numel() for cost_QT in costs])
    pairs = [
        np.stack(linear_sum_assignment(part.view(cost_QT.shape).numpy()))
        for part, cost_QT in zip(parts, costs, strict=True)
    ]
    joined = torch.from_numpy(np.concatenate(pairs, axis=1)).to(costs[0].device)
    found = joined.split([pair.shape[1] for pair in pairs], dim=1)
    return [(pair[0], pair[1]) for pair in found]


def _bce_cost(logits_QP: Tensor, truth_TP: Tensor) -> Tensor:
    # bce(x, t) = softplus(x) − x·t
    per_query = F.softplus(logits_QP).sum(1, keepdim=True)
    return (per_query - logits_QP @ truth_TP.T) / logits_QP.shape[1]


def _dice_cost(logits_QP: Tensor, truth_TP: Tensor) -> Tensor:
    probability_QP = logits_QP.sigmoid()
    overlap = 2 * probability_QP @ truth_TP.T
    total = probability_QP.sum(1, keepdim=True) + truth_TP.sum(1)
    return 1 - (overlap + 1) / (total + 1)
