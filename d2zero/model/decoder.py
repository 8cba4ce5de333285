"""The masked-attention transformer decoder (Mask2Former).

Learned queries read one memory level after another. Before the first layer and after each, the queries predict
masks; the next layer attends only inside them.

Letters: B batch, Q queries, C hidden channels, N pixels of one memory level.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from d2zero.model.config import LEVELS
from d2zero.model.positions import sine_positions


class MaskMLP(nn.Sequential):
    """Three linear layers from query features to mask embeddings."""

    def __init__(self, dim: int) -> None:
        super().__init__(nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, dim))


class DecoderLayer(nn.Module):
    """Masked cross-attention, self-attention, feed-forward; each followed by layer norm."""

    def __init__(self, dim: int, heads: int, ffn_dim: int) -> None:
        super().__init__()
        self.cross_attention = nn.MultiheadAttention(dim, heads, batch_first=True)
        self.cross_norm = nn.LayerNorm(dim)
        self.self_attention = nn.MultiheadAttention(dim, heads, batch_first=True)
        self.self_norm = nn.LayerNorm(dim)
        self.linear1 = nn.Linear(dim, ffn_dim)
        self.linear2 = nn.Linear(ffn_dim, dim)
        self.ffn_norm = nn.LayerNorm(dim)
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter)

    def forward(
        self, queries_BQC: Tensor, query_positions_QC: Tensor, memory_BNC: Tensor, keys_BNC: Tensor, blocked: Tensor
    ) -> Tensor:
        """Update the queries.

        Args:
            queries_BQC: Query features.
            query_positions_QC: Added to queries and keys, not to values.
            memory_BNC: Values of one level.
            keys_BNC: The same with position embeddings added.
            blocked: (B·heads, Q, N) bool, True where a query must not attend.
        """
        attended, _ = self.cross_attention(
            queries_BQC + query_positions_QC, keys_BNC, memory_BNC, attn_mask=blocked, need_weights=False
        )
        queries_BQC = self.cross_norm(queries_BQC + attended)
        positioned = queries_BQC + query_positions_QC
        attended, _ = self.self_attention(positioned, positioned, queries_BQC, need_weights=False)
        queries_BQC = self.self_norm(queries_BQC + attended)
        updated: Tensor = self.ffn_norm(queries_BQC + self.linear2(F.relu(self.linear1(queries_BQC))))
        return updated


class MaskedDecoder(nn.Module):
    """Learned queries, masked-attention layers, and the mask head.

    Args:
        dim: Hidden channels C.
        num_queries: Q.
        heads: Attention heads.
        layers: Decoder layers, cycling strides 32, 16, 8.
        ffn_dim: Width of the feed-forward layers.
    """

    def __init__(
        self, dim: int = 256, num_queries: int = 100, heads: int = 8, layers: int = 9, ffn_dim: int = 2048
    ) -> None:
        super().__init__()
        self.heads = heads
        self.query_features = nn.Parameter(torch.empty(num_queries, dim).normal_())
        self.query_positions = nn.Parameter(torch.empty(num_queries, dim).normal_())
        self.level_embedding = nn.Parameter(torch.empty(LEVELS, dim).normal_())
        self.layers = nn.ModuleList(DecoderLayer(dim, heads, ffn_dim) for _ in range(layers))
        self.norm = nn.LayerNorm(dim)
        self.mask_mlp = MaskMLP(dim)

    def forward(
        self, mask_features_BCHW: Tensor, memory: Sequence[Tensor], attention_masks: Sequence[Tensor] | None = None
    ) -> list[tuple[Tensor, Tensor]]:
        """Decode all heads.

        Args:
            mask_features_BCHW: (B, C, H/4, W/4).
            memory: Three maps (B, C, h, w) at strides 32, 16, 8.
            attention_masks: For each layer, where it must not attend, (B, Q, h·w) bool; computed from the preceding
                head's mask logits if left out.

        Returns:
            For each of the layers + 1 heads: normalised queries (B, Q, C), mask logits (B, Q, H/4, W/4).
        """
        values, keys, sizes = [], [], []
        for level, embedding in zip(memory, self.level_embedding, strict=True):
            size = (level.shape[2], level.shape[3])
            value_BNC = level.flatten(2).transpose(1, 2) + embedding
            position_CHW = sine_positions(*size, level.shape[1], level.device)
            values.append(value_BNC)
            keys.append(value_BNC + position_CHW.flatten(1).T)
            sizes.append(size)
        queries_BQC = self.query_features.expand(len(mask_features_BCHW), -1, -1)
        heads = [self._head(queries_BQC, mask_features_BCHW)]
        for index, layer in enumerate(self.layers):
            level_index = index % LEVELS
            if attention_masks is None:
                mask = attention_mask(heads[-1][1], sizes[level_index])
            else:
                mask = attention_masks[index]
            of_heads = mask.repeat_interleave(self.heads, dim=0)
            queries_BQC = layer(queries_BQC, self.query_positions, values[level_index], keys[level_index], of_heads)
            heads.append(self._head(queries_BQC, mask_features_BCHW))
        return heads

    def _head(self, queries_BQC: Tensor, mask_features_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        normalised_BQC = self.norm(queries_BQC)
        embeddings_BQC = self.mask_mlp(normalised_BQC)
        return normalised_BQC, torch.einsum("bqc,bchw->bqhw", embeddings_BQC, mask_features_BCHW)


def attention_mask(mask_logits_BQHW: Tensor, size: tuple[int, int]) -> Tensor:
    """Where the next layer must not attend: (B, Q, h·w) bool, without gradient.

    Blocked where sigmoid < 0.5, that is where the resized logit is negative. A query that would be blocked
    everywhere attends everywhere.
    """
    logits = F.interpolate(mask_logits_BQHW.detach(), size, mode="bilinear", align_corners=False)
    return blocked(logits.flatten(2))


def attention_masks(mask_logits_BQHW: Sequence[Tensor], image_size: tuple[int, int]) -> list[Tensor]:
    """Each layer's attention mask, from the preceding head's mask logits.

    Args:
        mask_logits_BQHW: Of all heads.
        image_size: Height and width of the input.
    """
    strides = [32 >> layer % LEVELS for layer in range(len(mask_logits_BQHW) - 1)]
    sizes = [(image_size[0] // stride, image_size[1] // stride) for stride in strides]
    return [attention_mask(logits, size) for logits, size in zip(mask_logits_BQHW[:-1], sizes, strict=True)]


def blocked(mask_logits_BQN: Tensor) -> Tensor:
    """Where queries must not attend, bool: negative logits, unless all of a query's are."""
    negative = mask_logits_BQN < 0
    return negative & ~negative.all(dim=2, keepdim=True)
