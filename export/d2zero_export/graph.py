"""The network as it is exported: the same function with less work, and no control flow that depends on data.

Exact accelerations (equal in real arithmetic):
- the classifier runs at the last head only;
- attention masks come from mask features that are resized once per level: resizing and the matmul with a
  query's mask embedding commute, so masks at full resolution are formed once, at the end;
- the last convolution of the pixel decoder, 1×1, is not run over all pixels: it commutes with resizing and with
  averaging, and is folded into the last layer of the queries' mask MLP and applied to the background's average;
- keys of a level are projected in one matmul for all layers that read it, and come out as attention reads them;
- the first head's mask embedding depends on no input and is a constant.

Letters: B batch, Q queries, K classes, C hidden channels, D text width, E semantic width, N pixels of a level.
"""

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from d2zero.model import D2Zero
from d2zero.model.classifier import NORM_FLOOR, background
from d2zero.model.config import LEVELS
from d2zero.model.decoder import DecoderLayer, MaskedDecoder, MaskMLP
from d2zero.model.positions import sine_positions
from d2zero_export.attention import FusedAttention, MatmulAttention, packed_weights, projected, readers
from d2zero_export.classifier import classifier_graph

ATTENTION_MASK = "attention_mask_"  # the graph's values of that name and a layer's number: where it must not look


class InferenceGraph(nn.Module):
    """`(images, class_embeddings) → (class_logits, mask_logits, queries, background)`, all float32.

    Between them, each part computes in the precision of its own weights (`precision.cast_to`).

    Args:
        model: In evaluation mode; its weights are shared, except those that are joined or folded, which are copied.
        baked: Use the model's own class embeddings, as a constant, and take none.
        fused: For what torch itself compiles: fused attention, and no copy of feature maps in another precision.
    """

    text_KE: Tensor | None
    first_QC: Tensor

    def __init__(self, model: D2Zero, baked: bool = False, fused: bool = False) -> None:
        super().__init__()
        self.model, self.fused = model, fused
        with torch.no_grad():
            self.attention = (FusedAttention if fused else MatmulAttention)(model.decoder)
            self.classifier = classifier_graph(model, self.attention)
            self.register_buffer("text_KE", self.classifier.project(model.class_embeddings) if baked else None)
            self.mask_mlp = folded_mask_mlp(model.decoder.mask_mlp, model.pixel_decoder.mask_features)
            self.register_buffer("first_QC", self._mask_embeddings(model.decoder.norm(model.decoder.query_features)))

    def forward(self, images: Tensor, class_embeddings: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Run the network.

        Args:
            images: (B, 3, H, W) normalised and padded; H and W multiples of 32.
            class_embeddings: (K, D); the model's own if left out.

        Returns:
            Class logits (B, Q, K + 1), mask logits (B, Q, H/4, W/4), queries (B, Q, C), background (B, C).
        """
        fused, memory = self._features(images)
        queries = self._decode(fused, memory)
        text_KE = self.text_KE
        if text_KE is None:
            text_KE = self.classifier.project(
                self.model.class_embeddings if class_embeddings is None else class_embeddings
            )
        mask_logits = self._mask_logits(self._mask_embeddings(queries), fused.flatten(2))
        mask_logits = mask_logits.unflatten(2, fused.shape[2:]).float()
        if self.model.classifier.reads_background:
            background = F.normalize(self._background(fused, mask_logits), dim=-1, eps=NORM_FLOOR)
        else:
            background = torch.zeros_like(queries[:, 0], dtype=torch.float32)
        return self.classifier.classify(queries, background, text_KE), mask_logits, queries.float(), background

    def _features(self, images: Tensor) -> tuple[Tensor, list[Tensor]]:
        backbone, pixel_decoder, decoder = self.model.backbone, self.model.pixel_decoder, self.model.decoder
        features = backbone(*_to(backbone, [images]))
        fused, memory = pixel_decoder.fused(_to(pixel_decoder, features))
        fused, *memory = _to(decoder.layers, [fused, *memory])
        return fused, memory

    def _mask_embeddings(self, normalised: Tensor) -> Tensor:
        """(…, C + 1) of normalised queries: what a pixel of the fused features is multiplied by, and what is added."""
        embeddings: Tensor = self.mask_mlp(*_to(self.mask_mlp, [normalised]))
        return embeddings

    def _mask_logits(self, embeddings: Tensor, fused_BCN: Tensor) -> Tensor:
        """Mask logits (B, Q, N)."""
        embeddings = embeddings.to(fused_BCN.dtype)
        logits: Tensor = embeddings[..., :-1] @ fused_BCN + embeddings[..., -1:]
        return logits

    def _background(self, fused: Tensor, mask_logits: Tensor) -> Tensor:
        """The mean mask feature of what no query claims, (B, C) float32, not normalised."""
        pixels_BN = background(mask_logits).flatten(1)
        share_B1 = pixels_BN.float().mean(dim=1, keepdim=True)
        if self.fused:  # read and added up in one pass, where ONNX's runtimes would write the weighted rows first
            total_BC = (fused.flatten(2) * pixels_BN[:, None]).sum(dim=2, dtype=torch.float32)
        else:
            total_BC = (fused.float().flatten(2) @ pixels_BN.float()[:, :, None]).squeeze(2)
        average_BC1 = (total_BC / pixels_BN.shape[1])[:, :, None]
        convolution = self.model.pixel_decoder.mask_features
        assert convolution.bias is not None
        # Not `average @ weight.T`: OpenVINO 2026.4 multiplied by the weight as it is, not transposed.
        moved_BC = (convolution.weight.flatten(1).float() @ average_BC1).squeeze(2)
        return moved_BC + share_B1 * convolution.bias.float()

    def _decode(self, fused: Tensor, memory: list[Tensor]) -> Tensor:
        """Normalised queries (B, Q, C)."""
        decoder, attend = self.model.decoder, self.attention
        layers: list[DecoderLayer] = list(decoder.layers)  # type: ignore[arg-type]
        keys, values = [], []
        small: list[Tensor] = []  # `fused` at each level's size, (B, C, N)
        for level, (features, embedding) in enumerate(zip(memory, decoder.level_embedding, strict=True)):
            size = features.shape[2:]
            value_BCN = features.flatten(2) + embedding[:, None]
            position = sine_positions(size[0], size[1], features.shape[1], features.device).to(features.dtype)
            level_keys, level_values = attend.project_level(level, value_BCN, position.flatten(1))
            keys.append(level_keys)
            values.append(level_values)
            small.append(_resized(fused, size, halved=level == LEVELS - 1).flatten(2))
        queries = decoder.query_features.expand(fused.shape[0], -1, -1)
        for index, layer in enumerate(layers):
            level, visit = index % LEVELS, index // LEVELS
            if index:
                embeddings = self._mask_embeddings(decoder.norm(queries))
            else:
                embeddings = self.first_QC.expand(fused.shape[0], -1, -1)
            mask_logits = self._mask_logits(embeddings, small[level])
            cross, own = layer.cross_attention, layer.self_attention
            asking = projected(queries + decoder.query_positions, cross, 0)
            attended = attend(cross, asking, keys[level][visit], values[level][visit], mask_logits)
            queries = layer.cross_norm(queries + attended)
            positioned = queries + decoder.query_positions
            asking, own_keys = projected(positioned, own, 0), attend.keys(own, positioned)
            queries = layer.self_norm(queries + attend(own, asking, own_keys, projected(queries, own, 2)))
            queries = layer.ffn_norm(queries + layer.linear2(F.relu(layer.linear1(queries))))
        normalised: Tensor = decoder.norm(queries)
        return normalised


def _precision(module: nn.Module) -> torch.dtype:
    return next(module.parameters()).dtype


def _to(module: nn.Module, tensors: Sequence[Tensor]) -> list[Tensor]:
    """The tensors in the precision that a part computes in."""
    return [tensor.to(_precision(module)) for tensor in tensors]


def folded_mask_mlp(mask_mlp: MaskMLP, convolution: nn.Conv2d) -> nn.Sequential:
    """The mask MLP with a 1×1 convolution of what it is multiplied with folded into its last layer, exactly.

    (W₃h + b₃)·(Wf + b) = (Wᵀ(W₃h + b₃))·f + b·(W₃h + b₃): C outputs for the fused features f and one more to add.
    """
    *first, last = mask_mlp
    assert isinstance(last, nn.Linear) and convolution.bias is not None
    moved = torch.cat([convolution.weight.flatten(1).T, convolution.bias[None]]).double()
    folded = nn.Linear(last.in_features, len(moved), device=last.weight.device, dtype=last.weight.dtype)
    folded.weight.copy_(moved @ last.weight.double())
    folded.bias.copy_(moved @ last.bias.double())
    return nn.Sequential(*first, folded)


def _resized(fused: Tensor, size: Sequence[int], halved: bool) -> Tensor:
    """`fused` at a level's size; at half its size, bilinear resizing is the mean of two by two pixels."""
    if halved:
        return F.avg_pool2d(fused, 2)
    return F.interpolate(fused, size, mode="bilinear", align_corners=False)


def value_projections(decoder: MaskedDecoder) -> Iterator[Tensor]:
    """Weights of the matmuls in an ONNX graph that make a level's values; its keys are made by a convolution."""
    for level in range(LEVELS):
        yield from (packed_weights(reader, 2)[0] for reader in readers(decoder, level))
