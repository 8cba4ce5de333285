"""The module of multi-scale deformable attention: projections around one of the implementations."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from d2zero.model.deformable.implementations import FUNCTIONS, best_impl
from d2zero.model.deformable.sampling import (
    ROW_SUMS,
    DeformableFunction,
    LevelSizes,
    RowSum,
    corners,
    grid_sample,
    levels_of_samples,
    sample_levels,
    sum_rows,
)


class DeformableAttention(nn.Module):
    """Deformable self-attention over the concatenated levels.

    Args:
        dim: Channels C.
        heads: M.
        levels: L.
        points: P.
        function: What computes the samples; the fastest implementation where the tensors are if left out.
    """

    def __init__(
        self, dim: int, heads: int, levels: int, points: int, function: DeformableFunction | None = None
    ) -> None:
        super().__init__()
        self.heads, self.levels, self.points = heads, levels, points
        self.function = function
        self.sampling_offsets = nn.Linear(dim, heads * levels * points * 2)
        self.attention_weights = nn.Linear(dim, heads * levels * points)
        self.value_proj = nn.Linear(dim, dim)
        self.output_proj = nn.Linear(dim, dim)
        self.merged: nn.Linear | None = None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Offsets start as one compass direction per head, point p reaching p pixels."""
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

    @torch.no_grad()
    def merge_projections(self) -> None:
        """Let one linear layer make offsets and weights, for inference: queries are read once.

        A copy of the weights as they are now, used by the implementations that take locations.
        """
        parts = (self.sampling_offsets, self.attention_weights)
        weight, bias = (torch.cat([getattr(part, name) for part in parts]) for name in ("weight", "bias"))
        self.merged = nn.Linear(weight.shape[1], len(weight), device=weight.device, dtype=weight.dtype)
        self.merged.weight.copy_(weight)
        self.merged.bias.copy_(bias)

    def forward(self, query_BSC: Tensor, source_BSC: Tensor, reference_S2: Tensor, sizes: LevelSizes) -> Tensor:
        """Attend from `query_BSC` to points of `source_BSC` around `reference_S2` (x, y in 0..1)."""
        function = self.function or FUNCTIONS[best_impl(query_BSC.device, torch.is_grad_enabled())]
        if function is grid_sample:
            sampled = self._grid_sampled(query_BSC, source_BSC, reference_S2, sizes)
        elif function in ROW_SUMS:
            sampled = self._rows_sampled(query_BSC, source_BSC, reference_S2, sizes, ROW_SUMS[function])
        else:
            values = self.value_proj(source_BSC).unflatten(-1, (self.heads, -1))
            sampled = function(values, sizes, *self._samples(query_BSC, reference_S2, sizes))
        output: Tensor = self.output_proj(sampled.to(source_BSC.dtype))
        return output

    # In lower precision, where to look and how much stay float32: halves lose 1/8 pixel beyond 128.

    def _samples(self, query_BSC: Tensor, reference_S2: Tensor, sizes: LevelSizes) -> tuple[Tensor, Tensor]:
        """Locations (B, R, M, L, P, 2) and weights (B, R, M, L, P), float32."""
        batch, length, _ = query_BSC.shape
        if self.merged is None:
            offsets, scores = self.sampling_offsets(query_BSC).float(), self.attention_weights(query_BSC).float()
        else:
            sizes_out = [self.sampling_offsets.out_features, self.attention_weights.out_features]
            offsets, scores = self.merged(query_BSC).float().split(sizes_out, dim=-1)
        offsets = offsets.view(batch, length, self.heads, self.levels, self.points, 2)
        weights = scores.view(batch, length, self.heads, -1).softmax(-1)
        weights = weights.view(batch, length, self.heads, self.levels, self.points)
        return reference_S2[:, None, None, None] + offsets / _extents(sizes, reference_S2)[:, None], weights

    def _grid_sampled(self, query_BSC: Tensor, source_BSC: Tensor, reference_S2: Tensor, sizes: LevelSizes) -> Tensor:
        """`grid_sample` with the queries innermost from the projections on: (B, R, C).

        Elements that are handled two or four at a time cost more than what is computed with them (docs/decisions/0011;
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

    def _rows_sampled(
        self, query_BSC: Tensor, source_BSC: Tensor, reference_S2: Tensor, sizes: LevelSizes, add: RowSum
    ) -> Tensor:
        """The implementations that read rows, with x and y apart from the projection on: (B, R, C)."""
        levels = levels_of_samples(sizes, self.points, reference_S2)
        weight, bias = self.offsets_apart()
        x, y = F.linear(query_BSC, weight, bias).float().unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        x = x + (reference_S2[:, :1] * levels.width - 0.5)
        y = y + (reference_S2[:, 1:] * levels.height - 0.5)
        scores = self.attention_weights(query_BSC).float().unflatten(-1, (self.heads, -1))
        weights = scores.transpose(1, 2).softmax(-1)
        values = self.value_proj(source_BSC).unflatten(-1, (self.heads, -1))
        return sum_rows(values, corners(levels, x, y, weights), add)

    def offsets_apart(self) -> tuple[Tensor, Tensor]:
        """Weight and bias of the sampling offsets with all x before all y: what reads rows uses them so."""
        offsets = self.sampling_offsets
        weight = offsets.weight.unflatten(0, (-1, 2)).transpose(0, 1).flatten(0, 1)  # xy, M·L·P
        return weight, offsets.bias.unflatten(0, (-1, 2)).T.flatten()

    def _weights_innermost(self, query_BCR: Tensor) -> Tensor:
        """Attention weights (B, L, M, P, R), float32: softmax over levels and points."""
        project, groups = self.attention_weights, (self.heads, self.levels, -1)
        weight = project.weight.unflatten(0, groups).transpose(0, 1).flatten(0, 2)
        bias = project.bias.unflatten(0, groups).transpose(0, 1).reshape(-1, 1)
        scores = (weight @ query_BCR + bias).float().unflatten(1, (self.levels, self.heads, -1))
        # By hand: a softmax over other than the last dimension is transposed and back by ONNX Runtime.
        powers = (scores - scores.amax((1, 3), keepdim=True).detach()).exp()
        weights: Tensor = powers / powers.sum((1, 3), keepdim=True)
        return weights


def _extents(sizes: LevelSizes, like: Tensor) -> Tensor:
    """(W, H) of each level, (L, 2); filled on the device: a copy from the host cannot be in a CUDA graph."""
    sides = [side for height, width in sizes for side in (width, height)]
    return torch.stack([torch.full((), side, device=like.device, dtype=like.dtype) for side in sides]).view(-1, 2)
