"""A model exported in eight bits: only the chosen nodes are quantized, and it is the same model within limits."""

import json
from collections import Counter
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from commands import Command
from end_to_end_files import traced_network
from onnx import helper
from onnxruntime import ExecutionOrder
from onnxruntime.quantization import CalibrationDataReader
from onnxruntime.quantization.calibrate import MinMaxCalibrater, create_calibrator
from tensorrt_surface import as_tensorrt_rtx, layer_types

from d2zero.data.coco import read_coco
from d2zero.data.shapes import ShapesConfig, write_dataset
from d2zero.demo.run import packaged_checkpoint
from d2zero.model import D2Zero
from d2zero_bench.measure import lower_precision
from d2zero_export.graph import ATTENTION_MASK
from d2zero_export.onnx_export import export_onnx
from d2zero_export.onnx_graph import FORBIDDEN
from d2zero_export.options import OnnxOptions
from d2zero_export.parity import LIMITS
from d2zero_export.quantize import QDQ, Photos, _reader, chosen, fold, reductions_early
from d2zero_export.verify import raw_parity, verify
from d2zero_runtime import D2ZeroError, load
from d2zero_runtime.artifacts.contract import EMBEDDINGS_INPUT, ModelContract
from d2zero_runtime.artifacts.engine import EngineMetadata
from d2zero_runtime.artifacts.onnx import read_contract
from d2zero_runtime.images import Preprocessing


@pytest.fixture(scope="module")
def eight_bits(demo_model: D2Zero, exported: Path, shapes_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All stages but the trace, which takes most of the time and is the same as for float32: from that file."""
    path = tmp_path_factory.mktemp("int8") / "demo.onnx"
    traced = traced_network(exported)
    orders = []
    collect = MinMaxCalibrater.collect_data

    def noting(calibrater: MinMaxCalibrater, reader: CalibrationDataReader) -> None:
        orders.append(calibrater.infer_session.get_session_options().execution_order)
        collect(calibrater, reader)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MinMaxCalibrater, "collect_data", noting)
        calibrated = OnnxOptions(precision="int8", verify=False, calibration=shapes_data / "train")
        export_onnx(demo_model, path, calibrated, traced=traced)
    assert orders == [ExecutionOrder.PRIORITY_BASED]
    return path


@pytest.fixture(scope="module")
def graph(eight_bits: Path) -> onnx.GraphProto:
    return onnx.load(eight_bits).graph


def test_chosen_nodes_are_quantized_and_no_others(graph: onnx.GraphProto, demo_model: D2Zero) -> None:
    made_by = {output: node for node in graph.node for output in node.output}
    stored = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
    counts: Counter[str] = Counter()
    for node in graph.node:
        sources = [made_by[name] for name in node.input if name in made_by]
        weights = [stored[s.input[0]] for s in sources if s.op_type == "DequantizeLinear" and s.input[0] in stored]
        matrices = [weight for weight in weights if weight.ndim > 1]
        if matrices:
            counts[node.op_type] += 1
            assert sources[0].op_type == "DequantizeLinear"  # the activation too
            assert matrices[0].dtype == np.int8 and np.abs(matrices[0].astype(int)).max() <= 64  # seven bits
        elif node.op_type not in ("QuantizeLinear", "DequantizeLinear", "Add", "AveragePool", "MaxPool", "Relu"):
            assert all(source.op_type != "DequantizeLinear" for source in sources), node.name  # it reads floats
    layers, encoders = len(demo_model.decoder.layers), len(demo_model.pixel_decoder.layers)
    linear = 3 * encoders + layers + 2 * layers  # encoder; values; feed-forward
    convolutions = sum(node.op_type == "Conv" for node in graph.node)
    assert counts == {"Conv": convolutions, "MatMul": linear} and convolutions > 15


def test_linear_layers_of_known_size_stay_products(tmp_path: Path) -> None:
    """onnxruntime makes one Gemm of a product and its bias where it knows the size; what is not found stays float32."""
    values = {"weight": np.ones((4, 4), np.float32), "bias": np.ones(4, np.float32)}
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "weight"], ["y"]), helper.make_node("Add", ["y", "bias"], ["z"])],
        "linear",
        [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1, 3, 4])],
        [helper.make_tensor_value_info("z", onnx.TensorProto.FLOAT, [1, 3, 4])],
        [onnx.numpy_helper.from_array(value, name) for name, value in values.items()],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), tmp_path / "m.onnx")
    fold(tmp_path / "m.onnx", tmp_path / "folded.onnx")
    assert [node.op_type for node in onnx.load(tmp_path / "folded.onnx").graph.node] == ["MatMul", "Add"]


def test_no_linear_layer_is_left_out_in_silence(exported: Path, demo_model: D2Zero) -> None:
    proto = onnx.load(exported)  # not folded: values are still slices of torch's packed weights
    with pytest.raises(D2ZeroError, match=r"3 of 12 linear layers to quantize are not matmuls"):
        chosen(proto, demo_model)


def test_classifier_and_embeddings_are_not_quantized(graph: onnx.GraphProto) -> None:
    made_by = {output: node.op_type for node in graph.node for output in node.output}
    types = {tensor.name: tensor.data_type for tensor in graph.initializer}
    readers = [node for node in graph.node if any("classifier.classifier." in name for name in node.input)]
    assert len(readers) > 5
    for node in readers:
        assert "DequantizeLinear" not in {made_by.get(name) for name in node.input}
        assert all(types.get(name, 1) == onnx.TensorProto.FLOAT for name in node.input)
    assert [entry.name for entry in graph.input] == ["images", EMBEDDINGS_INPUT]
    assert types[EMBEDDINGS_INPUT] == onnx.TensorProto.FLOAT
    assert {node.op_type for node in graph.node if EMBEDDINGS_INPUT in node.input} == {"Gemm", "Shape"}


def test_file_promises_what_exported_models_do(eight_bits: Path, demo_model: D2Zero) -> None:
    proto = onnx.load(eight_bits)
    onnx.checker.check_model(proto)
    assert [(entry.domain, entry.version) for entry in proto.opset_import] == [("", 18)]
    assert not FORBIDDEN & {node.op_type for node in proto.graph.node}
    values = {name for node in proto.graph.node for name in node.output}
    assert {f"{ATTENTION_MASK}{layer}" for layer in range(len(demo_model.decoder.layers))} <= values
    contract, words = read_contract(eight_bits)
    assert contract.precision == "int8" and contract.calibration["images"] == 32
    assert contract.calibration["method"] == "minmax" and words.names == demo_model.vocabulary.names
    before = {name: value for name, value in json.loads(contract.to_json()).items() if name != "calibration"}
    assert ModelContract.from_json(json.dumps(before), "a file from before").calibration == {}


@pytest.mark.slow
def test_same_model_at_every_size_batch_and_class_count(
    eight_bits: Path, exported: Path, demo_model: D2Zero, shapes_data: Path
) -> None:
    assert eight_bits.stat().st_size < 0.55 * exported.stat().st_size
    parity = raw_parity(demo_model.segmenter(), load(eight_bits))
    assert len(parity.differences) == 11 and not parity.failures(LIMITS["int8"])
    assert parity.failures(LIMITS["float32"])  # it is another precision
    photos = sorted((shapes_data / "val").iterdir())[:12]
    result = verify(demo_model, eight_bits, images=photos)
    assert not result.failures and result.attention_flipped is not None and 0 < result.attention_flipped < 0.03


def test_calibration_frees_tensors_as_it_goes_and_finds_the_same_ranges(
    exported: Path, shapes_data: Path, tmp_path: Path
) -> None:
    photos = Photos.read(shapes_data / "train", 1, Preprocessing(shortest_edge=64, longest_edge=64))
    plain, folded = tmp_path / "plain.onnx", tmp_path / "folded.onnx"
    proto = onnx.load(exported)
    del proto.metadata_props[:]
    onnx.save(proto, plain)
    fold(plain, folded)

    orders, ranges = [], []
    for context in (nullcontext(), reductions_early()):
        with context:
            calibrater = create_calibrator(folded, ["Conv"], augmented_model_path=str(tmp_path / "augmented.onnx"))
        orders.append(calibrater.infer_session.get_session_options().execution_order)
        calibrater.collect_data(_reader(photos, None))
        ranges.append({name: entry.range_value for name, entry in calibrater.compute_data().items()})
    assert orders == [ExecutionOrder.DEFAULT, ExecutionOrder.PRIORITY_BASED]
    assert len(ranges[0]) > 30 and str(ranges[0]) == str(ranges[1])


def test_openvino_runs_it(eight_bits: Path, demo_model: D2Zero) -> None:
    pytest.importorskip("openvino")
    segmenter = load(eight_bits, "openvino")
    assert segmenter.precision == "int8"
    assert not raw_parity(demo_model.segmenter(), segmenter).failures(LIMITS["int8"])
    with pytest.raises(D2ZeroError, match=r"bfloat16 is for float32 files, and .* is int8; use the provider openvino"):
        load(eight_bits, "openvino-bf16")


@pytest.mark.slow
@pytest.mark.long
def test_accuracy_of_what_the_command_makes(demo_model: D2Zero, tmp_path: Path, command: Command) -> None:
    write_dataset(tmp_path, ShapesConfig(train_images=32, val_images=200))
    eight_bits = tmp_path / "m.onnx"
    options = ("--precision", "int8", "--calibration", tmp_path / "train", "--size", "96x96")
    outcome = command("export", packaged_checkpoint(), "-o", eight_bits, *options)
    assert outcome.code == 0 and "int8, 36 classes inside" in outcome.out and "quantize" in outcome.err
    truth = read_coco(tmp_path / "annotations/instances_val_gzsi_shapes.json")
    result = verify(
        demo_model,
        eight_bits,
        images=sorted((tmp_path / "val").iterdir())[:24],
        annotations=truth,
        image_folder=tmp_path / "val",
    )
    ours, theirs = result.accuracy["gzsis"]["segm hm_ap50"]
    assert ours > 50 and abs(ours - theirs) <= 0.5


def test_photos_are_taken_evenly_and_as_the_model_sees_them(shapes_data: Path) -> None:
    preprocessing = Preprocessing(shortest_edge=64, longest_edge=64)
    photos = Photos.read(shapes_data / "train", 5, preprocessing, batch=2)
    assert [batch.shape for batch in photos.batches()] == [(2, 3, 64, 64)] * 5
    every = Photos.read(shapes_data / "train", 1000, preprocessing)
    assert len(every.images_HWC) == 48
    np.testing.assert_array_equal(photos.images_HWC[-1], every.images_HWC[-1])


def test_mistakes_are_refused_before_any_work(demo_model: D2Zero, tmp_path: Path, exported: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/a.png").write_bytes(b"no picture")
    for folder, message in (
        ("none", "takes a folder of photos"),
        ("empty", "holds no images"),
        ("broken", "not an image"),
    ):
        stages: list[str] = []
        with pytest.raises(D2ZeroError, match=message):
            export_onnx(
                demo_model,
                tmp_path / "m.onnx",
                OnnxOptions(precision="int8", calibration=tmp_path / folder),
                "",
                stages.append,
            )
        assert not stages
    for changes, message in (
        ({"calibration": None}, "give their folder with --calibration"),
        ({"precision": "float16"}, "are for --precision int8, got precision float16"),
        ({"calibration_images": 0}, "at least 1, got 0"),
    ):
        with pytest.raises(D2ZeroError, match=message):
            replace(OnnxOptions(precision="int8", calibration=tmp_path), **changes)


@pytest.mark.slow
@pytest.mark.long
def test_for_tensorrt_it_is_symmetric_and_rtx_builds_it(
    shapes_data: Path, tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    as_tensorrt_rtx(monkeypatch)
    export = ("export", packaged_checkpoint(), "-o", tmp_path / "m.engine", "--format", "tensorrt-rtx")
    outcome = command(*export, "--precision", "int8", "--calibration", shapes_data / "train", "--size", "96x96")
    assert outcome.code == 0, outcome.err
    graph = onnx.load(tmp_path / "m.onnx").graph
    values = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
    zeros = [values[node.input[2]] for node in graph.node if node.op_type in QDQ]
    assert len(zeros) > 100 and all(zero.dtype == np.int8 and not zero.any() for zero in zeros)
    assert EngineMetadata.read(tmp_path / "m.engine").contract.calibration["for"] == "tensorrt"
    layers = layer_types(tmp_path / "m.onnx")
    assert layers["QUANTIZE", "INT8"] > 30 and layers["DEQUANTIZE", "FLOAT"] > 60


def test_engines_of_what_is_for_cpus_are_refused(
    eight_bits: Path, tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    as_tensorrt_rtx(monkeypatch)
    outcome = command("export", eight_bits, "-o", tmp_path / "m.engine", "--format", "tensorrt-rtx")
    assert outcome.code == 2 and "was quantized for CPUs" in outcome.err and "--quantize-for tensorrt" in outcome.err


def test_benchmark_judges_by_the_wider_limits() -> None:
    assert lower_precision("float32", "int8") == "int8" == lower_precision("int8", "float16")
    assert lower_precision("float16", "float32") == "float16"
