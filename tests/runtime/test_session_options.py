"""Settings of ONNX Runtime and OpenVINO reach them, or are refused."""

from pathlib import Path
from typing import Any

import pytest
from tiny_model import write_model

from d2zero_runtime import D2ZeroError, load

PROVIDERS = {"cpu": "onnxruntime", "openvino": "openvino"}


def test_onnxruntime_takes_attributes_and_configuration_keys(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    key = "session.intra_op.allow_spinning"
    options = {"inter_op_num_threads": 2, "enable_mem_pattern": True, key: 0}
    backend: Any = load(write_model(tmp_path / "m.onnx"), session_options=options).backend
    found = backend.session.get_session_options()
    assert (found.inter_op_num_threads, found.enable_mem_pattern) == (2, True)
    assert found.get_session_config_entry(key) == "0"


def test_openvino_takes_properties(tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    options = {"NUM_STREAMS": 2, "PERFORMANCE_HINT": "THROUGHPUT"}
    backend: Any = load(write_model(tmp_path / "m.onnx"), "openvino", session_options=options).backend
    assert int(backend._request.get_compiled_model().get_property("NUM_STREAMS")) == 2


@pytest.mark.parametrize(
    ("provider", "options", "message"),
    [
        ("cpu", {"threads": 2}, "onnxruntime does not take the session option threads=2"),
        ("cpu", {"inter_op_num_threads": "two"}, "does not take the session option inter_op_num_threads='two'"),
        ("openvino", {"inter_op_num_threads": 2}, "openvino cannot load .*inter_op_num_threads"),
        ("openvino", {"INFERENCE_PRECISION_HINT": "bf16"}, "the precision is chosen by the provider"),
    ],
)
def test_an_option_of_another_library_is_refused(
    provider: str, options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    pytest.importorskip(PROVIDERS[provider])
    with pytest.raises(D2ZeroError, match=message):
        load(write_model(tmp_path / "m.onnx"), provider, session_options=options)


@pytest.mark.parametrize("name", ["m.engine", "m.pt2"])
def test_formats_without_such_a_library_refuse_them(name: str) -> None:
    with pytest.raises(D2ZeroError, match=f"session_options are for .onnx files, got '{name}'"):
        load(name, session_options={"NUM_STREAMS": 1})
