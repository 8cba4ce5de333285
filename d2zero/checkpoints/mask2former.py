"""Reading Mask2Former's instance segmentation checkpoints, which become models with a closed vocabulary.

There are two layouts: the published code's, in detectron2's names (`from_detectron2`), and transformers' folders
(`transformers_folder`). Both are renamed to our arrays, each of which must be there once and nothing else. Sizes are
read off the arrays' shapes. Preprocessing is Mask2Former's: RGB, shortest edge 800, longest at most 1333.

Panoptic and semantic models are refused: their "stuff" classes have no instances. They are recognised by a class for
the sky, which each of their data sets has (COCO, ADE20k, Cityscapes, Mapillary Vistas) and no instance data set does;
where a file has no names, by the number of classes.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from d2zero.checkpoints.published import build_exactly, renamed
from d2zero.data.splits import COCO_IDS
from d2zero.model import D2Zero, ModelConfig
from d2zero.model.closed import closed_vocabulary
from d2zero.model.config import LEVELS
from d2zero_runtime import D2ZeroError
from d2zero_runtime.errors import join_truncated
from d2zero_runtime.images import Preprocessing

POINTS = 4  # samples per head, level and query of the pixel decoder, in every Mask2Former
LARGEST_WINDOW = 32  # of Swin; a window's position index has as many elements to the fourth
_SKY = re.compile(r"(nature--)?sky(-other)?(-merged)?", re.IGNORECASE)
_OTHER_TASKS = {  # number of classes -> whose panoptic or semantic models have so many
    19: "Cityscapes",
    65: "Mapillary Vistas",
    133: "COCO panoptic",
    150: "ADE20k",
    171: "COCO-Stuff",
    847: "ADE20k (full)",
}
_SWINS: dict[tuple[int, tuple[int, ...], int], str] = {  # embedding width, depths, window -> timm's name
    (96, (2, 2, 6, 2), 7): "swin_tiny_patch4_window7_224",
    (96, (2, 2, 18, 2), 7): "swin_small_patch4_window7_224",
    (128, (2, 2, 18, 2), 12): "swin_base_patch4_window12_384",
    (192, (2, 2, 18, 2), 12): "swin_large_patch4_window12_384",
}
_RESNETS: dict[tuple[int, ...], str] = {(3, 4, 6, 3): "resnet50", (3, 4, 23, 3): "resnet101"}
_RESNET_WIDTHS = [64, 128, 256, 512]
_COCO_ALIASES = {  # darknet's names of COCO's classes -> COCO's; transformers has the former for mmdet's class numbers
    "motorbike": "motorcycle",
    "aeroplane": "airplane",
    "sofa": "couch",
    "pottedplant": "potted plant",
    "diningtable": "dining table",
    "tvmonitor": "tv",
}


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """A Mask2Former checkpoint of either layout.

    Args:
        arrays: Its weights under our names.
        unexpected: Names in the file that have none of ours.
        names: Its class names, if it has any.
        preprocessing: How images become input.
        notes: What is done otherwise than the checkpoint says, one line each.
    """

    arrays: dict[str, Tensor]
    unexpected: list[str]
    names: list[str] | None = None
    preprocessing: Preprocessing = field(default_factory=Preprocessing)
    notes: tuple[str, ...] = ()


def is_mask2former(arrays: Mapping[str, Tensor]) -> bool:
    """Whether arrays in detectron2's names are those of a Mask2Former, and not of a D2Zero or a backbone."""
    return "sem_seg_head.predictor.class_embed.weight" in arrays


def from_detectron2(arrays: Mapping[str, Tensor]) -> Checkpoint:
    """The checkpoint in the arrays of a published `.pkl` or `.pth`."""
    return Checkpoint(*renamed(arrays))


def model_of(checkpoint: Checkpoint, names: Sequence[str] | None = None) -> D2Zero:
    """Build the model of a checkpoint.

    Args:
        checkpoint: What was read.
        names: Class names in the order of training. If left out, the checkpoint's (see `coco_names`), or COCO's 80.

    Raises:
        D2ZeroError: It is no instance segmentation model, names are needed or do not fit, or an array is missing,
            unexpected or misshapen.
    """
    arrays = checkpoint.arrays
    count = _size(arrays, "classifier.linear.weight") - 1
    given = names or (checkpoint.names and coco_names(checkpoint.names))
    vocabulary = closed_vocabulary(class_names(count, given))
    config = config_of(arrays, checkpoint.preprocessing)
    return build_exactly(config, vocabulary, arrays, checkpoint.unexpected).eval()


def coco_names(names: Sequence[str]) -> list[str]:
    """Class names as COCO's annotations have them, if they are COCO's 80 under other names; else as they are.

    transformers' folders have darknet's, such as `sofa` for `couch`, and mmdet had underscores for spaces. With either,
    COCO's own annotations would be of other classes.
    """
    spaced = [name.replace("_", " ") for name in names]
    found = [_COCO_ALIASES.get(name, name) for name in spaced]
    return found if sorted(found) == sorted(COCO_IDS) else list(names)


def notes_on_names(checkpoint: Checkpoint, used: Sequence[str]) -> list[str]:
    """What to say of a model's class names where they are not as the checkpoint has them."""
    if checkpoint.names is None:
        return [f"the checkpoint does not name its {len(used)} classes; they are taken to be COCO's, in COCO's order"]
    changed = [f"{given} is {name}" for given, name in zip(checkpoint.names, used, strict=True) if given != name]
    listed = join_truncated(changed, len(_COCO_ALIASES))
    return [f"classes are named as in COCO's annotations: {listed}"] if changed else []


def class_names(count: int, given: Sequence[str] | None) -> list[str]:
    """Names for the classes of a checkpoint.

    Args:
        count: How many it has.
        given: The user's or the checkpoint's.

    Raises:
        D2ZeroError: There are none, another number, or those of a panoptic or semantic model.
    """
    if given is None and count == len(COCO_IDS):
        return list(COCO_IDS)
    if given is None and count in _OTHER_TASKS:
        raise D2ZeroError(
            f"the checkpoint has {count} classes, like panoptic or semantic models of {_OTHER_TASKS[count]}; only"
            " instance segmentation models can be converted (if it is one, give its class names with --names)"
        )
    if given is None:
        raise D2ZeroError(
            f"the checkpoint has {count} classes and does not name them; give --names: a .txt with one name per line,"
            " in the order of training"
        )
    if len(given) != count:
        raise D2ZeroError(f"the checkpoint has {count} classes, got {len(given)} names; expected one per class")
    sky = next((name for name in given if _SKY.fullmatch(name)), None)
    if sky:
        raise D2ZeroError(
            f"the checkpoint is a panoptic or semantic model (it has the class {sky!r}); only instance segmentation"
            " models can be converted"
        )
    return list(given)


def config_of(arrays: Mapping[str, Tensor], preprocessing: Preprocessing) -> ModelConfig:
    """The configuration of the model that has these arrays, under our names.

    Raises:
        D2ZeroError: An array that tells a size is missing, or is not of the shape of any Mask2Former.
    """
    swin = any(name.startswith("backbone.net.layers_") for name in arrays)
    backbone, options = _swin(arrays) if swin else _resnet(arrays)
    offsets = _size(arrays, "pixel_decoder.layers.0.attention.sampling_offsets.weight")
    return ModelConfig(
        backbone=backbone,
        backbone_options=options,
        backbone_output_norm=swin,
        hidden_dim=_size(arrays, "classifier.linear.weight", 1),
        num_heads=offsets // (2 * LEVELS * POINTS),
        encoder_layers=_count(arrays, "pixel_decoder.layers."),
        encoder_points=POINTS,
        encoder_ffn_dim=_size(arrays, "pixel_decoder.layers.0.linear1.weight"),
        num_queries=_size(arrays, "decoder.query_features"),
        decoder_layers=_count(arrays, "decoder.layers."),
        decoder_ffn_dim=_size(arrays, "decoder.layers.0.linear1.weight"),
        head="closed",
        text_dim=_size(arrays, "classifier.linear.weight") - 1,
        softmax_temperature=1.0,
        preprocessing=preprocessing,
    )


def _swin(arrays: Mapping[str, Tensor]) -> tuple[str, dict[str, Any]]:
    """Name and options of timm's Swin, for images of any size."""
    stages = [f"backbone.net.layers_{stage}.blocks." for stage in range(4)]
    tables = [f"{stage}0.attn.relative_position_bias_table" for stage in stages]
    width = _size(arrays, "backbone.net.patch_embed.proj.weight")
    depths = [_count(arrays, stage) for stage in stages]
    window = (math.isqrt(_size(arrays, tables[0])) + 1) // 2  # a table has (2·window - 1)² rows
    if not 1 <= window <= LARGEST_WINDOW:
        raise D2ZeroError(f"the backbone's windows must have 1 to {LARGEST_WINDOW} pixels per side, got {window}")
    options = {
        "embed_dim": width,
        "depths": depths,
        "num_heads": [_size(arrays, table, 1) for table in tables],
        "window_size": window,
        "mlp_ratio": _size(arrays, f"{stages[0]}0.mlp.fc1.weight") / width,
        "strict_img_size": False,
        "always_partition": True,
    }
    return _SWINS.get((width, tuple(depths), window), "swin_tiny_patch4_window7_224"), options


def _resnet(arrays: Mapping[str, Tensor]) -> tuple[str, dict[str, Any]]:
    """Name and options of timm's ResNet with bottlenecks."""
    stages = [f"backbone.net.layer{stage}." for stage in range(1, 5)]
    depths = [_count(arrays, stage) for stage in stages]
    widths = [_size(arrays, f"{stage}0.conv1.weight") for stage in stages]
    options: dict[str, Any] = {} if widths == _RESNET_WIDTHS else {"channels": widths}
    known = _RESNETS.get(tuple(depths))
    return (known, options) if known else ("resnet50", {"layers": depths, **options})


def _size(arrays: Mapping[str, Tensor], name: str, axis: int = 0) -> int:
    """The size of an array along an axis.

    Raises:
        D2ZeroError: The array is missing, has no such axis or no elements (then its sizes may be any).
    """
    shape = tuple(arrays[name].shape) if name in arrays else None
    if shape is None or len(shape) <= axis or 0 in shape:
        got = "it is missing" if shape is None else f"its shape is {shape}"
        raise D2ZeroError(f"the checkpoint is no Mask2Former with deformable attention, or is cut short: {name}: {got}")
    return shape[axis]


def _count(arrays: Mapping[str, Tensor], prefix: str) -> int:
    """How many layers have a name that begins so."""
    return len({name[len(prefix) :].partition(".")[0] for name in arrays if name.startswith(prefix)})
