"""Closed-vocabulary models: trained by the same command, started from, evaluated, and refused what they cannot do."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import Command
from tiny_network import tiny_closed

from d2zero.checkpoints.files import load_model, save_model
from d2zero.data.shapes import ALL_NAMES
from d2zero.model import D2Zero
from d2zero.model.closed import closed_vocabulary
from d2zero_runtime import D2ZeroError, Vocabulary
from d2zero_runtime.images import Preprocessing

SMALL = ("--steps", "1", "--batch-size", "2", "--set", "workers=0", "--set", "picture_every=0", "--device", "cpu")
SIZES = [
    "model.backbone=test_resnet", "model.hidden_dim=32", "model.num_heads=2", "model.encoder_layers=1",
    "model.encoder_ffn_dim=32", "model.num_queries=10", "model.decoder_layers=2", "model.decoder_ffn_dim=32",
    "model.semantic_dim=32", "model.adaptation_ffn_dim=32",
]  # fmt: skip
AUGMENT = ("--set", "augment.size=96")


def closed_model(names: tuple[str, ...] = ALL_NAMES) -> D2Zero:
    sizes = Preprocessing(shortest_edge=96, longest_edge=96)
    return tiny_closed(names, num_queries=10, decoder_layers=2, softmax_temperature=1.0, preprocessing=sizes)


@pytest.fixture
def train(shapes_data: Path) -> tuple[object, ...]:
    annotations = shapes_data / "annotations/instances_train_seen_shapes.json"
    return ("train", "--annotations", annotations, "--images", shapes_data / "train", *SMALL)


def settings() -> list[str]:
    return [word for setting in SIZES for word in ("--set", setting)]


def test_a_closed_model_is_trained_and_fine_tuned(
    train: tuple[object, ...], shapes_data: Path, tmp_path: Path, command: Command
) -> None:
    outcome = command(*train, *settings(), "--set", "model.head=closed", "-o", tmp_path / "first")
    assert outcome.code == 0, outcome.err
    first = load_model(tmp_path / "first")
    truth = json.loads((shapes_data / "annotations/instances_train_seen_shapes.json").read_text())
    names = tuple(category["name"] for category in truth["categories"])
    assert first.vocabulary.names == names and first.config.head == "closed"
    assert first.config.softmax_temperature == 1
    outcome = command(*train, "--init", tmp_path / "first", "-o", tmp_path / "second")
    assert outcome.code == 0 and "not from the checkpoint" not in outcome.err, outcome.err
    assert load_model(tmp_path / "second").config == first.config
    assert load_model(tmp_path / "second").vocabulary.source == first.vocabulary.source
    truth = shapes_data / "annotations/instances_val_gzsi_shapes.json"
    content = json.loads(truth.read_text())
    kept = {c["id"] for c in content["categories"] if c["name"] in names}
    content["categories"] = [c for c in content["categories"] if c["id"] in kept]
    content["annotations"] = [a for a in content["annotations"] if a["category_id"] in kept]
    (tmp_path / "val.json").write_text(json.dumps(content))
    files = ("--annotations", tmp_path / "val.json", "--images", shapes_data / "val", "--limit", "2")
    outcome = command(
        "eval", tmp_path / "second", *files, "-o", tmp_path / "evaluated", "--json", tmp_path / "metrics.json"
    )
    assert outcome.code == 0, outcome.err
    metrics = json.loads((tmp_path / "metrics.json").read_text())["segm"]
    assert metrics["ap"] is not None and metrics["unseen_ap50"] is None


def test_a_head_for_other_classes_is_fresh(train: tuple[object, ...], tmp_path: Path, command: Command) -> None:
    source = save_model(closed_model(("red circle", "dog")), tmp_path / "closed.safetensors", {})
    outcome = command(*train, "--init", source, "-o", tmp_path / "run")
    assert outcome.code == 0 and "2 arrays are fresh, not from the checkpoint: classifier" in outcome.err, outcome.err
    assert "does not know 26 of the 27 annotated classes (" in outcome.err and "the head is fresh" in outcome.err
    assert load_model(tmp_path / "run").config.text_dim == 27


def test_a_head_that_knows_more_classes_is_kept_and_resumed(
    train: tuple[object, ...], tmp_path: Path, command: Command
) -> None:
    """The 27 annotated classes are some of the 36 that the checkpoint knows."""
    model = closed_model()
    source = save_model(model, tmp_path / "closed.safetensors", {})
    unchanging = ("--set", "optim.lr=1e-12")
    outcome = command(*train, *unchanging, "--init", source, "-o", tmp_path / "run")
    assert outcome.code == 0 and "fresh" not in outcome.err, outcome.err
    require_equal_weights(load_model(tmp_path / "run"), model, ())
    two = [2 if argument == "1" else argument for argument in train]
    outcome = command(*two, "--resume", "-o", tmp_path / "run")
    assert outcome.code == 0 and "steps 1 to 2" in outcome.err, outcome.err
    resumed = load_model(tmp_path / "run")
    assert resumed.vocabulary.names == ALL_NAMES and resumed.config == model.config
    require_equal_weights(resumed, model, ())


def require_equal_weights(found: D2Zero, expected: D2Zero, other: tuple[str, ...]) -> None:
    """All arrays but those of the `other` parts must be there and equal."""
    ours, theirs = (
        {name: value for name, value in model.state_dict().items() if not name.startswith(other or ("?",))}
        for model in (found, expected)
    )
    assert ours.keys() == theirs.keys() and len(ours) > 50
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name], atol=1e-6, rtol=0, msg=name)


def test_settings_that_a_checkpoint_decides_are_named(
    train: tuple[object, ...], tmp_path: Path, command: Command
) -> None:
    source = save_model(closed_model(), tmp_path / "closed.safetensors", {})
    given = ("--set", "model.num_queries=12", "--set", "model.hidden_dim=32", "--set", "model.decoder_layers=1")
    outcome = command(*train, *given, "--init", source, "-o", tmp_path / "run")
    assert outcome.code == 0 and load_model(tmp_path / "run").config.num_queries == 10
    assert "these settings are not used: model.num_queries, model.decoder_layers" in outcome.err, outcome.err


def test_a_zero_shot_model_starts_from_closed_weights_with_a_warning(
    train: tuple[object, ...], shapes_data: Path, tmp_path: Path, command: Command
) -> None:
    model = closed_model()
    source = save_model(model, tmp_path / "closed.safetensors", {})
    words = ("-v", shapes_data / "vocabulary.npz", "--set", "optim.lr=1e-12")
    outcome = command(*train, *settings()[-4:], *words, "--init", source, "-o", tmp_path / "run")
    assert outcome.code == 0, outcome.err
    assert "NOT ZERO-SHOT: the weights that this run starts from" in outcome.err
    assert "were trained on 9 of its 9 unseen classes (" in outcome.err
    trained = load_model(tmp_path / "run")
    assert trained.config.head == "semantic" and trained.config.decoder_layers == 2
    assert trained.config.preprocessing == model.config.preprocessing
    require_equal_weights(trained, model, ("classifier.", "class_embeddings"))
    other = save_model(closed_model(("dog", "cat")), tmp_path / "other.safetensors", {})
    outcome = command(*train, *settings()[-4:], *words, "--init", other, "-o", tmp_path / "other")
    assert outcome.code == 0 and "were trained on dog, cat: what looks like one of these was seen" in outcome.err


def test_what_a_closed_model_cannot_do_is_refused(
    train: tuple[object, ...], shapes_data: Path, tmp_path: Path, command: Command
) -> None:
    segmenter = closed_model().segmenter()
    image = np.zeros((96, 96, 3), np.uint8)
    with pytest.raises(D2ZeroError, match="needs unseen classes"):
        segmenter(image, "zsis")
    words = Vocabulary.load(shapes_data / "vocabulary.npz")
    for wrong in (words, replace(words, source={})):
        with pytest.raises(D2ZeroError, match="has a closed vocabulary, the 36 classes that it was trained on"):
            segmenter.set_vocabulary(wrong)
    given = ("-v", shapes_data / "vocabulary.npz")
    outcome = command(*train, *given, "--set", "model.head=closed", "-o", tmp_path / "run")
    assert outcome.code == 2 and "a closed model has the classes that are annotated" in outcome.err
    outcome = command(*train, "--split", "coco-48-17", "--set", "model.head=closed", "-o", tmp_path / "run")
    assert outcome.code == 2 and "a closed model has no unseen classes; leave the split coco-48-17 out" in outcome.err
    closed_vocabulary(ALL_NAMES).save(tmp_path / "closed.npz")
    outcome = command(*train, "-v", tmp_path / "closed.npz", "-o", tmp_path / "run")
    assert outcome.code == 2 and "to train a closed model, leave the vocabulary out" in outcome.err


def test_a_closed_model_keeps_to_some_of_its_classes() -> None:
    model = closed_model()
    segmenter, image = model.segmenter(), np.random.default_rng(0).integers(0, 256, (96, 96, 3), np.uint8)
    chosen = segmenter.vocabulary.select(["blue star", "red ring"])
    found = segmenter(image, vocabulary=chosen, score_threshold=0)
    assert set(found.names) <= {"blue star", "red ring"} and len(found)
    named = segmenter.name(segmenter.segment(image), chosen, score_threshold=0)
    assert named.names == found.names and np.allclose(named.scores, found.scores, atol=1e-6)
