"""The optimiser's parameter groups, the learning rate as a function of the step, and the scale of gradients."""

import math
from typing import Any

import torch
from torch import nn

from d2zero.model import D2Zero
from d2zero.training.config import OptimConfig
from d2zero_runtime import D2ZeroError

_NORMS = (nn.LayerNorm, nn.GroupNorm, nn.modules.batchnorm._BatchNorm)
LEAST_SCALE = 2**-4  # twenty halvings of the scale to begin with, 65 536
MOST_SKIPPED = 20  # steps in a row
_EMBEDDINGS = ("query_features", "query_positions", "level_embedding")


def build_optimizer(model: D2Zero, config: OptimConfig) -> torch.optim.AdamW:
    """AdamW, fused on a GPU; the backbone learns slower, norms and embeddings have no weight decay."""
    undecayed = {
        id(parameter)
        for module in model.modules()
        if isinstance(module, _NORMS)
        for parameter in module.parameters(recurse=False)
    }
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        decays = id(parameter) not in undecayed and name.rsplit(".", 1)[-1] not in _EMBEDDINGS
        groups.setdefault((name.startswith("backbone."), decays), []).append(parameter)
    return torch.optim.AdamW(
        [
            {
                "params": parameters,
                "lr": config.lr * (config.backbone_lr_factor if in_backbone else 1.0),
                "initial_lr": config.lr * (config.backbone_lr_factor if in_backbone else 1.0),
                "weight_decay": config.weight_decay if decays else 0.0,
            }
            for (in_backbone, decays), parameters in sorted(groups.items())
        ],
        lr=config.lr,
        fused=True if next(model.parameters()).is_cuda else None,
    )


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Take up a state saved on any device; fused or not, and the learning rate, remain as the optimiser was built."""
    groups = [
        {**saved, **{key: own[key] for key in ("fused", "initial_lr") if key in own}}
        for saved, own in zip(state["param_groups"], optimizer.param_groups, strict=True)
    ]
    optimizer.load_state_dict({**state, "param_groups": groups})


def lr_factor(step: int, steps: int, config: OptimConfig) -> float:
    """What the learning rate is multiplied by at a step, counted from 0."""
    warmup_steps = _in_steps(config.warmup_steps, steps)
    warmup = min(1.0, (step + 1) / warmup_steps) if warmup_steps else 1.0
    if config.schedule == "cosine":
        progress = step / max(1, steps)
        cosine = 0.5 * (1 + math.cos(math.pi * progress))
        return warmup * (config.final_factor + (1 - config.final_factor) * cosine)
    passed = sum(step >= _in_steps(milestone, steps) for milestone in config.milestones)
    return float(warmup * config.gamma**passed)


def _in_steps(length: float, steps: int) -> float:
    return length * steps if length < 1 else length


def set_lr(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Set every group's learning rate to `factor` times its own."""
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * factor


class ScaleWatch:
    """Stops a run whose float16 gradients overflow whatever they are scaled by.

    A scaler skips a step whose gradients are not finite and halves its scale, so a step was skipped if the scale
    has fallen since.

    Args:
        scaler: The scaler whose scale is watched; one that is not enabled has none.
    """

    def __init__(self, scaler: torch.amp.GradScaler) -> None:
        self.scaler = scaler
        self.scale = scaler.get_scale()
        self.skipped = 0  # steps in a row

    def check(self, step: int) -> None:
        """Look at what became of the last step.

        It reads the scale from the device: call it where the device has just been waited for.

        Args:
            step: How many were done.

        Raises:
            D2ZeroError: The scale has collapsed, or too many steps in a row were skipped.
        """
        if not self.scaler.is_enabled():
            return
        before, self.scale = self.scale, self.scaler.get_scale()
        self.skipped = self.skipped + 1 if self.scale < before else 0
        if self.scale < LEAST_SCALE or self.skipped >= MOST_SKIPPED:
            raise D2ZeroError(
                f"float16 gradients overflow at step {step} (steps skipped in a row: {self.skipped}, gradient scale:"
                f" {self.scale:g}). Begin a new run with precision=bfloat16 or float32, or with a lower optim.lr, and"
                " look at the images"
            )

    def state_dict(self) -> dict[str, float]:
        """What a resume needs."""
        return {"scale": self.scale, "skipped": self.skipped}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Go on from what `state_dict` returned."""
        self.scale, self.skipped = state["scale"], int(state["skipped"])
