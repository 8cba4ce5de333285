"""Sine position embeddings of a feature map (DETR's, normalised), and pixel-centre reference points."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

TEMPERATURE = 10_000


def sine_positions(height: int, width: int, channels: int, device: torch.device | None = None) -> Tensor:
    """Position embedding (C, H, W), float32; the first half of the channels encodes y, the second x."""
    half = channels // 2
    pair = torch.arange(half, device=device) // 2
    divisor = TEMPERATURE ** (2 * pair.float() / half)

    def axis(length: int) -> Tensor:
        position = torch.arange(1, length + 1, device=device, dtype=torch.float32)
        angle = 2 * math.pi * position[:, None] / (length + 1e-6) / divisor
        return torch.stack([angle[:, 0::2].sin(), angle[:, 1::2].cos()], dim=2).flatten(1)  # length, half

    y = axis(height).T[:, :, None].expand(half, height, width)
    x = axis(width).T[:, None, :].expand(half, height, width)
    return torch.cat([y, x])


def pixel_centres(sizes: Sequence[tuple[int, int]], device: torch.device | None = None) -> Tensor:
    """Centres (x, y) in 0..1 of every pixel of every level, row by row: (S, 2) float32."""
    levels = []
    for height, width in sizes:
        y = (torch.arange(height, device=device, dtype=torch.float32) + 0.5) / height
        x = (torch.arange(width, device=device, dtype=torch.float32) + 0.5) / width
        grid_y, grid_x = torch.meshgrid(y, x, indexing="ij")
        levels.append(torch.stack([grid_x, grid_y], dim=-1).flatten(0, 1))
    return torch.cat(levels)
