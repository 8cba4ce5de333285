"""Swin's shifted windows at any image size, as the original has them.

timm shifts a map first and then pads it to whole windows; the original, Mask2Former and transformers pad first. The
two agree only where a stage's sides are multiples of the window.

Letters: B batch, H and W a stage's sides, C channels.
"""

import torch.nn.functional as F
from timm.models.swin_transformer import SwinTransformerBlock
from torch import Tensor, nn


class PaddedBlock(SwinTransformerBlock):
    """timm's block on a map that is padded to whole windows before it is shifted."""

    def _attn(self, map_BHWC: Tensor) -> Tensor:
        _, height, width, _ = map_BHWC.shape
        rows, columns = self.window_size
        padded = F.pad(map_BHWC, (0, 0, 0, -width % columns, 0, -height % rows))
        attended: Tensor = super()._attn(padded)
        return attended[:, :height, :width]


def pad_before_shift(net: nn.Module) -> None:
    """Let every Swin block in a network of timm's pad first. State and names stay the same."""
    for module in net.modules():
        if type(module) is SwinTransformerBlock:
            module.__class__ = PaddedBlock
