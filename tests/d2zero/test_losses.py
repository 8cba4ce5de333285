"""The training loss: invariants, edge cases, and the unseen-constrained term."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from d2zero.data.targets import Targets
from d2zero.losses.config import LossConfig
from d2zero.losses.criterion import Criterion, Losses
from d2zero.losses.matcher import assign, matching_costs
from d2zero.losses.points import Generators, sample, sample_shared, uncertain_points
from d2zero.losses.unseen import draw_pseudo_labels, draw_uniform, log_similarity
from d2zero.model import HeadOutput
from d2zero_runtime import D2ZeroError

CONFIG = LossConfig(num_points=400)
TEXT = torch.eye(5, 8)


def squares(*places: tuple[int, int], labels: list[int]) -> Targets:
    masks = torch.zeros(len(places), 64, 64, dtype=torch.bool)
    for mask, (y, x) in zip(masks, places, strict=True):
        mask[y : y + 20, x : x + 24] = True
    return Targets(torch.tensor(labels, dtype=torch.int64), masks)


def head_of(class_logits: Tensor, mask_logits: Tensor) -> HeadOutput:
    """What losses read of a head; they read no features."""
    return HeadOutput(class_logits, mask_logits, torch.empty(0), torch.empty(0))


def perfect(targets: list[Targets], order: list[int], classes: int = 5) -> HeadOutput:
    """Predictions that equal the targets, target i at query order[i]; other queries are background."""
    class_logits = torch.full((len(targets), 6, classes + 1), -20.0)
    class_logits[..., -1] = 20.0
    mask_logits = torch.full((len(targets), 6, 64, 64), -30.0)
    for image, target in enumerate(targets):
        for index, label in enumerate(target.labels):
            class_logits[image, order[index], -1] = -20.0
            class_logits[image, order[index], label] = 20.0
            mask_logits[image, order[index]][target.masks[index]] = 30.0
    return head_of(class_logits, mask_logits)


def two_images() -> list[Targets]:
    return [squares((2, 3), (30, 35), labels=[1, 4]), squares((10, 10), labels=[0])]


def test_matching_finds_the_order() -> None:
    targets = two_images()
    head = perfect(targets, [4, 2])
    points = torch.rand(2, 400, 2)
    labels, masks = [target.labels for target in targets], [target.masks.float() for target in targets]
    costs = matching_costs(head.class_logits, head.mask_logits, labels, masks, points, CONFIG)
    queries, chosen = assign(costs)[0]
    assert dict(zip(chosen.tolist(), queries.tolist(), strict=True)) == {0: 4, 1: 2}


def test_perfect_predictions_cost_next_to_nothing() -> None:
    targets = two_images()
    heads = [perfect(targets, order) for order in ([0, 1], [5, 3], [2, 4])]
    torch.manual_seed(0)
    losses = Criterion(CONFIG, TEXT)(heads, targets)
    assert set(losses) == {f"loss_{kind}{s}" for kind in ("ce", "mask", "dice") for s in ("", "_0", "_1")}
    assert losses["loss_ce"] < 1e-6
    wrong = perfect([squares((40, 3), (3, 40), labels=[2, 2]), squares((40, 40), labels=[3])], [0, 1])
    worse = Criterion(CONFIG, TEXT)([wrong], targets)
    assert worse["loss_ce"] > 10
    for name in ("loss_mask", "loss_dice"):  # points on an edge cost a little even so
        assert losses[name] < worse[name] / 10


def test_the_order_of_queries_does_not_matter() -> None:
    targets = two_images()
    generator = torch.Generator().manual_seed(3)
    class_logits = torch.randn(2, 6, 6, generator=generator)
    mask_logits = torch.randn(2, 6, 64, 64, generator=generator)
    turned = head_of(class_logits.flip(1), mask_logits.flip(1))
    found = []
    for head in (head_of(class_logits, mask_logits), turned):
        generators = [torch.Generator().manual_seed(s) for s in (1, 2)]
        found.append(Criterion(CONFIG, TEXT)([head], targets, generators))
    for name in found[0]:
        torch.testing.assert_close(found[0][name], found[1][name], atol=2e-2, rtol=2e-2)


def test_images_of_a_batch_add_up() -> None:
    """With generators of their own, two images cost what they cost apart, at the batch's normalisation."""
    targets = two_images()
    generator = torch.Generator().manual_seed(3)
    head = head_of(torch.randn(2, 6, 6, generator=generator), torch.randn(2, 6, 64, 64, generator=generator))

    def loss(rows: list[int]) -> dict[str, float]:
        part = head_of(head.class_logits[rows], head.mask_logits[rows])
        seeds = [torch.Generator().manual_seed(10 + row) for row in rows]
        found = Criterion(CONFIG, TEXT)([part], [targets[row] for row in rows], seeds)
        return {name: float(value) for name, value in found.items()}

    both, first, second = loss([0, 1]), loss([0]), loss([1])
    for name in ("loss_mask", "loss_dice"):
        assert both[name] == pytest.approx((2 * first[name] + 1 * second[name]) / 3, rel=1e-5)


def test_an_image_without_targets_costs_its_classes_alone() -> None:
    empty = Targets(torch.zeros(0, dtype=torch.int64), torch.zeros(0, 64, 64, dtype=torch.bool))
    mask_logits = torch.randn(1, 6, 64, 64, requires_grad=True)
    losses = Criterion(CONFIG, TEXT)([head_of(torch.randn(1, 6, 6), mask_logits)], [empty])
    assert losses["loss_mask"] == 0 and losses["loss_dice"] == 0 and losses["loss_ce"] > 0
    torch.stack(list(losses.values())).sum().backward()
    assert mask_logits.grad is not None and not mask_logits.grad.any()


def test_more_targets_than_queries() -> None:
    targets = squares(*[(i, i) for i in range(9)], labels=[i % 5 for i in range(9)])
    head = head_of(torch.randn(1, 6, 6), torch.randn(1, 6, 64, 64))
    points = torch.rand(1, 50, 2)
    costs = matching_costs(*head[:2], [targets.labels], [targets.masks.float()], points, CONFIG)
    ((queries, chosen),) = assign(costs)
    assert len(queries) == len(chosen) == 6
    assert all(torch.isfinite(value) for value in Criterion(CONFIG, TEXT)([head], [targets]).values())


def test_sampling_is_bilinear_with_zeros_outside() -> None:
    ramp = torch.arange(16.0).view(1, 4, 4)
    points = torch.tensor([[[0.5, 0.5], [0.125, 0.125], [0.0, 0.125]]])
    torch.testing.assert_close(sample(ramp, points)[0], torch.tensor([7.5, 0.0, 0.0]))
    torch.testing.assert_close(sample_shared(ramp[None] + 1, points)[0, 0], torch.tensor([8.5, 1.0, 0.5]))


def test_uncertain_points_lie_where_the_logit_is_near_zero() -> None:
    ramp = torch.linspace(-4, 4, 64).expand(1, 64, 64)
    generator = torch.Generator().manual_seed(0)
    candidates, rest = (torch.rand(1, count, 2, generator=generator) for count in (3000, 250))
    points = uncertain_points(ramp, candidates, rest, 1000)
    assert points.shape == (1, 1000, 2)
    chosen, uniform = points[0, :750, 0], points[0, 750:, 0]
    assert (chosen - 0.5).abs().max() < 0.2 < (uniform - 0.5).abs().max()


def test_pseudo_unseen_labels_follow_the_similarity() -> None:
    seen, unseen = torch.eye(3, 4), torch.tensor([[1.0, 0.2, 0, 0], [0, 1.0, 0.2, 0]])
    table = log_similarity(seen, unseen, 0.2)
    torch.testing.assert_close(table.exp().sum(1), torch.ones(3))
    labels = torch.zeros(20_000, dtype=torch.int64)
    uniform = draw_uniform([20_000], 2, torch.device("cpu"), [torch.Generator().manual_seed(0)])
    drawn = draw_pseudo_labels(table, labels, uniform)
    assert float((drawn == 0).float().mean()) == pytest.approx(float(table[0, 0].exp()), abs=0.01)


def test_unseen_constrained_loss_is_off_by_default_and_pulls_towards_similar_unseen_classes() -> None:
    targets = two_images()
    unseen = F.normalize(torch.rand(3, 8), dim=-1)
    logits = torch.randn(2, 6, 5 + 3 + 1, requires_grad=True)
    head = head_of(logits, torch.randn(2, 6, 64, 64))
    assert "loss_unseen" not in Criterion(CONFIG, TEXT, unseen)([head], targets)
    losses = Criterion(replace(CONFIG, unseen_weight=0.5), TEXT, unseen)([head], targets)
    losses["loss_unseen"].backward()
    assert losses["loss_unseen"] > 0
    assert logits.grad is not None
    assert logits.grad[..., 5:8].any() and not logits.grad[..., :5].any() and not logits.grad[..., 8].any()
    # The other terms look only at seen classes and background.
    seen_only = head_of(torch.cat([logits[..., :5], logits[..., 8:]], -1).detach(), head.mask_logits)
    seeds = [[torch.Generator().manual_seed(s) for s in (1, 2)] for _ in range(2)]
    with_unseen = Criterion(replace(CONFIG, unseen_weight=0.5), TEXT, unseen)([head], targets, seeds[0])
    without = Criterion(CONFIG, TEXT)([seen_only], targets, seeds[1])
    torch.testing.assert_close(with_unseen["loss_ce"], without["loss_ce"])
    torch.testing.assert_close(with_unseen["loss_mask"], without["loss_mask"])


@pytest.mark.parametrize(
    "change", [{"num_points": 0}, {"oversample_ratio": 0.5}, {"importance_ratio": 2}, {"unseen_temperature": 0}]
)
def test_impossible_settings_are_refused(change: dict) -> None:
    with pytest.raises(D2ZeroError, match=next(iter(change))):
        replace(CONFIG, **change)


def test_background_weighs_a_tenth() -> None:
    """One matched query and five background ones: the mean is weighted, as cross-entropy with weights is."""
    targets = [squares((10, 10), labels=[2])]
    logits = torch.randn(1, 6, 6)
    head = head_of(logits, perfect(targets, [3]).mask_logits)
    found = Criterion(LossConfig(num_points=100), TEXT)([head], targets)["loss_ce"]
    labels = np.full(6, 5)
    labels[3] = 2
    weight = torch.tensor([1.0] * 5 + [0.1])
    expected = 2 * F.cross_entropy(logits[0], torch.from_numpy(labels), weight)
    torch.testing.assert_close(found, expected)


def rows(counts: Sequence[int], *shape: int, generators: Generators) -> list[Tensor]:
    """Each image's random draws, from its own generator or out of one draw of the global one."""
    if generators is None:
        return list(torch.rand(sum(counts), *shape).split(list(counts)))
    return [torch.rand(count, *shape, generator=g) for count, g in zip(counts, generators, strict=True)]


def sampled(masks: Tensor, points: Tensor) -> Tensor:
    return F.grid_sample(masks[:, None], 2 * points[:, None] - 1, align_corners=False)[:, 0, 0]


def matched(head: HeadOutput, image: int, target: Targets, points: Tensor, config: LossConfig) -> tuple[Tensor, Tensor]:
    """The pairs of one image, every term of the cost written out."""
    with torch.no_grad():
        logits = sampled(head.mask_logits[image], points.expand(len(head.mask_logits[image]), -1, -1))[:, None]
        truth = sampled(target.masks.float(), points.expand(len(target.masks), -1, -1))[None].expand(
            len(logits), -1, -1
        )
        bce = F.binary_cross_entropy_with_logits(logits.expand_as(truth), truth, reduction="none").mean(2)
        p = logits.sigmoid()
        dice = 1 - (2 * (p * truth).sum(2) + 1) / (p.sum(2) + truth.sum(2) + 1)
        scores = torch.cat([head.class_logits[image][:, :5], head.class_logits[image][:, -1:]], 1).softmax(1)
        cost = -config.class_weight * scores[:, target.labels] + config.mask_weight * bce + config.dice_weight * dice
    queries, chosen = linear_sum_assignment(cost.numpy())
    return torch.from_numpy(queries), torch.from_numpy(chosen)


def head_by_head(
    config: LossConfig, unseen: Tensor, heads: list[HeadOutput], targets: list[Targets], generators: Generators
) -> Losses:
    """The loss as defined: each head draws, is matched and has its losses before the next begins."""
    losses, images = {}, range(len(targets))
    num_masks = max(1, sum(len(target.labels) for target in targets))
    important = int(config.num_points * config.importance_ratio)
    for index, head in enumerate([heads[-1], *heads[:-1]]):
        suffix = f"_{index - 1}" if index else ""
        places = rows([1 for _ in images], config.num_points, 2, generators=generators)
        pairs = [matched(head, i, targets[i], places[i], config) for i in images]
        counts = [len(queries) for queries, _ in pairs]
        labels = torch.full(head.class_logits.shape[:2], 5)
        for i, (queries, chosen) in enumerate(pairs):
            labels[i, queries] = targets[i].labels[chosen]
        weight = torch.tensor([1.0] * 5 + [config.background_weight])
        logits = torch.cat([head.class_logits[..., :5], head.class_logits[..., -1:]], -1)
        ce = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), weight, reduction="sum")
        losses[f"loss_ce{suffix}"] = config.class_weight * (ce / weight[labels].sum())

        predicted = torch.stack([head.mask_logits[i, q] for i in images for q in pairs[i][0]])
        truth = torch.cat([targets[i].masks[pairs[i][1]].float() for i in images])
        wanted = int(config.num_points * config.oversample_ratio)
        candidates = torch.cat(rows(counts, wanted, 2, generators=generators))
        chosen = (-sampled(predicted, candidates).abs()).topk(important, dim=1).indices
        rest = torch.cat(rows(counts, config.num_points - important, 2, generators=generators))
        points = torch.cat([candidates.gather(1, chosen[..., None].expand(-1, -1, 2)), rest], 1).detach()
        x, t = sampled(predicted, points), sampled(truth, points)
        p, bce = x.sigmoid(), F.binary_cross_entropy_with_logits(x, t, reduction="none").mean(1)
        dice = 1 - (2 * (p * t).sum(1) + 1) / (p.sum(1) + t.sum(1) + 1)
        losses[f"loss_mask{suffix}"] = config.mask_weight * (bce.sum() / num_masks)
        losses[f"loss_dice{suffix}"] = config.dice_weight * (dice.sum() / num_masks)

        if config.unseen_weight:
            table = log_similarity(TEXT, unseen, config.unseen_temperature)
            pseudo = []
            for i in images:
                uniform = torch.rand(counts[i], len(unseen), generator=generators[i] if generators else None)
                scores = table[targets[i].labels[pairs[i][1]]]
                pseudo.append((scores - (-uniform.clamp(min=1e-20).log()).clamp(min=1e-20).log()).argmax(-1))
            logits = torch.cat([head.class_logits[i, pairs[i][0], 5:-1] for i in images])
            loss = F.cross_entropy(logits, torch.cat(pseudo), reduction="sum") / num_masks
            losses[f"loss_unseen{suffix}"] = config.unseen_weight * loss
    return losses


@pytest.mark.parametrize("unseen_weight", [0.0, 0.5])
@pytest.mark.parametrize("own_generators", [True, False])
def test_heads_matched_together_equal_heads_one_by_one(own_generators: bool, unseen_weight: float) -> None:
    """Bit by bit, gradients and what is left of the generators too; images of two, of no and of too many targets."""
    config = replace(CONFIG, unseen_weight=unseen_weight)
    generator = torch.Generator().manual_seed(5)
    unseen = torch.rand(3, 8, generator=generator)
    none = Targets(torch.zeros(0, dtype=torch.int64), torch.zeros(0, 64, 64, dtype=torch.bool))
    crowd = squares(*[(4 * i, 3 * i) for i in range(9)], labels=[i % 5 for i in range(9)])
    targets = [two_images()[0], none, crowd]
    values = [
        (
            torch.randn(3, 6, 5 + 3 * bool(unseen_weight) + 1, generator=generator),
            torch.randn(3, 6, 16, 16, generator=generator),
        )
        for _ in range(3)
    ]
    found = []
    for loss in (Criterion(config, TEXT, unseen), lambda *given: head_by_head(config, unseen, *given)):
        torch.manual_seed(7)
        generators = [torch.Generator().manual_seed(seed) for seed in (1, 2, 3)] if own_generators else None
        heads = [head_of(*(tensor.clone().requires_grad_() for tensor in pair)) for pair in values]
        losses = loss(heads, targets, generators)
        torch.stack(list(losses.values())).sum().backward()
        drawn_from: Sequence[torch.Generator | None] = generators or [None]
        left = [torch.rand(4, generator=g) for g in drawn_from]
        found.append((losses, [tensor.grad for head in heads for tensor in head[:2]], left))
    (ours, our_gradients, our_rest), (expected, gradients, rest) = found
    assert list(ours) == list(expected)
    assert all(torch.equal(ours[name], value) for name, value in expected.items())
    for mine, theirs in zip([*our_gradients, *our_rest], [*gradients, *rest], strict=True):
        assert mine is not None and theirs is not None and torch.equal(mine, theirs) and theirs.any()
