"""Engines that TensorRT-RTX really builds: what its parser reads, in which types, and what its builder says."""

import hashlib
import json
import signal
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import onnx
import pytest
from commands import Command
from tensorrt_surface import as_tensorrt_rtx, layer_types
from tiny_model import write_model
from tiny_network import tiny

from d2zero.demo.run import packaged_checkpoint
from d2zero_export.engine import Build, EngineOptions, Shape, build_engine
from d2zero_export.onnx_export import export_onnx
from d2zero_export.options import OnnxOptions
from d2zero_runtime import D2ZeroError
from d2zero_runtime.artifacts.engine import EngineMetadata
from d2zero_runtime.artifacts.onnx import graph_inputs
from d2zero_runtime.backends.tensorrt.environment import TENSORRT_RTX, require_library

SMALL = EngineOptions(sdk="tensorrt-rtx", max=Shape(1, 96, 128, 40), opt=Shape(1, 96, 128, 36), verify=False)


@pytest.fixture(autouse=True)
def rtx(monkeypatch: pytest.MonkeyPatch) -> Any:
    return as_tensorrt_rtx(monkeypatch)


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A tiny model exported with some options, once."""
    folder = tmp_path_factory.mktemp("tiny")

    def export(deform_attn: str, precision: str, **options: Any) -> Path:
        path = folder / f"{deform_attn}-{precision}.onnx"
        if not path.exists():
            options = {"deform_attn": deform_attn, "precision": precision, "verify": False, **options}
            export_onnx(tiny(), path, OnnxOptions(**options))
        return path

    return export


def test_float32_stays_float32(exported: Path) -> None:
    types = layer_types(exported)
    assert types["CONVOLUTION", "FLOAT"] > 20 and types["GRID_SAMPLE", "FLOAT"] == 3
    assert not [kind for kind in types if kind[1] in ("HALF", "BF16")]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("deform_attn", "bake"),
    [("gather", False), pytest.param("gridsample", True, marks=pytest.mark.long)],
    ids=["gather", "gridsample baked"],
)
def test_float16_is_half_except_where_promised(made: Callable[..., Path], deform_attn: str, bake: bool) -> None:
    path = made(deform_attn, "float16", size=(64, 96), batch=None if bake else 1, bake=bake)
    types = layer_types(path)
    assert types["CONVOLUTION", "HALF"] > 20 and not types["CONVOLUTION", "FLOAT"]
    assert types["MATRIX_MULTIPLY", "HALF"] > 20
    assert types["MATRIX_MULTIPLY", "FLOAT"] > 20  # the classifier, mask embeddings
    assert not types["GRID_SAMPLE", "HALF"]  # where deformable attention looks
    assert types["SOFTMAX", "FLOAT"] >= 2  # the classifier's attention over classes


@pytest.mark.slow
@pytest.mark.long
def test_every_variant_is_built(made: Callable[..., Path], exported: Path, tmp_path: Path) -> None:
    for name, path, options in (
        ("dynamic", exported, SMALL),
        ("static", made("gather", "float16", size=(64, 96), batch=1), EngineOptions(sdk="tensorrt-rtx")),
        ("baked", made("gridsample", "float16", size=(64, 96), bake=True), EngineOptions(sdk="tensorrt-rtx")),
        ("float32", made("gather", "float32", size=(64, 96), batch=1, bake=True), EngineOptions(sdk="tensorrt-rtx")),
    ):
        output = tmp_path / f"{name}.engine"
        metadata = build_engine(path, output, options)
        assert EngineMetadata.read(output).to_json() == metadata.to_json()
        assert metadata.sdk == "tensorrt-rtx" and metadata.tensorrt.startswith("1.") and metadata.gpu == ""
        assert hashlib.sha256(metadata.require_plan(output)).hexdigest() == metadata.plan_sha256
        assert metadata.contract.baked == (name in ("baked", "float32"))
    assert json.loads((tmp_path / "dynamic.engine.json").read_text())["compute_capability"].endswith("12.0 and later")


@pytest.mark.slow
@pytest.mark.long
def test_chosen_gpus_progress_and_ctrl_c(
    made: Callable[..., Path], exported: Path, tmp_path: Path, command: Command
) -> None:
    path, phases = made("gather", "float16", size=(64, 96), batch=1), set[str]()
    options = EngineOptions(sdk="tensorrt-rtx", compute_capabilities=("8.9", "12.0"))
    metadata = build_engine(path, tmp_path / "m.engine", options, progress=lambda phase, *_: phases.add(phase))
    assert metadata.compute_capability == "8.9, 12.0" and phases
    outcome = command(
        "export", path, "-o", tmp_path / "t.engine", "--format", "tensorrt-rtx", "--compute-capability", "7.5"
    )
    assert outcome.code == 2 and "Turing (SM75): FP32 GEMM is not supported" in outcome.err
    threading.Timer(1, signal.raise_signal, [signal.SIGINT]).start()
    with pytest.raises(KeyboardInterrupt):
        build_engine(exported, tmp_path / "interrupted.engine", SMALL)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["m.engine", "m.engine.json"]


def test_what_the_parser_refuses_is_one_line(tmp_path: Path) -> None:
    path = write_model(tmp_path / "m.onnx")
    proto = onnx.load(path)
    proto.graph.node[0].op_type, proto.graph.node[0].name = "Nonsense", "node_0"
    onnx.save(proto, path)
    message = r"^TensorRT-RTX 1\..* cannot read .*m\.onnx: node_0 \(Nonsense\): .*Plugin not found"
    with pytest.raises(D2ZeroError, match=message) as raised:
        build_engine(path, tmp_path / "m.engine", SMALL)
    assert "\n" not in str(raised.value) and [entry.name for entry in tmp_path.iterdir()] == ["m.onnx"]


def test_embeddings_that_vanished_are_noticed(tmp_path: Path) -> None:
    path = write_model(tmp_path / "m.onnx")
    build = Build(require_library(TENSORRT_RTX), path)
    with pytest.raises(D2ZeroError, match="made a constant of class_embeddings"):
        build.parse(path.read_bytes(), graph_inputs(path))  # with the default inside


def test_failing_progress_stops_the_build(tmp_path: Path) -> None:
    def broken(phase: str, done: int, total: int) -> None:
        raise RuntimeError("no screen")

    with pytest.raises(RuntimeError, match="no screen"):
        build_engine(write_model(tmp_path / "m.onnx"), tmp_path / "m.engine", SMALL, progress=broken)
    assert [entry.name for entry in tmp_path.iterdir()] == ["m.onnx"]


def test_ctrl_c_while_the_build_starts_stops_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    submit = ThreadPoolExecutor.submit

    def interrupted(*arguments: Any) -> None:
        submit(*arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(ThreadPoolExecutor, "submit", interrupted)
    with pytest.raises(KeyboardInterrupt):
        build_engine(write_model(tmp_path / "m.onnx"), tmp_path / "m.engine", SMALL)
    assert [entry.name for entry in tmp_path.iterdir()] == ["m.onnx"]


def test_wrong_choices_are_one_line(exported: Path, tmp_path: Path, command: Command) -> None:
    for flags, message in (
        (["--compute-capability", "9.0"], "builds for the compute capabilities 7.5, 8.0, 8.6, 8.9, 12.0"),
        (["--compute-capability", "89"], "a compute capability is written as 8.9, got '89'"),
        (["--compute-capability", "8.9", "--compute-capability", "8.9"], "is given twice"),
        (["--masks", "logits"], "--masks, --max-detections and --mode are for --end-to-end"),
        (["--timing-cache", "t"], "are for --format tensorrt: TensorRT-RTX measures nothing while it builds"),
        (["--max", "1x64x64x1", "--min", "1x96x96x1"], "shapes must grow from min to opt to max"),
    ):
        outcome = command("export", exported, "-o", tmp_path / "m.engine", "--format", "tensorrt-rtx", *flags)
        assert outcome.code == 2 and message in outcome.err and outcome.err.count("error:") == 1
    assert not list(tmp_path.iterdir())
    (tmp_path / "m.onnx").write_text("mine")
    outcome = command("export", packaged_checkpoint(), "-o", tmp_path / "m.engine", "--format", "tensorrt-rtx")
    assert outcome.code == 2 and "exists; give it as the model to build from it" in outcome.err
    assert (tmp_path / "m.onnx").read_text() == "mine"
    with pytest.raises(D2ZeroError, match="--compute-capability is for --format tensorrt-rtx"):
        EngineOptions(compute_capabilities=("8.9",))
    with pytest.raises(D2ZeroError, match="sdk must be one of tensorrt, tensorrt-rtx, got 'openvino'"):
        EngineOptions(sdk="openvino")
