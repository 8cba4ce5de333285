"""Engines: shapes, the file that TensorRT reads, and builds against the real bindings of two versions."""

import sys
from pathlib import Path

import onnx
import pytest
from tensorrt_surface import VERSIONS, run_inside
from tiny_model import CLASSES, WIDTH, contract, write_model

from d2zero_export.engine import EngineOptions, Shape, build_engine, profile_for
from d2zero_runtime import D2ZeroError
from d2zero_runtime.artifacts.onnx import graph_inputs, without_default_embeddings
from d2zero_runtime.artifacts.profile import Profile
from d2zero_runtime.backends.tensorrt.environment import TENSORRT
from d2zero_runtime.backends.tensorrt.issues import known_issues
from d2zero_runtime.images import Preprocessing

OPEN = {"images": (None, 3, None, None), "class_embeddings": (None, WIDTH)}


@pytest.mark.parametrize("version", VERSIONS)
def test_building_against_the_real_bindings(version: str, tmp_path: Path) -> None:
    run_inside(Path(__file__).with_name("engine_scenarios.py"), version, tmp_path)


def test_without_tensorrt_there_is_one_clear_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(D2ZeroError, match=r"TensorRT cannot be used here.*d2zero\[tensorrt\].*\.onnx file runs every"):
        build_engine(tmp_path / "none.onnx", tmp_path / "m.engine")
    with pytest.raises(D2ZeroError, match=r"must end in \.engine, got 'm\.plan'"):
        build_engine(tmp_path / "none.onnx", tmp_path / "m.plan")


def test_shapes() -> None:
    assert Shape.parse("1x800x1216x80") == Shape(1, 800, 1216, 80) and str(Shape(1, 32, 64, 2)) == "1x32x64x2"
    for text, message in (
        ("800x1216", "such as 1x800x1216x80, got '800x1216'"),
        ("1x800x1216xmany", "got '1x800x1216xmany'"),
        ("1x800x1200x80", "multiples of 32, got 800 and 1200"),
        ("0x800x1216x80", "at least 1"),
    ):
        with pytest.raises(D2ZeroError, match=message):
            Shape.parse(text)
    small, large = Shape(1, 64, 64, 1), Shape(2, 128, 96, 9)
    with pytest.raises(D2ZeroError, match="the batch goes 2, 1, 1"):
        Profile(large, small, small)
    profile = Profile(small, small, large)
    profile.require(Shape(2, 128, 64, 9))
    with pytest.raises(D2ZeroError, match=r"from 1x64x64x1 to 2x128x96x9, got 3x64x128x1: batch 3 \(1 to 2\), width"):
        profile.require(Shape(3, 64, 128, 1))


def test_profile_from_the_contract() -> None:
    found = profile_for(EngineOptions(), contract(), OPEN)
    assert [str(shape) for shape in (found.min, found.opt, found.max)] == [
        "1x64x64x1",
        "1x800x1216x5",
        "4x1344x1344x1203",
    ]
    sizes = Preprocessing(shortest_edge=96, longest_edge=160)
    assert str(profile_for(EngineOptions(), contract(preprocessing=sizes), OPEN).opt) == "1x96x160x5"
    names = tuple(f"c{number}" for number in range(2000))
    assert (
        profile_for(
            EngineOptions(), contract(class_names=names, seen=(True,) * 2000, active=(True,) * 2000), OPEN
        ).max.classes
        == 2000
    )
    small = profile_for(EngineOptions(max=Shape(1, 640, 640, 3)), contract(), OPEN)
    assert (str(small.min), str(small.opt)) == ("1x64x64x1", "1x640x640x3")
    large = profile_for(EngineOptions(opt=Shape(8, 1600, 1600, 3)), contract(), OPEN)
    assert str(large.max) == "8x1600x1600x1203"


def test_fixed_sizes_of_the_model_are_kept(tmp_path: Path) -> None:
    model = write_model(tmp_path / "m.onnx", baked=True, images=(1, 3, 96, "width"))
    inputs = graph_inputs(model)
    assert inputs == {"images": (1, 3, 96, None)}
    found = profile_for(EngineOptions(), contract(), inputs)
    for shape in (found.min, found.opt, found.max):
        assert (shape.batch, shape.height, shape.classes) == (1, 96, CLASSES)
    with pytest.raises(D2ZeroError, match="height is fixed at 96, got 128 in --opt 1x128x64x5"):
        profile_for(EngineOptions(opt=Shape(1, 128, 64, CLASSES)), contract(), inputs)
    with pytest.raises(D2ZeroError, match="classes is fixed at 5, got 80 in --max"):
        profile_for(EngineOptions(max=Shape(1, 96, 64, 80)), contract(), inputs)


def test_the_default_embeddings_are_dropped_and_nothing_else(tmp_path: Path) -> None:
    model = write_model(tmp_path / "m.onnx")
    assert graph_inputs(model) == OPEN
    proto = onnx.load(model)
    reduced = onnx.ModelProto.FromString(without_default_embeddings(model))
    onnx.checker.check_model(reduced)
    assert len(reduced.graph.initializer) == 0 and len(proto.graph.initializer) == 1
    del proto.graph.initializer[:]
    assert reduced == proto
    baked = write_model(tmp_path / "b.onnx", baked=True)
    assert without_default_embeddings(baked) == baked.read_bytes()
    (tmp_path / "cut.onnx").write_bytes(model.read_bytes()[:200])
    with pytest.raises(D2ZeroError, match="damaged, cut short, or no ONNX file"):
        graph_inputs(tmp_path / "cut.onnx")


def test_an_exported_model_is_understood(exported: Path) -> None:
    inputs = graph_inputs(exported)
    assert inputs == {"images": (None, 3, None, None), "class_embeddings": (None, 64)}
    reduced = onnx.ModelProto.FromString(without_default_embeddings(exported))
    onnx.checker.check_model(reduced)
    assert "class_embeddings" not in {tensor.name for tensor in reduced.graph.initializer}
    assert len(reduced.graph.initializer) == len(onnx.load(exported).graph.initializer) - 1


def test_known_issues_and_wrong_settings() -> None:
    assert (
        "4813" in known_issues(contract(), TENSORRT, "11.1")[0]
        and known_issues(contract(deform_attn="gather"), TENSORRT, "11.1") == ()
    )
    with pytest.raises(D2ZeroError, match="0 to 5, got 6"):
        EngineOptions(optimization_level=6)
    with pytest.raises(D2ZeroError, match="above 0"):
        EngineOptions(workspace_gb=0)
