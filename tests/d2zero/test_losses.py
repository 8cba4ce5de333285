"""The training loss: invariants, edge cases, and the unseen-constrained term."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from d2zero.losses.config import LossConfig
from d2zero.losses.criterion import Criterion
from d2zero.losses.matcher import Targets, match
from d2zero.losses.points import sample, sample_shared, uncertain_points
from d2zero.losses.unseen import draw_pseudo_labels, log_similarity
from d2zero.model import HeadOutput
from d2zero_runtime import D2ZeroError

CONFIG = LossConfig(num_points=400)
TEXT = torch.eye(5, 8)


def squares(*places: tuple[int, int], labels: list[int]) -> Targets:
    masks = torch.zeros(len(places), 64, 64, dtype=torch.bool)
    for mask, (y, x) in zip(masks, places, strict=True):
        mask[y : y + 20, x : x + 24] = True
    return Targets(torch.tensor(labels, dtype=torch.int64), masks)


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
    return HeadOutput(class_logits, mask_logits)


def two_images() -> list[Targets]:
    return [squares((2, 3), (30, 35), labels=[1, 4]), squares((10, 10), labels=[0])]


def test_matching_finds_the_order() -> None:
    targets = two_images()
    head = perfect(targets, [4, 2])
    points = torch.rand(2, 400, 2)
    labels, masks = [target.labels for target in targets], [target.masks.float() for target in targets]
    queries, chosen = match(head.class_logits, head.mask_logits, labels, masks, points, CONFIG)[0]
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
    turned = HeadOutput(class_logits.flip(1), mask_logits.flip(1))
    found = []
    for head in (HeadOutput(class_logits, mask_logits), turned):
        generators = [torch.Generator().manual_seed(s) for s in (1, 2)]
        found.append(Criterion(CONFIG, TEXT)([head], targets, generators))
    for name in found[0]:
        torch.testing.assert_close(found[0][name], found[1][name], atol=2e-2, rtol=2e-2)


def test_images_of_a_batch_add_up() -> None:
    """With generators of their own, two images cost what they cost apart, at the batch's normalisation."""
    targets = two_images()
    generator = torch.Generator().manual_seed(3)
    head = HeadOutput(torch.randn(2, 6, 6, generator=generator), torch.randn(2, 6, 64, 64, generator=generator))

    def loss(rows: list[int]) -> dict[str, float]:
        part = HeadOutput(head.class_logits[rows], head.mask_logits[rows])
        seeds = [torch.Generator().manual_seed(10 + row) for row in rows]
        found = Criterion(CONFIG, TEXT)([part], [targets[row] for row in rows], seeds)
        return {name: float(value) for name, value in found.items()}

    both, first, second = loss([0, 1]), loss([0]), loss([1])
    for name in ("loss_mask", "loss_dice"):
        assert both[name] == pytest.approx((2 * first[name] + 1 * second[name]) / 3, rel=1e-5)


def test_an_image_without_targets_costs_its_classes_alone() -> None:
    empty = Targets(torch.zeros(0, dtype=torch.int64), torch.zeros(0, 64, 64, dtype=torch.bool))
    mask_logits = torch.randn(1, 6, 64, 64, requires_grad=True)
    losses = Criterion(CONFIG, TEXT)([HeadOutput(torch.randn(1, 6, 6), mask_logits)], [empty])
    assert losses["loss_mask"] == 0 and losses["loss_dice"] == 0 and losses["loss_ce"] > 0
    torch.stack(list(losses.values())).sum().backward()
    assert mask_logits.grad is not None and not mask_logits.grad.any()


def test_more_targets_than_queries() -> None:
    targets = squares(*[(i, i) for i in range(9)], labels=[i % 5 for i in range(9)])
    head = HeadOutput(torch.randn(1, 6, 6), torch.randn(1, 6, 64, 64))
    points = torch.rand(1, 50, 2)
    ((queries, chosen),) = match(*head, [targets.labels], [targets.masks.float()], points, CONFIG)
    assert len(queries) == len(chosen) == 6
    assert all(torch.isfinite(value) for value in Criterion(CONFIG, TEXT)([head], [targets]).values())


def test_sampling_is_bilinear_with_zeros_outside() -> None:
    ramp = torch.arange(16.0).view(1, 4, 4)
    points = torch.tensor([[[0.5, 0.5], [0.125, 0.125], [0.0, 0.125]]])
    torch.testing.assert_close(sample(ramp, points)[0], torch.tensor([7.5, 0.0, 0.0]))
    torch.testing.assert_close(sample_shared(ramp[None] + 1, points)[0, 0], torch.tensor([8.5, 1.0, 0.5]))


def test_uncertain_points_lie_where_the_logit_is_near_zero() -> None:
    ramp = torch.linspace(-4, 4, 64).expand(1, 64, 64)
    points = uncertain_points(ramp, [1], 1000, 3.0, 0.75, [torch.Generator().manual_seed(0)])
    assert points.shape == (1, 1000, 2)
    chosen, uniform = points[0, :750, 0], points[0, 750:, 0]
    assert (chosen - 0.5).abs().max() < 0.2 < (uniform - 0.5).abs().max()


def test_pseudo_unseen_labels_follow_the_similarity() -> None:
    seen, unseen = torch.eye(3, 4), torch.tensor([[1.0, 0.2, 0, 0], [0, 1.0, 0.2, 0]])
    table = log_similarity(seen, unseen, 0.2)
    torch.testing.assert_close(table.exp().sum(1), torch.ones(3))
    labels = torch.zeros(20_000, dtype=torch.int64)
    drawn = draw_pseudo_labels(table, [labels], [torch.Generator().manual_seed(0)])
    assert float((drawn == 0).float().mean()) == pytest.approx(float(table[0, 0].exp()), abs=0.01)


def test_unseen_constrained_loss_is_off_by_default_and_pulls_towards_similar_unseen_classes() -> None:
    targets = two_images()
    unseen = torch.nn.functional.normalize(torch.rand(3, 8), dim=-1)
    logits = torch.randn(2, 6, 5 + 3 + 1, requires_grad=True)
    head = HeadOutput(logits, torch.randn(2, 6, 64, 64))
    assert "loss_unseen" not in Criterion(CONFIG, TEXT, unseen)([head], targets)
    losses = Criterion(replace(CONFIG, unseen_weight=0.5), TEXT, unseen)([head], targets)
    losses["loss_unseen"].backward()
    assert losses["loss_unseen"] > 0
    assert logits.grad is not None
    assert logits.grad[..., 5:8].any() and not logits.grad[..., :5].any() and not logits.grad[..., 8].any()
    # The other terms look at seen classes and background alone.
    seen_only = HeadOutput(torch.cat([logits[..., :5], logits[..., 8:]], -1).detach(), head.mask_logits)
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
    head = HeadOutput(logits, perfect(targets, [3]).mask_logits)
    found = Criterion(LossConfig(num_points=100), TEXT)([head], targets)["loss_ce"]
    labels = np.full(6, 5)
    labels[3] = 2
    weight = torch.tensor([1.0] * 5 + [0.1])
    expected = 2 * torch.nn.functional.cross_entropy(logits[0], torch.from_numpy(labels), weight)
    torch.testing.assert_close(found, expected)
