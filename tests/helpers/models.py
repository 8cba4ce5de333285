"""Reference data, vocabularies of the published split, and the published architecture."""

import os
from pathlib import Path

import numpy as np
import torch
from published import published_shapes, reference_weights

from d2zero.checkpoints.published import load_published
from d2zero.data.splits import find_split
from d2zero.model import D2Zero, ModelConfig, build
from d2zero.text.word2vec import read_word2vec
from d2zero_runtime import Vocabulary

ROOT = Path(__file__).parents[2]
SHARED = Path(os.environ.get("D2ZERO_SHARED") or ROOT.parent / "shared")
SMALL_REFERENCE = ROOT / "tests/reference_48_17_small.npz"


def published_vocabulary(shared: Path, split: str) -> Vocabulary:
    return read_word2vec(shared / "data/embeddings" / f"word_w2v_withbg_{split}.txt", find_split(split))


def placeholder_vocabulary() -> Vocabulary:
    """Names and seen flags of the 48/17 split with drawn embeddings, for what does not depend on text."""
    split = find_split("48_17")
    rows = np.random.default_rng(0).standard_normal((len(split.names), 300)).astype(np.float32)
    return Vocabulary(split.names, rows, seen=np.array(split.is_seen(split.names)))


def published_model(words: Vocabulary) -> D2Zero:
    """The published architecture with the reference weights, without dropout."""
    model = build(ModelConfig(adaptation_dropout=0.0), words)
    weights = reference_weights(published_shapes(len(words.seen_names)))
    load_published(model, {name: torch.from_numpy(array) for name, array in weights.items()})
    return model.eval()
