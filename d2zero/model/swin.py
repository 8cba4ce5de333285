"""Swin's shifted windows at any image size, as the original has them.

timm shifts a map first and then pads it to whole windows; the original, Mask2Former and transformers pad first. The
two agree only where a stage's sides are multiples of the window. Here padding, shifting and cutting into windows are
one gather of pixels, and so is the way back: equal, and `torch.export` need not reason about strides of maps whose
size is not fixed. For its sake, patches are merged without timm's padding to even sides: inputs are multiples of 32.

Letters: B batch, H and W a stage's sides, C channels, R windows of an image, N pixels of a window.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from timm.models.swin_transformer import PatchMerging, SwinTransformerBlock
from torch import Tensor, nn

BLOCKED = -100.0  # added to attention logits between pixels that only the shift made neighbours


class Axis(NamedTuple):
    """One axis of a padded and shifted map of P pixels, in windows."""

    windows: int  # how many
    window: int  # pixels
    source: Tensor  # (P,) the pixel of the map that each shows; those of the padding are not in it
    region: Tensor  # (P,) 0, or 1 in the last window, or 2 in what the shift brought around
    shown_at: Tensor  # (side,) where each pixel of the map is shown


class PaddedBlock(SwinTransformerBlock):
    """timm's block, which pads a map to whole windows before it shifts it."""

    def _attn(self, map_BHWC: Tensor) -> Tensor:
        batch, height, width, channels = map_BHWC.shape
        rows, columns = (
            _axis(side, window, shift, map_BHWC.device)
            for side, window, shift in zip((height, width), self.window_size, self.shift_size, strict=True)
        )
        y, x = rows.source[:, None], columns.source[None, :]
        outside = height * width  # a pixel of zeros behind the map
        pixel_RN = _windows(torch.where((y < height) & (x < width), y * width + x, outside), rows, columns)
        pixels = F.pad(map_BHWC.reshape(batch, outside, channels), (0, 0, 0, 1))
        count, size = rows.windows * columns.windows, rows.window * columns.window
        attended = self.attn(
            pixels[:, pixel_RN].reshape(batch * count, size, channels),
            _mask(rows, columns, map_BHWC.dtype) if any(self.shift_size) else None,
        )
        y, x = rows.shown_at[:, None], columns.shown_at[None, :]
        window = y // rows.window * columns.windows + x // columns.window
        position = window * size + y % rows.window * columns.window + x % columns.window
        back: Tensor = attended.reshape(batch, count * size, channels)[:, position.reshape(-1)]
        return back.reshape(batch, height, width, channels)


def _axis(side: int, window: int, shift: int, device: torch.device) -> Axis:
    count = (side + window - 1) // window
    padded = count * window
    pixel = torch.arange(padded, device=device)
    region = (pixel >= padded - window).long() + (pixel >= padded - shift).long()
    # Not remainders: ONNX's translation takes no divisor that depends on the size, TensorRT-RTX no negative number.
    source, shown_at = pixel + shift, torch.arange(side, device=device) - shift
    source = torch.where(source >= padded, source - padded, source)
    return Axis(count, window, source, region, torch.where(shown_at < 0, shown_at + padded, shown_at))


def _windows(values: Tensor, rows: Axis, columns: Axis) -> Tensor:
    """(R, N) from one value for each pixel of the padded map."""
    tiles = values.view(rows.windows, rows.window, columns.windows, columns.window).transpose(1, 2)
    return tiles.reshape(rows.windows * columns.windows, rows.window * columns.window)


def _mask(rows: Axis, columns: Axis, dtype: torch.dtype) -> Tensor:
    """(R, N, N), added to attention logits: pixels attend to those that were neighbours before the shift."""
    region_RN = _windows(3 * rows.region[:, None] + columns.region[None, :], rows, columns)
    apart = region_RN[:, :, None] != region_RN[:, None, :]
    return torch.zeros_like(apart, dtype=dtype).masked_fill(apart, BLOCKED)


class EvenMerging(PatchMerging):
    """timm's merging of 2x2 patches, for maps with even sides."""

    def forward(self, map_BHWC: Tensor) -> Tensor:
        """(B, H/2, W/2, 2C)."""
        batch, height, width, channels = map_BHWC.shape
        quads = map_BHWC.reshape(batch, height // 2, 2, width // 2, 2, channels).permute(0, 1, 3, 4, 2, 5).flatten(3)
        merged: Tensor = self.reduction(self.norm(quads))
        return merged


def use_original_windows(net: nn.Module) -> None:
    """Give every Swin stage in a network of timm's the layers of this module. State and names stay the same."""
    assert callable(getattr(SwinTransformerBlock, "_attn", None)), (
        "timm's blocks no longer have the method overridden here"
    )
    for module in net.modules():
        if type(module) is SwinTransformerBlock:
            module.__class__ = PaddedBlock
        elif type(module) is PatchMerging:
            module.__class__ = EvenMerging
