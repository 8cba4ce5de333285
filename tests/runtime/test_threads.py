"""One segmenter in several threads: every backend gives each its own result."""

import time
from pathlib import Path

import numpy as np
import pytest
from own_results import assert_own_results
from tiny_model import WIDTH, write_model

from d2zero.model import D2Zero
from d2zero_runtime import load
from d2zero_runtime.backends.base import Backend, Raw


@pytest.mark.parametrize("provider", ["cpu", "openvino"])
def test_exported_models(provider: str, tmp_path: Path) -> None:
    pytest.importorskip({"cpu": "onnxruntime"}.get(provider, provider))
    backend = load(write_model(tmp_path / "m.onnx"), provider).backend
    assert_own_results(backend, WIDTH, (256, 384))


def test_checkpoints(small_model: D2Zero) -> None:
    assert_own_results(small_model.segmenter().backend, small_model.config.text_dim, (32, 64))


def test_a_wrong_result_is_noticed() -> None:
    class Mixed(Backend):
        held: Raw

        def run(self, images: np.ndarray, embeddings: np.ndarray | None) -> Raw:
            self.held = Raw.of(np.zeros((1, 1), np.float32) if embeddings is None else embeddings, images)
            time.sleep(0.001)  # another thread comes
            return self.held

    with pytest.raises(AssertionError):
        assert_own_results(Mixed(), WIDTH)
