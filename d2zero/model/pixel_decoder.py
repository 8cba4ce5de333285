"""From backbone features to mask features and multi-scale memory (Mask2Former's pixel decoder).

Three levels (strides 32, 16, 8) pass through deformable encoder layers together; the stride-8 output is
then fused with the stride-4 features of the backbone. Computed in float32 even under mixed precision, as
in the published code.

Letters: B batch, C hidden channels, S = pixels of the three levels together.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from d2zero.model.config import LEVELS
from d2zero.model.deformable import DeformableAttention, DeformableFunction, LevelSizes
from d2zero.model.positions import pixel_centres, sine_positions

NORM_GROUPS = 32


class EncoderLayer(nn.Module):
    """Deformable self-attention and feed-forward, each followed by layer norm."""

    def __init__(self, dim: int, heads: int, points: int, ffn_dim: int, function: DeformableFunction | None) -> None:
        super().__init__()
        self.attention = DeformableAttention(dim, heads, LEVELS, points, function)
        self.norm1 = nn.LayerNorm(dim)
        self.linear1 = nn.Linear(dim, ffn_dim)
        self.linear2 = nn.Linear(ffn_dim, dim)
        self.norm2 = nn.LayerNorm(dim)
        nn.init.xavier_uniform_(self.linear1.weight)
        nn.init.xavier_uniform_(self.linear2.weight)

    def forward(self, source_BSC: Tensor, position_SC: Tensor, reference_S2: Tensor, sizes: LevelSizes) -> Tensor:
        attended = self.attention(source_BSC + position_SC, source_BSC, reference_S2, sizes)
        source_BSC = self.norm1(source_BSC + attended)
        output: Tensor = self.norm2(source_BSC + self.linear2(F.relu(self.linear1(source_BSC))))
        return output


class PixelDecoder(nn.Module):
    """Deformable encoder over strides 32, 16, 8 and a one-step feature pyramid down to stride 4.

    Args:
        in_channels: Channels of the backbone's features at strides 4, 8, 16, 32.
        dim: Hidden channels C, a multiple of 32.
        heads: Attention heads.
        layers: Encoder layers.
        points: Samples per head, level and query.
        ffn_dim: Width of the feed-forward layers.
        function: How deformable attention is computed; see `DeformableAttention`.
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        dim: int = 256,
        heads: int = 8,
        layers: int = 6,
        points: int = 4,
        ffn_dim: int = 1024,
        function: DeformableFunction | None = None,
    ) -> None:
        super().__init__()
        self.input_projections = nn.ModuleList(
            nn.Sequential(nn.Conv2d(channels, dim, 1), nn.GroupNorm(NORM_GROUPS, dim))
            for channels in reversed(in_channels[1:])  # strides 32, 16, 8
        )
        self.level_embedding = nn.Parameter(torch.empty(LEVELS, dim))
        self.layers = nn.ModuleList(EncoderLayer(dim, heads, points, ffn_dim, function) for _ in range(layers))
        self.lateral = nn.Sequential(nn.Conv2d(in_channels[0], dim, 1, bias=False), nn.GroupNorm(NORM_GROUPS, dim))
        self.fuse = nn.Sequential(
            nn.Conv2d(dim, dim, 3, padding=1, bias=False), nn.GroupNorm(NORM_GROUPS, dim), nn.ReLU()
        )
        self.mask_features = nn.Conv2d(dim, dim, 1)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise as the published code does."""
        nn.init.normal_(self.level_embedding)
        for module in self.input_projections.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.xavier_uniform_(module.weight)
                zero_bias(module)
        for part in (self.lateral, self.fuse, self.mask_features):
            for module in part.modules():
                if isinstance(module, nn.Conv2d):
                    nn.init.kaiming_uniform_(module.weight, a=1)
                    zero_bias(module)

    def forward(self, features: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """Decode backbone features.

        Args:
            features: Maps (B, C_i, H/s, W/s) at strides s = 4, 8, 16, 32.

        Returns:
            Mask features (B, C, H/4, W/4) and memory [(B, C, H/s, W/s)] at strides 32, 16, 8, float32.
        """
        with torch.autocast(features[0].device.type, enabled=False):
            return self.decode([feature.float() for feature in features])

    def decode(self, features: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """The same in the precision of its inputs."""
        fused, memory = self.fused(features)
        return self.mask_features(fused), memory

    def fused(self, features: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """What `mask_features` reads, (B, C, H/4, W/4), in place of mask features; and the memory."""
        levels = [
            project(feature) for project, feature in zip(self.input_projections, reversed(features[1:]), strict=True)
        ]
        sizes = [(level.shape[2], level.shape[3]) for level in levels]
        device, dim = levels[0].device, levels[0].shape[1]
        position_SC = torch.cat(
            [
                sine_positions(*size, dim, device).flatten(1).T + embedding
                for size, embedding in zip(sizes, self.level_embedding, strict=True)
            ]
        )
        reference_S2 = pixel_centres(sizes, device)
        position_SC = position_SC.to(levels[0].dtype)
        source_BSC = torch.cat([level.flatten(2).transpose(1, 2) for level in levels], dim=1)
        for layer in self.layers:
            source_BSC = layer(source_BSC, position_SC, reference_S2, sizes)
        memory = [
            part.transpose(1, 2).unflatten(2, size)
            for part, size in zip(source_BSC.split([h * w for h, w in sizes], dim=1), sizes, strict=True)
        ]
        upsampled = F.interpolate(memory[-1], features[0].shape[2:], mode="bilinear", align_corners=False)
        return self.fuse(self.lateral(features[0]) + upsampled), memory


def zero_bias(module: nn.Conv2d) -> None:
    """Set a convolution's bias to zero, if it has one."""
    if module.bias is not None:
        nn.init.zeros_(module.bias)
