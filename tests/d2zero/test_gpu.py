"""What must hold on a GPU: run with `pytest -m gpu` on a machine that has one."""

import json
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import masked_attention_cases
import numpy as np
import pytest
import torch
from deformable_cases import Case, assert_equals_float64, case, outputs
from models import published_model, published_vocabulary

from d2zero.data.dataset import Dataset
from d2zero.model import D2Zero, deformable
from d2zero.model.deformable import triton_sample
from d2zero.model.masked_attention import masked_attention
from d2zero.training.config import shapes, with_settings
from d2zero.training.start import Inputs, start
from d2zero.training.step import without_cudnn_attention
from d2zero_export.options import Pt2Options
from d2zero_export.pt2_export import export_pt2
from d2zero_runtime import load
from d2zero_runtime.backends.torch_pt2 import GraphedNetwork, Pt2Backend
from d2zero_runtime.masks.device import Sizes, in_one_kernel, in_steps

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and torch sees none"),
]


LEVELS_800x1216 = [(25, 38), (50, 76), (100, 152)]
PUBLISHED: dict[str, Any] = {"heads": 8, "width": 32, "points": 4, "spread": 0.3, "device": "cuda"}
EVERY_PIXEL = sum(height * width for height, width in LEVELS_800x1216)


@pytest.fixture(autouse=True)
def exact_float32() -> None:
    """TF32 would round away what these tests compare."""
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False


@pytest.mark.parametrize("impl", [deformable.grid_sample, deformable.gather, triton_sample])
def test_published_model_equals_the_recorded_outputs(shared: Path, impl: deformable.DeformableFunction) -> None:
    recorded = np.load(shared / "reference/reference_48_17.npz")
    model = published_model(published_vocabulary(shared, "48_17")).to("cuda")
    model.set_deformable(impl)
    out = model.predict_raw([recorded["image_u8"]]).to_numpy()
    np.testing.assert_allclose(out.class_logits[0], recorded["pred_logits"], atol=1e-3, rtol=0)
    np.testing.assert_allclose(out.mask_logits[0], recorded["pred_masks"], atol=1e-3, rtol=0)


def test_a_batch_equals_its_images_one_by_one(small_model: D2Zero) -> None:
    model = small_model.to("cuda")
    images = [np.random.default_rng(i).integers(0, 256, (96, 96, 3), np.uint8) for i in range(3)]
    together = model.predict_raw(images)
    for row, image in enumerate(images):
        alone = model.predict_raw([image])
        torch.testing.assert_close(together.class_logits[row], alone.class_logits[0], atol=1e-4, rtol=0)


@pytest.mark.parametrize("precision", ["float16", "bfloat16", "float32"])
def test_training_in_every_precision(shapes_data: Path, tmp_path: Path, precision: str) -> None:
    settings = [f"precision={precision}", "steps=30", "log_every=1", "optim.warmup_steps=5"]
    inputs = Inputs(Dataset(shapes_data), shapes_data / "vocabulary.npz")
    start(with_settings(shapes(), settings), inputs, tmp_path / "run", device="cuda")
    losses = [json.loads(line)["loss"] for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    assert np.isfinite(losses).all() and np.mean(losses[-5:]) < 0.85 * np.mean(losses[:5])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_masked_attention_of_the_recipe_has_finite_gradients(dtype: torch.dtype) -> None:
    queries, keys, values = (
        torch.randn(2, 8, count, 32, device="cuda", dtype=dtype, requires_grad=True) for count in (100, 14_400, 14_400)
    )
    mask = torch.rand(2, 8, 100, 14_400, device="cuda") < 0.5
    with without_cudnn_attention():
        out = torch.nn.functional.scaled_dot_product_attention(queries, keys, values, mask)
    out.sum().backward()
    gradients = [tensor.grad for tensor in (queries, keys, values)]
    assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "shape",
    [
        {"sizes": [(5, 3)], "heads": 1, "points": 1, "width": 1},
        {"sizes": [(1, 7), (5, 1), (3, 3)], "width": 3, "batch": 2, "queries": 77},
        {"sizes": [(2, 3), (4, 7)], "width": 160, "queries": 5},
        {"sizes": LEVELS_800x1216, "queries": 1000, "batch": 2} | PUBLISHED,
        {"sizes": LEVELS_800x1216, "queries": 100} | PUBLISHED | {"spread": 1e6},
    ],
    ids=["one", "odd", "wide", "published", "outside"],
)
def test_triton_form_equals_float64(shape: dict, dtype: torch.dtype) -> None:
    assert_equals_float64(triton_sample, case(**{"device": "cuda"} | shape, dtype=dtype))


def test_triton_form_writes_every_element() -> None:
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills new memory with NaN
    try:
        with pytest.warns(UserWarning, match="not deterministic"):
            assert_equals_float64(triton_sample, case(LEVELS_800x1216, queries=77, **PUBLISHED | {"width": 24}))
    finally:
        torch.use_deterministic_algorithms(False)


def test_triton_form_compiled_and_in_a_cuda_graph() -> None:
    compiled = torch.compile(triton_sample, fullgraph=True, dynamic=True)
    for sizes in ([(4, 7), (9, 5)], [(8, 3), (16, 16)]):
        assert_equals_float64(compiled, case(sizes, device="cuda"))
    drawn = case([(4, 7), (9, 5)], device="cuda")
    expected, graph = triton_sample(*drawn[:4]), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = triton_sample(*drawn[:4])
    out.zero_()
    graph.replay()
    torch.testing.assert_close(out, expected, atol=0, rtol=0)


def test_triton_form_beyond_two_to_the_31_elements() -> None:
    batch, last = 2**31 // (EVERY_PIXEL * 256) + 2, case(LEVELS_800x1216, queries=3, **PUBLISHED)
    if torch.cuda.mem_get_info()[0] < batch * EVERY_PIXEL * 256 * 10:
        pytest.skip("needs 22 GB of free GPU memory")
    values = torch.zeros(batch, *last.values.shape[1:], dtype=torch.bfloat16, device="cuda")
    values[-1] = last.values[0]
    alone = last._replace(values=values[-1:])
    locations, weights, grad = (tensor.repeat(batch, *[1] * (tensor.dim() - 1)) for tensor in last[2:])
    together = Case(values, last.sizes, locations, weights, grad.bfloat16())
    alone = alone._replace(grad=last.grad.bfloat16())
    for many, one in zip(outputs(triton_sample, together), outputs(triton_sample, alone), strict=True):
        torch.testing.assert_close(many[-1:], one, atol=1e-2, rtol=1e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "shape",
    [
        {},
        {"queries": 100, "keys": 950, "heads": 8, "width": 32},
        {"queries": 100, "keys": 15_200, "heads": 8, "width": 32, "batch": 2},
        {"queries": 67, "keys": 131, "heads": 3, "width": 12},
    ],
    ids=["small", "coarse", "fine", "odd"],
)
def test_masked_attention_equals_float64(shape: dict, dtype: torch.dtype) -> None:
    masked_attention_cases.assert_equals_float64(masked_attention_cases.case(**shape, dtype=dtype, device="cuda"))


def test_masked_attention_in_a_cuda_graph() -> None:
    drawn = masked_attention_cases.case(queries=100, keys=3800, heads=8, width=32, dtype=torch.float16, device="cuda")
    expected, graph = masked_attention(*drawn), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = masked_attention(*drawn)
    out.zero_()
    graph.replay()
    torch.testing.assert_close(out, expected, atol=0, rtol=0)


def milliseconds(run: Callable[[], object], times: int = 20) -> float:
    """The least time of a call on the GPU, after three calls to warm up."""
    spans = []
    for _ in range(times + 3):
        start_, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start_.record()
        run()
        end.record()
        end.synchronize()
        spans.append(start_.elapsed_time(end))
    return min(spans[3:])


@pytest.mark.timed
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_triton_form_is_five_times_faster(dtype: torch.dtype, capsys: pytest.CaptureFixture[str]) -> None:
    values, sizes, locations, weights, _ = case(LEVELS_800x1216, queries=EVERY_PIXEL, **PUBLISHED, dtype=dtype)
    impls = (deformable.grid_sample, triton_sample)

    def train(impl: deformable.DeformableFunction) -> None:
        inputs = [tensor.detach().requires_grad_() for tensor in (values, locations, weights)]
        impl(inputs[0], sizes, inputs[1], inputs[2]).sum().backward()

    with torch.no_grad():
        forward = [milliseconds(partial(impl, values, sizes, locations, weights)) for impl in impls]
    both = [milliseconds(partial(train, impl)) for impl in impls]
    with capsys.disabled():
        print(f"\n800×1216 {dtype}, grid_sample and triton in ms: forward {forward}, with backward {both}")
    assert forward[1] * 5 <= forward[0]


def drawn_masks(dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator("cuda").manual_seed(0)
    logits = torch.randn(100, 25, 38, device="cuda", generator=generator)
    return torch.nn.functional.interpolate(logits[None], (200, 304), mode="bicubic")[0].to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("output", [(800, 1216), (480, 730)])
def test_masks_by_one_kernel_equal_those_by_torchs_operators(output: tuple[int, int], dtype: torch.dtype) -> None:
    logits, way = drawn_masks(dtype), Sizes((800, 1216), (800, 1216), output)
    found, expected = (find(logits, range(100), way, True) for find in (in_one_kernel, in_steps))
    np.testing.assert_allclose(found[0][:, 0], expected[0][:, 0], atol=1e-4)
    assert found[1] is not None and expected[1] is not None
    assert np.unpackbits(found[1] ^ expected[1]).mean() < 1e-6  # where the value is 0 except for rounding
    np.testing.assert_allclose(found[0][:, 1:], expected[0][:, 1:], atol=1)


@pytest.mark.timed
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("output", [(800, 1216), (480, 730)])
def test_masks_by_one_kernel_are_no_slower(
    output: tuple[int, int], dtype: torch.dtype, capsys: pytest.CaptureFixture[str]
) -> None:
    logits, way = drawn_masks(dtype), Sizes((800, 1216), (800, 1216), output)
    spans = [milliseconds(partial(find, logits, range(100), way, True)) for find in (in_one_kernel, in_steps)]
    with capsys.disabled():
        print(f"\n100 masks of {output[0]}x{output[1]}, {dtype}, in one kernel and in steps: {spans} ms")
    assert spans[0] <= spans[1]


@pytest.mark.parametrize("precision", ["float32", "float16"])
def test_a_compiled_model_is_the_checkpoint_and_is_captured(
    small_model: D2Zero, tmp_path: Path, precision: str
) -> None:
    path = tmp_path / "m.pt2"
    assert export_pt2(small_model, path, Pt2Options(device="cuda", precision=precision)) is not None  # verified
    images = [np.random.default_rng(seed).integers(0, 256, (96, 128, 3), np.uint8) for seed in range(4)]
    compiled, reference = load(path), small_model.segmenter()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # where no graph can be captured, the backend warns
        found = [compiled.predict_raw([image]) for image in images]
    for out, image in zip(found, images, strict=True):
        expected = reference.predict_raw([image])
        limit = 1e-3 if precision == "float32" else 0.2
        np.testing.assert_allclose(out.class_logits, expected.class_logits, atol=limit)
    assert isinstance(compiled.backend, Pt2Backend) and isinstance(compiled.backend._network, GraphedNetwork)
    assert any(graph is not None for graph in compiled.backend._network._seen.values())
