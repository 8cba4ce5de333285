"""OpenVINO runs the same file: the same outputs in float32, close ones in bfloat16, or a clear refusal."""

import sys
from pathlib import Path

import numpy as np
import pytest

from d2zero_runtime import D2ZeroError, Segmenter, load
from d2zero_runtime.backends.openvino.backend import computes_in_bfloat16

openvino = pytest.importorskip("openvino", reason="needs the extra 'openvino'")
HAS_BFLOAT16 = computes_in_bfloat16(openvino.Core())


def pictures() -> list[np.ndarray]:
    random = np.random.default_rng(0)
    return [random.integers(0, 256, (*size, 3), np.uint8) for size in ((96, 128), (64, 96), (96, 128))]


def difference(one: Segmenter, other: Segmenter) -> float:
    ours, theirs = one.predict_raw(pictures()), other.predict_raw(pictures())
    return float(np.abs(ours.class_logits - theirs.class_logits).mean() / np.abs(ours.class_logits).mean())


def test_float32_equals_onnxruntime_with_any_vocabulary(exported: Path) -> None:
    one, other = load(exported), load(exported, "openvino")
    assert difference(one, other) < 1e-5 and other.precision == "float32"
    few = one.vocabulary.select(one.vocabulary.names[3:7])
    for segmenter in (one, other):
        segmenter.set_vocabulary(few)
    assert difference(one, other) < 1e-5
    assert other.predict_raw(pictures()).class_logits.shape[2] == 5


@pytest.mark.skipif(not HAS_BFLOAT16, reason="this processor has no bfloat16")
def test_bfloat16_is_close_and_says_so(exported: Path) -> None:
    lowered = load(exported, ["openvino-bf16"], threads=1)
    assert 0 < difference(load(exported), lowered) < 0.1
    assert lowered.precision == "bfloat16" and "bfloat16" in lowered.backend.name


def test_refusals(exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(D2ZeroError, match="openvino cannot be combined with other providers, got openvino, cpu"):
        load(exported, ["openvino", "cpu"])

    class Old:
        def get_property(self, *_: str) -> list[str]:
            return ["FP32"]

    monkeypatch.setattr(openvino, "Core", Old)
    with pytest.raises(D2ZeroError, match="does not compute in bfloat16"):
        load(exported, "openvino-bf16")
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(D2ZeroError, match=r"the package openvino; install it with: pip install 'd2zero\[openvino\]'"):
        load(exported, "openvino")
