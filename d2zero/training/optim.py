"""The optimiser's parameter groups and the learning rate as a function of the step."""

import math

import torch
from torch import nn

from d2zero.model import D2Zero
from d2zero.training.config import OptimConfig

_NORMS = (nn.LayerNorm, nn.GroupNorm, nn.modules.batchnorm._BatchNorm)
_EMBEDDINGS = ("query_features", "query_positions", "level_embedding")


def build_optimizer(model: D2Zero, config: OptimConfig) -> torch.optim.AdamW:
    """AdamW; the backbone learns slower, norms and embeddings have no weight decay."""
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
    )


def lr_factor(step: int, steps: int, config: OptimConfig) -> float:
    """What the learning rate is multiplied by at a step, counted from 0."""
    warmup = min(1.0, (step + 1) / config.warmup_steps) if config.warmup_steps else 1.0
    if config.schedule == "cosine":
        progress = step / max(1, steps)
        cosine = 0.5 * (1 + math.cos(math.pi * progress))
        return warmup * (config.final_factor + (1 - config.final_factor) * cosine)
    passed = sum(step >= milestone for milestone in config.milestones)
    return float(warmup * config.gamma**passed)


def set_lr(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Set every group's learning rate to `factor` times its own."""
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * factor
