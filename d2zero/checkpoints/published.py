"""Reading published D2Zero checkpoints: every array accounted for by name, nothing executed.

Published files are detectron2's: `.pth` saved by torch (`{"model": {name: tensor}}`) or `.pkl` (a pickled
dict of NumPy arrays). An older layout leaves `pixel_decoder.` out of the pixel decoder's names. The names are
Mask2Former's, whose own checkpoints `mask2former` reads.
"""

import operator
import re
import warnings
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from d2zero.checkpoints.fit import check_compatible
from d2zero.checkpoints.plain_pickle import read_pickle
from d2zero.model import D2Zero, ModelConfig, build
from d2zero_runtime import D2ZeroError, Vocabulary

# published name -> ours, the first rule that matches the whole name; `<2-1>` in a name is computed
Rules = Sequence[tuple[str, str]]
_HEAD = r"sem_seg_head\."
_PIXELS = _HEAD + r"(?:pixel_decoder\.)?"
_PREDICTOR = _HEAD + r"predictor\."
DETECTRON2_RULES: Rules = (
    (r"backbone\.stem\.conv1\.norm\.(.+)", r"backbone.net.bn1.\1"),
    (r"backbone\.stem\.conv1\.(.+)", r"backbone.net.conv1.\1"),
    (r"backbone\.res(\d)\.(\d+)\.shortcut\.norm\.(.+)", r"backbone.net.layer<\1-1>.\2.downsample.1.\3"),
    (r"backbone\.res(\d)\.(\d+)\.shortcut\.(.+)", r"backbone.net.layer<\1-1>.\2.downsample.0.\3"),
    (r"backbone\.res(\d)\.(\d+)\.conv(\d)\.norm\.(.+)", r"backbone.net.layer<\1-1>.\2.bn\3.\4"),
    (r"backbone\.res(\d)\.(\d+)\.conv(\d)\.(.+)", r"backbone.net.layer<\1-1>.\2.conv\3.\4"),
    (r"backbone\.patch_embed\.(.+)", r"backbone.net.patch_embed.\1"),
    (r"backbone\.layers\.(\d)\.blocks\.(.+)", r"backbone.net.layers_\1.blocks.\2"),
    (r"backbone\.layers\.(\d)\.downsample\.(.+)", r"backbone.net.layers_<\1+1>.downsample.\2"),  # timm's come first
    (r"backbone\.norm(\d)\.(.+)", r"backbone.output_norms.\1.\2"),
    (_PREDICTOR + r"class_embed\.(.+)", r"classifier.linear.\1"),
    (_PREDICTOR + r"logit_scale", "classifier.logit_scale"),
    (_PREDICTOR + r"fc_semantic\.(.+)", r"classifier.query_projection.\1"),
    (_PREDICTOR + r"text_projection\.(.+)", r"classifier.text_projection.\1"),
    (_PREDICTOR + r"text_projection_2\.(.+)", r"classifier.background_projection.\1"),
    (_PREDICTOR + r"transformer\.(.+)", r"classifier.adaptation.\1"),
    (_PREDICTOR + r"transformer_self_attention_layers\.(\d+)\.self_attn\.(.+)", r"decoder.layers.\1.self_attention.\2"),
    (_PREDICTOR + r"transformer_self_attention_layers\.(\d+)\.norm\.(.+)", r"decoder.layers.\1.self_norm.\2"),
    (
        _PREDICTOR + r"transformer_cross_attention_layers\.(\d+)\.multihead_attn\.(.+)",
        r"decoder.layers.\1.cross_attention.\2",
    ),
    (_PREDICTOR + r"transformer_cross_attention_layers\.(\d+)\.norm\.(.+)", r"decoder.layers.\1.cross_norm.\2"),
    (_PREDICTOR + r"transformer_ffn_layers\.(\d+)\.norm\.(.+)", r"decoder.layers.\1.ffn_norm.\2"),
    (_PREDICTOR + r"transformer_ffn_layers\.(\d+)\.(.+)", r"decoder.layers.\1.\2"),
    (_PREDICTOR + r"decoder_norm\.(.+)", r"decoder.norm.\1"),
    (_PREDICTOR + r"(?:query_feat|static_query)\.weight", "decoder.query_features"),
    (_PREDICTOR + r"query_embed\.weight", "decoder.query_positions"),
    (_PREDICTOR + r"level_embed\.weight", "decoder.level_embedding"),
    (_PREDICTOR + r"mask_embed\.layers\.(\d+)\.(.+)", r"decoder.mask_mlp.<\1*2>.\2"),  # among ReLUs
    (_PIXELS + r"input_proj\.(\d+)\.(.+)", r"pixel_decoder.input_projections.\1.\2"),
    (_PIXELS + r"transformer\.level_embed", "pixel_decoder.level_embedding"),
    (_PIXELS + r"transformer\.encoder\.layers\.(\d+)\.self_attn\.(.+)", r"pixel_decoder.layers.\1.attention.\2"),
    (_PIXELS + r"transformer\.encoder\.layers\.(\d+)\.(.+)", r"pixel_decoder.layers.\1.\2"),
    (_PIXELS + r"adapter_1\.norm\.(.+)", r"pixel_decoder.lateral.1.\1"),
    (_PIXELS + r"adapter_1\.(.+)", r"pixel_decoder.lateral.0.\1"),
    (_PIXELS + r"layer_1\.norm\.(.+)", r"pixel_decoder.fuse.1.\1"),
    (_PIXELS + r"layer_1\.(.+)", r"pixel_decoder.fuse.0.\1"),
    (_PIXELS + r"mask_features\.(.+)", r"pixel_decoder.mask_features.\1"),
)
_LOSS_WEIGHT = "criterion.empty_weight"  # (seen classes + 1,): a constant of the loss, not of the model
# Constants of the loss, of training and of Swin's windows, which are no weights.
CONSTANTS = r"criterion\.empty_weight|.+\.(?:num_batches_tracked|relative_position_index)"
_ARITHMETIC = {"+": operator.add, "-": operator.sub, "*": operator.mul}


def our_name(published: str, rules: Rules = DETECTRON2_RULES) -> str | None:
    """Our name of a published array, or None if it has none."""
    for pattern, replacement in rules:
        match = re.fullmatch(pattern, published)
        if match:
            return re.sub(r"<(\d{1,4})([-+*])(\d)>", _computed, match.expand(replacement))
    return None


def _computed(match: re.Match[str]) -> str:
    return str(_ARITHMETIC[match[2]](int(match[1]), int(match[3])))


def renamed(
    arrays: Mapping[str, Tensor], rules: Rules = DETECTRON2_RULES, unused: str = CONSTANTS
) -> tuple[dict[str, Tensor], list[str]]:
    """Arrays under our names, and the names that have none or one that is taken.

    Args:
        arrays: A file's.
        rules: Its names and ours, as in `our_name`.
        unused: A pattern of names that are left out.
    """
    ours: dict[str, Tensor] = {}
    unexpected = []
    for published, array in arrays.items():
        if re.fullmatch(unused, published):
            continue
        name = our_name(published, rules)
        if name is None or name in ours:
            unexpected.append(published)
        else:
            ours[name] = array
    return ours, unexpected


def read_arrays(path: Path) -> dict[str, Tensor]:
    """Read the arrays of a `.pth` or `.pkl` file without executing what is pickled in it.

    Raises:
        D2ZeroError: The file is absent, damaged, holds anything but plain data, or holds no arrays.
    """
    if not path.is_file():
        raise D2ZeroError(f"checkpoint {path} does not exist")
    try:
        content = read_pickle(path) if path.suffix == ".pkl" else _read_pth(path)
    except Exception as error:  # torch's and Python's, of many kinds, for damaged files
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise D2ZeroError(f"{path} is damaged, or is not a checkpoint of plain arrays: {reason}") from error
    for key in ("model", "state_dict"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    arrays = {
        str(name): torch.as_tensor(value)
        for name, value in (content.items() if isinstance(content, dict) else ())
        if isinstance(value, (np.ndarray, Tensor))
    }
    for name, array in arrays.items():
        _require_numbers(path, name, array)
    if not arrays:
        raise D2ZeroError(f"{path} holds no arrays; expected a dict of names and tensors, or one under 'model'")
    return arrays


def _read_pth(path: Path) -> object:
    """What torch saved; it executes nothing of it (`weights_only`)."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:  # torch stores, so that no entry is larger than it looks
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
                raise ValueError("it has compressed entries, which torch.save does not write")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of old kinds of storages
        return torch.load(path, "cpu", weights_only=True)


def _require_numbers(path: Path, name: str, array: Tensor) -> None:
    """Refuse what is no array of numbers, or claims more numbers than the file holds for it."""
    plain = array.layout == torch.strided and not array.is_quantized and not array.is_complex()
    if (
        not plain
        or array.device.type != "cpu"
        or array.numel() * array.element_size() > array.untyped_storage().nbytes()
    ):
        raise D2ZeroError(f"{path} is damaged: {name} is no plain array of numbers")


def load_published(model: D2Zero, arrays: dict[str, Tensor]) -> None:
    """Copy published arrays into a model of the published architecture, all of them or none.

    Raises:
        D2ZeroError: Lists each array that is missing, unexpected or misshapen.
    """
    seen = int(model.vocabulary.seen.sum())
    weight = arrays.get(_LOSS_WEIGHT)
    if weight is not None and tuple(weight.shape) != (seen + 1,):
        raise D2ZeroError(
            f"the checkpoint was trained on {weight.numel() - 1} seen classes, the vocabulary has {seen}; give the"
            " vocabulary of the split it was trained on"
        )
    ours, unexpected = renamed(arrays)
    scale = ours.get("classifier.logit_scale")
    if scale is not None and scale.numel() == 1:
        ours["classifier.logit_scale"] = scale.float().exp().reshape(())
    load_exactly(model, ours, unexpected)


def build_exactly(
    config: ModelConfig, vocabulary: Vocabulary, arrays: dict[str, Tensor], unexpected: list[str] | None = None
) -> D2Zero:
    """Build a model and load its state, which is compared with what is described before memory is taken for it.

    Raises:
        D2ZeroError: Lists each array that is missing, unexpected or misshapen.
    """
    try:
        with torch.device("meta"):
            require_exactly(build(config, vocabulary), arrays, unexpected)
    except (RuntimeError, OverflowError) as error:  # torch's, for sizes whose product is too large
        reason = str(error).splitlines()[0]
        raise D2ZeroError(f"the checkpoint describes a model that cannot be built: {reason}") from error
    model = build(config, vocabulary)
    load_exactly(model, arrays, unexpected)
    return model


def load_exactly(model: D2Zero, arrays: dict[str, Tensor], unexpected: list[str] | None = None) -> None:
    """Load a state that must fit to the last array; the class embeddings come from the vocabulary.

    Raises:
        D2ZeroError: Lists each array that is missing, unexpected or misshapen.
    """
    require_exactly(model, arrays, unexpected)
    model.load_state_dict({name: value for name, value in arrays.items() if name != "class_embeddings"}, strict=False)


def require_exactly(model: D2Zero, arrays: dict[str, Tensor], unexpected: list[str] | None = None) -> None:
    """Refuse a state that does not fit to the last array, as `load_exactly` does; the model may be on `meta`.

    Raises:
        D2ZeroError: Lists each array that is missing, unexpected or misshapen.
    """
    wanted, given = (
        {name: value for name, value in state.items() if name != "class_embeddings"}
        for state in (model.state_dict(), arrays)
    )
    check_compatible("the checkpoint does not fit the model", wanted, given, unexpected or [])
