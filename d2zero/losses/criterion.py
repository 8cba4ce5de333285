"""The training loss: the same three terms at every head, after matching queries to targets.

All random numbers are drawn first, so that the heads can be matched together, with one wait for the device.
Normalised over all processes together, so that a batch cut into processes has the loss of the whole
(gradients being averaged over processes).

Letters: B batch, Q queries, S seen and U unseen classes, M matched queries of the whole batch, P points.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from d2zero.data.targets import Targets
from d2zero.losses.config import LossConfig
from d2zero.losses.matcher import assign, matching_costs
from d2zero.losses.points import Generators, draw_points, sample, sample_chosen, uncertain_points
from d2zero.losses.unseen import draw_pseudo_labels, draw_uniform, log_similarity
from d2zero.model.d2zero import HeadOutput

Losses = dict[str, Tensor]
Pairs = Sequence[tuple[Tensor, Tensor]]  # of each image: queries, and the targets that they are matched to


@dataclass(frozen=True)
class Draws:
    """The random numbers of one head, uniform in 0..1. M counts the pairs: min(Q, T) in each image."""

    matching_BP2: Tensor  # points at which masks are compared to match them
    candidates_MC2: Tensor  # points of the mask losses to choose the uncertain ones from
    uniform_MR2: Tensor  # the other points of the mask losses
    pseudo_MU: Tensor | None  # for the pseudo labels of the unseen-constrained loss


class Criterion:
    """Losses of all heads by name: `loss_ce`, `loss_mask`, `loss_dice` (the final head), then `…_0` on.

    Args:
        config: Weights and sizes.
        seen_SD: Text embeddings of the seen classes, in the order of the targets' labels.
        unseen_UD: Text embeddings of the unseen classes; needed only for the unseen-constrained loss.
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
            heads: Outputs of `D2Zero.forward(all_heads=True)`, the final one last. Class logits are
                (B, Q, S + 1), or (B, Q, S + U + 1) with the unseen-constrained loss.
            targets: B targets.
            generators: B random generators, or None for torch's global one.
        """
        device = heads[0].mask_logits.device
        num_masks = _mean_over_processes(torch.tensor(float(sum(len(t.labels) for t in targets)), device=device))
        masks = [target.masks.float() for target in targets]  # once: every head samples them
        heads = [heads[-1], *heads[:-1]]
        num_pairs = [min(heads[0].class_logits.shape[1], len(target.labels)) for target in targets]
        draws = deque(self._draw(num_pairs, device, generators) for _ in heads)
        losses: Losses = {}
        with torch.autocast(device.type, enabled=False):
            pairs = self._match(heads, targets, masks, [drawn.matching_BP2 for drawn in draws])
            for index, head in enumerate(heads):
                suffix = f"_{index - 1}" if index else ""
                drawn = draws.popleft()  # so that it is freed: the candidates of all heads are large
                terms = self._head_losses(head, targets, masks, pairs[index], num_masks.clamp(min=1), drawn)
                losses |= {f"{name}{suffix}": value for name, value in terms.items()}
        return losses

    def _draw(self, num_pairs: Sequence[int], device: torch.device, generators: Generators) -> Draws:
        config = self.config
        important = int(config.num_points * config.importance_ratio)
        matching = draw_points([1] * len(num_pairs), config.num_points, device, generators)
        candidates = draw_points(num_pairs, int(config.num_points * config.oversample_ratio), device, generators)
        uniform = draw_points(num_pairs, config.num_points - important, device, generators)
        table = self.log_similarity_SU
        pseudo = None if table is None else draw_uniform(num_pairs, table.shape[1], device, generators)
        return Draws(matching, candidates, uniform, pseudo)

    @torch.no_grad()
    def _match(
        self,
        heads: Sequence[HeadOutput],
        targets: Sequence[Targets],
        masks: Sequence[Tensor],
        points: Sequence[Tensor],
    ) -> list[Pairs]:
        """The pairs of each head."""
        labels = [target.labels for target in targets]
        costs: list[Tensor] = []
        for head, points_BP2 in zip(heads, points, strict=True):
            costs += matching_costs(self._seen_logits(head), head.mask_logits, labels, masks, points_BP2, self.config)
        pairs, images = assign(costs), len(targets)
        return [pairs[start : start + images] for start in range(0, len(pairs), images)]

    def _seen_logits(self, head: HeadOutput) -> Tensor:
        """Class logits (B, Q, S + 1) without those of unseen classes."""
        class_logits = head.class_logits.float()
        return torch.cat([class_logits[..., : self.num_seen], class_logits[..., -1:]], dim=-1)

    def _head_losses(
        self,
        head: HeadOutput,
        targets: Sequence[Targets],
        masks: Sequence[Tensor],
        pairs: Pairs,
        num_masks: Tensor,
        draws: Draws,
    ) -> Losses:
        config = self.config
        losses = {"loss_ce": config.class_weight * self._class_loss(self._seen_logits(head), targets, pairs)}
        mask_loss, dice_loss = self._mask_losses(head.mask_logits.float(), masks, pairs, num_masks, draws)
        losses["loss_mask"] = config.mask_weight * mask_loss
        losses["loss_dice"] = config.dice_weight * dice_loss
        if draws.pseudo_MU is not None:
            unseen_logits_BQU = head.class_logits[..., self.num_seen : -1].float()
            loss = self._unseen_loss(unseen_logits_BQU, targets, pairs, num_masks, draws.pseudo_MU)
            losses["loss_unseen"] = config.unseen_weight * loss
        return losses

    def _class_loss(self, logits_BQS: Tensor, targets: Sequence[Targets], pairs: Pairs) -> Tensor:
        labels_BQ = torch.full(logits_BQS.shape[:2], self.num_seen, device=logits_BQS.device)
        for image, (queries, chosen) in enumerate(pairs):
            labels_BQ[image, queries] = targets[image].labels[chosen]
        weight = torch.ones(self.num_seen + 1, device=logits_BQS.device)
        weight[-1] = self.config.background_weight
        total = F.cross_entropy(logits_BQS.flatten(0, 1), labels_BQ.flatten(), weight, reduction="sum")
        return total / _mean_over_processes(weight[labels_BQ].sum())

    def _mask_losses(
        self, mask_logits_BQhw: Tensor, masks: Sequence[Tensor], pairs: Pairs, num_masks: Tensor, draws: Draws
    ) -> tuple[Tensor, Tensor]:
        queries_M = torch.cat([queries for queries, _ in pairs])
        images_M = torch.cat([torch.full_like(queries, image) for image, (queries, _) in enumerate(pairs)])
        # One look-up for the batch: with one per image, each would fill a gradient of the whole batch's size.
        predicted_Mhw = mask_logits_BQhw[images_M, queries_M]
        if not len(predicted_Mhw):
            nothing = 0 * mask_logits_BQhw.sum()
            return nothing, nothing
        counts = [len(queries) for queries, _ in pairs]
        points_MP2 = uncertain_points(predicted_Mhw, draws.candidates_MC2, draws.uniform_MR2, self.config.num_points)
        with torch.no_grad():
            truth_MP = torch.cat(
                [
                    sample_chosen(mask_THW, chosen, points)
                    for mask_THW, (_, chosen), points in zip(masks, pairs, points_MP2.split(counts), strict=True)
                ]
            )
        logits_MP = sample(predicted_Mhw, points_MP2)
        bce_M = F.binary_cross_entropy_with_logits(logits_MP, truth_MP, reduction="none").mean(1)
        probability_MP = logits_MP.sigmoid()
        overlap_M = 2 * (probability_MP * truth_MP).sum(1)
        dice_M = 1 - (overlap_M + 1) / (probability_MP.sum(1) + truth_MP.sum(1) + 1)
        return bce_M.sum() / num_masks, dice_M.sum() / num_masks

    def _unseen_loss(
        self, logits_BQU: Tensor, targets: Sequence[Targets], pairs: Pairs, num_masks: Tensor, uniform_MU: Tensor
    ) -> Tensor:
        assert self.log_similarity_SU is not None
        logits_MU = torch.cat([logits_BQU[image, queries] for image, (queries, _) in enumerate(pairs)])
        labels_M = torch.cat([target.labels[chosen] for target, (_, chosen) in zip(targets, pairs, strict=True)])
        pseudo_M = draw_pseudo_labels(self.log_similarity_SU.to(logits_MU.device), labels_M, uniform_MU)
        return F.cross_entropy(logits_MU, pseudo_M, reduction="sum") / num_masks


def _mean_over_processes(value: Tensor) -> Tensor:
    """The mean of a number over all processes; the number itself in a single process."""
    if not (dist.is_available() and dist.is_initialized()):
        return value
    value = value.detach().clone()
    dist.all_reduce(value)
    return value / dist.get_world_size()
