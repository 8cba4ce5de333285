"""A CLIP model small enough for a test, with random weights, and its exported text encoder."""

import json
from pathlib import Path
from typing import Any

import torch

NAME, WIDTH = "tiny-test-clip", 64  # of the demo's embeddings, too


def write_weights(folder: Path, name: str = NAME, custom_text: bool = False, **text_options: Any) -> Path:
    """Weights of a model that open_clip then knows by its name; options are those of its text encoder."""
    import open_clip

    config = {
        "embed_dim": WIDTH,
        "custom_text": custom_text,
        "vision_cfg": {"image_size": 32, "layers": 1, "width": 16, "head_width": 8, "patch_size": 16},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1, **text_options},
    }
    configs = folder / f"config-{name}"
    configs.mkdir()
    (configs / f"{name}.json").write_text(json.dumps(config))
    open_clip.add_model_config(configs)
    torch.manual_seed(0)
    weights = folder / f"{name}.pt"
    torch.save(open_clip.create_model(name).state_dict(), weights)
    return weights
