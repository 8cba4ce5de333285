"""What training looks for in an image: labels and masks."""

from dataclasses import dataclass

import torch
from torch import Tensor


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
