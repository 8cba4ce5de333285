"""The published checkpoint's array names, and the recorded reference weights for them.

The reference outputs (`reference_*.npz`) were recorded with weights that depend on an array's published
name and shape only, so that no checkpoint has to travel. This is that rule.
"""

import zlib
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

Shapes = dict[str, tuple[int, ...]]
SEED = 7


def published_shapes(seen_classes: int, text_dim: int = 300) -> Shapes:
    """Names and shapes of a published ResNet-50 checkpoint."""
    return dict(
        [
            *_backbone(),
            *_pixel_decoder("sem_seg_head.pixel_decoder"),
            *_predictor("sem_seg_head.predictor", text_dim),
            ("criterion.empty_weight", (seen_classes + 1,)),
        ]
    )


def reference_weights(shapes: Shapes, seed: int = SEED) -> dict[str, NDArray[np.float32]]:
    """One float32 array a name."""
    return {name: _weight(name, shape, seed) for name, shape in shapes.items()}


def _weight(name: str, shape: tuple[int, ...], seed: int) -> NDArray[np.float32]:
    key = [zlib.crc32(name.encode()), seed]
    noise = np.random.Generator(np.random.Philox(key=key)).standard_normal(shape, dtype=np.float32)
    return np.asarray(_scaled(name, shape, noise), np.float32)


def _scaled(name: str, shape: tuple[int, ...], noise: NDArray[np.float32]) -> NDArray[np.floating]:
    leaf = name.rpartition(".")[2]
    if leaf == "logit_scale":
        return np.full(shape, np.log(100.0), np.float32)
    if leaf == "empty_weight":
        return np.append(np.ones(shape[0] - 1), 0.1).astype(np.float32)
    if leaf == "running_var":
        return 1 + 0.1 * np.abs(noise)
    if leaf == "running_mean":
        return 0.1 * noise
    if len(shape) <= 1:
        if leaf != "weight":
            return 0.05 * noise
        gain = 0.25 if "backbone" in name and ".conv3.norm." in name else 1.0
        return gain * (1 + 0.1 * noise)
    for part, factor in (("query_feat", 4), ("query_embed", 2), ("level_embed", 2)):
        if part in name:
            return factor * noise
    fan_in = int(np.prod(shape[1:]))
    scale = np.sqrt(1.0 / fan_in)
    if "transformer_cross_attention" in name and "in_proj_weight" in name:
        return 2.0 * noise * scale
    if "transformer_ffn" in name or "self_attention_layers" in name:
        return 0.5 * noise * scale
    if "sampling_offsets" in name:
        return 2.0 * noise / np.sqrt(fan_in)
    return noise * np.sqrt((2.0 if "backbone" in name else 1.0) / fan_in)


Entries = Iterator[tuple[str, tuple[int, ...]]]


def _linear(name: str, out: int, into: int) -> Entries:
    yield f"{name}.weight", (out, into)
    yield f"{name}.bias", (out,)


def _norm(name: str, width: int) -> Entries:
    yield f"{name}.weight", (width,)
    yield f"{name}.bias", (width,)


def _attention(name: str, width: int) -> Entries:
    yield f"{name}.in_proj_weight", (3 * width, width)
    yield f"{name}.in_proj_bias", (3 * width,)
    yield from _linear(f"{name}.out_proj", width, width)


def _conv_norm(name: str, out: int, into: int, kernel: int) -> Entries:
    yield f"{name}.weight", (out, into, kernel, kernel)
    for leaf in ("weight", "bias", "running_mean", "running_var"):
        yield f"{name}.norm.{leaf}", (out,)


def _backbone() -> Entries:
    yield from _conv_norm("backbone.stem.conv1", 64, 3, 7)
    into = 64
    for stage, (blocks, width) in enumerate(zip((3, 4, 6, 3), (64, 128, 256, 512), strict=True), 2):
        for block in range(blocks):
            name = f"backbone.res{stage}.{block}"
            if block == 0:
                yield from _conv_norm(f"{name}.shortcut", 4 * width, into, 1)
            yield from _conv_norm(f"{name}.conv1", width, into, 1)
            yield from _conv_norm(f"{name}.conv2", width, width, 3)
            yield from _conv_norm(f"{name}.conv3", 4 * width, width, 1)
            into = 4 * width


def _pixel_decoder(name: str) -> Entries:
    for level, channels in enumerate((2048, 1024, 512)):
        yield f"{name}.input_proj.{level}.0.weight", (256, channels, 1, 1)
        yield f"{name}.input_proj.{level}.0.bias", (256,)
        yield from _norm(f"{name}.input_proj.{level}.1", 256)
    yield f"{name}.transformer.level_embed", (3, 256)
    for layer in range(6):
        prefix = f"{name}.transformer.encoder.layers.{layer}"
        yield from _linear(f"{prefix}.self_attn.sampling_offsets", 192, 256)
        yield from _linear(f"{prefix}.self_attn.attention_weights", 96, 256)
        yield from _linear(f"{prefix}.self_attn.value_proj", 256, 256)
        yield from _linear(f"{prefix}.self_attn.output_proj", 256, 256)
        yield from _norm(f"{prefix}.norm1", 256)
        yield from _linear(f"{prefix}.linear1", 1024, 256)
        yield from _linear(f"{prefix}.linear2", 256, 1024)
        yield from _norm(f"{prefix}.norm2", 256)
    yield f"{name}.mask_features.weight", (256, 256, 1, 1)
    yield f"{name}.mask_features.bias", (256,)
    for conv, kernel in (("adapter_1", 1), ("layer_1", 3)):
        yield f"{name}.{conv}.weight", (256, 256, kernel, kernel)
        yield from _norm(f"{name}.{conv}.norm", 256)


def _predictor(name: str, text_dim: int) -> Entries:
    yield f"{name}.logit_scale", (1,)
    for layer in range(9):
        self_name, cross_name, ffn_name = (
            f"{name}.transformer_{part}_layers.{layer}" for part in ("self_attention", "cross_attention", "ffn")
        )
        yield from _attention(f"{self_name}.self_attn", 256)
        yield from _norm(f"{self_name}.norm", 256)
        yield from _attention(f"{cross_name}.multihead_attn", 256)
        yield from _norm(f"{cross_name}.norm", 256)
        yield from _linear(f"{ffn_name}.linear1", 2048, 256)
        yield from _linear(f"{ffn_name}.linear2", 256, 2048)
        yield from _norm(f"{ffn_name}.norm", 256)
    yield from _norm(f"{name}.decoder_norm", 256)
    yield f"{name}.query_feat.weight", (100, 256)
    yield f"{name}.query_embed.weight", (100, 256)
    yield f"{name}.level_embed.weight", (3, 256)
    for layer in range(3):
        yield from _linear(f"{name}.mask_embed.layers.{layer}", 256, 256)
    yield from _linear(f"{name}.fc_semantic", 512, 256)
    prefix = f"{name}.transformer.layers.0"
    yield from _attention(f"{prefix}.self_attn", 512)
    yield from _attention(f"{prefix}.multihead_attn", 512)
    yield from _linear(f"{prefix}.linear1", 2048, 512)
    yield from _linear(f"{prefix}.linear2", 512, 2048)
    for norm in ("norm1", "norm2", "norm3"):
        yield from _norm(f"{prefix}.{norm}", 512)
    yield from _norm(f"{name}.transformer.norm", 512)
    yield from _linear(f"{name}.text_projection", 512, text_dim)
    yield from _linear(f"{name}.text_projection_2", 512, 256)
