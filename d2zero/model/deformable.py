"""Multi-scale deformable attention, as one function in interchangeable forms.

Each query samples P points on each of L levels for each of M heads, bilinearly, with zeros outside, and
adds up the samples by attention weight (Deformable DETR, Zhu et al. 2021, equation 3). The forms compute
the same sums:

- `grid_sample`: torch's own operator, level by level. Good with autograd, and what ONNX knows as GridSample.
- `gather`: four row gathers from the channels-last values of all levels at once. Compiles well, and uses
  no operator that an inference engine might get wrong.

Letters: B batch, S = sum of the levels' H·W, M heads, N channels a head, R queries, L levels, P points.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LevelSizes = Sequence[tuple[int, int]]  # (H, W) of each level
DeformableForm = Callable[[Tensor, LevelSizes, Tensor, Tensor], Tensor]


def grid_sample(values_BSMN: Tensor, sizes: LevelSizes, locations: Tensor, weights: Tensor) -> Tensor:
    """Sample and add up with `torch.nn.functional.grid_sample`.

    Args:
        values_BSMN: (B, S, M, N) values of all levels, concatenated; may be of lower precision than the rest.
        sizes: (H, W) of each level.
        locations: (B, R, M, L, P, 2) x and y in 0..1 of each level's map.
        weights: (B, R, M, L, P), summing to 1 over levels and points.

    Returns:
        (B, R, M·N).
    """
    batch, _, heads, width = values_BSMN.shape
    queries = locations.shape[1]
    levels = values_BSMN.to(locations.dtype).split([height * width_ for height, width_ in sizes], dim=1)
    # Queries innermost: what follows the sampling then runs along memory, not over P = 4 numbers at a time.
    grids = (2 * locations - 1).permute(3, 0, 2, 4, 1, 5).flatten(1, 2)  # L, B·M, P, R, 2
    shares = weights.permute(3, 0, 2, 4, 1).flatten(1, 2)[:, :, None]  # L, B·M, 1, P, R
    sampled = [
        F.grid_sample(
            level.flatten(2).transpose(1, 2).reshape(batch * heads, width, *size),
            grid,
            mode="bilinear",
            padding_mode="zeros",
            align_corners=False,
        )
        for level, size, grid in zip(levels, sizes, grids, strict=True)
    ]  # each (B·M, N, P, R)
    # Weighted level by level: joined first, the samples of all levels would be written once more.
    parts = [(level * share).sum(2) for level, share in zip(sampled, shares, strict=True)]
    out: Tensor = sum(parts[1:], parts[0])
    return out.view(batch, heads * width, queries).transpose(1, 2)


def gather(values_BSMN: Tensor, sizes: LevelSizes, locations: Tensor, weights: Tensor) -> Tensor:
    """Sample and add up with row gathers; arguments and result as in `grid_sample`."""
    batch, total, heads, width = values_BSMN.shape
    queries = locations.shape[1]
    device = locations.device
    extent = torch.tensor([[w, h] for h, w in sizes], device=device)  # L, 2 as (W, H)
    starts = torch.tensor([0, *(h * w for h, w in sizes)][:-1], device=device).cumsum(0)[:, None]  # L, 1
    position = locations * extent[:, None].to(locations.dtype) - 0.5
    corner = position.floor()
    fraction = position - corner
    x0, y0 = corner.long().unbind(-1)  # B, R, M, L, P
    rows_of_head = torch.arange(heads, device=device)[:, None, None]
    rows_of_image = torch.arange(batch, device=device)[:, None, None, None, None] * total
    limit_x, limit_y = extent[:, :1], extent[:, 1:]
    flat_values = values_BSMN.reshape(batch * total * heads, width)
    out = values_BSMN.new_zeros(batch * queries * heads, width)
    for dy in (0, 1):
        for dx in (0, 1):
            x, y = x0 + dx, y0 + dy
            inside = (x >= 0) & (x < limit_x) & (y >= 0) & (y < limit_y)
            share = (fraction[..., 0] if dx else 1 - fraction[..., 0]) * (
                fraction[..., 1] if dy else 1 - fraction[..., 1]
            )
            pixel = starts + y.clamp(min=0).minimum(limit_y - 1) * limit_x + x.clamp(min=0).minimum(limit_x - 1)
            rows = (rows_of_image + pixel) * heads + rows_of_head
            shares = (share * inside * weights).reshape(batch * queries * heads, 1, -1)
            rows = rows.reshape(batch * queries * heads, -1)
            out = out + (shares.to(flat_values.dtype) @ flat_values[rows]).squeeze(1)
    return out.view(batch, queries, heads * width)


class DeformableAttention(nn.Module):
    """Deformable self-attention over the concatenated levels.

    Args:
        dim: channels C.
        heads: M.
        levels: L.
        points: P.
        form: which of the equal forms computes the samples.
    """

    def __init__(self, dim: int, heads: int, levels: int, points: int, form: DeformableForm = grid_sample) -> None:
        super().__init__()
        self.heads, self.levels, self.points = heads, levels, points
        self.form = form
        self.sampling_offsets = nn.Linear(dim, heads * levels * points * 2)
        self.attention_weights = nn.Linear(dim, heads * levels * points)
        self.value_proj = nn.Linear(dim, dim)
        self.output_proj = nn.Linear(dim, dim)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Offsets start as one compass direction a head, point p reaching p pixels."""
        angle = torch.arange(self.heads) * (2 * torch.pi / self.heads)
        direction = torch.stack([angle.cos(), angle.sin()], dim=-1)
        direction = direction / direction.abs().amax(-1, keepdim=True)
        reach = torch.arange(1, self.points + 1)[:, None]
        bias = (direction[:, None, None] * reach).expand(self.heads, self.levels, self.points, 2)
        nn.init.zeros_(self.sampling_offsets.weight)
        with torch.no_grad():
            self.sampling_offsets.bias.copy_(bias.flatten())
        nn.init.zeros_(self.attention_weights.weight)
        nn.init.zeros_(self.attention_weights.bias)
        for layer in (self.value_proj, self.output_proj):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, query_BSC: Tensor, source_BSC: Tensor, reference_S2: Tensor, sizes: LevelSizes) -> Tensor:
        """Attend from `query_BSC` to points of `source_BSC` around `reference_S2` (x, y in 0..1)."""
        # In lower precision, where to look and how much stay float32: halves lose 1/8 pixel beyond 128.
        batch, length, _ = query_BSC.shape
        values = self.value_proj(source_BSC).unflatten(-1, (self.heads, -1))
        offsets = self.sampling_offsets(query_BSC).float()
        offsets = offsets.view(batch, length, self.heads, self.levels, self.points, 2)
        weights = self.attention_weights(query_BSC).float().view(batch, length, self.heads, -1).softmax(-1)
        weights = weights.view(batch, length, self.heads, self.levels, self.points)
        extent = torch.tensor([[w, h] for h, w in sizes], device=query_BSC.device, dtype=reference_S2.dtype)
        locations = reference_S2[:, None, None, None] + offsets / extent[:, None]
        sampled = self.form(values, sizes, locations, weights).to(values.dtype)
        output: Tensor = self.output_proj(sampled)
        return output
