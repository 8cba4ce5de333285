"""The training loss: the same three terms at every head, after matching queries to targets.

Normalised over all processes together, so that a batch cut into processes has the loss of the whole
(gradients being averaged over processes).

Letters: B batch, Q queries, S seen and U unseen classes, T targets of the whole batch.
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from d2zero.losses.config import LossConfig
from d2zero.losses.matcher import Targets, match
from d2zero.losses.points import Generators, draw_points, sample, sample_chosen, uncertain_points
from d2zero.losses.unseen import draw_pseudo_labels, log_similarity
from d2zero.model.d2zero import HeadOutput

Losses = dict[str, Tensor]


class Criterion:
    """Losses of all heads by name: `loss_ce`, `loss_mask`, `loss_dice` (the final head), then `…_0` on.

    Args:
        config: weights and sizes.
        seen_SD: text embeddings of the seen classes, in the order of the targets' labels.
        unseen_UD: text embeddings of the unseen classes; needed only for the unseen-constrained loss.
    """

    def __init__(self, config: LossConfig, seen_SD: Tensor, unseen_UD: Tensor | None = None) -> None:
        self.config = config
        self.num_seen = len(seen_SD)
        self.log_similarity_SU = (
            log_similarity(seen_SD, unseen_UD, config.unseen_temperature)
            if config.unseen_weight and unseen_UD is not None
            else None
        )

    def __call__(
        self, heads: Sequence[HeadOutput], targets: Sequence[Targets], generators: Generators = None
    ) -> Losses:
        """Weighted losses, whose sum is to be minimised.

        Args:
            heads: of `D2Zero.forward(all_heads=True)`, the final one last. Class logits are
                (B, Q, S + 1), or (B, Q, S + U + 1) with the unseen-constrained loss.
            targets: B targets.
            generators: B random generators, or None for torch's global one.
        """
        device = heads[0].mask_logits.device
        num_masks = _mean_over_processes(torch.tensor(float(sum(len(t.labels) for t in targets)), device=device))
        masks = [target.masks.float() for target in targets]  # once: every head samples them
        losses: Losses = {}
        with torch.autocast(device.type, enabled=False):
            for index, head in enumerate([heads[-1], *heads[:-1]]):
                suffix = f"_{index - 1}" if index else ""
                terms = self._head_losses(head, targets, masks, num_masks.clamp(min=1), generators)
                losses |= {f"{name}{suffix}": value for name, value in terms.items()}
        return losses

    def _head_losses(
        self,
        head: HeadOutput,
        targets: Sequence[Targets],
        masks: Sequence[Tensor],
        num_masks: Tensor,
        generators: Generators,
    ) -> Losses:
        config = self.config
        class_logits, mask_logits = head.class_logits.float(), head.mask_logits.float()
        background = class_logits[..., -1:]
        seen_logits_BQS = torch.cat([class_logits[..., : self.num_seen], background], dim=-1)
        points_BP2 = draw_points([1] * len(targets), config.num_points, mask_logits.device, generators)
        labels = [target.labels for target in targets]
        pairs = match(seen_logits_BQS, mask_logits, labels, masks, points_BP2, config)
        losses = {"loss_ce": config.class_weight * self._class_loss(seen_logits_BQS, targets, pairs)}
        mask_loss, dice_loss = self._mask_losses(mask_logits, masks, pairs, num_masks, generators)
        losses["loss_mask"] = config.mask_weight * mask_loss
        losses["loss_dice"] = config.dice_weight * dice_loss
        if self.log_similarity_SU is not None:
            unseen_logits_BQU = class_logits[..., self.num_seen : -1]
            loss = self._unseen_loss(unseen_logits_BQU, targets, pairs, num_masks, generators)
            losses["loss_unseen"] = config.unseen_weight * loss
        return losses

    def _class_loss(
        self, logits_BQS: Tensor, targets: Sequence[Targets], pairs: Sequence[tuple[Tensor, Tensor]]
    ) -> Tensor:
        labels_BQ = torch.full(logits_BQS.shape[:2], self.num_seen, device=logits_BQS.device)
        for image, (queries, chosen) in enumerate(pairs):
            labels_BQ[image, queries] = targets[image].labels[chosen]
        weight = torch.ones(self.num_seen + 1, device=logits_BQS.device)
        weight[-1] = self.config.background_weight
        total = F.cross_entropy(logits_BQS.flatten(0, 1), labels_BQ.flatten(), weight, reduction="sum")
        return total / _mean_over_processes(weight[labels_BQ].sum())

    def _mask_losses(
        self,
        mask_logits_BQhw: Tensor,
        masks: Sequence[Tensor],
        pairs: Sequence[tuple[Tensor, Tensor]],
        num_masks: Tensor,
        generators: Generators,
    ) -> tuple[Tensor, Tensor]:
        config = self.config
        counts = [len(queries) for queries, _ in pairs]
        queries_T = torch.cat([queries for queries, _ in pairs])
        images_T = torch.arange(len(pairs)).repeat_interleave(torch.tensor(counts)).to(queries_T.device)
        # One look-up for the batch: of one an image, each would fill a gradient of the whole batch's size.
        predicted_Thw = mask_logits_BQhw[images_T, queries_T]
        if not len(predicted_Thw):
            nothing = 0 * mask_logits_BQhw.sum()
            return nothing, nothing
        points_TP2 = uncertain_points(
            predicted_Thw, counts, config.num_points, config.oversample_ratio, config.importance_ratio, generators
        )
        with torch.no_grad():
            truth_TP = torch.cat(
                [
                    sample_chosen(mask_THW, chosen, points)
                    for mask_THW, (_, chosen), points in zip(masks, pairs, points_TP2.split(counts), strict=True)
                ]
            )
        logits_TP = sample(predicted_Thw, points_TP2)
        bce_T = F.binary_cross_entropy_with_logits(logits_TP, truth_TP, reduction="none").mean(1)
        probability_TP = logits_TP.sigmoid()
        overlap_T = 2 * (probability_TP * truth_TP).sum(1)
        dice_T = 1 - (overlap_T + 1) / (probability_TP.sum(1) + truth_TP.sum(1) + 1)
        return bce_T.sum() / num_masks, dice_T.sum() / num_masks

    def _unseen_loss(
        self,
        logits_BQU: Tensor,
        targets: Sequence[Targets],
        pairs: Sequence[tuple[Tensor, Tensor]],
        num_masks: Tensor,
        generators: Generators,
    ) -> Tensor:
        assert self.log_similarity_SU is not None
        logits_MU = torch.cat([logits_BQU[image, queries] for image, (queries, _) in enumerate(pairs)])
        labels = [t.labels[chosen] for t, (_, chosen) in zip(targets, pairs, strict=True)]
        similarity = self.log_similarity_SU.to(logits_MU.device)
        pseudo_M = draw_pseudo_labels(similarity, labels, generators)
        return F.cross_entropy(logits_MU, pseudo_M, reduction="sum") / num_masks


def _mean_over_processes(value: Tensor) -> Tensor:
    """The mean of a number over all processes; the number itself in a single process."""
    if not (dist.is_available() and dist.is_initialized()):
        return value
    value = value.detach().clone()
    dist.all_reduce(value)
    return value / dist.get_world_size()
