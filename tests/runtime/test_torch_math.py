"""TF32 decided for a block: both of torch's APIs agree inside, and afterwards all is as it was."""

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from d2zero_runtime.backends.torch_math import float32_math

BACKENDS: Any = torch.backends  # whose annotations lack some of the settings
STATES: dict[str, Callable[[], Any]] = {
    "default": lambda: None,
    "older, allowed": lambda: setattr(BACKENDS.cuda.matmul, "allow_tf32", True),
    "older, forbidden": lambda: setattr(BACKENDS.cudnn, "allow_tf32", False),
    "medium": lambda: torch.set_float32_matmul_precision("medium"),
    "newer, allowed": lambda: setattr(BACKENDS.cuda.matmul, "fp32_precision", "tf32"),
    "newer, forbidden": lambda: setattr(BACKENDS.cudnn.conv, "fp32_precision", "ieee"),
    "newer, all": lambda: setattr(BACKENDS, "fp32_precision", "ieee"),
}


def _readable(read: Callable[[], Any]) -> Any:
    try:
        return read()
    except RuntimeError:
        return "mixed"


def state() -> list[Any]:
    """Everything that either API tells."""
    return [
        BACKENDS.fp32_precision,
        BACKENDS.cudnn.fp32_precision,
        BACKENDS.cuda.matmul.fp32_precision,
        BACKENDS.cudnn.conv.fp32_precision,
        BACKENDS.cudnn.rnn.fp32_precision,
        BACKENDS.mkldnn.matmul.fp32_precision,
        _readable(torch.get_float32_matmul_precision),
        _readable(lambda: BACKENDS.cuda.matmul.allow_tf32),
        _readable(lambda: BACKENDS.cudnn.allow_tf32),
    ]


def allowed() -> list[bool]:
    """As each API tells it of matmuls and of convolutions."""
    newer = [BACKENDS.cuda.matmul.fp32_precision == "tf32", BACKENDS.cudnn.conv.fp32_precision == "tf32"]
    return [*newer, BACKENDS.cuda.matmul.allow_tf32, BACKENDS.cudnn.allow_tf32]


@pytest.fixture(params=STATES)
def before(request: pytest.FixtureRequest) -> Iterator[list[Any]]:
    """The settings of a process in which someone has changed them, or not."""
    newer = [BACKENDS.cuda.matmul, BACKENDS.cudnn.conv, BACKENDS.cudnn.rnn, BACKENDS.mkldnn.matmul]
    precisions = [setting.fp32_precision for setting in newer]
    STATES[request.param]()
    yield state()
    BACKENDS.fp32_precision = "none"
    torch.set_float32_matmul_precision("highest")
    BACKENDS.cudnn.allow_tf32 = True
    for setting, precision in zip(newer, precisions, strict=True):
        setting.fp32_precision = precision


@pytest.mark.parametrize("tf32", [False, True])
def test_both_apis_agree_inside_and_all_is_restored(before: list[Any], tf32: bool) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with float32_math(torch, tf32):
            assert allowed() == [tf32] * 4
            with float32_math(torch, not tf32):
                assert allowed() == [not tf32] * 4
            assert allowed() == [tf32] * 4
    _assert_restored(before)


def test_an_exception_restores_too(before: list[Any]) -> None:
    with pytest.raises(ZeroDivisionError), float32_math(torch, True):
        raise ZeroDivisionError
    _assert_restored(before)


def _assert_restored(before: list[Any]) -> None:
    for now, then in zip(state(), before, strict=True):
        assert now == then or then == "mixed"  # what could not be read may now be readable
