"""Small Mask2Formers of transformers with random weights, and their arrays in detectron2's names.

The names are translated by plain replacements, in the other direction than d2zero's rules and without them.
"""

import re
from pathlib import Path
from typing import Any

import torch
import transformers as typed_transformers
from safetensors.torch import load_file
from torch import Tensor

from studies.mask2former import draw_weights

transformers: Any = typed_transformers  # its configurations take more arguments than they declare
STAGES = ["stage1", "stage2", "stage3", "stage4"]
NAMES = ("cat", "dog", "traffic light", "tree", "car")
SMALL = {
    "feature_size": 64,
    "mask_feature_size": 64,
    "hidden_dim": 64,
    "encoder_feedforward_dim": 96,
    "dim_feedforward": 128,
    "encoder_layers": 2,
    "decoder_layers": 5,  # heads; one layer fewer
    "num_queries": 12,
    "id2label": dict(enumerate(NAMES)),
}


def swin(**options: Any) -> Any:
    """A configuration; two blocks per stage and windows of 3 by default."""
    small = {"embed_dim": 24, "depths": [2, 2, 2, 2], "num_heads": [1, 2, 3, 4], "window_size": 3, "image_size": 64}
    return transformers.SwinConfig(**{**small, **options}, out_features=STAGES)


def resnet(**options: Any) -> Any:
    """A configuration; a ResNet-50 with fewer blocks and channels by default."""
    small = {"hidden_sizes": [32, 64, 96, 128], "depths": [1, 2, 1, 1]}
    return transformers.ResNetConfig(**{**small, **options}, out_features=STAGES)


def empty_mask2former(backbone: Any, **options: Any) -> Any:
    """A model as transformers initialises it, in evaluation mode."""
    config = transformers.Mask2FormerConfig(backbone_config=backbone, **options)
    return transformers.Mask2FormerForUniversalSegmentation(config).eval()


def mask2former(backbone: Any, seed: int = 0) -> Any:
    """A small model with random weights, whose outputs are some units large."""
    model = empty_mask2former(backbone, **SMALL)
    draw_weights(model, seed)
    return model


DETECTRON2 = (  # pieces of transformers' names -> detectron2's, replaced in this order
    ("class_predictor", "sem_seg_head.predictor.class_embed"),
    ("model.pixel_level_module.encoder.embeddings.patch_embeddings.projection", "backbone.patch_embed.proj"),
    ("model.pixel_level_module.encoder.embeddings.norm", "backbone.patch_embed.norm"),
    ("model.pixel_level_module.encoder.embedder.embedder.convolution", "backbone.stem.conv1"),
    ("model.pixel_level_module.encoder.embedder.embedder.normalization", "backbone.stem.conv1.norm"),
    *((f"encoder.hidden_states_norms.stage{stage}", f"backbone.norm{stage - 1}") for stage in range(1, 5)),
    *((f"encoder.encoder.stages.{stage}.layers", f"backbone.res{stage + 2}") for stage in range(4)),
    *((f".layer.{conv}.convolution", f".conv{conv + 1}") for conv in range(3)),
    *((f".layer.{conv}.normalization", f".conv{conv + 1}.norm") for conv in range(3)),
    ("shortcut.convolution", "shortcut"),
    ("shortcut.normalization", "shortcut.norm"),
    ("encoder.encoder.layers", "backbone.layers"),
    ("layernorm_before", "norm1"),
    ("layernorm_after", "norm2"),
    ("attention.output.dense", "attn.proj"),
    ("attention.self.relative", "attn.relative"),
    ("attention.self", "attn"),
    ("intermediate.dense", "mlp.fc1"),
    ("output.dense", "mlp.fc2"),
    ("model.pixel_level_module.backbone", "backbone"),
    ("model.pixel_level_module.decoder", "sem_seg_head.pixel_decoder"),
    ("input_projections", "input_proj"),
    ("pixel_decoder.level_embed", "pixel_decoder.transformer.level_embed"),
    ("pixel_decoder.encoder", "pixel_decoder.transformer.encoder"),
    ("mask_projection", "mask_features"),
    ("adapter_1.0", "adapter_1"),
    ("adapter_1.1", "adapter_1.norm"),
    ("layer_1.0", "layer_1"),
    ("layer_1.1", "layer_1.norm"),
    ("model.transformer_module.decoder.layernorm", "sem_seg_head.predictor.decoder_norm"),
    ("model.transformer_module.decoder.mask_predictor.mask_embedder", "sem_seg_head.predictor.mask_embed.layers"),
    ("model.transformer_module.queries_features", "sem_seg_head.predictor.query_feat"),
    ("model.transformer_module.queries_embedder", "sem_seg_head.predictor.query_embed"),
    ("model.transformer_module.level_embed", "sem_seg_head.predictor.level_embed"),
)
_PARTS = {  # of a layer, in the encoder and in the decoder
    "transformer.encoder.layers": {
        "self_attn_layer_norm": "norm1",
        "final_layer_norm": "norm2",
        "fc1": "linear1",
        "fc2": "linear2",
    },
    "model.transformer_module.decoder.layers": {
        "self_attn_layer_norm": "transformer_self_attention_layers.{}.norm",
        "cross_attn_layer_norm": "transformer_cross_attention_layers.{}.norm",
        "final_layer_norm": "transformer_ffn_layers.{}.norm",
        "self_attn": "transformer_self_attention_layers.{}.self_attn",
        "cross_attn": "transformer_cross_attention_layers.{}.multihead_attn",
        "fc1": "transformer_ffn_layers.{}.linear1",
        "fc2": "transformer_ffn_layers.{}.linear2",
    },
}


def detectron2_arrays(folder: Path) -> dict[str, Tensor]:
    """The weights of a folder of transformers as the published code saves them."""
    theirs = load_file(folder / "model.safetensors")
    named = {_detectron2_name(name): array for name, array in theirs.items() if "swin.layernorm" not in name}
    named = {name: array for name, array in named.items() if not name.endswith("num_batches_tracked")}
    for name in [name for name in named if re.search(r"\.(query|q_proj)\.", name)]:
        parts = [named.pop(name.replace("query", part).replace("q_proj", f"{part[0]}_proj")) for part in _QKV]
        joined = name.replace("query", "qkv").replace("q_proj.", "in_proj_")
        named[joined] = torch.cat(parts)
    for name in [name for name in named if name.endswith("relative_position_bias_table")]:
        named[name.replace("bias_table", "index")] = torch.zeros(9, 9, dtype=torch.int64)
    return named


_QKV = ("query", "key", "value")


def _detectron2_name(name: str) -> str:
    for theirs, published in DETECTRON2:
        name = name.replace(theirs, published)
    name = re.sub(r"(mask_embed\.layers\.\d)\.0", r"\1", name)
    for where, parts in _PARTS.items():
        match = re.fullmatch(rf"(.*{re.escape(where)})\.(\d+)\.(\w+?)\.(.+)", name)
        if match:
            part = parts.get(match[3], match[3])
            layer = f"sem_seg_head.predictor.{part}" if "{}" in part else f"{match[1]}.{{}}.{part}"
            return f"{layer.format(match[2])}.{match[4]}"
    return name
