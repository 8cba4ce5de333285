"""Image features at strides 4, 8, 16 and 32 from any timm backbone.

Published D2Zero uses ResNet-50 with stride in the 3×3 convolution and frozen batch norm, which is timm's
`resnet50` with its batch norms frozen. Mask2Former's Swin is timm's with a layer norm on each of the four maps, and
pads maps as the original does (`swin`); without these norms, a Swin is timm's own.
Leaves weights to `d2zero.checkpoints`.
"""

import re
from collections.abc import Mapping
from typing import Any

import timm
import torch
from timm.layers import freeze_batch_norm_2d  # type: ignore[attr-defined]
from torch import Tensor, nn

from d2zero.model.swin import use_original_windows
from d2zero_runtime import D2ZeroError

STRIDES = (4, 8, 16, 32)
# Options of timm that say how large a backbone is. timm opens files and fetches addresses named in others, and a
# checkpoint may be a stranger's.
SIZES = frozenset(
    [
        "channels",
        "layers",
        "depths",
        "dims",
        "embed_dim",
        "depth",
        "num_heads",
        "window_size",
        "img_size",
        "patch_size",
        "stem_width",
        "stem_chs",
        "base_width",
        "cardinality",
        "drop_rate",
        "drop_path_rate",
        "mlp_ratio",
        "strict_img_size",
        "dynamic_img_size",
        "always_partition",
    ]
)
LARGEST_SIZE = 65_536
MOST_LAYERS = 1000  # in one number


class Backbone(nn.Module):
    """res2…res5 of a timm model.

    Args:
        name: A timm model that supports `features_only`.
        options: Further arguments of `timm.create_model`: sizes only (`SIZES`), numbers or lists of them.
        frozen_norm: Replace batch norm by a fixed scale and shift.
        output_norm: Layer norm over the channels of each map, as Mask2Former's Swin has; a Swin is then that one.

    Raises:
        D2ZeroError: timm has no such model, an option is no size, or it lacks features at strides 4, 8, 16 and 32.
    """

    def __init__(
        self,
        name: str,
        options: Mapping[str, Any] | None = None,
        frozen_norm: bool = True,
        output_norm: bool = False,
    ) -> None:
        super().__init__()
        options = dict(options or {})
        _require_sizes(options)
        strides = _feature_strides(name, options)
        missing = [stride for stride in STRIDES if stride not in strides]
        if missing:
            raise D2ZeroError(f"backbone {name!r} has features at strides {strides}, needs {list(STRIDES)}")
        indices = tuple(strides.index(stride) for stride in STRIDES)
        net: Any = timm.create_model(name, pretrained=False, features_only=True, out_indices=indices, **options)
        self.channels: tuple[int, ...] = tuple(net.feature_info.channels())
        self.channels_last = net.feature_info.get_dicts()[0].get("format") == "NHWC" or (
            getattr(net, "output_fmt", "NCHW") == "NHWC"
        )
        if output_norm:
            use_original_windows(net)
        self.net: nn.Module = freeze_batch_norm_2d(net) if frozen_norm else net
        self.output_norms = nn.ModuleList(nn.LayerNorm(width) for width in self.channels if output_norm)

    def forward(self, images_B3HW: Tensor) -> list[Tensor]:
        """Four maps (B, C_i, H/s, W/s) for s = 4, 8, 16, 32."""
        features: list[Tensor] = self.net(images_B3HW)
        if not self.output_norms:
            return [f.permute(0, 3, 1, 2) for f in features] if self.channels_last else features
        maps_BHWC = features if self.channels_last else [f.permute(0, 2, 3, 1) for f in features]
        return [norm(f).permute(0, 3, 1, 2) for norm, f in zip(self.output_norms, maps_BHWC, strict=True)]


def _feature_strides(name: str, options: dict[str, Any]) -> list[int]:
    known = re.fullmatch(r"(\w+)(\.\w+)?", name)  # no "hf-hub:" or "local-dir:", which timm would fetch or open
    if not known or not timm.is_model(known[1]):
        close = timm.list_models(f"*{name.split('.')[0][:6]}*")[:5] if known else []
        hint = f"; close names: {', '.join(close)}" if close else ""
        raise D2ZeroError(f"timm has no backbone {name!r}{hint}")
    try:
        with torch.device("meta"):
            probe: Any = timm.create_model(name, pretrained=False, features_only=True, **options)
    except Exception as error:  # timm's, of many kinds, for sizes that do not fit together
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise D2ZeroError(f"backbone {name!r} gives no feature maps with options {options}: {reason}") from error
    return list(probe.feature_info.reduction())


def _require_sizes(options: Mapping[str, Any]) -> None:
    """Refuse options that are not sizes of a backbone.

    Raises:
        D2ZeroError: Names the option.
    """
    for option, value in options.items():
        if option not in SIZES:
            raise D2ZeroError(f"backbone_options must be sizes ({', '.join(sorted(SIZES))}), got {option!r}")
        most = MOST_LAYERS if option in ("layers", "depths", "depth") else LARGEST_SIZE
        for number in value if isinstance(value, (list, tuple)) else [value]:
            if not isinstance(number, (int, float)) or not 0 <= number <= most:
                raise D2ZeroError(f"backbone_options: {option} must be numbers from 0 to {most}, got {value!r}")
