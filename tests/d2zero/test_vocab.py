"""Vocabularies from files and from text."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import Command
from tiny_clip import NAME, write_weights

from d2zero.data.splits import COCO_IDS, Split, find_split
from d2zero.text.clip import encode_names
from d2zero_runtime import Vocabulary
from d2zero_runtime.text.prompts import TEMPLATES

COCO_48_17 = find_split("coco-48-17")
COCO_65_15 = find_split("coco-65-15")

open_clip = pytest.importorskip("open_clip")


@pytest.mark.parametrize(("split", "file"), [(COCO_48_17, "48_17"), (COCO_65_15, "65_15")])
def test_word2vec(split: Split, file: str, shared: Path, tmp_path: Path, command: Command) -> None:
    source = shared / f"data/embeddings/word_w2v_withbg_{file}.txt"
    outcome = command("vocab", "word2vec", source, "--split", split.name, "-o", tmp_path / "v.npz")
    assert outcome.code == 0, outcome.err
    words = Vocabulary.load(tmp_path / "v.npz")
    assert words.names == split.names and words.unseen_names == split.unseen and words.width == 300
    assert words.source == {"encoder": "word2vec", "split": split.name}
    column = np.loadtxt(source, delimiter=",", usecols=1 + words.names.index("cat"))
    np.testing.assert_allclose(words.embeddings[words.names.index("cat")], column, rtol=1e-6)
    shown = command("vocab", "show", tmp_path / "v.npz")
    assert f"unseen ({len(split.unseen)}): {', '.join(split.unseen)}" in shown.out
    described = json.loads(command("vocab", "show", tmp_path / "v.npz", "--json").out)
    assert described["width"] == 300 and len(described["classes"]) == len(split.names)


def test_arrays_with_a_split_are_put_in_its_order(shared: Path, tmp_path: Path, command: Command) -> None:
    source = shared / "data/embeddings/coco_clip_vitb32.npy"
    arguments = ("--names", "coco", "--split", "coco-48-17", "--encoder", "clip:ViT-B-32")
    outcome = command("vocab", "npy", source, *arguments, "-o", tmp_path / "v.npz")
    assert outcome.code == 0 and "48 seen and 17 unseen" in outcome.out
    words, array = Vocabulary.load(tmp_path / "v.npz"), np.load(source)
    assert words.names == COCO_48_17.names and words.encoder == "clip:ViT-B-32"
    for name in ("person", "snowboard"):
        row = words.embeddings[words.names.index(name)]
        np.testing.assert_array_equal(row, array[list(COCO_IDS).index(name)])


def test_lvis_names_from_a_file(shared: Path, tmp_path: Path, command: Command) -> None:
    folder = shared / "data/embeddings"
    outcome = command(
        "vocab", "npy", folder / "lvis_clip_vitb32.npy", "--names", folder / "lvis_names.json", "-o", tmp_path / "v.npz"
    )
    assert outcome.code == 0, outcome.err
    assert len(Vocabulary.load(tmp_path / "v.npz")) == 1203


@pytest.fixture(scope="module")
def random_clip(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    return NAME, write_weights(tmp_path_factory.mktemp("clip"))


def test_clip_features_are_averaged_over_templates_and_synonyms(random_clip: tuple[str, Path]) -> None:
    name, weights = random_clip
    words = encode_names(["cat", "sofa|couch"], name, weights)
    assert words.names == ("cat", "sofa") and words.source["templates"] == list(TEMPLATES)
    model = open_clip.create_model(name, pretrained=str(weights)).eval()
    tokenizer = open_clip.get_tokenizer(name)
    with torch.inference_mode():
        for row, synonyms in zip(words.embeddings, (["cat"], ["sofa", "couch"]), strict=True):
            features = [
                torch.nn.functional.normalize(model.encode_text(tokenizer([template.replace("{}", word)]))[0], dim=0)
                for word in synonyms
                for template in TEMPLATES
            ]
            expected = torch.nn.functional.normalize(torch.stack(features).mean(0), dim=0)
            np.testing.assert_allclose(row, expected, atol=1e-6)


def test_clip_command(random_clip: tuple[str, Path], tmp_path: Path, command: Command) -> None:
    name, weights = random_clip
    arguments = ("--model", name, "--weights", weights, "-o", tmp_path / "v.npz")
    assert command("vocab", "clip", "cat, dog", *arguments).code == 0
    assert Vocabulary.load(tmp_path / "v.npz").encoder == f"clip:{name}"
    assert command("vocab", "clip", "coco", "--split", "coco-65-15", *arguments).code == 0
    assert Vocabulary.load(tmp_path / "v.npz").names == COCO_65_15.names
    weights.with_name("cut.pt").write_bytes(weights.read_bytes()[:5000])
    outcome = command("vocab", "clip", "cat", "--model", name, "--weights", weights.with_name("cut.pt"), "-o", "v.npz")
    assert outcome.code == 2 and "does not fit tiny-test-clip, or is damaged" in outcome.err
