"""The copy of a model that is exported: batch norms folded into convolutions, and its precision.

A float16 graph is strongly typed: every tensor has its type in the file, and an engine chooses none itself.
What stays float32 in it was decided by measurement (docs/decisions/0009).
"""

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from d2zero.model import D2Zero
from d2zero_runtime import D2ZeroError

PRECISIONS = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,  # of what torch itself compiles
    "int8": torch.float32,  # `quantize`, later
}
FP32_MODULES = ("classifier", "decoder.mask_mlp")  # parts that stay float32 in a graph of lower precision


def cast_to(model: D2Zero, precision: str, fp32_modules: Iterable[str] = FP32_MODULES) -> D2Zero:
    """A copy for inference, in the given precision.

    Args:
        model: In evaluation mode; not changed.
        precision: `float32`, `float16`, `bfloat16`, or `int8`, which begins as float32.
        fp32_modules: Names of parts that stay float32.

    Raises:
        D2ZeroError: There is no such precision.
    """
    if precision not in PRECISIONS:
        raise D2ZeroError(f"precision must be one of {', '.join(PRECISIONS)}, got {precision!r}")
    copied = copy.deepcopy(model).eval()
    fold_batch_norms(copied.backbone)
    copied.to(PRECISIONS[precision])
    for name in fp32_modules:
        copied.get_submodule(name).float()
    return copied


@torch.no_grad()
def fold_batch_norms(backbone: nn.Module) -> int:
    """Fold every batch norm that follows a convolution into it; in place.

    Which norm reads which convolution is seen by running the backbone once, so that it works for any.

    Returns:
        How many were folded.
    """
    pairs = _norms_after_convolutions(backbone)
    for convolution, norm, names in pairs:
        weight, bias = fuse_conv_bn_weights(
            convolution.weight,
            convolution.bias,
            norm.running_mean,
            norm.running_var,
            norm.eps,
            norm.weight,
            norm.bias,
        )
        convolution.weight, convolution.bias = weight, bias
        activation = [part for part in (getattr(norm, "drop", None), getattr(norm, "act", None)) if part is not None]
        backbone.set_submodule(names, nn.Sequential(*activation) if activation else nn.Identity())
    return len(pairs)


def _norms_after_convolutions(backbone: nn.Module) -> list[tuple[nn.Conv2d, Any, str]]:
    """(convolution, batch norm, the norm's name) wherever only the norm reads the convolution's output."""
    made: list[tuple[nn.Conv2d, Tensor]] = []  # kept alive, so that no two outputs share an address
    pairs: list[tuple[nn.Conv2d, Any, str]] = []

    def written(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        assert isinstance(module, nn.Conv2d)
        made.append((module, output))

    def read(name: str, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        pairs.extend((conv, module, name) for conv, output in made if output is inputs[0])

    hooks = [m.register_forward_hook(written) for m in backbone.modules() if isinstance(m, nn.Conv2d)]
    for name, module in backbone.named_modules():
        if hasattr(module, "running_var") and hasattr(module, "running_mean"):
            hooks.append(module.register_forward_pre_hook(lambda m, inputs, name=name: read(name, m, inputs)))
    backbone(torch.zeros(1, 3, 64, 64, device=next(backbone.parameters()).device))
    for hook in hooks:
        hook.remove()
    used = [conv for conv, _, _ in pairs]
    return [pair for pair in pairs if used.count(pair[0]) == 1]
