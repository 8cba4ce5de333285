"""A D2Zero network with all its parts and next to no weights."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from tiny_model import WIDTH

from d2zero.model import D2Zero, ModelConfig, build
from d2zero.model.closed import closed_vocabulary
from d2zero_runtime import Vocabulary

CLASSES = [f"class {number}" for number in range(WIDTH)]
CONFIG = ModelConfig(
    backbone="test_resnet",
    frozen_backbone_norm=True,
    hidden_dim=32,
    num_heads=2,
    encoder_layers=1,
    encoder_points=2,
    encoder_ffn_dim=32,
    num_queries=5,
    decoder_layers=1,
    decoder_ffn_dim=32,
    text_dim=WIDTH,
    semantic_dim=32,
    adaptation_heads=2,
    adaptation_ffn_dim=32,
)


def tiny(**changes: Any) -> D2Zero:
    """The network; `changes` are fields of its configuration."""
    torch.manual_seed(0)
    words = Vocabulary(tuple("abc"), np.random.default_rng(0).standard_normal((3, WIDTH)).astype(np.float32))
    return build(replace(CONFIG, **changes), words).eval()


def tiny_closed(names: Sequence[str] = CLASSES, **changes: Any) -> D2Zero:
    """The same with the closed head, for classes of these names."""
    torch.manual_seed(0)
    config = replace(CONFIG, head="closed", text_dim=len(names), **changes)
    return build(config, closed_vocabulary(names)).eval()
