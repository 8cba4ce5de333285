"""Weights and sizes of the training loss, as published."""

import math
from dataclasses import dataclass

from d2zero_runtime import D2ZeroError


@dataclass(frozen=True)
class LossConfig:
    """How predictions are matched to targets and what each part of the loss weighs."""

    class_weight: float = 2.0
    mask_weight: float = 5.0  # binary cross-entropy on sampled points
    dice_weight: float = 5.0
    background_weight: float = 0.1  # of the background class inside the cross-entropy
    num_points: int = 12_544  # points a mask
    oversample_ratio: float = 3.0  # candidates drawn for each point chosen by uncertainty
    importance_ratio: float = 0.75  # share of the points chosen by uncertainty
    unseen_weight: float = 0.0  # λ of the unseen-constrained loss (not published; 0 leaves it out)
    unseen_temperature: float = 0.1  # τ of the similarity of seen to unseen classes (not published)

    def __post_init__(self) -> None:
        for name in ("class_weight", "mask_weight", "dice_weight", "background_weight", "unseen_weight"):
            if not 0 <= getattr(self, name) < math.inf:
                raise D2ZeroError(f"loss.{name} must not be negative, got {getattr(self, name)}")
        if self.num_points < 1:
            raise D2ZeroError(f"loss.num_points must be at least 1, got {self.num_points}")
        if self.oversample_ratio < 1 or not 0 <= self.importance_ratio <= 1:
            raise D2ZeroError(
                "loss.oversample_ratio must be at least 1 and loss.importance_ratio within 0..1,"
                f" got {self.oversample_ratio} and {self.importance_ratio}"
            )
        if self.unseen_temperature <= 0:
            raise D2ZeroError(f"loss.unseen_temperature must be positive, got {self.unseen_temperature}")
