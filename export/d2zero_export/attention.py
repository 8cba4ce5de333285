"""How the exported graph attends: by matmuls for ONNX, or by fused operators for what torch compiles.

Both have the same interface and equal results. They differ in how keys leave their projection: a matmul of scores
reads them best as (B, C, N), fused operators want channels to be adjacent, (B, N, C).

Letters: B batch, Q queries, N pixels of a level, C channels, H heads.
"""

from collections.abc import Sequence
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from d2zero.model.config import LEVELS
from d2zero.model.decoder import DecoderLayer, MaskedDecoder, blocked
from d2zero.model.masked_attention import masked_attention
from d2zero.model.triton_launch import has_triton


class MatmulAttention(nn.Module):
    """Attention by matmuls and a softmax: ONNX has no operator for it below opset 23.

    Args:
        decoder: Whose cross-attentions read the levels. What projects keys is a copy of its weights.
    """

    def __init__(self, decoder: MaskedDecoder) -> None:
        super().__init__()
        self._readers = [readers(decoder, level) for level in range(LEVELS)]
        self.key_projections = nn.ModuleList(_key_convolution(read) for read in self._readers if read)

    def project_level(
        self, level: int, value_BCN: Tensor, position_CN: Tensor
    ) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        """Keys (B, C, N) and values (B, N, C) of each attention that reads a level."""
        read = self._readers[level]
        if not read:
            return [], []
        keys = self.key_projections[level](value_BCN + position_CN).chunk(len(read), dim=1)
        return keys, [projected(value_BCN.transpose(1, 2), reader, 2) for reader in read]

    def keys(self, attention: nn.MultiheadAttention, inputs_BNC: Tensor) -> Tensor:
        """Keys of an attention without a mask, as `forward` takes them."""
        return self.laid_out(projected(inputs_BNC, attention, 1))

    def laid_out(self, keys_BNC: Tensor) -> Tensor:
        """Projected keys as `forward` takes them."""
        return keys_BNC.transpose(1, 2)

    def forward(
        self,
        attention: nn.MultiheadAttention,
        queries_BQC: Tensor,
        keys_BCN: Tensor,
        values_BNC: Tensor,
        mask_logits_BQN: Tensor | None = None,
    ) -> Tensor:
        """Multi-head attention over what was projected: (B, Q, C); see `blocked` for the mask."""
        asked_BHQc, values_BHNc = (_by_head(entry, attention) for entry in (queries_BQC, values_BNC))
        scores = (asked_BHQc * attention.head_dim**-0.5) @ keys_BCN.unflatten(1, (attention.num_heads, -1))
        if mask_logits_BQN is not None:
            scores = scores.masked_fill(blocked(mask_logits_BQN)[:, None], float("-inf"))
        output: Tensor = attention.out_proj((scores.softmax(-1) @ values_BHNc).transpose(1, 2).flatten(2))
        return output


class FusedAttention(nn.Module):
    """Attention by one operator, which forms no scores in memory: torch's own, or ours for masks on a GPU with Triton.

    Args:
        decoder: The decoder; keys and values of a level are projected by copies of its weights.
    """

    def __init__(self, decoder: MaskedDecoder) -> None:
        super().__init__()
        read = [readers(decoder, level) for level in range(LEVELS)]
        self.key_projections, self.value_projections = (
            nn.ModuleList(_joined(level, part) for level in read if level) for part in (1, 2)
        )
        self._counts = [len(level) for level in read]

    def project_level(
        self, level: int, value_BCN: Tensor, position_CN: Tensor
    ) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        """Keys and values, (B, N, C), of each attention that reads a level; rows are C times their number apart."""
        count = self._counts[level]
        if not count:
            return [], []
        value_BNC = value_BCN.transpose(1, 2)
        keys = self.key_projections[level](value_BNC + position_CN.T)
        return keys.chunk(count, dim=2), self.value_projections[level](value_BNC).chunk(count, dim=2)

    def keys(self, attention: nn.MultiheadAttention, inputs_BNC: Tensor) -> Tensor:
        """Keys of an attention without a mask, as `forward` takes them."""
        return self.laid_out(projected(inputs_BNC, attention, 1))

    def laid_out(self, keys_BNC: Tensor) -> Tensor:
        """Projected keys as `forward` takes them."""
        return keys_BNC

    def forward(
        self,
        attention: nn.MultiheadAttention,
        queries_BQC: Tensor,
        keys_BNC: Tensor,
        values_BNC: Tensor,
        mask_logits_BQN: Tensor | None = None,
    ) -> Tensor:
        """As of `MatmulAttention`, with keys (B, N, C)."""
        if mask_logits_BQN is not None and in_triton(queries_BQC.device):
            attended = masked_attention(queries_BQC, keys_BNC, values_BNC, mask_logits_BQN, attention.num_heads)
        else:
            allowed = None if mask_logits_BQN is None else ~blocked(mask_logits_BQN)[:, None]
            asked, keys, values = (_by_head(entry, attention) for entry in (queries_BQC, keys_BNC, values_BNC))
            attended = F.scaled_dot_product_attention(asked, keys, values, allowed).transpose(1, 2).flatten(2)
        output: Tensor = attention.out_proj(attended)
        return output


def in_triton(device: torch.device) -> bool:
    """Whether masked attention is our Triton operator on a device."""
    return device.type == "cuda" and has_triton()


def projected(inputs: Tensor, attention: nn.MultiheadAttention, part: int) -> Tensor:
    """The query (0), key (1) or value (2) projection of torch's packed weights."""
    weight, bias = packed_weights(attention, part)
    return F.linear(inputs, weight, bias)


def packed_weights(attention: nn.MultiheadAttention, part: int) -> tuple[Tensor, Tensor]:
    """Weight and bias of a projection, as of `projected`."""
    rows = slice(part * attention.embed_dim, (part + 1) * attention.embed_dim)
    return attention.in_proj_weight[rows], attention.in_proj_bias[rows]


def readers(decoder: MaskedDecoder, level: int) -> list[nn.MultiheadAttention]:
    """The cross-attentions that read a level."""
    layers: list[DecoderLayer] = list(decoder.layers)  # type: ignore[arg-type]
    return [layer.cross_attention for layer in layers[level::LEVELS]]


def _by_head(projected_BNC: Tensor, attention: nn.MultiheadAttention) -> Tensor:
    """(B, H, N, C/H), a view."""
    by_head: Tensor = projected_BNC.unflatten(2, (attention.num_heads, -1)).transpose(1, 2)
    return by_head


def _joined(read: list[nn.MultiheadAttention], part: int) -> nn.Linear:
    """One projection of several attentions as one linear layer."""
    pairs = [packed_weights(reader, part) for reader in read]
    weight, bias = (torch.cat(entries) for entries in zip(*pairs, strict=True))
    return _filled(nn.Linear(weight.shape[1], len(weight), device=weight.device, dtype=weight.dtype), weight, bias)


def _key_convolution(read: list[nn.MultiheadAttention]) -> nn.Conv1d:
    """The key projections of several attentions as one 1×1 convolution of (B, C, N)."""
    linear = _joined(read, 1)
    made = nn.Conv1d(linear.in_features, linear.out_features, 1, device=linear.weight.device, dtype=linear.weight.dtype)
    return _filled(made, linear.weight[:, :, None], linear.bias)


Projection = TypeVar("Projection", nn.Linear, nn.Conv1d)


def _filled(module: Projection, weight: Tensor, bias: Tensor) -> Projection:
    with torch.no_grad():
        module.weight.copy_(weight)
        assert module.bias is not None
        module.bias.copy_(bias)
    return module
