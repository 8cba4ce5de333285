"""Running engines against the real bindings and CUDA's real names; run by `test_tensorrt_backend.py`.

What the engine and the GPU are here: `fake_engine.py`, `fake_cuda.py`.
"""

import warnings
from dataclasses import replace
from pathlib import Path

import cuda.bindings.runtime as real_cuda
import numpy as np
import pytest
from fake_engine import Setting
from naming import require_equal
from own_results import assert_own_results
from tiny_engine import expected, inputs
from tiny_model import CLASSES, QUERIES, WIDTH

from d2zero_runtime import Preprocessing, load
from d2zero_runtime.artifacts.engine import EngineMetadata
from d2zero_runtime.backends.tensorrt.backend import MAX_SHAPES, TensorrtBackend
from d2zero_runtime.errors import D2ZeroError


@pytest.fixture
def setting(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Setting:
    return Setting(monkeypatch, tmp_path)


def run_and_compare(backend: TensorrtBackend, *shape: int, seed: int = 0, query_dim: int = 0) -> None:
    images, words = inputs(*shape, seed=seed)
    for found, wanted in zip(backend.run(images, words), expected(images, words, query_dim), strict=True):
        np.testing.assert_array_equal(found, wanted)


def test_threads_get_their_own_results(setting: Setting) -> None:
    assert_own_results(setting.load(), WIDTH, (32, 64))


def test_inputs_stay_on_the_gpu(setting: Setting) -> None:
    backend = setting.load()
    images, words = inputs(1, 32, 64, 5)
    run_once = backend.resident(images, words)
    before = setting.cuda.count("cudaMemcpyAsync")
    for _ in range(3):
        run_once()
    assert setting.cuda.count("cudaMemcpyAsync") == before
    run_and_compare(backend, 1, 32, 64, 5, seed=1)


def test_data_flows_at_every_shape(setting: Setting) -> None:
    backend = setting.load()
    shapes = [(1, 32, 64, 5), (2, 64, 96, 20), (1, 32, 64, 1), (3, 96, 96, 3), (2, 64, 96, 20), (1, 32, 64, 5)]
    for seed, shape in enumerate(shapes * 3):
        run_and_compare(backend, *shape, seed=seed)
    version = ".".join(setting.tensorrt.__version__.split(".")[:2])
    assert backend.name == f"tensorrt {version} on NVIDIA H200"
    backend.close()
    backend.close()
    assert setting.cuda.memory == {"device": {}, "host": {}} and setting.cuda.count("cudaStreamDestroy") == 1
    with pytest.raises(D2ZeroError, match="was closed"):
        run_and_compare(backend, 1, 32, 64, 5)


def test_results_stay_when_the_memory_is_used_again(setting: Setting) -> None:
    backend = setting.load()
    images, words = inputs(1, 32, 64, 5)
    first = np.array(backend.run(images, words).mask_logits)
    kept = backend.run(images, words).mask_logits
    backend.run(images + 1, words)
    np.testing.assert_array_equal(kept, first)


def test_embeddings_are_uploaded_when_they_change(setting: Setting) -> None:
    backend = setting.load()
    images, words = inputs(1, 32, 64, 5)
    copies = []
    for change in (0, 0, 1, 0):
        words += change  # in place: the same object, other elements
        before = setting.cuda.count("cudaMemcpyAsync")
        found = backend.run(images, words)
        np.testing.assert_array_equal(found[0], expected(images, words)[0])
        copies.append(setting.cuda.count("cudaMemcpyAsync") - before)
    assert copies == [4, 3, 4, 3]


def test_a_graph_is_captured_once_a_shape_and_replayed(setting: Setting) -> None:
    backend = setting.load()
    for seed in range(5):
        run_and_compare(backend, 1, 64, 64, 5, seed=seed)
    assert setting.count("execute_async_v3") == 2  # the warm-up and the capture
    assert setting.cuda.count("cudaStreamBeginCapture") == 1 and setting.cuda.count("cudaGraphLaunch") == 4
    run_and_compare(backend, 1, 32, 64, 5)
    assert setting.cuda.count("cudaGraphLaunch") == 4  # another shape: a warm-up of its own
    run_and_compare(backend, 1, 64, 64, 5)
    assert setting.cuda.count("cudaGraphLaunch") == 5 and setting.cuda.count("cudaStreamBeginCapture") == 1
    assert setting.cuda.count("cudaGraphDestroy") == 1


def test_memory_that_grows_invalidates_graphs(setting: Setting) -> None:
    backend = setting.load()
    for _ in range(2):
        run_and_compare(backend, 1, 32, 64, 5)
    run_and_compare(backend, 2, 96, 96, 40)
    assert setting.cuda.count("cudaGraphExecDestroy") == 1
    for seed in range(3):
        run_and_compare(backend, 1, 32, 64, 5, seed=seed)
    assert setting.cuda.count("cudaStreamBeginCapture") == 2
    held = {side: len(blocks) for side, blocks in setting.cuda.memory.items()}
    assert held == {"device": 5, "host": 4}  # four tensors and the activations: what was outgrown is given back


def test_few_shapes_are_kept(setting: Setting) -> None:
    backend = setting.load()
    shapes = [(1, 32 * side, 96, 5) for side in range(4, 0, -1)] + [(1, 32 * side, 64, 5) for side in range(4, 0, -1)]
    for shape in [*shapes, shapes[0], (1, 32, 32, 5)]:
        run_and_compare(backend, *shape)
        run_and_compare(backend, *shape)
    assert len(shapes) == MAX_SHAPES and setting.cuda.count("cudaGraphExecDestroy") == 1
    run_and_compare(backend, *shapes[0])  # used last but one: kept
    assert setting.count("update_device_memory_size_for_shapes") == MAX_SHAPES + 1
    run_and_compare(backend, *shapes[1])  # used longest ago: prepared again
    assert setting.count("update_device_memory_size_for_shapes") == MAX_SHAPES + 2
    strategy = setting.tensorrt.ExecutionContextAllocationStrategy.USER_MANAGED
    assert {call[1] for call in setting.calls if call[0] == "ICudaEngine.create_execution_context"} == {strategy}


@pytest.mark.parametrize("failing", ["cudaStreamBeginCapture", "cudaStreamEndCapture", "cudaGraphInstantiate", "empty"])
def test_without_a_graph_it_runs_and_says_so(setting: Setting, failing: str) -> None:
    backend = setting.load()
    run_and_compare(backend, 1, 32, 64, 5)
    if failing == "empty":
        setting.cuda.enqueue = lambda work: None if setting.cuda.capturing is not None else work()
    else:
        setting.cuda.failing[failing] = real_cuda.cudaError_t.cudaErrorStreamCaptureInvalidated
    with pytest.warns(RuntimeWarning, match="no CUDA graph could be captured, running without"):
        run_and_compare(backend, 1, 32, 64, 5, seed=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run_and_compare(backend, 1, 32, 64, 5, seed=2)
    assert setting.cuda.count("cudaGraphLaunch") == 0


def test_graphs_can_be_left_out(setting: Setting) -> None:
    backend = setting.load(cuda_graphs=False)
    for seed in range(3):
        run_and_compare(backend, 1, 32, 64, 5, seed=seed)
    assert setting.cuda.count("cudaStreamBeginCapture") == 0 and setting.count("execute_async_v3") == 3


def test_baked_vocabulary(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    setting = Setting(monkeypatch, tmp_path, baked=True)
    images, words = inputs(2, 64, 64, 17)
    for _ in range(3):
        found = setting.load().run(images, words)
        np.testing.assert_array_equal(found[0], expected(images, None)[0])
    assert found[0].shape == (2, QUERIES, CLASSES + 1)


def test_the_segmenter_runs_an_engine_in_parts_that_it_takes(setting: Setting) -> None:
    segmenter = load(setting.path)
    images = [np.full((32, 64, 3), 40 * number, np.uint8) for number in range(5)]
    out = segmenter.predict_raw(images)  # the engine takes four at most
    batch = segmenter.preprocessing.batch(images, (32, 64))
    for found, wanted in zip((out.class_logits, out.mask_logits), expected(batch, None)[:2], strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-5)
    segmenter.set_vocabulary(segmenter.vocabulary.select(["class 3", "class 1"]))
    assert segmenter.predict_raw(images[:1]).class_logits.shape == (1, QUERIES, 3)
    assert segmenter.contract.batch is None and segmenter.preprocessing.static_size is None
    segmenter.close()
    with pytest.raises(D2ZeroError, match="was closed; load the model again"):
        segmenter.predict_raw(images)
    with pytest.raises(D2ZeroError, match="leave out the providers"):
        load(setting.path, providers=["cuda"])


def test_features_come_with_the_logits(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    setting = Setting(monkeypatch, tmp_path, query_dim=6)
    backend = setting.load()
    for seed, shape in enumerate([(1, 32, 64, 5), (3, 64, 96, 20), (1, 32, 64, 5)] * 2):
        run_and_compare(backend, *shape, seed=seed, query_dim=6)
    metadata = EngineMetadata.read(setting.path)
    small = replace(metadata.contract, preprocessing=Preprocessing(shortest_edge=32, longest_edge=64))
    replace(metadata, contract=small).write(setting.path)
    segmenter, image = load(setting.path), np.full((32, 64, 3), 200, np.uint8)
    batch, segments = segmenter.preprocessing.batch([image], (32, 64)), segmenter.segment(image)
    np.testing.assert_array_equal(segments.queries, expected(batch, None, 6).queries[0])
    require_equal(segmenter.name(segments), segmenter(image))


def test_wrong_inputs(setting: Setting) -> None:
    backend = setting.load()
    images, words = inputs(1, 32, 64, 5)
    for wrong, message in (
        ((images.astype(np.float64), words), r"images must be \(B, 3, H, W\) float32, got \(1, 3, 32, 64\) float64"),
        ((images[0], words), r"images must be"),
        ((images, words[:, :3]), rf"class embeddings must be \(K, {WIDTH}\) float32, got \(5, 3\)"),
        (inputs(9, 32, 64, 5), r"from 1x32x32x1 to 4x128x128x40, got 9x32x64x5: batch 9 \(1 to 4\); build another"),
        (inputs(1, 32, 64, 50), r"classes 50 \(1 to 40\)"),
        ((images[:, :, :30], words), "multiples of 32"),
    ):
        with pytest.raises(D2ZeroError, match=message):
            backend.run(*wrong)
    run_and_compare(backend, 1, 32, 64, 5)


def test_failures_of_cuda_and_tensorrt_are_named(setting: Setting) -> None:
    backend = setting.load()
    setting.cuda.failing["cudaMalloc"] = real_cuda.cudaError_t.cudaErrorMemoryAllocation
    message = r"cudaMalloc failed with cudaErrorMemoryAllocation \(out of memory\); free memory of the GPU"
    with pytest.raises(D2ZeroError, match=message):
        run_and_compare(backend, 1, 32, 64, 5)
    setting.cuda.failing.clear()
    run_and_compare(backend, 1, 32, 64, 5)  # as if nothing had been
    logits = 4 * QUERIES * (20 + 1)  # after the embeddings' memory has moved
    setting.cuda.failing["cudaMallocHost", logits] = real_cuda.cudaError_t.cudaErrorMemoryAllocation
    with pytest.raises(D2ZeroError, match="cudaMallocHost failed"):
        run_and_compare(backend, 1, 32, 64, 20)
    run_and_compare(backend, 1, 32, 64, 5)
    setting.answers["IExecutionContext.execute_async_v3"] = False
    broken = setting.load()
    (logger,) = [call[1] for call in setting.calls if call[0] == "Runtime"][-1:]
    logger.log(setting.tensorrt.ILogger.ERROR, "kernel is gone")
    with pytest.raises(D2ZeroError, match="the engine cannot run: kernel is gone"):
        run_and_compare(broken, 1, 32, 64, 5)


def test_engines_that_do_not_belong_here(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    sidecar = EngineMetadata.read(setting.path)
    for changes, message in (
        (
            {"tensorrt": "10.13.0.1"},
            r"was built by TensorRT 10\.13\.0\.1, here is 1\d\..* build it again: .* --format tensorrt -o m\.engine",
        ),
        ({"compute_capability": "8.9"}, r"was built for compute capability 8\.9 .*, here is 9\.0"),
        ({"plan_bytes": 3}, r"is not the plan that m\.engine\.json describes \(3 bytes\)"),
        ({"plan_sha256": "0" * 64}, "cut short or exchanged"),
    ):
        with pytest.raises(D2ZeroError, match=message):
            TensorrtBackend(setting.path, replace(sidecar, **changes))
    with pytest.raises(D2ZeroError, match="there is no GPU 1: this machine has 1"):
        setting.load(device=1)
    for key, answer, message in (
        ("Runtime.deserialize_cuda_engine", None, "cannot load .*m.engine: TensorRT gave no reason; build the engine"),
        ("ICudaEngine.num_io_tensors", 3, "expected the tensors images, class_embeddings, class_logits, mask_logits"),
        ("ICudaEngine.get_tensor_dtype", setting.tensorrt.DataType.HALF, "images must be float32, it is DataType.HALF"),
    ):
        with monkeypatch.context() as patch, pytest.raises(D2ZeroError, match=message):
            patch.setitem(setting.answers, key, answer)
            setting.load()
    setting.path.write_bytes(b"")
    with pytest.raises(D2ZeroError, match="is empty"):
        setting.load()
    setting.path.unlink()
    with pytest.raises(D2ZeroError, match="does not exist"):
        setting.load()
