"""Exported models are the same models, and stay so with other classes, sizes, batches and modes."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
from commands import Command
from end_to_end_files import end_to_end_file
from models import published_model, published_vocabulary
from naming import EVERY_PAIR, other_words, renamed, require_equal
from PIL import Image
from recorded import require_recorded_detections
from tiny_network import tiny

from d2zero.demo.run import packaged_checkpoint
from d2zero.model import D2Zero
from d2zero.model.backbone import Backbone
from d2zero_export import onnx_export
from d2zero_export.end_to_end_parity import open_end_to_end, runtime_detections
from d2zero_export.graph import ATTENTION_MASK, InferenceGraph
from d2zero_export.onnx_export import export_onnx
from d2zero_export.onnx_graph import FORBIDDEN
from d2zero_export.options import OnnxOptions
from d2zero_export.parity import alike
from d2zero_export.precision import cast_to, fold_batch_norms
from d2zero_export.verify import raw_parity, verify
from d2zero_runtime import D2ZeroError, Vocabulary, load, read_image
from d2zero_runtime.artifacts.contract import CONTRACT_KEY
from d2zero_runtime.artifacts.onnx import read_contract, replace_onnx_vocabulary
from d2zero_runtime.images import Size
from d2zero_runtime.masks.postprocess import ModeName
from d2zero_runtime.sources import expand

# Tracing one size takes a quarter of the time of any.
SIZES = [pytest.param((96, 128), id="one size"), pytest.param(None, id="any size", marks=pytest.mark.long)]


@pytest.fixture
def photos(shapes_data: Path) -> list[Path]:
    return sorted((shapes_data / "val").iterdir())[:6]


def test_graph_equals_the_model(small_model: D2Zero) -> None:
    import torch

    images = torch.randn(2, 3, 96, 64, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        ours = small_model(images)[-1]
        found = InferenceGraph(small_model)(images, small_model.class_embeddings)
    for theirs, expected, tolerance in zip(found, ours, (5e-5, 5e-4, 5e-5, 5e-5), strict=True):
        torch.testing.assert_close(theirs, expected, atol=tolerance, rtol=0)


def test_file_equals_the_checkpoint_at_every_size_batch_and_class_count(demo_model: D2Zero, exported: Path) -> None:
    parity = raw_parity(demo_model.segmenter(), load(exported))
    assert len(parity.differences) == 11
    for entry in parity.differences:
        assert entry.class_logits < 1e-4 and entry.mask_logits < 1e-3 and entry.flipped < 1e-4, entry


def test_operators(exported: Path) -> None:
    proto = onnx.load(exported)
    operators = {node.op_type for node in proto.graph.node}
    assert not operators & FORBIDDEN and "GridSample" in operators
    assert {entry.domain: entry.version for entry in proto.opset_import}[""] < 20
    assert [entry.name for entry in proto.graph.input] == ["images", "class_embeddings"]
    content = proto.SerializeToString()
    root = str(Path(__file__).parents[2]).encode()
    assert b"d2zero_export" not in content and root not in content  # no traces of who made it where


@pytest.mark.slow
@pytest.mark.long
def test_gather_form_has_no_grid_sample_and_gives_the_same(tmp_path: Path) -> None:
    parity = export_onnx(tiny(), tmp_path / "g.onnx", OnnxOptions(deform_attn="gather"))
    assert parity is not None and max(entry.mask_logits for entry in parity.differences) < 1e-3
    assert "GridSample" not in {node.op_type for node in onnx.load(tmp_path / "g.onnx").graph.node}


@pytest.mark.slow
@pytest.mark.parametrize("size", SIZES)
def test_float16_is_in_the_graph_and_finds_the_same_instances(
    size: Size | None, demo_model: D2Zero, photos: list[Path], tmp_path: Path
) -> None:
    parity = export_onnx(demo_model, tmp_path / "h.onnx", OnnxOptions(precision="float16", size=size))
    limit = 0.02 if size else 0.01  # images that fill half of the one size differ most
    assert parity is not None and max(entry.class_relative for entry in parity.differences) < limit
    proto = onnx.load(tmp_path / "h.onnx")
    type_of = {tensor.name: tensor.data_type for tensor in proto.graph.initializer}
    weights = [type_of[name] for node in proto.graph.node if node.op_type == "Conv" for name in node.input[1:]]
    assert len(weights) > 20 and set(weights) == {onnx.TensorProto.FLOAT16}
    assert {entry.type.tensor_type.elem_type for entry in (*proto.graph.input, *proto.graph.output)} == {
        onnx.TensorProto.FLOAT
    }
    result = verify(demo_model, tmp_path / "h.onnx", images=photos)
    assert not result.failures and result.instances.matched >= 0.99 and result.instances.same_label >= 0.99
    assert result.attention_flipped is not None and result.attention_flipped < 0.01
    assert load(tmp_path / "h.onnx").contract.precision == "float16"


def test_modules_that_stay_float32(demo_model: D2Zero) -> None:
    import torch

    before = demo_model.class_embeddings.dtype
    copied = cast_to(demo_model, "float16", fp32_modules=("classifier",))
    assert {p.dtype for p in copied.classifier.parameters()} == {torch.float32}
    assert {p.dtype for p in copied.decoder.parameters()} == {torch.float16}
    assert {p.dtype for p in demo_model.parameters()} == {torch.float32} == {before}  # the original is as it was
    with pytest.raises(D2ZeroError, match="precision must be one of float32, float16, bfloat16, int8, got 'int4'"):
        cast_to(demo_model, "int4")


@pytest.mark.parametrize("name", ["resnet50", "convnext_atto", "efficientnet_b0"])
def test_batch_norms_are_folded_in_any_backbone(name: str) -> None:
    import torch

    backbone = Backbone(name, frozen_norm=name != "efficientnet_b0").eval()
    generator = torch.Generator().manual_seed(0)
    for buffer_name, buffer in backbone.named_buffers():  # as training leaves them, not fresh ones
        if buffer_name.endswith("running_mean"):
            buffer.normal_(generator=generator)
        elif buffer_name.endswith("running_var"):
            buffer.uniform_(0.5, 2, generator=generator)
    images = torch.randn(1, 3, 64, 64, generator=generator)
    with torch.no_grad():
        before = backbone(images)
        count = fold_batch_norms(backbone)
        after = backbone(images)
    assert count == {"resnet50": 53, "convnext_atto": 0, "efficientnet_b0": 48}[name]
    assert not any(hasattr(module, "running_var") for module in backbone.modules())
    for ours, theirs in zip(after, before, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


@pytest.mark.slow
def test_fixed_and_baked(demo_model: D2Zero, photos: list[Path], tmp_path: Path, command: Command) -> None:
    path = tmp_path / "fixed.onnx"
    parity = export_onnx(demo_model, path, OnnxOptions(size=(96, 128), batch=2, bake=True))
    assert parity is not None and len(parity.differences) == 8  # other class counts do not apply
    inputs = onnx.load(path).graph.input
    assert [entry.name for entry in inputs] == ["images"]
    assert [dim.dim_value for dim in inputs[0].type.tensor_type.shape.dim] == [2, 3, 96, 128]
    segmenter = load(path)
    assert len(segmenter(photos[:3])) == 3 and segmenter.vocabulary.names == demo_model.vocabulary.names
    words = segmenter.vocabulary
    segments, others = segmenter.segment(photos[0]), other_words(words)
    require_equal(segmenter.name(segments), segmenter(photos[0]))
    expected = alike(demo_model.segmenter(), segmenter.preprocessing, others)(photos[0], **EVERY_PAIR)
    found = segmenter.name(segments, others, **EVERY_PAIR)
    np.testing.assert_allclose(found.scores, expected.scores, atol=1e-5)
    renamed(words).save(tmp_path / "renamed.npz")
    assert command("vocab", "set", path, tmp_path / "renamed.npz").code == 0
    assert load(path)(photos[0]).names[0].isupper()
    words.select(words.names[:3]).save(tmp_path / "few.npz")
    outcome = command("vocab", "set", path, tmp_path / "few.npz")
    assert outcome.code == 2 and "exported with --bake" in outcome.err


@pytest.mark.slow
@pytest.mark.long
def test_published_model_equals_the_recorded_outputs(shared: Path, tmp_path: Path) -> None:
    model = published_model(published_vocabulary(shared, "48_17"))
    recorded = np.load(shared / "reference/reference_48_17.npz")
    size = (4 * recorded["pred_masks"].shape[1], 4 * recorded["pred_masks"].shape[2])
    # A static shape: tracing dynamic ones takes four times as long, and the demo's model covers them.
    export_onnx(model, tmp_path / "p.onnx", OnnxOptions(verify=False, size=size))
    segmenter = load(tmp_path / "p.onnx")
    out = segmenter.predict_raw([recorded["image_u8"]])
    np.testing.assert_allclose(out.class_logits[0], recorded["pred_logits"], atol=1e-3, rtol=0)
    np.testing.assert_allclose(out.mask_logits[0], recorded["pred_masks"], atol=1e-3, rtol=0)
    require_recorded_detections(segmenter, out, recorded)
    whole = end_to_end_file(model, tmp_path / "p.onnx", tmp_path / "whole.onnx")
    pixels, session = recorded["image_u8"][None], open_end_to_end(whole)
    (ours,) = runtime_detections(segmenter, pixels, segmenter.vocabulary, session)
    (theirs,) = session.found_in(pixels)
    np.testing.assert_allclose(theirs.scores, ours.scores, atol=1e-5, rtol=0)
    np.testing.assert_allclose(theirs.boxes, ours.boxes, atol=1e-3, rtol=0)
    np.testing.assert_array_equal(theirs.class_ids, ours.class_ids)
    assert (theirs.bitmaps() != ours.bitmaps()).mean() < 1e-6
    started = load(tmp_path / "p.onnx").contract
    assert started.preprocessing.shortest_edge == 800 and len(started.class_names) == 65


def test_the_first_decoder_layers_are_the_head_of_that_number(demo_model: D2Zero) -> None:
    import torch

    images = torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        heads = demo_model(images, all_heads=True)
        for count in (1, 2, 3):
            shorter = demo_model.with_decoder_layers(count)
            for ours, theirs in zip(shorter(images)[-1], heads[count], strict=True):
                torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)
            assert shorter.contract().decoder_layers == count
    assert len(demo_model.decoder.layers) == demo_model.config.decoder_layers == 3
    for count in (0, 4):
        with pytest.raises(D2ZeroError, match=f"decoder_layers must be 1 to 3, which the model has, got {count}"):
            demo_model.with_decoder_layers(count)


@pytest.mark.slow
@pytest.mark.long
def test_an_export_may_stop_after_some_decoder_layers(tmp_path: Path, command: Command) -> None:
    path, checkpoint = tmp_path / "two.onnx", packaged_checkpoint()
    assert command("export", checkpoint, "-o", path, "--decoder-layers", "2", "--size", "96x128").code == 0
    assert read_contract(path)[0].decoder_layers == 2
    assert sum(name.startswith(ATTENTION_MASK) for node in onnx.load(path).graph.node for name in node.output) == 2
    outcome = command("verify", checkpoint, path)  # with as many layers of the checkpoint
    assert outcome.code == 0, outcome.err
    outcome = command("export", checkpoint, "-o", path, "--decoder-layers", "4")
    assert outcome.code == 2 and "decoder_layers must be 1 to 3" in outcome.err


def test_contract_and_default_vocabulary(demo_model: D2Zero, exported: Path) -> None:
    contract, words = read_contract(exported)
    assert words.names == demo_model.vocabulary.names and contract.checkpoint == "abc"
    np.testing.assert_array_equal(words.embeddings, demo_model.vocabulary.embeddings)
    np.testing.assert_array_equal(words.seen, demo_model.vocabulary.seen)
    assert contract.preprocessing == demo_model.config.preprocessing
    assert contract.softmax_temperature == demo_model.config.softmax_temperature
    assert {"d2zero", "torch", "onnx"} <= contract.tools.keys()


@pytest.mark.parametrize("mode", ["gzsis", "zsis", "gzsis-copy-paste"])
def test_instances_equal_those_of_the_checkpoint(
    demo_model: D2Zero, exported: Path, photos: list[Path], mode: ModeName
) -> None:
    found = load(exported)(photos, mode, score_threshold=0.0)
    expected = [demo_model.predict([read_image(path)], mode, score_threshold=0.0)[0] for path in photos]
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours.scores, theirs.scores, atol=1e-5)
        clear = theirs.scores > 0.05
        assert [n for n, c in zip(ours.names, clear, strict=True) if c] == [
            n for n, c in zip(theirs.names, clear, strict=True) if c
        ]
        assert (ours[clear].bitmaps() != theirs[clear].bitmaps()).mean() < 1e-4


def test_vocabularies_at_run_time(exported: Path, photos: list[Path]) -> None:
    segmenter = load(exported)
    words = segmenter.vocabulary
    few = words.select(["red ring", "blue cross", "green star"])
    assert set(segmenter(photos[0], vocabulary=few).names) <= set(few.names)
    assert segmenter.vocabulary is words  # only for that call
    segmenter.set_vocabulary(words.with_active(["red ring"]))
    assert set(segmenter(photos[0], score_threshold=0.0).names) == {"red ring"}
    many = np.random.default_rng(0).standard_normal((1203, 64)).astype(np.float32)
    segmenter.set_vocabulary(Vocabulary(tuple(f"c{i}" for i in range(1203)), many))
    raw = segmenter.predict_raw([read_image(photos[0])])
    assert raw.class_logits.shape[2] == 1204 and len(segmenter.postprocess(raw, [(96, 96)], [(96, 96)])[0]) == 100
    with pytest.raises(D2ZeroError, match="width 64, the vocabulary has 8"):
        segmenter.set_vocabulary(Vocabulary(("a",), np.ones((1, 8), np.float32)))
    with pytest.raises(D2ZeroError, match="do not mix"):
        segmenter(photos[0], vocabulary=replace(few, source={"encoder": "clip"}))
    with pytest.raises(D2ZeroError, match="needs unseen classes"):
        segmenter(photos[0], "zsis")


def test_default_vocabulary_is_replaced_in_the_file(exported: Path, tmp_path: Path, command: Command) -> None:
    path = tmp_path / "m.onnx"
    shutil.copy(exported, path)
    before = load(path)
    words = before.vocabulary.select(["blue cross", "red circle"])
    words.save(tmp_path / "v.npz")
    outcome = command("vocab", "set", path, tmp_path / "v.npz")
    assert outcome.code == 0 and "now 2 classes (1 unseen)" in outcome.out, outcome.err
    onnx.checker.check_model(onnx.load(path))
    after = load(path)
    assert after.vocabulary.names == words.names
    image = np.random.default_rng(0).integers(0, 256, (96, 96, 3), np.uint8)
    before.set_vocabulary(words)
    np.testing.assert_array_equal(before.predict_raw([image]).class_logits, after.predict_raw([image]).class_logits)
    assert "blue cross" in command("vocab", "show", path).out
    assert [entry.name for entry in tmp_path.iterdir() if "partial" in entry.name] == []
    replace_onnx_vocabulary(path, load(exported).vocabulary)
    assert path.stat().st_size == exported.stat().st_size
    with pytest.raises(D2ZeroError, match="width"):
        replace_onnx_vocabulary(path, Vocabulary(("a",), np.ones((1, 8), np.float32)))


def test_sources(exported: Path, photos: list[Path], tmp_path: Path) -> None:
    segmenter = load(exported)
    array = read_image(photos[0])
    first = segmenter(photos[0])
    for source in (str(photos[0]), array, Image.fromarray(array)):
        np.testing.assert_array_equal(segmenter(source).scores, first.scores)
    (tmp_path / "deep").mkdir()
    for index, photo in enumerate(photos[:3]):
        shutil.copy(photo, tmp_path / "deep" / f"{index}.PNG")
    (tmp_path / "notes.txt").write_text("no image")
    for files in (tmp_path, tmp_path / "deep", str(tmp_path / "*" / "*.PNG")):
        assert len(segmenter(files)) == 3
    np.testing.assert_array_equal(segmenter([photos[0], array])[1].scores, first.scores)
    with pytest.raises(D2ZeroError, match="no file matches"):
        expand(str(tmp_path / "*.jpg"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(D2ZeroError, match="holds no images"):
        segmenter(tmp_path / "empty")


def test_stream_keeps_the_order_and_reports_bad_files(exported: Path, photos: list[Path], tmp_path: Path) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes(photos[0].read_bytes()[:100])
    segmenter, failed = load(exported), []
    mixed = [photos[0], broken, photos[1], tmp_path / "none.png", photos[2]]
    found = list(segmenter.stream(iter(mixed), on_error=lambda source, error: failed.append((source, str(error)))))
    assert [source for source, _ in found] == [photos[0], photos[1], photos[2]]
    assert [source for source, _ in failed] == [broken, tmp_path / "none.png"]
    np.testing.assert_array_equal(found[2][1].scores, segmenter(photos[2]).scores)
    with pytest.raises(D2ZeroError, match=r"cut short|not an image"):
        segmenter(mixed)


@pytest.mark.parametrize("suffix", [".onnx", ".safetensors"])
def test_predict_command(suffix: str, exported: Path, photos: list[Path], tmp_path: Path, command: Command) -> None:
    model = exported if suffix == ".onnx" else packaged_checkpoint()
    folder = tmp_path / "photos"
    folder.mkdir()
    for photo in photos[:2]:
        shutil.copy(photo, folder)
    outcome = command("predict", folder, "-m", model, "-o", tmp_path / "out", "--score", "0.2")
    assert outcome.code == 0, outcome.err
    content = json.loads((tmp_path / "out/detections.json").read_text())
    assert len(content["images"]) == 2 and len(content["categories"]) == 36 and content["annotations"]
    assert all(entry["score"] >= 0.2 for entry in content["annotations"])
    assert len(list((tmp_path / "out").glob("*.jpg"))) == 2
    (folder / "zz.png").write_bytes(b"broken")
    outcome = command("predict", folder, "-m", model, "-o", tmp_path / "again", "--no-pictures")
    assert outcome.code == 2 and "skipped: " in outcome.err and "1 of 3 files" in outcome.err
    assert len(json.loads((tmp_path / "again/detections.json").read_text())["images"]) == 2


def test_predictions_are_kept_when_stopped(
    exported: Path, photos: list[Path], tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = []

    def stopped(*arguments: object, **options: object) -> Image.Image:
        shown.append(arguments)
        if len(shown) == 3:
            raise KeyboardInterrupt
        return Image.new("RGB", (8, 8))

    monkeypatch.setattr("d2zero_runtime.Detections.plot", stopped)
    outcome = command("predict", photos[0].parent, "-m", exported, "-o", tmp_path / "out", "--score", "0.2")
    assert outcome.code == 130 and "interrupted" in outcome.err
    content = json.loads((tmp_path / "out/detections.json").read_text())
    assert len(content["images"]) == 3 and {entry["image_id"] for entry in content["annotations"]} <= {1, 2, 3}
    assert not [entry.name for entry in (tmp_path / "out").iterdir() if entry.name.startswith(".")]


def test_runtime_needs_no_torch(exported: Path, photos: list[Path]) -> None:
    code = (
        "import sys; sys.modules['torch'] = None; import d2zero_runtime as r;"
        f"found = r.load({str(exported)!r})({str(photos[0])!r}, 'zsis', score_threshold=0.0); assert len(found) > 50;"
        "from d2zero.cli.main import main; sys.argv = ['d2zero', 'vocab', 'show', '" + str(exported) + "']; main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and "36 classes" in done.stdout, done.stderr


def test_bad_models_and_providers(exported: Path, tmp_path: Path, command: Command) -> None:
    for size in (0, 50, 5000, exported.stat().st_size - 1000):
        (tmp_path / "cut.onnx").write_bytes(exported.read_bytes()[:size])
        with pytest.raises(D2ZeroError, match=r"damaged, cut short|is empty|no d2zero contract"):
            load(tmp_path / "cut.onnx")
    with pytest.raises(D2ZeroError, match=r"expected an exported model \(\.onnx or \.engine or \.pt2\)"):
        load(packaged_checkpoint())
    with pytest.raises(D2ZeroError, match="does not exist"):
        load(tmp_path / "none.onnx")
    with pytest.raises(D2ZeroError, match=r"CUDAExecutionProvider not available.*d2zero\[gpu\]"):
        load(exported, providers=["cuda"])
    proto = onnx.load(exported)
    for change, message in (({"version": 99}, "version 99.*upgrade"), ({"class_names": None}, "lacks class_names")):
        entry = next(prop for prop in proto.metadata_props if prop.key == CONTRACT_KEY)
        values = {k: v for k, v in {**json.loads(entry.value), **change}.items() if v is not None}
        changed = onnx.ModelProto()
        changed.CopyFrom(proto)
        next(prop for prop in changed.metadata_props if prop.key == CONTRACT_KEY).value = json.dumps(values)
        onnx.save(changed, tmp_path / "changed.onnx")
        with pytest.raises(D2ZeroError, match=message):
            load(tmp_path / "changed.onnx")
    outcome = command("predict", "nowhere.jpg", "-m", exported, "-o", tmp_path / "out", "--provider", "cuda")
    assert outcome.code == 2 and outcome.err.count("\n") == 1


def test_a_file_that_differs_is_not_written(
    demo_model: D2Zero, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exported: Path
) -> None:
    """Verification is the last stage; here the graph is that of a model with other weights."""
    traced = SimpleNamespace(graph_signature=SimpleNamespace(user_inputs=["images"]))
    monkeypatch.setattr(onnx_export, "trace", lambda model, config: traced)
    proto = onnx.load(exported)
    tensor = next(t for t in proto.graph.initializer if t.name.endswith("background_projection.weight"))
    tensor.CopyFrom(onnx.numpy_helper.from_array(1.5 * onnx.numpy_helper.to_array(tensor), tensor.name))
    del proto.metadata_props[:]
    words = next(t for t in proto.graph.initializer if t.name == "class_embeddings")
    proto.graph.initializer.remove(words)
    monkeypatch.setattr(onnx_export, "translate", lambda program, inputs, outputs: proto)
    with pytest.raises(D2ZeroError, match=r"class_logits differ by .* \(limit 1e-03\) for one image"):
        export_onnx(demo_model, tmp_path / "m.onnx")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["none.safetensors", "-o", "m.onnx"], "does not exist"),
        (["m.safetensors", "-o", "m.engine"], "must end in .onnx for --format onnx"),
        (["m.safetensors", "-o", "m.onnx", "--format", "tflite"], "--format must be one of onnx, tensorrt"),
        (["m.safetensors", "-o", "m.engine", "--format", "tensorrt"], "an engine runs on NVIDIA GPUs only"),
        (["m.safetensors", "-o", "m.engine", "--format", "tensorrt", "--max", "4x800"], "such as 1x800x1216x80"),
        (["m.safetensors", "-o", "m.onnx", "--max", "4x800x800x8"], "are for --format tensorrt"),
        (["m.onnx", "-o", "n.onnx"], "exported already"),
        (["m.safetensors", "-o", "m.onnx", "--precision", "int4"], "float32, float16, bfloat16, int8, got 'int4'"),
        (["m.safetensors", "-o", "m.onnx", "--size", "big"], "HEIGHTxWIDTH such as 800x1216, got 'big'"),
        (["m.safetensors", "-o", "m.onnx", "--size", "800x1210"], "size must be multiples of 32, got 800x1210"),
        (["m.safetensors", "-o", "m.onnx", "--deform-attn", "magic"], "gridsample, gather, got 'magic'"),
    ],
)
def test_wrong_export_commands(arguments: list[str], message: str, command: Command) -> None:
    outcome = command("export", *arguments)
    assert outcome.code == 2 and message in outcome.err and outcome.err.count("\n") == 1
