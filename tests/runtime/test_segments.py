"""What is segmented once is named like what is segmented again: with any classes, in every mode, by every backend."""

import base64
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from exported_files import changed, older, same_graph, with_classifier, with_constant_classes, without_features
from naming import EVERY_PAIR, other_words, renamed, require_close, require_equal, require_named_alike
from PIL import Image
from tiny_network import tiny

import d2zero
from d2zero.checkpoints.files import load_model, save_model
from d2zero.demo.run import packaged_checkpoint
from d2zero_export.onnx_export import contract_for
from d2zero_export.options import OnnxOptions
from d2zero_runtime import D2ZeroError, Segmenter, Vocabulary, load, read_image
from d2zero_runtime.artifacts.onnx import CLASSIFIER_KEY, read_classifier, replace_onnx_vocabulary
from d2zero_runtime.masks.postprocess import Mode
from d2zero_runtime.sources import ImageLike


@pytest.fixture(params=["checkpoint", "cpu", "openvino"], scope="module")
def segmenter(request: pytest.FixtureRequest, exported: Path) -> Segmenter:
    """The demo's model; not to be changed."""
    if request.param == "checkpoint":
        return d2zero.load(packaged_checkpoint()).segmenter()
    if request.param == "openvino":
        pytest.importorskip("openvino", reason="needs the extra 'openvino'")
    return load(exported, request.param)


@pytest.fixture(scope="module")
def photos(shapes_data: Path) -> list[Path]:
    return sorted((shapes_data / "val").iterdir())[:4]


@pytest.fixture(scope="module")
def large(photos: list[Path]) -> np.ndarray:
    """A photo that is shrunk for the network, and whose sides are no multiples of anything."""
    return np.asarray(Image.open(photos[0]).convert("RGB").resize((331, 247)))


def test_a_call_is_both_steps_in_a_row(segmenter: Segmenter, photos: list[Path], large: np.ndarray) -> None:
    # Measured on twelve pictures: 0 where one library computes both, 1.0e-6 with OpenVINO's network.
    tolerance = 3e-6 if "openvino" in segmenter.backend.name else 1e-6
    for image in (read_image(photos[0]), large):
        require_named_alike(segmenter, image, tolerance)


def test_lists_folders_and_batches(segmenter: Segmenter, photos: list[Path], large: np.ndarray) -> None:
    mixed: list[ImageLike] = [photos[0], large, read_image(photos[1]), Image.open(photos[2])]
    same: list[ImageLike] = [*photos]  # in size
    for sources, batch_size in ((mixed, 1), (same, 3)):
        found = segmenter.segment(sources, batch_size=batch_size)
        called = segmenter(sources, batch_size=batch_size)
        assert len(found) == len(called) == 4
        for segments, expected in zip(found, called, strict=True):
            require_equal(segmenter.name(segments), expected)
    assert len(segmenter.segment([])) == 0
    matching: Any = segmenter.segment(str(photos[0].with_suffix(".*")))
    assert len(matching) == 1
    require_equal(segmenter.name(matching[0]), segmenter(photos[0]))


def test_a_stream_of_segments_reports_bad_files(segmenter: Segmenter, photos: list[Path], tmp_path: Path) -> None:
    broken, failed = tmp_path / "broken.png", list[tuple[object, str]]()
    broken.write_bytes(photos[0].read_bytes()[:100])
    mixed = [photos[0], broken, photos[1], tmp_path / "none.png", photos[2]]
    stream = segmenter.segment_stream(iter(mixed), on_error=lambda source, error: failed.append((source, str(error))))
    found = list(stream)
    assert [source for source, _ in found] == photos[:3]
    assert [source for source, _ in failed] == [broken, tmp_path / "none.png"]
    require_equal(segmenter.name(found[2][1]), segmenter(photos[2]))
    with pytest.raises(D2ZeroError, match=r"cut short|not an image"):
        segmenter.segment(mixed)
    with pytest.raises(D2ZeroError, match="batch_size must be at least 1, got 0"):
        segmenter.segment(photos, batch_size=0)


def test_segments_are_all_queries_of_an_image(segmenter: Segmenter, large: np.ndarray) -> None:
    segments, contract = segmenter.segment(large), segmenter.contract
    count = contract.num_queries
    assert len(segments) == len(segments.masks) == count and segments.image_size == (247, 331)
    shapes = {name: getattr(segments, name).shape for name in ("queries", "background", "boxes", "qualities")}
    width = contract.query_dim
    assert shapes == {"queries": (count, width), "background": (width,), "boxes": (count, 4), "qualities": (count,)}
    assert {getattr(segments, name).dtype for name in shapes} == {np.dtype(np.float32)}
    assert np.linalg.norm(segments.background) == pytest.approx(1, abs=1e-5)
    assert "247x331" in repr(segments) and len(repr(segments)) < 80
    everything = segmenter(large, **EVERY_PAIR).masks
    assert isinstance(everything, tuple)
    masked = {mask["counts"] for mask in everything}
    areas = (segments.boxes[:, 2:] - segments.boxes[:, :2]).prod(axis=1)
    assert {mask["counts"] for mask, area in zip(segments.masks, areas, strict=True) if area} == masked
    assert not segments.boxes[areas == 0].any()


def test_classes_can_change_between_the_steps(exported: Path, large: np.ndarray) -> None:
    model = load(exported)
    segments, words = model.segment(large), other_words(model.vocabulary)
    before = model.name(segments)
    model.set_vocabulary(words)
    require_equal(model.name(segments), model.name(segments, words))
    require_equal(load(exported).name(segments), before)
    names = model.name(segments, renamed(load(exported).vocabulary)).names  # of the logits that the network made
    assert len(before) and names == tuple(name.upper() for name in before.names)


def test_segments_are_named_whatever_ran_the_network(exported: Path, large: np.ndarray) -> None:
    pytest.importorskip("openvino", reason="needs the extra 'openvino'")
    one, other = load(exported), load(exported, "openvino")
    segments, words = one.segment(large), other_words(one.vocabulary)
    require_equal(other.name(segments, words), one.name(segments, words))


def test_a_checkpoint_and_its_exported_file_name_each_others_segments(
    exported: Path, tmp_path: Path, large: np.ndarray
) -> None:
    checkpoint = d2zero.load(packaged_checkpoint())
    contract = contract_for(checkpoint, OnnxOptions(), OnnxOptions().impl, checkpoint_hash="")
    path = changed(exported, tmp_path / "m.onnx", same_graph, checkpoint=contract.checkpoint)
    ours, theirs = checkpoint.segmenter(), load(path)
    words = other_words(ours.vocabulary)
    segments = theirs.segment(large)
    found, expected = (model.name(segments, words, **EVERY_PAIR) for model in (ours, theirs))
    require_close(found, expected, 1e-6)


def test_segments_of_another_model_are_refused(exported: Path, large: np.ndarray) -> None:
    checkpoint, shorter = (d2zero.load(packaged_checkpoint()) for _ in range(2))
    shorter = shorter.with_decoder_layers(2)
    others = (tiny().segmenter(), checkpoint.segmenter(), shorter.segmenter())
    for made, names in ((made, names) for made in others for names in (*others, load(exported)) if made is not names):
        with pytest.raises(
            D2ZeroError, match="segments are another model's, or of another precision; name them with theirs"
        ):
            names.name(made.segment(large))


def test_models_of_one_architecture_are_told_apart(tmp_path: Path) -> None:
    image, found = np.zeros((64, 64, 3), np.uint8), []
    for number in range(2):
        model = tiny()
        model.classifier.get_buffer("logit_scale").fill_(1 + number)
        found.append(load_model(save_model(model, tmp_path / f"{number}.safetensors")).segmenter())
    with pytest.raises(D2ZeroError, match="another model's"):
        found[1].name(found[0].segment(image))


@pytest.mark.parametrize(
    ("words", "mode", "message"),
    [
        (Vocabulary(("a",), np.ones((1, 8), np.float32)), Mode.GZSIS, "width 64, the vocabulary has 8"),
        (Vocabulary(("a",), np.ones((1, 64), np.float32), source={"encoder": "clip"}), Mode.GZSIS, "do not mix"),
        (Vocabulary(("a",), np.ones((1, 64), np.float32)), Mode.ZSIS, "mode zsis needs unseen classes"),
    ],
    ids=["width", "encoder", "mode"],
)
def test_vocabularies_that_do_not_fit_are_refused(
    segmenter: Segmenter, large: np.ndarray, words: Vocabulary, mode: Mode, message: str
) -> None:
    with pytest.raises(D2ZeroError, match=message):
        segmenter.name(segmenter.segment(large), words, mode)


def test_an_older_file_predicts_and_refuses_to_segment(exported: Path, tmp_path: Path, large: np.ndarray) -> None:
    model = load(older(exported, tmp_path / "older.onnx"))
    require_close(model(large, **EVERY_PAIR), load(exported)(large, **EVERY_PAIR), 1e-6)
    assert model.predict_raw([np.zeros((64, 64, 3), np.uint8)]).class_logits.shape[2] == len(model.vocabulary) + 1
    for refused in (
        lambda: model.segment(large),
        lambda: model.classifier,
        lambda: next(model.segment_stream([large])),
    ):
        with pytest.raises(D2ZeroError, match="was exported by an older d2zero; export the model again") as error:
            refused()
        assert "\n" not in str(error.value)


def test_outputs_that_the_contract_promises_are_there(exported: Path, tmp_path: Path) -> None:
    path = changed(exported, tmp_path / "m.onnx", without_features)
    with pytest.raises(D2ZeroError, match="lacks queries, background; export it again"):
        load(path)


def test_a_baked_file_names_with_any_classes(exported: Path, tmp_path: Path, large: np.ndarray) -> None:
    baked, open_ = load(changed(exported, tmp_path / "b.onnx", with_constant_classes, baked=True)), load(exported)
    words = other_words(open_.vocabulary)
    with pytest.raises(D2ZeroError, match="exported with --bake"):
        baked(large, vocabulary=words)
    segments = baked.segment(large)
    require_equal(baked.name(segments), baked(large))
    found = baked.name(segments, words, **EVERY_PAIR)
    require_close(found, open_(large, vocabulary=words, **EVERY_PAIR), 1e-6)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("no base64", "m.onnx is damaged: its classifier cannot be read"),
        ("", "m.onnx has no classifier beside its network; export the model again"),
        (base64.b64encode(b"no onnx").decode(), "onnxruntime cannot load the classifier in .*: "),
        (None, "the classifier in .* is not a model of d2zero: .*; export it again"),
    ],
    ids=["no base64", "empty", "no onnx", "another graph"],
)
def test_a_damaged_classifier_is_one_clear_line(
    exported: Path, tmp_path: Path, large: np.ndarray, content: str | None, message: str
) -> None:
    def damage(proto: onnx.ModelProto) -> None:
        next(entry for entry in proto.metadata_props if entry.key == CLASSIFIER_KEY).value = content

    def rename_output(classifier: onnx.ModelProto) -> None:
        classifier.graph.output[0].name = classifier.graph.node[-1].output[0] = "scores"

    change = with_classifier(rename_output) if content is None else damage
    model = load(changed(exported, tmp_path / "m.onnx", change))
    segments = model.segment(large)
    assert len(model.name(segments)) == len(model(large))  # which needs no classifier
    with pytest.raises(D2ZeroError, match=message) as error:
        model.name(segments, other_words(model.vocabulary))
    assert "\n" not in str(error.value)


def test_a_replaced_vocabulary_leaves_the_classifier(exported: Path, tmp_path: Path, large: np.ndarray) -> None:
    path = Path(shutil.copy(exported, tmp_path / "m.onnx"))
    before, words = load(exported), other_words(load(exported).vocabulary)
    replace_onnx_vocabulary(path, words)
    after = load(path)
    assert read_classifier(path) == read_classifier(exported) and after.vocabulary.names == words.names
    segments = before.segment(large)
    require_equal(after.name(segments), before.name(segments, words))
    require_equal(after.name(segments, before.vocabulary), before.name(segments))
    require_named_alike(after, large)
