"""Masked attention's Triton kernels in Triton's interpreter, on the CPU.

`test_masked_attention.py` runs this file in a process of its own, since the interpreter must be on before Triton is
imported. By hand: `TRITON_INTERPRET=1 pytest --noconftest tests/d2zero/interpreted_masked_attention.py`.
"""

from copy import deepcopy

import pytest
import torch
from kernels import poisoned_memory
from masked_attention_cases import assert_equals_float64, case

from d2zero.model.masked_attention import masked_attention, operator
from d2zero_runtime import D2ZeroError

# Rows of a tile beyond the queries have no keys; NumPy, which interprets, warns of what is not stored.
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")


@pytest.fixture(autouse=True)
def several_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operator, "processors", lambda device: 12)


@pytest.mark.parametrize(
    "shape",
    [
        {},
        {"keys": 1, "queries": 1, "heads": 1},
        {"keys": 64},
        {"keys": 65, "queries": 65},
        {"keys": 950, "queries": 7, "heads": 1},
        {"width": 12, "heads": 3},
        {"width": 160, "heads": 1, "queries": 3},
        {"batch": 3, "queries": 2},
        {"scale": 30.0},
    ],
    ids=str,
)
def test_equals_float64(shape: dict) -> None:
    assert_equals_float64(case(**shape))


def test_half_precision() -> None:  # the interpreter multiplies the bits of bfloat16 as whole numbers
    assert_equals_float64(case(dtype=torch.float16))


def test_every_element_is_written() -> None:
    with poisoned_memory():
        assert_equals_float64(case(queries=67, keys=131, batch=2, width=12))


def test_a_query_that_is_blocked_everywhere_attends_everywhere() -> None:
    drawn = case()
    drawn.mask_logits[0, 1] = -1.0
    drawn.mask_logits[0, 2] = -1.0
    drawn.mask_logits[0, 2, 77] = 0.0  # in one split; the others have nothing
    assert_equals_float64(drawn)
    out = masked_attention(*drawn)
    torch.testing.assert_close(out[0, 2], drawn.values[0, 77], atol=1e-6, rtol=0)


def test_rows_that_lie_apart_are_read_in_place() -> None:
    drawn = case(batch=2)
    joined = torch.cat([drawn.values, drawn.keys, drawn.values], dim=2)
    _, keys, values = joined.chunk(3, dim=2)
    found = masked_attention(drawn.queries, keys, values, drawn.mask_logits, drawn.heads)
    torch.testing.assert_close(found, masked_attention(*drawn), atol=0, rtol=0)
    turned = keys.transpose(1, 2).contiguous().transpose(1, 2)
    found = masked_attention(drawn.queries, turned, values, drawn.mask_logits, drawn.heads)
    torch.testing.assert_close(found, masked_attention(*drawn), atol=0, rtol=0)


def test_nothing_else_is_read() -> None:
    clean = case(batch=2, queries=3, keys=70)
    dirty = deepcopy(clean)
    for tensor in dirty[:3]:
        tensor[1], tensor[..., 4:] = torch.nan, torch.nan  # another image, another head
    dirty.mask_logits[1] = torch.nan
    ours, theirs = masked_attention(*clean), masked_attention(*dirty)
    torch.testing.assert_close(ours[0, :, :4], theirs[0, :, :4], atol=0, rtol=0)


def test_the_registration() -> None:
    torch.library.opcheck(masked_attention, tuple(case(queries=2, keys=3, heads=1)))


def test_wrong_arguments() -> None:
    queries, keys, values, logits, heads = case()
    for wrong in (
        (queries.double(), keys, values, logits, heads),
        (queries.half(), keys, values, logits, heads),
        (queries[0], keys, values, logits, heads),
        (queries, keys[:, 1:], values, logits, heads),
        (queries, keys, values[..., 1:], logits, heads),
        (queries, keys, values, logits[:, 1:], heads),
        (queries, keys[:, :0], values[:, :0], logits[..., :0], heads),
        (queries, keys, values, logits, 3),
    ):
        with pytest.raises(D2ZeroError, match=r"masked_attention takes|do not fit"):
            masked_attention(*wrong)


def test_a_wrong_result_is_noticed() -> None:
    with pytest.raises(AssertionError):
        assert_equals_float64(case(), lambda q, k, v, m, h: masked_attention(q, k, v, -m, h))
