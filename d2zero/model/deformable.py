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
    batch, total, heads, width = values_BSMN.shape
    values_GNS = values_BSMN.permute(0, 2, 3, 1).reshape(batch * heads, width, total).to(locations.dtype)
    grids = (2 * locations - 1).permute(3, 0, 2, 4, 1, 5).flatten(1, 2)
    out_GNR = sample_levels(values_GNS, sizes, grids, weights.permute(3, 0, 2, 4, 1).flatten(1, 2))
    out: Tensor = out_GNR.view(batch, heads * width, -1).transpose(1, 2)
    return out


def sample_levels(values_GNS: Tensor, sizes: LevelSizes, grids_LGPR2: Tensor, weights_LGPR: Tensor) -> Tensor:
    """Sample and add up with the queries innermost: what follows the sampling runs along memory, not over P = 4.

    Args:
        values_GNS: values of all levels; G = B·M.
        sizes: (H, W) of each level.
        grids_LGPR2: x and y in -1..1 of each level's map.
        weights_LGPR: weights of the samples.

    Returns:
        (G, N, R).
    """
    maps = values_GNS.split([height * width for height, width in sizes], dim=2)
    out: Tensor | None = None
    # Weighted level by level: joined first, the samples of all levels would be written once more.
    for level, size, grid, weight in zip(maps, sizes, grids_LGPR2, weights_LGPR, strict=True):
        # `reshape` copies: a level's maps lie S apart, and grid_sample wants them whole.
        sampled = F.grid_sample(
            level.reshape(*level.shape[:2], *size), grid, mode="bilinear", padding_mode="zeros", align_corners=False
        )
        part = (sampled * weight[:, None]).sum(2)
        out = part if out is None else out + part
    assert out is not None, "at least one level"
    return out


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
        if self.form is grid_sample:
            sampled = self._grid_sampled(query_BSC, source_BSC, reference_S2, sizes)
        else:
            values = self.value_proj(source_BSC).unflatten(-1, (self.heads, -1))
            sampled = self.form(values, sizes, *self._samples(query_BSC, reference_S2, sizes))
        output: Tensor = self.output_proj(sampled.to(source_BSC.dtype))
        return output

    # In lower precision, where to look and how much stay float32: halves lose 1/8 pixel beyond 128.

    def _samples(self, query_BSC: Tensor, reference_S2: Tensor, sizes: LevelSizes) -> tuple[Tensor, Tensor]:
        """Locations (B, R, M, L, P, 2) and weights (B, R, M, L, P), float32."""
        batch, length, _ = query_BSC.shape
        offsets = self.sampling_offsets(query_BSC).float()
        offsets = offsets.view(batch, length, self.heads, self.levels, self.points, 2)
        weights = self.attention_weights(query_BSC).float().view(batch, length, self.heads, -1).softmax(-1)
        weights = weights.view(batch, length, self.heads, self.levels, self.points)
        return reference_S2[:, None, None, None] + offsets / _extents(sizes, reference_S2)[:, None], weights

    def _grid_sampled(self, query_BSC: Tensor, source_BSC: Tensor, reference_S2: Tensor, sizes: LevelSizes) -> Tensor:
        """The form `grid_sample` with the queries innermost from the projections on: (B, R, C).

        Numbers that are handled two or four at a time cost more than what is computed with them (docs/LOG.md:
        1.4 times faster in ONNX Runtime, 1.5 to 1.9 times in eager torch). So the rows of the projections are put in
        the order (L, xy, M, P), and the step from pixels to grids is in their weights.
        """
        batch, heads, levels = query_BSC.shape[0], self.heads, self.levels
        query_BCR = query_BSC.transpose(1, 2)
        steps_L2 = 2 / _extents(sizes, reference_S2)
        offsets = self.sampling_offsets
        weight = offsets.weight.unflatten(0, (heads, levels, -1, 2)).permute(1, 3, 0, 2, 4)
        weight = (weight * steps_L2[:, :, None, None, None]).flatten(0, 3).to(query_BSC.dtype)
        bias = offsets.bias.unflatten(0, (heads, levels, -1, 2)).permute(1, 3, 0, 2)
        bias = bias.float() * steps_L2[:, :, None, None]
        reach = (weight @ query_BCR).float() + bias.reshape(-1, 1)
        reach = reach.unflatten(1, (levels, 2, -1)) + (2 * reference_S2 - 1).T[:, None]  # B, L, 2, M·P, R
        grids = reach.unflatten(3, (heads, -1)).permute(1, 0, 3, 4, 5, 2).flatten(1, 2)
        weights = self._weights_innermost(query_BCR).transpose(0, 1).flatten(1, 2)
        values_BCS = self.value_proj.weight @ source_BSC.transpose(1, 2) + self.value_proj.bias[:, None]
        values_GNS = values_BCS.float().unflatten(1, (heads, -1)).flatten(0, 1)
        sampled_GNR = sample_levels(values_GNS, sizes, grids, weights)
        return sampled_GNR.view(batch, source_BSC.shape[2], -1).transpose(1, 2)

    def _weights_innermost(self, query_BCR: Tensor) -> Tensor:
        """Attention weights (B, L, M, P, R), float32: softmax over levels and points."""
        project, groups = self.attention_weights, (self.heads, self.levels, -1)
        weight = project.weight.unflatten(0, groups).transpose(0, 1).flatten(0, 2)
        bias = project.bias.unflatten(0, groups).transpose(0, 1).reshape(-1, 1)
        scores = (weight @ query_BCR + bias).float().unflatten(1, (self.levels, self.heads, -1))
        # By hand: a softmax over other than the last numbers is turned over and back by ONNX Runtime.
        powers = (scores - scores.amax((1, 3), keepdim=True).detach()).exp()
        weights: Tensor = powers / powers.sum((1, 3), keepdim=True)
        return weights


def _extents(sizes: LevelSizes, like: Tensor) -> Tensor:
    """(W, H) of each level, (L, 2)."""
    return torch.tensor([[width, height] for height, width in sizes], device=like.device, dtype=like.dtype)
