"""The network as it is exported: the same function with less work, and no control flow that depends on data.

Exact accelerations (equal in real arithmetic; DESIGN §5):
- the classifier runs at the last head alone;
- attention masks come from mask features that are resized once a level: resizing and the product with a
  query's mask embedding commute, so masks at full resolution are formed once, at the end;
- the last convolution of the pixel decoder, 1×1, is not run over all pixels: it commutes with resizing and with
  averaging, and is applied to the queries' mask embeddings and to the background's average instead;
- keys of a level are projected in one product for all layers that read it, and come out as scores read them;
- the first head's mask embedding depends on no input and becomes a constant.

Letters: B batch, Q queries, K classes, C hidden channels, D text width, E semantic width, N pixels of a level.
"""

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from d2zero.model import D2Zero
from d2zero.model.classifier import NORM_FLOOR, background
from d2zero.model.decoder import LEVELS, DecoderLayer, MaskedDecoder
from d2zero.model.positions import sine_positions

ATTENTION_MASK = "attention_mask_"  # the graph's values of that name and a layer's number: where it must not look


class InferenceGraph(nn.Module):
    """`(images, class_embeddings) → (class_logits, mask_logits)`, all float32.

    Between them, each part computes in the precision of its own weights (`precision.lowered`).

    Args:
        model: in evaluation mode; its weights are shared, but for those that make keys, which are copied.
        baked: use the model's own class embeddings, as a constant, and take none.
        fused: attention by torch's one operator for it, for what torch itself compiles; ONNX has none below opset 23.
    """

    text_KE: Tensor | None

    def __init__(self, model: D2Zero, baked: bool = False, fused: bool = False) -> None:
        super().__init__()
        self.model, self._attend = model, _attend_fused if fused else _attend
        with torch.no_grad():
            self.register_buffer("text_KE", self._projected(model.class_embeddings) if baked else None)
            read = (_readers(model.decoder, level) for level in range(LEVELS))
            self.keys = nn.ModuleList(_key_convolution(readers) for readers in read if readers)

    def forward(self, images: Tensor, class_embeddings: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Run the network.

        Args:
            images: (B, 3, H, W) normalised and padded; H and W multiples of 32.
            class_embeddings: (K, D); the model's own if left out.

        Returns:
            class logits (B, Q, K + 1), mask logits (B, Q, H/4, W/4).
        """
        fused, memory = self._features(images)
        queries, _ = self._decode(fused, memory)
        text_KE = self.text_KE
        if text_KE is None:
            text_KE = self._projected(self.model.class_embeddings if class_embeddings is None else class_embeddings)
        mask_logits = self._mask_logits(queries, fused.flatten(2))
        mask_logits = mask_logits.unflatten(2, fused.shape[2:]).float()
        return self._classify(queries, mask_logits, fused, text_KE), mask_logits

    def attention_masks(self, images: Tensor) -> list[Tensor]:
        """Where each decoder layer must not look: (B, Q, N) bool, N pixels of the layer's level."""
        return self._decode(*self._features(images))[1]

    def _features(self, images: Tensor) -> tuple[Tensor, list[Tensor]]:
        backbone, pixel_decoder, decoder = self.model.backbone, self.model.pixel_decoder, self.model.decoder
        features = backbone(*_to(backbone, [images]))
        fused, memory = pixel_decoder.fused(_to(pixel_decoder, features))
        fused, *memory = _to(decoder.layers, [fused, *memory])
        return fused, memory

    def _projected(self, class_embeddings: Tensor) -> Tensor:
        classifier = self.model.classifier
        projected: Tensor = classifier.text_projection(*_to(classifier, [class_embeddings]))
        return projected

    def _mask_logits(self, normalised_BQC: Tensor, fused_BCN: Tensor) -> Tensor:
        """Mask logits (B, Q, N): the product with mask features, their convolution moved to the queries' side."""
        mask_mlp = self.model.decoder.mask_mlp
        embeddings_BQC = mask_mlp(*_to(mask_mlp, [normalised_BQC]))
        weight_CC, bias_C = self._mask_convolution(embeddings_BQC.dtype)
        moved = (embeddings_BQC @ weight_CC).to(fused_BCN.dtype)
        logits: Tensor = moved @ fused_BCN + (embeddings_BQC @ bias_C[:, None]).to(fused_BCN.dtype)
        return logits

    def _mask_convolution(self, precision: torch.dtype) -> tuple[Tensor, Tensor]:
        """Weight (C, C) and bias (C,) of the 1×1 convolution that makes mask features."""
        convolution = self.model.pixel_decoder.mask_features
        assert convolution.bias is not None
        return convolution.weight.flatten(1).to(precision), convolution.bias.to(precision)

    def _background(self, fused: Tensor, mask_logits: Tensor) -> Tensor:
        """The mean mask feature of what no query claims, (B, C) float32, not normalised."""
        pixels_BN1 = background(mask_logits).flatten(1).float()[:, :, None]
        average_BC1 = (fused.float().flatten(2) @ pixels_BN1) / pixels_BN1.shape[1]
        weight_CC, bias_C = self._mask_convolution(torch.float32)
        # Not `average @ weight.T`: OpenVINO 2026.4 takes the weight as `_mask_logits` has it, not turned over.
        return (weight_CC @ average_BC1).squeeze(2) + pixels_BN1.mean(dim=1) * bias_C

    def _decode(self, fused: Tensor, memory: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        decoder = self.model.decoder
        layers: list[DecoderLayer] = list(decoder.layers)  # type: ignore[arg-type]
        keys: list[list[Tensor]] = []
        values: list[list[Tensor]] = []
        small: list[Tensor] = []  # `fused` at each level's size, (B, C, N)
        for level, (features, embedding) in enumerate(zip(memory, decoder.level_embedding, strict=True)):
            size = features.shape[2:]
            value_BCN = features.flatten(2) + embedding[:, None]
            position = sine_positions(size[0], size[1], features.shape[1], features.device).to(features.dtype)
            readers = _readers(decoder, level)
            if readers:
                keys.append(list(self.keys[level](value_BCN + position.flatten(1)).chunk(len(readers), dim=1)))
            values.append([_linear(value_BCN.transpose(1, 2), reader, 2) for reader in readers])
            small.append(_resized(fused, size, halved=level == LEVELS - 1).flatten(2))
        masks: list[Tensor] = []
        queries = decoder.query_features.expand(fused.shape[0], -1, -1)
        for index, layer in enumerate(layers):
            level, visit = index % LEVELS, index // LEVELS
            blocked = self._mask_logits(decoder.norm(queries), small[level]) < 0
            blocked = blocked & ~blocked.all(dim=2, keepdim=True)
            masks.append(blocked)
            cross, own = layer.cross_attention, layer.self_attention
            asking = _linear(queries + decoder.query_positions, cross, 0)
            attended = self._attend(cross, asking, keys[level][visit], values[level][visit], blocked)
            queries = layer.cross_norm(queries + attended)
            positioned = queries + decoder.query_positions
            asking, key_BCQ = _linear(positioned, own, 0), _linear(positioned, own, 1).transpose(1, 2)
            attended = self._attend(own, asking, key_BCQ, _linear(queries, own, 2))
            queries = layer.self_norm(queries + attended)
            queries = layer.ffn_norm(queries + layer.linear2(F.relu(layer.linear1(queries))))
        return decoder.norm(queries), masks

    def _classify(self, queries: Tensor, mask_logits: Tensor, fused: Tensor, text_KE: Tensor) -> Tensor:
        classifier = self.model.classifier
        precision = _precision(classifier)
        queries_BQE = F.normalize(classifier.query_projection(queries.to(precision)), dim=-1)
        background = F.normalize(self._background(fused, mask_logits), dim=-1, eps=NORM_FLOOR).to(precision)
        background = classifier.background_projection(background)
        text = torch.cat([text_KE.expand(queries.shape[0], -1, -1), background[:, None]], dim=1)
        text = F.normalize(text, dim=-1)
        if classifier.adaptation is not None:
            for layer in classifier.adaptation.layers:
                text = self._adapted(layer, text, queries_BQE)
            assert classifier.adaptation.norm is not None
            text = F.normalize(classifier.adaptation.norm(text), dim=-1)
        logits: Tensor = classifier.logit_scale.float() * (queries_BQE.float() @ text.float().transpose(1, 2))
        return logits

    def _adapted(self, layer: nn.TransformerDecoderLayer, text: Tensor, queries: Tensor) -> Tensor:
        """One transformer decoder layer, post-norm, without dropout."""
        own, cross = layer.self_attn, layer.multihead_attn
        for attention, read, norm in ((own, text, layer.norm1), (cross, queries, layer.norm2)):
            keys_BEN, values = _linear(read, attention, 1).transpose(1, 2), _linear(read, attention, 2)
            text = norm(text + self._attend(attention, _linear(text, attention, 0), keys_BEN, values))
        output: Tensor = layer.norm3(text + layer.linear2(F.relu(layer.linear1(text))))
        return output


def _precision(module: nn.Module) -> torch.dtype:
    return next(module.parameters()).dtype


def _to(module: nn.Module, tensors: Sequence[Tensor]) -> list[Tensor]:
    """The tensors in the precision that a part computes in."""
    return [tensor.to(_precision(module)) for tensor in tensors]


def _linear(inputs: Tensor, attention: nn.MultiheadAttention, part: int) -> Tensor:
    """The query (0), key (1) or value (2) projection of torch's packed weights."""
    weight, bias = _weights(attention, part)
    return F.linear(inputs, weight, bias)


def _weights(attention: nn.MultiheadAttention, part: int) -> tuple[Tensor, Tensor]:
    rows = slice(part * attention.embed_dim, (part + 1) * attention.embed_dim)
    return attention.in_proj_weight[rows], attention.in_proj_bias[rows]


def _key_convolution(readers: list[nn.MultiheadAttention]) -> nn.Conv1d:
    """The key projections of several attentions in one product, (B, C, N) each: as scores read them."""
    pairs = [_weights(reader, 1) for reader in readers]
    weight, bias = torch.cat([weight for weight, _ in pairs]), torch.cat([bias for _, bias in pairs])
    made = nn.Conv1d(weight.shape[1], weight.shape[0], 1, device=weight.device, dtype=weight.dtype)
    made.weight.copy_(weight[:, :, None])
    assert made.bias is not None
    made.bias.copy_(bias)
    return made


def _resized(fused: Tensor, size: Sequence[int], halved: bool) -> Tensor:
    """`fused` at a level's size; at half its size, bilinear resizing is the mean of two by two pixels."""
    if halved:
        return F.avg_pool2d(fused, 2)
    return F.interpolate(fused, size, mode="bilinear", align_corners=False)


def _readers(decoder: MaskedDecoder, level: int) -> list[nn.MultiheadAttention]:
    """The attentions that read a level."""
    layers: list[DecoderLayer] = list(decoder.layers)  # type: ignore[arg-type]
    return [layer.cross_attention for layer in layers[level::LEVELS]]


def value_projections(decoder: MaskedDecoder) -> Iterator[Tensor]:
    """Weights of the products in the graph that make a level's values; its keys are made by a convolution."""
    for level in range(LEVELS):
        yield from (_weights(reader, 2)[0] for reader in _readers(decoder, level))


def _attend(
    attention: nn.MultiheadAttention, queries: Tensor, keys_BCN: Tensor, values: Tensor, blocked: Tensor | None = None
) -> Tensor:
    """Multi-head attention over projected queries, keys and values; `blocked` (B, Q, N) may not be attended."""
    queries_BHQC, keys_BHCN, values_BHNC = _heads(attention, queries, keys_BCN, values)
    scores = (queries_BHQC * attention.head_dim**-0.5) @ keys_BHCN
    if blocked is not None:
        scores = scores.masked_fill(blocked[:, None], float("-inf"))
    gathered = (scores.softmax(-1) @ values_BHNC).transpose(1, 2).flatten(2)
    output: Tensor = attention.out_proj(gathered)
    return output


def _attend_fused(
    attention: nn.MultiheadAttention, queries: Tensor, keys_BCN: Tensor, values: Tensor, blocked: Tensor | None = None
) -> Tensor:
    """`_attend` by one operator, which forms no scores in memory."""
    queries_BHQC, keys_BHCN, values_BHNC = _heads(attention, queries, keys_BCN, values)
    allowed = None if blocked is None else ~blocked[:, None]
    gathered = F.scaled_dot_product_attention(queries_BHQC, keys_BHCN.transpose(2, 3), values_BHNC, attn_mask=allowed)
    output: Tensor = attention.out_proj(gathered.transpose(1, 2).flatten(2))
    return output


def _heads(
    attention: nn.MultiheadAttention, queries: Tensor, keys_BCN: Tensor, values: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries (B, H, Q, C/H), keys (B, H, C/H, N) and values (B, H, N, C/H) of each of H heads."""
    heads = attention.num_heads
    asking, read = (tensor.unflatten(-1, (heads, -1)).transpose(1, 2) for tensor in (queries, values))
    return asking, keys_BCN.unflatten(1, (heads, -1)), read
