"""Image features at strides 4, 8, 16 and 32 from any timm backbone.

Published D2Zero uses ResNet-50 with stride in the 3×3 convolution and frozen batch norm, which is timm's
`resnet50` with its batch norms frozen. Leaves weights to `d2zero.checkpoints`.
"""

from collections.abc import Mapping
from typing import Any

import timm
import torch
from timm.layers import freeze_batch_norm_2d  # type: ignore[attr-defined]
from torch import Tensor, nn

from d2zero_runtime import D2ZeroError

STRIDES = (4, 8, 16, 32)


class Backbone(nn.Module):
    """res2…res5 of a timm model.

    Args:
        name: a timm model that supports `features_only`.
        options: further arguments of `timm.create_model`.
        frozen_norm: replace batch norm by a fixed scale and shift.

    Raises:
        D2ZeroError: timm has no such model, or it lacks features at strides 4, 8, 16 and 32.
    """

    def __init__(self, name: str, options: Mapping[str, Any] | None = None, frozen_norm: bool = True) -> None:
        super().__init__()
        strides = _feature_strides(name, dict(options or {}))
        missing = [stride for stride in STRIDES if stride not in strides]
        if missing:
            raise D2ZeroError(f"backbone {name!r} has features at strides {strides}, needs {list(STRIDES)}")
        indices = tuple(strides.index(stride) for stride in STRIDES)
        net: Any = timm.create_model(name, features_only=True, out_indices=indices, **dict(options or {}))
        self.channels: tuple[int, ...] = tuple(net.feature_info.channels())
        self.channels_last = net.feature_info.get_dicts()[0].get("format") == "NHWC" or (
            getattr(net, "output_fmt", "NCHW") == "NHWC"
        )
        self.net: nn.Module = freeze_batch_norm_2d(net) if frozen_norm else net

    def forward(self, images_B3HW: Tensor) -> list[Tensor]:
        """Four maps (B, C_i, H/s, W/s) for s = 4, 8, 16, 32."""
        features: list[Tensor] = self.net(images_B3HW)
        return [f.permute(0, 3, 1, 2) for f in features] if self.channels_last else features


def _feature_strides(name: str, options: dict[str, Any]) -> list[int]:
    if not timm.is_model(name.split(".")[0]):
        close = timm.list_models(f"*{name.split('.')[0][:6]}*")[:5]
        hint = f"; close names: {', '.join(close)}" if close else ""
        raise D2ZeroError(f"timm has no backbone {name!r}{hint}")
    try:
        with torch.device("meta"):
            probe: Any = timm.create_model(name, features_only=True, **options)
    except (RuntimeError, TypeError, AttributeError) as error:
        raise D2ZeroError(f"backbone {name!r} gives no feature maps with options {options}: {error}") from error
    return list(probe.feature_info.reduction())
