"""Hungarian matching of queries to targets, an image at a time.

Letters: Q queries, K classes without background, T targets of one image, P points.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from d2zero.losses.config import LossConfig
from d2zero.losses.points import sample_shared


@dataclass(frozen=True)
class Targets:
    """What is in one training image.

    Args:
        labels: (T,) int64, indices into the seen classes.
        masks: (T, H, W) bool, H and W the padded image's sides.
    """

    labels: Tensor
    masks: Tensor

    def to(self, device: torch.device) -> "Targets":
        """A copy on another device."""
        return Targets(self.labels.to(device, non_blocking=True), self.masks.to(device, non_blocking=True))

    def pin_memory(self) -> "Targets":
        """A copy in page-locked memory, from which `to` copies while other work goes on."""
        return Targets(self.labels.pin_memory(), self.masks.pin_memory())


@torch.no_grad()
def match(
    class_logits_QK: Tensor, mask_logits_Qhw: Tensor, targets: Targets, points_P2: Tensor, config: LossConfig
) -> tuple[Tensor, Tensor]:
    """The assignment of least cost: class probability, point cross-entropy and dice.

    Args:
        class_logits_QK: (Q, K + 1), the background last.
        mask_logits_Qhw: (Q, h, w).
        targets: T targets.
        points_P2: points (x, y) in 0..1 that all masks of the image share.
        config: the cost's weights.

    Returns:
        queries and targets, int64, min(Q, T) each; pair i is (queries[i], targets[i]).
    """
    probabilities = class_logits_QK.float().softmax(-1)
    class_cost_QT = -probabilities[:, targets.labels]
    logits_QP = sample_shared(mask_logits_Qhw.float(), points_P2)
    truth_TP = sample_shared(targets.masks.float(), points_P2)
    cost_QT = (
        config.class_weight * class_cost_QT
        + config.mask_weight * _bce_cost(logits_QP, truth_TP)
        + config.dice_weight * _dice_cost(logits_QP, truth_TP)
    )
    queries, chosen = linear_sum_assignment(cost_QT.nan_to_num(1e6, 1e6, -1e6).cpu().numpy())
    device = mask_logits_Qhw.device
    return torch.as_tensor(queries, device=device), torch.as_tensor(chosen, device=device)


def _bce_cost(logits_QP: Tensor, truth_TP: Tensor) -> Tensor:
    # bce(x, t) = softplus(x) − x·t
    per_query = F.softplus(logits_QP).sum(1, keepdim=True)
    return (per_query - logits_QP @ truth_TP.T) / logits_QP.shape[1]


def _dice_cost(logits_QP: Tensor, truth_TP: Tensor) -> Tensor:
    probability_QP = logits_QP.sigmoid()
    overlap = 2 * probability_QP @ truth_TP.T
    total = probability_QP.sum(1, keepdim=True) + truth_TP.sum(1)
    return 1 - (overlap + 1) / (total + 1)
