"""Training augmentation: flips, scale jitter, crop and pad to one size."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as transforms

from d2zero_runtime import D2ZeroError


@dataclass(frozen=True)
class AugmentConfig:
    """How training images are varied. The defaults are the published recipe."""

    size: int = 960  # sides of the training image, a multiple of 32
    scale_range: tuple[float, float] = (0.1, 2.0)  # factor on fitting the image inside `size`; (1, 1) for none
    horizontal_flip: bool = True
    vertical_flip: bool = False
    quarter_turns: bool = False
    pad_value: int = 128  # grey level outside the image

    def __post_init__(self) -> None:
        if self.size < 32 or self.size % 32:
            raise D2ZeroError(f"augment.size must be a multiple of 32, got {self.size}")
        low, high = self.scale_range if len(self.scale_range) == 2 else (0, 0)
        if not 0 < low <= high:
            raise D2ZeroError(f"augment.scale_range must be two rising positive numbers, got {self.scale_range}")


class QuarterTurn(v2.Transform):
    """Turn by 0, 90, 180 or 270 degrees."""

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        """Draw the number of quarter turns."""
        return {"turns": int(torch.randint(4, ()))}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        """Turn an image or masks."""
        if not isinstance(inpt, (tv_tensors.Image, tv_tensors.Mask)):
            return inpt
        return tv_tensors.wrap(torch.rot90(inpt, params["turns"], (-2, -1)), like=inpt)


class JitterOnto(v2.Transform):
    """Scale jitter, then crop at random what is too large and pad right and bottom what is too small.

    One factor f of `scale_range` is drawn and the image is fitted inside (f·size, f·size), keeping its
    aspect, with sizes rounded.
    """

    def __init__(self, size: int, scale_range: tuple[float, float], pad_value: int) -> None:
        super().__init__()
        self.size, self.scale_range, self.pad_value = size, scale_range, pad_value

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        """Draw the factor and the crop."""
        height, width = v2.query_size(flat_inputs)
        low, high = self.scale_range
        factor = low + (high - low) * float(torch.rand(()))
        scale = factor * self.size / max(height, width)
        new_height, new_width = max(1, round(height * scale)), max(1, round(width * scale))
        top = int(torch.rand(()) * (max(0, new_height - self.size) + 1))
        left = int(torch.rand(()) * (max(0, new_width - self.size) + 1))
        return {"size": (new_height, new_width), "top": top, "left": left}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        """Resize, crop and pad an image or masks."""
        is_mask = isinstance(inpt, tv_tensors.Mask)
        if not is_mask and not isinstance(inpt, tv_tensors.Image):
            return inpt
        height, width = params["size"]
        if is_mask:
            return tv_tensors.wrap(self._placed(inpt, params), like=inpt)
        if tuple(inpt.shape[-2:]) != (height, width):
            inpt = transforms.resize(inpt, [height, width], antialias=True)
        kept_height, kept_width = min(height, self.size), min(width, self.size)
        inpt = transforms.crop(inpt, params["top"], params["left"], kept_height, kept_width)
        padding = [0, 0, self.size - kept_width, self.size - kept_height]
        return transforms.pad(inpt, padding, fill=self.pad_value)

    def _placed(self, masks_THW: Tensor, params: dict[str, Any]) -> Tensor:
        """Masks resized, cropped and padded in one step: only pixels that stay are looked up, each along one side.

        The same pixels as torchvision's resize, crop and pad give, at a tenth of their time.
        """
        rows, columns = (
            nearest(before, after)[first : first + self.size]
            for before, after, first in zip(
                masks_THW.shape[-2:], params["size"], (params["top"], params["left"]), strict=True
            )
        )
        masks = masks_THW.numpy()
        if len(rows) > masks.shape[1]:  # columns are the slower ones to pick: of as few rows as there are
            picked = masks.take(columns, axis=2).take(rows, axis=1)
        else:
            picked = masks.take(rows, axis=1).take(columns, axis=2)
        placed = torch.zeros(len(masks), self.size, self.size, dtype=masks_THW.dtype)
        placed[:, : len(rows), : len(columns)] = torch.from_numpy(picked)
        return placed


def nearest(before: int, after: int) -> NDArray[np.int64]:
    """Which of `before` pixels torch's nearest resize takes for each of `after`."""
    places = torch.arange(before, dtype=torch.float32)[None, None]
    picked: NDArray[np.int64] = F.interpolate(places, size=after, mode="nearest")[0, 0].long().numpy()
    return picked


def training_transform(config: AugmentConfig) -> v2.Transform:
    """The augmentation of an image (tv Image, uint8) together with its masks (tv Mask)."""
    steps: list[v2.Transform] = []
    if config.horizontal_flip:
        steps.append(v2.RandomHorizontalFlip())
    if config.vertical_flip:
        steps.append(v2.RandomVerticalFlip())
    if config.quarter_turns:
        steps.append(QuarterTurn())
    steps.append(JitterOnto(config.size, config.scale_range, config.pad_value))
    return v2.Compose(steps)
