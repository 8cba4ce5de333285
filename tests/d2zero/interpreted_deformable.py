"""The Triton kernels in Triton's interpreter, on the CPU.

`test_deformable_triton.py` runs this file in a process of its own, since the interpreter must be on before
Triton is imported. By hand: `TRITON_INTERPRET=1 pytest --noconftest tests/d2zero/interpreted_deformable.py`.
"""

import pytest
import torch
from deformable_cases import Case, assert_equals_float64, case, outputs
from kernels import poisoned_memory

from d2zero.model.deformable import grid_sample
from d2zero.model.deformable.operator import deformable_attention, deformable_attention_backward, triton_sample
from d2zero_runtime import D2ZeroError

SIZES = [(2, 3), (4, 7)]


def arguments(of: Case) -> tuple[torch.Tensor, list[int], torch.Tensor, torch.Tensor]:
    return of.values, [side for size in of.sizes for side in size], of.locations, of.weights


@pytest.mark.parametrize(
    "shape",
    [
        {"sizes": SIZES},
        {"sizes": [(5, 3)], "heads": 1, "points": 1, "width": 1},
        {"sizes": [(1, 1)], "points": 3},
        {"sizes": [(1, 7), (5, 1), (3, 3)], "width": 3, "batch": 2},
        {"sizes": SIZES, "width": 12, "heads": 3, "points": 3},
        {"sizes": SIZES, "width": 32, "queries": 19},  # no multiple of a tile's queries
        {"sizes": SIZES, "width": 160, "queries": 2, "points": 1},
        {"sizes": SIZES, "batch": 3, "heads": 1, "queries": 1},
        {"sizes": SIZES, "spread": 5.0},
        {"sizes": SIZES, "spread": 1e6},
    ],
    ids=str,
)
def test_equals_float64(shape: dict) -> None:
    assert_equals_float64(triton_sample, case(**shape))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("width", [3, 8])
def test_half_precision_values_round_once(dtype: torch.dtype, width: int) -> None:
    drawn = case(SIZES, width=width, batch=2, dtype=dtype)
    # The interpreter cuts float32 to bfloat16 off, where GPUs round to the nearest.
    assert_equals_float64(triton_sample, drawn, ulps=1.0 if dtype == torch.bfloat16 else 0.5)
    assert [tensor.dtype for tensor in outputs(triton_sample, drawn)] == [dtype, dtype, torch.float32, torch.float32]


def test_locations_on_pixels_and_borders() -> None:
    # Eighths of a 4×4 map: pixel centres, edges between pixels, the map's border, and half a pixel beyond.
    steps = torch.arange(-2, 11) / 8
    locations = torch.cartesian_prod(steps, steps).view(1, -1, 1, 1, 1, 2)
    values, grad = torch.randn(1, 16, 1, 2), torch.randn(1, locations.shape[1], 2)
    weights = torch.rand(locations.shape[:-1])
    assert_equals_float64(triton_sample, Case(values, [(4, 4)], locations, weights, grad))


def test_every_element_is_written() -> None:
    with poisoned_memory(), pytest.warns(UserWarning, match="not deterministic"):
        assert_equals_float64(triton_sample, case(SIZES, width=3, queries=7, batch=2))


def test_nothing_else_is_read() -> None:
    # Image 1 and head 1 full of NaN leave image 0 and head 0 as they were.
    clean = case(SIZES, width=3, batch=2)
    dirty = clean._replace(values=clean.values.clone())
    dirty.values[1], dirty.values[:, :, 1] = torch.nan, torch.nan
    for left, right in zip(outputs(triton_sample, clean), outputs(triton_sample, dirty), strict=True):
        left, right = (tensor.unflatten(-1, (2, 3)) if tensor.dim() == 3 else tensor for tensor in (left, right))
        torch.testing.assert_close(left[0, :, 0], right[0, :, 0])  # each is (B, rows, M, …)


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # numpy's, for what is shown
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_broken_location_shows_in_its_own_query_alone(bad: float) -> None:
    drawn = case(SIZES)
    drawn.locations[0, 2, 1, 0, 0, 0] = bad
    out = triton_sample(*drawn[:4])
    assert out[0, 2, 4:].isnan().all()
    assert out.isfinite().sum() == out.numel() - 4


def test_strided_inputs() -> None:
    drawn = case(SIZES, batch=2)
    strided = [tensor.transpose(0, 1).contiguous().transpose(0, 1) for tensor in (drawn.values, drawn.locations)]
    out = triton_sample(strided[0], drawn.sizes, strided[1], drawn.weights)
    torch.testing.assert_close(out, triton_sample(*drawn[:4]), atol=0, rtol=0)


def test_no_queries() -> None:
    drawn = case(SIZES, queries=0)
    assert triton_sample(*drawn[:4]).shape == (1, 0, 8)


def test_the_registrations() -> None:
    drawn = case([(2, 3)], batch=2, points=1, queries=2)
    values, sizes, locations, weights = arguments(drawn)
    inputs = [tensor.requires_grad_() for tensor in (values, locations, weights)]
    torch.library.opcheck(deformable_attention, (inputs[0], sizes, inputs[1], inputs[2]))
    inputs = [tensor.detach() for tensor in inputs]
    torch.library.opcheck(deformable_attention_backward, (drawn.grad, inputs[0], sizes, inputs[1], inputs[2]))


def test_compiled_with_dynamic_sizes_in_one_graph() -> None:
    compiled = torch.compile(triton_sample, backend="aot_eager", fullgraph=True, dynamic=True)
    for sizes in (SIZES, [(5, 3), (2, 6)]):
        assert_equals_float64(compiled, case(sizes))


def test_deterministic_algorithms_are_refused() -> None:
    torch.use_deterministic_algorithms(True)
    try:
        with pytest.raises(D2ZeroError, match="not deterministic"):
            outputs(triton_sample, case(SIZES))
    finally:
        torch.use_deterministic_algorithms(False)


def test_wrong_arguments() -> None:
    values, sizes, locations, weights, _ = case(SIZES)
    for wrong in (
        (values.double(), sizes, locations, weights),
        (values, sizes, locations.half(), weights),
        (values[0], sizes, locations, weights),
        (values[:, 1:], sizes, locations, weights),
        (values, sizes[:1], locations, weights),
        (values, [(4, 7), (3, 3)], locations, weights),
        (values, sizes, locations[..., :1], weights),
        (values, sizes, locations, weights[..., 0]),
    ):
        with pytest.raises(D2ZeroError, match=r"triton_sample takes|do not fit"):
            triton_sample(*wrong)


def test_a_wrong_form_is_noticed() -> None:
    # The comparison itself: a weight off by a ten-thousandth is an error.
    with pytest.raises(AssertionError, match="output"):
        assert_equals_float64(lambda v, s, at, w: grid_sample(v, s, at, w * 1.0001), case(SIZES))
