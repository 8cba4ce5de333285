"""What passes as the same model: single logits within the limit, all of them on average, all values finite."""

import math

import numpy as np
import pytest
from numpy.typing import NDArray

from d2zero_export.parity import LIMITS, RawParity, difference
from d2zero_runtime.images import PADDING_LOGIT

Outputs = tuple[NDArray[np.float32], NDArray[np.float32]]


@pytest.fixture
def outputs() -> Outputs:
    """Three images of 100 queries."""
    random = np.random.default_rng(0)
    return random.standard_normal((3, 100, 5)).astype(np.float32), random.standard_normal((3, 100, 6, 8)).astype(
        np.float32
    )


def failures(ours: Outputs, theirs: Outputs, precision: str = "float32") -> list[str]:
    return difference("a case", ours, theirs).failures(LIMITS[precision])


def changed(outputs: Outputs, tensor: int, image: int, queries: int, by: float) -> Outputs:
    """The same outputs, except for one number of each of the first queries of an image."""
    copies = outputs[0].copy(), outputs[1].copy()
    copies[tensor].reshape(3, 100, -1)[image, :queries, 1] += by
    return copies


@pytest.mark.parametrize("tensor", [0, 1])
def test_a_few_queries_may_look_elsewhere(outputs: Outputs, tensor: int) -> None:
    few = changed(outputs, tensor, image=1, queries=9, by=5e-3)
    found = difference("", outputs, few)
    assert (found.class_most, found.mask_most) == (0, 0)
    assert (found.class_logits, found.mask_logits)[tensor] == pytest.approx(5e-3, rel=1e-3)
    assert not failures(outputs, few)


@pytest.mark.parametrize(("tensor", "name"), [(0, "class_logits"), (1, "mask_logits")])
def test_what_is_another_model(outputs: Outputs, tensor: int, name: str) -> None:
    many = changed(outputs, tensor, image=2, queries=11, by=2e-3)  # of one image in three
    assert failures(outputs, many) == [f"{name} differ by 2.00e-03 (limit 1e-03) for a case"]
    far = changed(outputs, tensor, image=0, queries=5, by=30.0)
    (message,) = failures(outputs, far)
    assert message.startswith(f"{name} differ by") and message.endswith("on average (limit 0.1%) for a case")
    assert len(failures(outputs, changed(outputs, tensor, 0, 1, math.nan))) == 1
    assert not failures(outputs, changed(outputs, tensor, 0, 100, 9e-4))


def test_low_precision_is_held_to_means(outputs: Outputs) -> None:
    close = outputs[0] * 1.04, outputs[1] * 0.97
    assert not failures(outputs, close, "float16") and len(failures(outputs, close)) == 2
    assert len(failures(outputs, (outputs[0] * 1.06, outputs[1]), "float16")) == 1


def test_single_logits_are_held_to_the_limit_with_the_same_attention_masks(outputs: Outputs) -> None:
    many = changed(outputs, 0, image=2, queries=11, by=2e-3)
    own, limits = (difference("own masks", outputs, many),), LIMITS["float32"]
    assert RawParity(own).failures(limits) == ["class_logits differ by 2.00e-03 (limit 1e-03) for own masks"]
    assert not RawParity(own, (difference("the same", outputs, outputs, most=1),)).failures(limits)
    one = difference("the same", outputs, changed(outputs, 1, image=0, queries=1, by=2e-3), most=1)
    assert RawParity(own, (one,)).failures(limits) == ["mask_logits differ by 2.00e-03 (limit 1e-03) for the same"]
    far = difference("own masks", outputs, changed(outputs, 0, image=0, queries=5, by=30.0))
    (message,) = RawParity((far,), (difference("the same", outputs, outputs, most=1),)).failures(limits)
    assert message.endswith("on average (limit 0.1%) for own masks")


def test_padding_is_not_compared_on_average(outputs: Outputs) -> None:
    padded = outputs[0], outputs[1].copy()
    padded[1][:, :, 3:] = PADDING_LOGIT
    assert difference("", padded, padded).mask_relative == 0
    off = padded[0], padded[1] + np.float32(0.01)
    assert difference("", padded, off).mask_relative == pytest.approx(
        0.01 / np.abs(padded[1][:, :, :3]).mean(), rel=1e-3
    )
