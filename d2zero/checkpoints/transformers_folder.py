"""Reading a Mask2Former in the folder that `transformers` saves: weights, `config.json`, `preprocessor_config.json`.

transformers has queries, keys and values of an attention apart where we have them joined, and numbers some layers
otherwise. Its weights of before and after version 5 differ in Swin's names; both are read.

Two of its habits are not followed. It stretches an image's sides to multiples of 32, where Mask2Former and we pad. And
a `preprocessor_config.json` may ask for one height and width, whatever the image's proportions: then Mask2Former's own
test size is used.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from d2zero.checkpoints.files import read_safetensors
from d2zero.checkpoints.mask2former import Checkpoint
from d2zero.checkpoints.published import CONSTANTS, Rules, read_arrays, renamed
from d2zero_runtime import D2ZeroError
from d2zero_runtime.checked_json import parse_object
from d2zero_runtime.errors import join_truncated
from d2zero_runtime.images import Preprocessing

CONFIG, PREPROCESSOR = "config.json", "preprocessor_config.json"
WEIGHTS, INDEX, OLD_WEIGHTS = "model.safetensors", "model.safetensors.index.json", "pytorch_model.bin"
BILINEAR = 2  # Pillow's number
Colour = tuple[float, float, float]

_BACKBONE = r"model\.pixel_level_module\.encoder\."
_SWIN = _BACKBONE + r"(?:swin\.)?"
_BLOCK = _SWIN + r"encoder\.layers\.(\d)\.blocks\.(\d+)\."
_OUR_BLOCK = r"backbone.net.layers_\1.blocks.\2."
_RESNET = _BACKBONE + r"encoder\.stages\.(\d)\.layers\.(\d+)\."
_OUR_RESNET = r"backbone.net.layer<\1+1>.\2."
_PIXELS = r"model\.pixel_level_module\.decoder\."
_DECODER = r"model\.transformer_module\.decoder\."
_LAYER = _DECODER + r"layers\.(\d+)\."
# Theirs -> ours, as in `published`; `[0]`, `[1]` and `[2]` are parts of one array, to be joined.
RULES: Rules = (
    (r"class_predictor\.(.+)", r"classifier.linear.\1"),
    (_SWIN + r"embeddings\.patch_embeddings\.projection\.(.+)", r"backbone.net.patch_embed.proj.\1"),
    (_SWIN + r"embeddings\.norm\.(.+)", r"backbone.net.patch_embed.norm.\1"),
    (_BLOCK + r"layernorm_before\.(.+)", _OUR_BLOCK + r"norm1.\3"),
    (_BLOCK + r"layernorm_after\.(.+)", _OUR_BLOCK + r"norm2.\3"),
    (_BLOCK + r"attention\.(?:self\.query|q_proj)\.(.+)", _OUR_BLOCK + r"attn.qkv.\3[0]"),
    (_BLOCK + r"attention\.(?:self\.key|k_proj)\.(.+)", _OUR_BLOCK + r"attn.qkv.\3[1]"),
    (_BLOCK + r"attention\.(?:self\.value|v_proj)\.(.+)", _OUR_BLOCK + r"attn.qkv.\3[2]"),
    (_BLOCK + r"attention\.(?:output\.dense|o_proj)\.(.+)", _OUR_BLOCK + r"attn.proj.\3"),
    (
        _BLOCK + r"attention\.(?:self|relative_position_bias)\.relative_position_bias_table",
        _OUR_BLOCK + r"attn.relative_position_bias_table",
    ),
    (_BLOCK + r"(?:intermediate\.dense|mlp\.fc1)\.(.+)", _OUR_BLOCK + r"mlp.fc1.\3"),
    (_BLOCK + r"(?:output\.dense|mlp\.fc2)\.(.+)", _OUR_BLOCK + r"mlp.fc2.\3"),
    (_SWIN + r"encoder\.layers\.(\d)\.downsample\.(.+)", r"backbone.net.layers_<\1+1>.downsample.\2"),
    (_BACKBONE + r"hidden_states_norms\.stage(\d)\.(.+)", r"backbone.output_norms.<\1-1>.\2"),
    (_BACKBONE + r"embedder\.embedder\.convolution\.(.+)", r"backbone.net.conv1.\1"),
    (_BACKBONE + r"embedder\.embedder\.normalization\.(.+)", r"backbone.net.bn1.\1"),
    (_RESNET + r"shortcut\.convolution\.(.+)", _OUR_RESNET + r"downsample.0.\3"),
    (_RESNET + r"shortcut\.normalization\.(.+)", _OUR_RESNET + r"downsample.1.\3"),
    (_RESNET + r"layer\.(\d)\.convolution\.(.+)", _OUR_RESNET + r"conv<\3+1>.\4"),
    (_RESNET + r"layer\.(\d)\.normalization\.(.+)", _OUR_RESNET + r"bn<\3+1>.\4"),
    (_PIXELS + r"input_projections\.(.+)", r"pixel_decoder.input_projections.\1"),
    (_PIXELS + r"level_embed", "pixel_decoder.level_embedding"),
    (_PIXELS + r"encoder\.layers\.(\d+)\.self_attn\.(.+)", r"pixel_decoder.layers.\1.attention.\2"),
    (_PIXELS + r"encoder\.layers\.(\d+)\.self_attn_layer_norm\.(.+)", r"pixel_decoder.layers.\1.norm1.\2"),
    (_PIXELS + r"encoder\.layers\.(\d+)\.fc(\d)\.(.+)", r"pixel_decoder.layers.\1.linear\2.\3"),
    (_PIXELS + r"encoder\.layers\.(\d+)\.final_layer_norm\.(.+)", r"pixel_decoder.layers.\1.norm2.\2"),
    (_PIXELS + r"adapter_1\.(.+)", r"pixel_decoder.lateral.\1"),
    (_PIXELS + r"layer_1\.(.+)", r"pixel_decoder.fuse.\1"),
    (_PIXELS + r"mask_projection\.(.+)", r"pixel_decoder.mask_features.\1"),
    (r"model\.transformer_module\.queries_features\.weight", "decoder.query_features"),
    (r"model\.transformer_module\.queries_embedder\.weight", "decoder.query_positions"),
    (r"model\.transformer_module\.level_embed\.weight", "decoder.level_embedding"),
    (_LAYER + r"cross_attn\.(.+)", r"decoder.layers.\1.cross_attention.\2"),
    (_LAYER + r"cross_attn_layer_norm\.(.+)", r"decoder.layers.\1.cross_norm.\2"),
    (_LAYER + r"self_attn\.q_proj\.(.+)", r"decoder.layers.\1.self_attention.in_proj_\2[0]"),
    (_LAYER + r"self_attn\.k_proj\.(.+)", r"decoder.layers.\1.self_attention.in_proj_\2[1]"),
    (_LAYER + r"self_attn\.v_proj\.(.+)", r"decoder.layers.\1.self_attention.in_proj_\2[2]"),
    (_LAYER + r"self_attn\.out_proj\.(.+)", r"decoder.layers.\1.self_attention.out_proj.\2"),
    (_LAYER + r"self_attn_layer_norm\.(.+)", r"decoder.layers.\1.self_norm.\2"),
    (_LAYER + r"fc(\d)\.(.+)", r"decoder.layers.\1.linear\2.\3"),
    (_LAYER + r"final_layer_norm\.(.+)", r"decoder.layers.\1.ffn_norm.\2"),
    (_DECODER + r"layernorm\.(.+)", r"decoder.norm.\1"),
    (_DECODER + r"mask_predictor\.mask_embedder\.(\d)\.0\.(.+)", r"decoder.mask_mlp.<\1*2>.\2"),
)
UNUSED = rf"{CONSTANTS}|{_BACKBONE}swin\.layernorm\..+"  # a norm after Swin's last stage, which a backbone does not use
_PART = re.compile(r"(.+)\[[0-2]\]")
# What a configuration may say of a Mask2Former that is like the published ones. Sizes are read off the weights.
_MODEL: dict[str, Any] = {
    "pre_norm": False,
    "enforce_input_projection": False,
    "activation_function": "relu",
    "common_stride": 4,
    "feature_strides": [4, 8, 16, 32],
}
_BACKBONES: dict[str, dict[str, Any]] = {
    "swin": {"hidden_act": "gelu", "layer_norm_eps": 1e-5, "use_absolute_embeddings": False, "patch_size": 4},
    "resnet": {
        "hidden_act": "relu",
        "layer_type": "bottleneck",
        "downsample_in_first_stage": False,
        "downsample_in_bottleneck": False,
    },
}


def read_folder(folder: Path) -> Checkpoint:
    """Read a folder.

    Raises:
        D2ZeroError: A file is missing or damaged, or the model is no Mask2Former like the published ones.
    """
    config = _read_config(folder)
    preprocessing, notes = read_preprocessing(folder)
    arrays, unexpected = renamed(_read_weights(folder), RULES, UNUSED)
    return Checkpoint(joined(arrays), unexpected, _names(folder / CONFIG, config), preprocessing, notes)


def _read_config(folder: Path) -> dict[str, Any]:
    config = _read_json(folder, CONFIG)
    _check_config(folder / CONFIG, config)
    return config


def _read_json(folder: Path, name: str) -> dict[str, Any]:
    path = folder / name
    if not path.is_file():
        raise D2ZeroError(
            f"{folder} has no {name}; a checkpoint of transformers is a folder with {CONFIG} and {WEIGHTS}"
        )
    return parse_object(path.read_bytes(), str(path))


def _check_config(path: Path, config: dict[str, Any]) -> None:
    """Refuse a model that is not built as the published ones are.

    Raises:
        D2ZeroError: Names the entry.
    """
    if config.get("model_type") != "mask2former":
        raise D2ZeroError(f"{path}: model_type is {config.get('model_type')!r}, expected 'mask2former'")
    _require(path, config, _MODEL)
    backbone = config.get("backbone_config")
    kind = backbone.get("model_type") if isinstance(backbone, dict) else config.get("backbone")
    if not isinstance(backbone, dict) or not isinstance(kind, str) or kind not in _BACKBONES:
        raise D2ZeroError(f"{path}: the backbone is {kind!r}, expected {' or '.join(map(repr, _BACKBONES))}")
    _require(path, backbone, _BACKBONES[kind], "backbone_config.")


def _require(path: Path, config: dict[str, Any], expected: dict[str, Any], prefix: str = "") -> None:
    for name, value in expected.items():
        if config.get(name, value) != value:
            raise D2ZeroError(f"{path}: {prefix}{name} is {config[name]!r}; only {value!r} is supported")


def _names(path: Path, config: dict[str, Any]) -> list[str] | None:
    """Class names in order, if the configuration has them: not those that transformers makes up, `LABEL_0` and so on.

    Raises:
        D2ZeroError: They are not one text for each of the numbers from 0.
    """
    labels = config.get("id2label")
    if labels is None:
        return None
    numbers = [str(number) for number in range(len(labels))] if isinstance(labels, dict) else []
    if not isinstance(labels, dict) or set(labels) != set(numbers):
        raise D2ZeroError(f"{path}: id2label must name the classes 0, 1, 2, …; give --names instead")
    names = [str(labels[number]) for number in numbers]
    return None if all(name == f"LABEL_{number}" for number, name in enumerate(names)) else names


def _read_weights(folder: Path) -> dict[str, Tensor]:
    """All arrays of the folder, from one file or several.

    Raises:
        D2ZeroError: There are none, or a file is missing or damaged.
    """
    files = weight_files(folder)
    if files == [folder / OLD_WEIGHTS]:
        return read_arrays(folder / OLD_WEIGHTS)
    return {name: array for path in files for name, array in read_safetensors(path)[1].items()}


def weight_files(folder: Path) -> list[Path]:
    """The files with the folder's weights.

    Raises:
        D2ZeroError: There are none, or one of several is missing.
    """
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if (folder / INDEX).is_file():
        return _shards(folder)
    if (folder / OLD_WEIGHTS).is_file():
        return [folder / OLD_WEIGHTS]
    raise D2ZeroError(f"{folder} has no weights: expected {WEIGHTS}, {INDEX} or {OLD_WEIGHTS}; download it again")


def _shards(folder: Path) -> list[Path]:
    places = _read_json(folder, INDEX).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()):
        raise D2ZeroError(f"{folder / INDEX} is damaged: weight_map must say which file each array is in")
    files = sorted(set(places.values()))
    missing = [name for name in files if Path(name).name != name or not (folder / name).is_file()]
    if missing:
        raise D2ZeroError(f"{folder} is incomplete: it lacks {join_truncated(missing)}; download it again")
    return [folder / name for name in files]


def joined(arrays: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Arrays with those in three parts, `name[0]` to `name[2]`, joined along the first axis; others are kept."""
    found = dict(arrays)
    for whole in dict.fromkeys(match[1] for match in map(_PART.fullmatch, arrays) if match):
        names = [f"{whole}[{part}]" for part in range(3)]
        parts = [arrays[name] for name in names if name in arrays]
        alike = len({(part.shape, part.dtype) for part in parts}) == 1
        if len(parts) == 3 and alike and parts[0].dim() and whole not in arrays:
            found[whole] = torch.cat([found.pop(name) for name in names])
    return found


def read_preprocessing(folder: Path) -> tuple[Preprocessing, tuple[str, ...]]:
    """How the folder wants images to be prepared, and what of it is not followed.

    Raises:
        D2ZeroError: Its file is damaged, or it is no Mask2Former's folder.
    """
    _read_config(folder)
    default = Preprocessing()
    if not (folder / PREPROCESSOR).is_file():
        return default, (f"{folder} has no {PREPROCESSOR}; images are prepared as Mask2Former's own",)
    values, notes = _read_json(folder, PREPROCESSOR), []
    if values.get("resample", BILINEAR) != BILINEAR:
        notes.append(f"{PREPROCESSOR} asks for resampling filter {values['resample']}; images are resized bilinearly")
    try:
        edges = _edges(values)
        if edges is None:
            resizes = values.get("do_resize", True)
            what = f"resizes images to {values.get('size')}" if resizes else "does not resize images"
            notes.append(
                f"{PREPROCESSOR} {what}; here they are resized as in Mask2Former's tests, in proportion: shortest edge"
                f" {default.shortest_edge}, longest at most {default.longest_edge}"
            )
        shortest, longest = edges or (default.shortest_edge, default.longest_edge)
        mean, std = _scaling(values)
        return replace(default, shortest_edge=shortest, longest_edge=longest, mean=mean, std=std), tuple(notes)
    except (TypeError, ValueError, ZeroDivisionError, OverflowError) as error:
        raise D2ZeroError(f"{folder / PREPROCESSOR} is damaged: {error}; download it again") from error


def _edges(values: dict[str, Any]) -> tuple[int, int] | None:
    """Shortest and longest edge, if images keep their proportions."""
    if not values.get("do_resize", True):
        return None
    size = values.get("size", {})
    if isinstance(size, int):  # of transformers before 4.26
        size = {"shortest_edge": size}
    if "shortest_edge" not in size:
        return None
    longest = size.get("longest_edge") or values.get("max_size") or Preprocessing().longest_edge
    return int(size["shortest_edge"]), int(longest)


def _scaling(values: dict[str, Any]) -> tuple[Colour, Colour]:
    """Mean and standard deviation in grey levels; transformers has them for images that are rescaled first."""
    grey_levels = 1 / float(values.get("rescale_factor", 1 / 255)) if values.get("do_rescale", True) else 1.0
    if not values.get("do_normalize", True):
        return (0, 0, 0), _scaled((1, 1, 1), grey_levels)
    mean, std = values.get("image_mean", (0.485, 0.456, 0.406)), values.get("image_std", (0.229, 0.224, 0.225))
    return _scaled(mean, grey_levels), _scaled(std, grey_levels)


def _scaled(colour: Sequence[float], factor: float) -> Colour:
    """Three channels times a factor, to a thousandth: single precision leaves so much of the published 123.675."""
    red, green, blue = (round(float(channel) * factor, 3) for channel in colour)
    return red, green, blue
