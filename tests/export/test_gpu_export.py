"""Exported models on a GPU: `pytest -m gpu`, where a CUDA build of onnxruntime is installed."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from d2zero.demo.run import packaged_checkpoint
from d2zero_export.parity import LIMITS
from d2zero_export.verify import raw_parity
from d2zero_runtime import load

onnxruntime = pytest.importorskip("onnxruntime")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.skipif(
        "CUDAExecutionProvider" not in onnxruntime.get_available_providers(), reason="needs onnxruntime-gpu"
    ),
]
WORK = frozenset({"Conv", "MatMul", "FusedMatMul", "Gemm", "GridSample", "Softmax", "LayerNormalization", "Resize"})


def test_the_cuda_provider_gives_the_checkpoints_numbers(exported: Path) -> None:
    import d2zero

    segmenter = load(exported, providers=[("cuda", {"use_tf32": 0})])
    parity = raw_parity(d2zero.load(packaged_checkpoint()).segmenter(), segmenter)
    assert not parity.failures(LIMITS["float32"]), parity.differences


def test_all_work_is_placed_on_the_gpu(exported: Path, tmp_path: Path) -> None:
    """ONNX Runtime may place an operator on the CPU without a word (mmdeploy#2535)."""
    options = onnxruntime.SessionOptions()
    options.enable_profiling = True
    options.profile_file_prefix = str(tmp_path / "profile")
    session = onnxruntime.InferenceSession(str(exported), options, providers=["CUDAExecutionProvider"])
    session.run(None, {"images": np.zeros((1, 3, 96, 128), np.float32)})
    events = json.loads(Path(session.end_profiling()).read_text())
    placed = {(e["args"]["op_name"], e["args"]["provider"]) for e in events if "provider" in e.get("args", {})}
    assert not {operator for operator, provider in placed if provider == "CPUExecutionProvider"} & WORK, placed
    assert ("GridSample", "CUDAExecutionProvider") in placed
