"""A text encoder as a file: equal to open_clip's, run without torch, and names typed for a model."""

import json
import random
import subprocess
import sys
import unicodedata
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from commands import Command
from tiny_clip import NAME, WIDTH, write_weights
from tiny_model import write_model

from d2zero.checkpoints.files import load_model, save_model
from d2zero.demo.run import packaged_checkpoint
from d2zero.text.clip import Clip, encode_names, load_clip
from d2zero_export import text_export
from d2zero_export.onnx_graph import FORBIDDEN, OPSET
from d2zero_export.text_export import export_text_encoder
from d2zero_runtime import D2ZeroError, TextEncoder, Vocabulary, load
from d2zero_runtime.artifacts.text_encoder import TEXT_KEY, TextContract
from d2zero_runtime.formats import format_of

open_clip = pytest.importorskip("open_clip")

NAMES = ["cat", "sofa|couch", "Traffic Light, stoplight", "Café Müller's chair", "red mug"]


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_weights(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def text_file(weights: Path) -> Path:
    """Not to be changed."""
    file = weights.with_name("text.onnx")
    assert export_text_encoder(NAME, weights, file) < 1e-5
    return file


@pytest.fixture(scope="module")
def clip(weights: Path, text_file: Path) -> Clip:
    return load_clip(NAME, weights)


@pytest.fixture(scope="module")
def encoder(text_file: Path) -> TextEncoder:
    return TextEncoder.load(text_file, threads=1)


def test_vocabularies_are_those_of_open_clip(encoder: TextEncoder, weights: Path) -> None:
    made, expected = encoder(NAMES), encode_names(NAMES, NAME, weights)
    assert made.names == expected.names == ("cat", "sofa", "Traffic Light", "Café Müller's chair", "red mug")
    assert made.source == expected.source and made.encoder == encoder.encoder == f"clip:{NAME}"
    assert made.seen.all() and made.width == encoder.width == WIDTH
    np.testing.assert_allclose(made.embeddings, expected.embeddings, atol=1e-5)
    np.testing.assert_allclose(encoder(["red mug"]).embeddings[0], made.embeddings[-1], atol=1e-6)
    assert encoder(NAMES, seen=["sofa", "unheard of"]).seen_names == ("sofa",)


def test_the_graph(encoder: TextEncoder, clip: Clip, text_file: Path) -> None:
    texts = [f"a photo of {number} cats" for number in range(5)]
    for count in (1, 2, 5):
        found = encoder.encode(texts[:count])
        assert found.shape == (count, WIDTH) and found.dtype == np.float32
        np.testing.assert_allclose(found, clip.encode(texts[:count]), atol=1e-5)
        np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-5)
    model = onnx.load(text_file)
    assert [entry.version for entry in model.opset_import if not entry.domain] == [OPSET]
    assert not {node.op_type for node in model.graph.node} & FORBIDDEN
    assert not any(node.metadata_props or node.doc_string for node in model.graph.node)
    assert TextContract.read(text_file).tools.keys() >= {"open_clip_torch", "tokenizers", "torch"}


def letters() -> list[str]:
    """Each letter and sign that Python's Unicode tables know, within a word and by itself."""
    return [
        f"a{chr(code)}b {chr(code)}"
        for code in range(0x20, 0x20000)
        if unicodedata.category(chr(code)) not in ("Cn", "Co", "Cs")
    ]


def mixtures(count: int) -> list[str]:
    signs = "abcdefghijklmnopqrstuvwxyz   ''0123456789.,!?-_&;#<>|/éñßſKİ漢字🙂👍🏽\u200d\u0301\t\n\xa0ABC"
    drawn = random.Random(0)
    return ["".join(drawn.choice(signs) for _ in range(drawn.randrange(90))) for _ in range(count)]


def words(count: int) -> list[str]:
    known = [word.replace("</w>", "") for word in open_clip.tokenizer._tokenizer.encoder if "_of_text" not in word]
    drawn = random.Random(0)
    return [drawn.choice(["", " "]).join(drawn.choices(known, k=drawn.randrange(30))) for _ in range(count)]


ODD = [
    "", " ", "!", "Red Mug", "don't 'S 'LL they'Re 'ſ", "&amp;amp; &lt;b&gt; &#39; L&AMP;R", "x" * 400, "word " * 100,
    "e\u0301 ﬁ Å", "“smart” – quotes…", "ÃƒÂ©", "1234 12a3 a_b-c/d", "</w> <w> <|endoftext|>", "x\x00y\ufeff",
    "İstanbul ẞ",
]  # fmt: skip


@pytest.mark.parametrize(
    "texts", [ODD, letters()[::29], mixtures(1000), words(400)], ids=["odd", "letters", "mixed", "words"]
)
def test_tokens_are_those_of_open_clip(encoder: TextEncoder, texts: list[str]) -> None:
    expected = open_clip.SimpleTokenizer(context_length=77)(texts).numpy()
    found = encoder.tokenize(texts)
    assert found.dtype == np.int64 and found.shape == (len(texts), 77)
    wrong = [text for text, left, right in zip(texts, expected, found, strict=True) if not np.array_equal(left, right)]
    assert not wrong


@pytest.mark.slow
@pytest.mark.long
def test_tokens_of_every_letter(encoder: TextEncoder) -> None:
    test_tokens_are_those_of_open_clip(encoder, letters())


def test_control_words_are_refused(encoder: TextEncoder) -> None:
    with pytest.raises(D2ZeroError, match="must not contain <start_of_text>"):
        encoder(["a <END_of_text> b"])


def test_names_are_checked_before_they_are_encoded(encoder: TextEncoder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoder, "encode", None)
    for names, message in (
        ([], "at least one class name"), (["cat", "cat|kitty"], "cat given more than once"),
        (["cat", " "], "number 1 is"), ("cat", "got the text 'cat'"),
    ):  # fmt: skip
        with pytest.raises(D2ZeroError, match=message):
            encoder(names)


@pytest.mark.slow
def test_another_tower(tmp_path: Path) -> None:
    """As CoCa's: a class token after the text, masks made of the tokens, another context length."""
    name = "tiny-test-tower"
    weights = write_weights(tmp_path, name, custom_text=True, embed_cls=True, context_length=20)
    assert export_text_encoder(name, weights, tmp_path / "t.onnx") < 1e-5
    assert TextEncoder.load(tmp_path / "t.onnx").tokenize(["word " * 50]).shape == (1, 20)


def test_a_file_that_differs_is_not_written(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text_file: Path
) -> None:
    content = onnx.load(text_file)
    (tmp_path / "t.onnx").write_bytes(b"before")
    monkeypatch.setattr(text_export, "tokenizer_json", lambda clip: TextContract.read(text_file).tokenizer)
    for tensor in content.graph.initializer:
        values = onnx.numpy_helper.to_array(tensor)
        if values.dtype == np.float32 and values.ndim == 2:
            tensor.CopyFrom(onnx.numpy_helper.from_array(values * np.float32(1.01) + np.float32(0.001), tensor.name))
    del content.metadata_props[:]
    monkeypatch.setattr(text_export, "_graph", lambda clip: content)
    with pytest.raises(D2ZeroError, match=r"differ by .* the limit is 1e-05"):
        export_text_encoder(NAME, weights, tmp_path / "t.onnx")
    other = TextContract.read(text_file).tokenizer.replace("'s|'t", "'s")
    monkeypatch.setattr(text_export, "tokenizer_json", lambda clip: other)
    del content.metadata_props[:]
    with pytest.raises(D2ZeroError, match="tokenizer differs from that of tiny-test-clip, first in"):
        export_text_encoder(NAME, weights, tmp_path / "t.onnx")
    assert (tmp_path / "t.onnx").read_bytes() == b"before" and len(list(tmp_path.iterdir())) == 1


def test_what_cannot_be_exported_is_refused(tmp_path: Path, weights: Path, command: Command) -> None:
    for arguments, message in (
        (("ViT-B-16-SigLIP", "--weights", weights, "-o", "t.onnx"), "has a tokenizer other than CLIP's own"),
        (("roberta-ViT-B-32", "--weights", weights, "-o", "t.onnx"), "has a tokenizer other than CLIP's own"),
        (("ViT-Z", "--weights", weights, "-o", "t.onnx"), "open_clip has no model 'ViT-Z'"),
        ((NAME, "--weights", tmp_path / "none.pt", "-o", "t.onnx"), "do not exist"),
        ((NAME, "--weights", weights, "-o", "t.txt"), "must end in .onnx"),
    ):
        outcome = command("export-text", *arguments)
        assert outcome.code == 2 and message in outcome.err
        assert outcome.err.splitlines()[-1].startswith("error: ")


def test_files_that_are_no_text_encoders_are_refused(text_file: Path, tmp_path: Path) -> None:
    model = write_model(tmp_path / "model.onnx")
    with pytest.raises(D2ZeroError, match="is no text encoder of d2zero; make one with `d2zero export-text`"):
        TextEncoder.load(model)
    with pytest.raises(D2ZeroError, match="carries no d2zero contract"):
        load(text_file)
    with pytest.raises(D2ZeroError, match="leave out openvino"):
        TextEncoder.load(text_file, providers=("openvino", {}))
    with pytest.raises(D2ZeroError, match="a provider is one of"):
        TextEncoder.load(text_file, providers=["nothing"])
    whole = text_file.read_bytes()
    (tmp_path / "t.onnx").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(D2ZeroError, match="damaged, cut short"):
        TextEncoder.load(tmp_path / "t.onnx")
    with pytest.raises(D2ZeroError, match="does not exist"):
        TextEncoder.load(tmp_path / "absent.onnx")
    for change, message in (
        ({"version": 2}, "upgrade d2zero"),
        ({"tokenizer": "{}"}, "its tokenizer cannot be read"),
        ({"width": 9}, r"made features of shape \(8, 64\), expected \(8, 9\)"),
        ({"context_length": 5}, "onnxruntime cannot run"),
        ({"context_length": 10**9}, "from 3 to 4096"),
        ({"templates": ["a"]}, "templates must be"),
        ({"encoder": 5}, "is damaged"),
    ):
        file = with_contract(text_file, tmp_path / "changed.onnx", change)
        with pytest.raises(D2ZeroError, match=message):
            TextEncoder.load(file)(["cat"])


def with_contract(source: Path, path: Path, change: Mapping[str, object]) -> Path:
    model = onnx.load(source)
    (entry,) = (entry for entry in model.metadata_props if entry.key == TEXT_KEY)
    entry.value = json.dumps({**json.loads(entry.value), **change})
    path.write_bytes(model.SerializeToString())
    return path


def test_typed_names_replace_the_vocabulary(
    encoder: TextEncoder, text_file: Path, shapes_data: Path, tmp_path: Path, command: Command
) -> None:
    model = load_model(packaged_checkpoint())
    own = encoder(["red circle", "blue ring|blue hoop", "green cross"], seen=["red circle", "blue ring"])
    model.set_vocabulary(replace(own, source={}))  # the demo's has another encoder
    model.set_vocabulary(own)
    checkpoint = save_model(model, tmp_path / "m.safetensors")
    picture, file = next((shapes_data / "val").glob("*.png")), tmp_path / "out/detections.json"
    typed = ["green cross", "red circle", "purple star|violet star"]
    expected = encoder(typed, seen=own.seen_names)
    assert expected.seen_names == ("red circle",) and expected.names == ("green cross", "red circle", "purple star")
    for mode in ("gzsis", "zsis"):
        options = ("--names", ", ".join(typed), "--text-encoder", text_file, "--score", "0", "--mode", mode)
        outcome = command("predict", picture, "-m", checkpoint, "-o", tmp_path / "out", "--no-pictures", *options)
        assert outcome.code == 0, outcome.err
        written = json.loads(file.read_text())
        assert [entry["name"] for entry in written["categories"]] == list(expected.names)
        with model.segmenter() as segmenter:
            found = segmenter(picture, mode, vocabulary=expected, score_threshold=0.0)
        assert [entry["category_id"] - 1 for entry in written["annotations"]] == found.class_ids.tolist()
        np.testing.assert_allclose([entry["score"] for entry in written["annotations"]], found.scores, atol=1e-4)
        assert len(found) > 20 and (1 in found.class_ids) == (mode == "gzsis")


def test_names_that_cannot_be_used_are_refused_before_work(
    text_file: Path, shapes_data: Path, tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TextEncoder, "load", None)
    model = write_model(tmp_path / "model.onnx")
    start = ("predict", shapes_data / "val", "-m", packaged_checkpoint(), "-o", tmp_path / "out")
    for arguments, message in (
        (("--names", "cat"), "--names and --text-encoder go together"),
        (("--text-encoder", text_file), "--names and --text-encoder go together"),
        (("--names", "cat", "--text-encoder", text_file, "-v", "v.npz"), "both give the classes"),
        (("--names", "cat", "--text-encoder", model), "is no text encoder of d2zero"),
        (
            ("--names", "cat", "--text-encoder", text_file),
            f"trained with embeddings of shapes-attributes, the text encoder has those of clip:{NAME}",
        ),
    ):
        outcome = command(*start, *arguments)
        assert outcome.code == 2 and message in outcome.err and outcome.err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_vocab_text(text_file: Path, encoder: TextEncoder, tmp_path: Path, command: Command) -> None:
    arguments = ("--text-encoder", text_file, "-o", tmp_path / "v.npz")
    outcome = command("vocab", "text", "red mug, cat|kitty", *arguments)
    assert outcome.code == 0, outcome.err
    made = Vocabulary.load(tmp_path / "v.npz")
    np.testing.assert_array_equal(made.embeddings, encoder(["red mug", "cat|kitty"]).embeddings)
    outcome = command("vocab", "text", "cat", "--text-encoder", text_file, "-o", tmp_path / "v.txt")
    assert outcome.code == 2 and "--output must end in .npz" in outcome.err
    outcome = command("vocab", "text", "cat, dog", "--split", "coco-48-17", *arguments)
    assert outcome.code == 2 and "the names lack" in outcome.err


WITHOUT_TORCH = """
import sys
for name in ("torch", "open_clip", "transformers", "onnx"):
    sys.modules[name] = None
import d2zero_runtime
from d2zero.cli.main import main

picture, model, text, out = sys.argv[1:]
print(d2zero_runtime.TextEncoder.load(text, threads=1)(["red mug", "cat|kitty"]).names)
main(["predict", picture, "-m", model, "-o", out, "--names", "red mug, cat", "--text-encoder", text])
"""


def test_without_torch(exported: Path, text_file: Path, shapes_data: Path, tmp_path: Path) -> None:
    model = tmp_path / "m.onnx"
    model.write_bytes(exported.read_bytes())
    rows = np.random.default_rng(0).standard_normal((2, WIDTH)).astype(np.float32)
    format_of(model).replace_vocabulary(model, Vocabulary(("a", "b"), rows))  # which records no encoder
    arguments = (next((shapes_data / "val").glob("*.png")), model, text_file, tmp_path / "out")
    line = [sys.executable, "-c", WITHOUT_TORCH, *map(str, arguments)]
    done = subprocess.run(line, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "('red mug', 'cat')" in done.stdout and "1 images" in done.stdout
    categories = json.loads((tmp_path / "out/detections.json").read_text())["categories"]
    assert [entry["name"] for entry in categories] == ["red mug", "cat"]


def test_missing_packages_are_named(text_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for package in ("tokenizers", "ftfy"):
        with monkeypatch.context() as changed:
            changed.setitem(sys.modules, package, None)
            with pytest.raises(D2ZeroError, match=rf"package {package}; install it with: pip install 'd2zero\[text\]'"):
                TextEncoder.load(text_file)


def test_weights_beyond_what_a_file_holds_are_refused(clip: Clip, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_export, "LARGEST", 1000)
    with pytest.raises(D2ZeroError, match="GB of weights"):
        text_export._require_small(clip)
