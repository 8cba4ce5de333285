"""Files from pixels to detections find what the runtime finds, in every runtime that we promise."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from commands import Command
from end_to_end_files import end_to_end_file
from PIL import Image
from tensorrt_surface import as_tensorrt_rtx, layer_types
from tiny_model import WIDTH, contract

from d2zero.demo.run import packaged_checkpoint
from d2zero.model import D2Zero
from d2zero_export.end_to_end_parity import end_to_end_difference, open_end_to_end
from d2zero_export.engine import EngineOptions, Shape, build_engine
from d2zero_export.engine_options import dimensions, profile_for
from d2zero_export.onnx_graph import FORBIDDEN
from d2zero_runtime import D2ZeroError, load, read_image
from d2zero_runtime.artifacts.contract import EndToEnd
from d2zero_runtime.artifacts.onnx import read_contract
from d2zero_runtime.masks.postprocess import Mode


@pytest.fixture(scope="module")
def whole(demo_model: D2Zero, exported: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return end_to_end_file(demo_model, exported, tmp_path_factory.mktemp("whole") / "whole.onnx")


@pytest.mark.parametrize(
    "options",
    [EndToEnd(), EndToEnd(masks="logits", max_detections=7), EndToEnd(mode=Mode.ZSIS), EndToEnd(max_detections=9999)],
    ids=["packed", "logits", "zsis", "all pairs"],
)
def test_instances_are_those_of_the_runtime(
    demo_model: D2Zero, exported: Path, tmp_path: Path, options: EndToEnd
) -> None:
    path = end_to_end_file(demo_model, exported, tmp_path / "whole.onnx", options)
    found = end_to_end_difference(load(exported), path)
    assert found.failures("float32") == [] and found.instances > 10
    assert found.scores < 1e-6 and found.bits < 1e-6


def test_only_standard_operators(whole: Path) -> None:
    proto = onnx.load(whole)
    assert not {node.op_type for node in proto.graph.node} & FORBIDDEN
    assert {node.domain for node in proto.graph.node} == {""}
    assert [entry.name for entry in proto.graph.input] == ["pixels", "class_embeddings", "active"]
    assert [entry.name for entry in proto.graph.output] == ["boxes", "scores", "class_ids", "masks"]


def test_openvino_finds_the_same(whole: Path, shapes_data: Path) -> None:
    openvino = pytest.importorskip("openvino")
    pixels = read_image(min((shapes_data / "val").iterdir()))[:77, :83][None]
    (ours,) = open_end_to_end(whole).found_in(pixels)
    compiled = openvino.Core().compile_model(whole, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    found = compiled({"pixels": pixels})
    names = ("boxes", "scores", "class_ids", "masks")
    boxes, scores, class_ids, masks = (found[name][0][: len(ours)] for name in names)  # the rest has no score
    clear = ours.scores > 0.05
    assert clear.sum() > 3
    np.testing.assert_allclose(scores[clear], ours.scores[clear], atol=1e-5)
    np.testing.assert_allclose(boxes[clear], ours.boxes[clear], atol=1e-3)
    np.testing.assert_array_equal(class_ids[clear], ours.class_ids[clear])
    bits = np.unpackbits(masks[clear], axis=2, count=83)
    assert (bits.view(bool) != ours.bitmaps()[clear]).mean() < 1e-4


@pytest.mark.parametrize("masks", ["packed", "logits"])
def test_the_runtime_takes_it(
    demo_model: D2Zero, exported: Path, shapes_data: Path, tmp_path: Path, masks: Any
) -> None:
    path = end_to_end_file(demo_model, exported, tmp_path / "whole.onnx", EndToEnd(masks))
    pictures = sorted((shapes_data / "val").iterdir())[:3]
    large = [Image.open(picture).resize((331, 247)) for picture in pictures]  # shrunk for the network
    for sources, overlap, tolerance in ((pictures, 1.0, 1e-5), (large, 0.9 if masks == "packed" else 1.0, 0.02)):
        ours = load(exported)(sources, batch_size=2)
        theirs = load(path)(sources, batch_size=2)
        for left, right in zip(ours, theirs, strict=True):
            assert left.names == right.names and left.image_size == right.image_size
            np.testing.assert_allclose(left.scores, right.scores, atol=tolerance)
            both, either = left.bitmaps() & right.bitmaps(), left.bitmaps() | right.bitmaps()
            assert (both.sum(axis=(1, 2)) >= overlap * either.sum(axis=(1, 2))).all()


def test_what_the_runtime_cannot_do_with_it(whole: Path, shapes_data: Path) -> None:
    segmenter, image = load(whole), read_image(min((shapes_data / "val").iterdir()))
    assert len(segmenter(image, score_threshold=0.0, max_detections=3)) == 3
    assert segmenter(image, masks="none").masks is None
    with pytest.raises(D2ZeroError, match="the mode gzsis is fixed in this end-to-end file, got zsis"):
        segmenter(image, "zsis")
    with pytest.raises(D2ZeroError, match="hands over detections and no raw output"):
        segmenter.predict_raw([image])
    for refused in (lambda: segmenter.segment(image), lambda: segmenter.classifier):
        with pytest.raises(D2ZeroError, match="an end-to-end file hands over only what has names; use one without"):
            refused()
    assert read_contract(whole)[0].query_dim == 0
    with pytest.raises(D2ZeroError, match="runs with ONNX Runtime: leave out openvino"):
        load(whole, "openvino")
    segmenter.close()
    with pytest.raises(D2ZeroError, match="was closed"):
        segmenter(image)


@pytest.mark.slow
def test_tensorrt_rtx_builds_it(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    as_tensorrt_rtx(monkeypatch)
    assert layer_types(whole)["TOPK", "FLOAT"] == 2
    options = EngineOptions(sdk="tensorrt-rtx", max=Shape(1, 96, 128, 40), opt=Shape(1, 96, 128, 36))
    metadata = build_engine(whole, tmp_path / "m.engine", options)
    assert metadata.contract.end_to_end == EndToEnd()
    with pytest.raises(D2ZeroError, match="is an end-to-end engine"):
        load(tmp_path / "m.engine")


def test_the_vocabulary_is_replaced_in_the_file(whole: Path, tmp_path: Path, command: Command) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(whole.read_bytes())
    words = read_contract(path)[1].select(["red ring", "blue star", "cyan ring"])
    replace(words, active=np.array([True, False, True])).save(tmp_path / "v.npz")
    assert command("vocab", "set", path, tmp_path / "v.npz").code == 0
    onnx.checker.check_model(onnx.load(path), full_check=True)
    session = open_end_to_end(path)
    assert session.vocabulary.names == words.names
    (found,) = session.found_in(np.random.default_rng(0).integers(0, 256, (1, 96, 96, 3)).astype(np.uint8))
    assert len(found) and set(found.class_ids.tolist()) <= {0, 2}


@pytest.mark.slow
@pytest.mark.long
def test_the_command_exports_verifies_and_compares(tmp_path: Path, command: Command) -> None:
    path, checkpoint = tmp_path / "whole.onnx", packaged_checkpoint()
    outcome = command("export", checkpoint, "-o", path, "--end-to-end", "--size", "32x64", "--masks", "logits")
    assert outcome.code == 0 and "end to end" in outcome.err, outcome.err
    assert read_contract(path)[0].end_to_end == EndToEnd("logits")
    outcome = command("verify", checkpoint, path)
    assert outcome.code == 0 and "100.00 % matched" in outcome.out, outcome.err
    outcome = command("verify", checkpoint, path, "--max-logits", "1")
    assert outcome.code == 2 and "only --min-matched limits them, got a limit of logits" in outcome.err


def test_another_post_processing_is_found(exported: Path, whole: Path, tmp_path: Path) -> None:
    proto = onnx.load(whole)
    scale = next(tensor for tensor in proto.graph.initializer if tensor.name == "after/temperature")
    scale.CopyFrom(onnx.numpy_helper.from_array(np.array(0.5, np.float32), scale.name))
    onnx.save(proto, tmp_path / "other.onnx")
    assert end_to_end_difference(load(exported), tmp_path / "other.onnx").failures("float32")


def test_a_vocabulary_that_the_file_cannot_use_is_refused(
    demo_model: D2Zero, exported: Path, tmp_path: Path, command: Command
) -> None:
    path = end_to_end_file(demo_model, exported, tmp_path / "m.onnx", EndToEnd(mode=Mode.ZSIS))
    content, words = path.read_bytes(), read_contract(path)[1]
    replace(words, seen=np.ones(len(words), bool)).save(tmp_path / "seen.npz")
    words.with_synonyms({"red circle": "red ring"}).save(tmp_path / "synonyms.npz")
    for name, message in (("seen", "mode zsis needs unseen classes"), ("synonyms", "cannot add up synonyms")):
        outcome = command("vocab", "set", path, tmp_path / f"{name}.npz")
        assert outcome.code == 2 and message in outcome.err
    assert path.read_bytes() == content


def test_a_static_size_bounds_engines(tmp_path: Path) -> None:
    sizes = replace(contract().preprocessing, static_size=(96, 128))
    inputs = {"pixels": (None, None, None, 3), "class_embeddings": (None, WIDTH), "active": (None,)}
    found = profile_for(EngineOptions(), contract(preprocessing=sizes), inputs)
    assert [str(shape) for shape in (found.min, found.opt, found.max)] == ["1x64x64x1", "1x96x128x5", "4x96x128x1203"]
    assert dimensions(found.max, WIDTH, inputs) == {
        "pixels": (4, 96, 128, 3),
        "class_embeddings": (1203, WIDTH),
        "active": (1203,),
    }
    with pytest.raises(D2ZeroError, match="takes images of up to 96x128, got 1x128x128x5; give a smaller --max"):
        profile_for(EngineOptions(max=Shape(1, 128, 128, 5)), contract(preprocessing=sizes), inputs)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": Mode.GZSIS_COPY_PASTE}, "has one of the modes gzsis, zsis, got gzsis-copy-paste"),
        ({"masks": "rle"}, "masks must be one of packed, logits, got 'rle'"),
        ({"max_detections": 0}, "max_detections must be at least 1, got 0"),
    ],
)
def test_wrong_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(D2ZeroError, match=message):
        EndToEnd(**options)
