"""Group norm as sums in stages, for runtimes that add up a group's elements one after the other.

At 800×1216 a group of the mask features has 486 400 elements. Added up one by one in float32, as ONNX Runtime and
OpenVINO do, their mean is off by up to 1e-3 of their spread where much of the image is padding, and attention masks
flip bits (docs/decisions/0013). Lines first, then lines of lines, costs no more and is as exact as torch.

Letters: B batch, C channels, G groups, N channels of a group.
"""

from itertools import pairwise

import torch
from torch import Tensor, nn

_TAKEN_AWAY = 0.01  # little beside what is normalised, and not rounded to 0 with the scales of eight bits


class StagedGroupNorm(nn.Module):
    """`torch.nn.GroupNorm` of maps (B, C, H, W), equal in real arithmetic.

    Args:
        norm: The norm whose weights it takes.
    """

    def __init__(self, norm: nn.GroupNorm) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, maps_BCHW: Tensor) -> Tensor:
        """Normalise."""
        norm = self.norm
        lines = maps_BCHW.mean(3), torch.linalg.vector_norm(maps_BCHW, dim=3).square() / maps_BCHW.shape[3]
        mean_BG1, square_BG1 = (self._by_group(means_BCH.mean(2)).mean(2, keepdim=True) for means_BCH in lines)
        variance_BG1 = (square_BG1 - mean_BG1.square()).clamp(min=0)
        scale_BGN = self._by_group(norm.weight) / (variance_BG1 + norm.eps).sqrt()
        shift_BGN = self._by_group(norm.bias) - mean_BG1 * scale_BGN
        scale, shift = (part.flatten(1)[:, :, None, None] for part in (scale_BGN, shift_BGN))
        output: Tensor = maps_BCHW * scale + shift
        return output

    def _by_group(self, values: Tensor) -> Tensor:
        """(…, C) as (…, G, N)."""
        grouped: Tensor = values.unflatten(-1, (self.norm.num_groups, -1))
        return grouped


def in_stages(module: nn.Module) -> int:
    """Let all group norms of a module work so; in place.

    Convolutions before them that have no bias get one, the same for all channels: the norm takes it away again. In
    eight bits and with dynamic shapes, OpenVINO 2026.4 scales twice what several read of a convolution without a bias.

    Returns:
        How many norms there are.
    """
    pairs = [pair for part in module.modules() if isinstance(part, nn.Sequential) for pair in pairwise(part)]
    for convolution, norm in pairs:
        if isinstance(norm, nn.GroupNorm) and isinstance(convolution, nn.Conv2d) and convolution.bias is None:
            bias = torch.full((norm.num_channels,), _TAKEN_AWAY, device=norm.weight.device, dtype=norm.weight.dtype)
            convolution.bias = nn.Parameter(bias, requires_grad=False)
    found = [(name, part) for name, part in module.named_modules() if isinstance(part, nn.GroupNorm)]
    for name, norm in found:
        module.set_submodule(name, StagedGroupNorm(norm))
    return len(found)
