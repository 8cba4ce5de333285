"""The Triton kernel that makes masks, in Triton's interpreter, against torch's operators.

`test_device_masks.py` runs this file in a process of its own, since the interpreter must be on before Triton is
imported. By hand: `TRITON_INTERPRET=1 pytest --noconftest tests/runtime/interpreted_masks.py`.
"""

from typing import Any

import numpy as np
import pytest
import torch

from d2zero_runtime import Vocabulary, postprocess
from d2zero_runtime.masks.device import DeviceLogits, Sizes, in_one_kernel, in_steps
from d2zero_runtime.masks.postprocess import MaskKind


def drawn(queries: int, height: int, width: int) -> torch.Tensor:
    """Smooth logits; the last query's are nowhere above 0."""
    logits = torch.randn(queries, height, width, generator=torch.Generator().manual_seed(0)).cumsum(1).cumsum(2)
    logits -= logits.mean((1, 2), keepdim=True)
    logits[-1] = -1
    return logits


@pytest.mark.parametrize(
    ("logits", "sizes"),
    [
        ((3, 36), Sizes((12, 144), (11, 140), (11, 140))),  # used as it is; more than one tile each way
        ((8, 8), Sizes((32, 32), (32, 32), (32, 32))),
        ((8, 16), Sizes((32, 64), (29, 60), (9, 131))),  # shrunk and stretched
        ((8, 8), Sizes((32, 32), (1, 1), (1, 1))),
        ((8, 8), Sizes((32, 32), (31, 5), (9, 7))),
    ],
    ids=str,
)
def test_equals_torchs_operators(logits: tuple[int, int], sizes: Sizes) -> None:
    tensor, queries = drawn(4, *logits), [3, 1]
    expected, bits = in_steps(tensor, queries, sizes, packed=True)
    found, found_bits = in_one_kernel(tensor, queries, sizes, packed=True)
    np.testing.assert_array_equal(found[:, 1:], expected[:, 1:])
    np.testing.assert_allclose(found[:, 0], expected[:, 0], atol=1e-6)
    np.testing.assert_array_equal(found_bits, bits)
    assert bits is not None and found_bits is not None
    assert not found[0].any() and not found_bits[0].any()
    assert bits[1].any() and (sizes.output == (1, 1) or not np.unpackbits(bits[1], axis=1, count=sizes.output[1]).all())


def test_stats_without_bits() -> None:
    tensor, sizes = drawn(3, 8, 8), Sizes((32, 32), (31, 5), (9, 7))
    stats, nothing = in_one_kernel(tensor, [1], sizes, packed=False)
    np.testing.assert_array_equal(stats, in_one_kernel(tensor, [1], sizes, packed=True)[0])
    assert nothing is None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_halves_and_parts_of_a_larger_tensor(dtype: torch.dtype) -> None:
    sizes = Sizes((32, 48), (30, 45), (20, 25))
    larger = torch.full((6, 11, 31), 7.0, dtype=dtype)
    larger[:, :8, :12] = drawn(6, 8, 12)
    part = larger[:, :8, :12]
    for tensor in (part, part.transpose(1, 2).contiguous().transpose(1, 2)):
        expected, bits = in_steps(tensor, [1, 4], sizes, packed=True)
        found, found_bits = in_one_kernel(tensor, [1, 4], sizes, packed=True)
        np.testing.assert_allclose(found, expected, atol=1e-5)
        np.testing.assert_array_equal(found_bits, bits)


def test_memory_that_is_not_written_would_be_seen() -> None:
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills new memory: NaN, and 255 in bytes
    try:
        assert torch.empty(3).isnan().all() and (torch.empty(3, dtype=torch.uint8) == 255).all()
        test_equals_torchs_operators((8, 16), Sizes((32, 64), (29, 60), (9, 131)))
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(("kind", "threshold"), [("packed", 0.0), ("bitmap", 0.2), ("rle", 0.2), ("packed", 2.0)])
def test_bits_that_come_later_belong_to_the_same_instances(
    monkeypatch: pytest.MonkeyPatch, kind: MaskKind, threshold: float
) -> None:
    class_logits = np.random.default_rng(0).standard_normal((4, 4)).astype(np.float32) * 5
    words = Vocabulary(("a", "b", "c"), np.eye(3, dtype=np.float32))
    sizes: dict[str, Any] = {"padded_size": (32, 32), "input_size": (31, 20), "output_size": (10, 9)}
    found = []
    for one_kernel in (False, True):
        monkeypatch.setattr(DeviceLogits, "one_kernel", one_kernel)
        logits = DeviceLogits(drawn(4, 8, 8))
        found.append(postprocess(class_logits, logits, words, masks=kind, score_threshold=threshold, **sizes))
    steps, kernel = found
    assert steps.names == kernel.names and type(steps.masks) is type(kernel.masks)
    assert (len(steps) == 0) == (threshold == 2.0) and (len(steps) < 12 or threshold == 0.0)
    np.testing.assert_allclose(kernel.scores, steps.scores, atol=1e-6)
    np.testing.assert_array_equal(kernel.boxes, steps.boxes)
    np.testing.assert_array_equal(kernel.bitmaps(), steps.bitmaps())
