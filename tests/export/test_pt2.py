"""`.pt2`: compiled by torch, described like every exported model, run by the runtime."""

import json
import os
import shutil
import subprocess
import sys
import warnings
import zipfile
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from naming import require_named_alike
from own_results import assert_own_results
from tiny_model import CLASSES, WIDTH, contract, embeddings
from tiny_network import tiny
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from d2zero.data.shapes import vocabulary
from d2zero.model import D2Zero, build
from d2zero.model.deformable import triton_sample
from d2zero.training.config import shapes
from d2zero_export.graph import InferenceGraph
from d2zero_export.onnx_export import trace
from d2zero_export.options import GraphOptions, Pt2Options
from d2zero_export.parity import drawn_image
from d2zero_export.precision import cast_to
from d2zero_export.pt2_export import HEADERS, cuda_headers, export_pt2, hardware
from d2zero_runtime import D2ZeroError, Vocabulary, load
from d2zero_runtime.artifacts.pt2 import ENTRY, Pt2Metadata, replace_pt2_vocabulary
from d2zero_runtime.backends.torch_pt2 import MAX_SHAPES, GraphedNetwork, Pt2Backend
from d2zero_runtime.formats import read_exported


class Nothing(nn.Module):
    """Inputs and outputs of a model, and next to nothing inside."""

    def forward(self, images: Tensor, class_embeddings: Tensor) -> tuple[Tensor, Tensor]:
        return class_embeddings.relu()[None], images.relu()


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pt2") / "tiny.pt2"
    shapes = ({0: torch.export.Dim("batch", min=1, max=8)}, {0: torch.export.Dim("classes", min=1, max=99)})
    program = torch.export.export(
        Nothing(), (torch.zeros(2, 3, 32, 32), torch.zeros(7, WIDTH)), dynamic_shapes=shapes, strict=False
    )
    torch._inductor.aoti_compile_and_package(program, package_path=str(path))
    described(path).add_to(path)
    return path


def described(path: Path, **changes: Any) -> Pt2Metadata:
    values: dict[str, Any] = {"contract": contract(), "embeddings": embeddings(), "device": "cpu"}
    values |= {"hardware": hardware("cpu"), "torch": torch.__version__}
    return Pt2Metadata(**values | changes)


def rewritten(path: Path, to: Path, text: str | None) -> Path:
    """A copy with another description, or none."""
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(to, "w") as new:
        for name in old.namelist():
            if not name.endswith(ENTRY):
                new.writestr(name, old.read(name))
        if text is not None:
            new.writestr(f"tiny/{ENTRY}", text)
    return to


def test_it_is_loaded_and_run_like_every_exported_model(compiled: Path) -> None:
    segmenter = load(compiled, threads=1)
    images = np.random.default_rng(0).standard_normal((1, 3, 32, 32)).astype(np.float32)
    for words in (embeddings(), np.ones((4, WIDTH), np.float32)):
        class_logits, mask_logits, *_ = segmenter.backend.run(images, words)
        np.testing.assert_array_equal(class_logits[0], np.maximum(words, 0))
        np.testing.assert_array_equal(mask_logits, np.maximum(images, 0))
    assert "AOTInductor (CPU)" in segmenter.backend.name


def test_threads_get_their_own_results(compiled: Path) -> None:
    assert_own_results(load(compiled).backend, WIDTH, (32, 32))


def test_its_contract_is_read_without_torch(compiled: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from d2zero_runtime.formats import read_exported;"
        f"print(len(read_exported(Path({str(compiled)!r})).vocabulary)); assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(CLASSES)


def test_its_vocabulary_is_replaced_in_the_file(compiled: Path, tmp_path: Path) -> None:
    copy = rewritten(compiled, tmp_path / "other.pt2", described(compiled, classifier=b"a classifier").to_json())
    words = Vocabulary(("x", "y"), np.full((2, WIDTH), 3, np.float32), source={"encoder": "word2vec"})
    replace_pt2_vocabulary(copy, words)
    assert read_exported(copy).vocabulary.names == ("x", "y")
    assert Pt2Metadata.read(copy).classifier == b"a classifier"
    class_logits = load(copy).backend.run(np.zeros((1, 3, 32, 32), np.float32), words.embeddings).class_logits
    np.testing.assert_array_equal(class_logits[0], words.embeddings)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other.pt2"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"torch": "2.9.1"}, r"compiled by torch 2\.9\.1 and runs only with 2\.9\.\*"),
        ({"device": "cuda", "hardware": "NVIDIA H200"}, r"NVIDIA H200|this is"),
        ({"operators": ("d2zero::unheard_of",)}, "calls the operator d2zero::unheard_of, which nothing here brings"),
        ({"classifier": "?"}, r"m\.pt2 is damaged: its classifier cannot be read"),
        ({"version": 9}, r"m\.pt2 follows version 9 of the description, this d2zero reads up to 1; upgrade d2zero$"),
    ],
)
def test_what_does_not_fit_this_machine_is_said(
    compiled: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    description = json.loads(described(compiled).to_json()) | changes
    path = rewritten(compiled, tmp_path / "m.pt2", json.dumps(description))
    with pytest.raises(D2ZeroError, match=message):
        load(path)


def test_damaged_and_foreign_files_are_named(compiled: Path, tmp_path: Path) -> None:
    (tmp_path / "cut.pt2").write_bytes(compiled.read_bytes()[:5000])
    cases = {
        "absent.pt2": "does not exist",
        "cut.pt2": "is damaged or no .pt2",
        rewritten(compiled, tmp_path / "foreign.pt2", None).name: "was not made by `d2zero export --format pt2`",
        rewritten(compiled, tmp_path / "odd.pt2", "{}").name: r"lacks version, contract, embeddings; export it again$",
    }
    for name, message in cases.items():
        with pytest.raises(D2ZeroError, match=message):
            load(tmp_path / name)
    with pytest.raises(D2ZeroError, match="leave out the providers"):
        load(compiled, providers=("cpu",))


def test_what_cannot_be_compiled_here_is_refused_before_any_work(tmp_path: Path) -> None:
    with pytest.raises(D2ZeroError, match="one of cpu, cuda, got 'tpu'"):
        Pt2Options(device="tpu")
    with pytest.raises(D2ZeroError, match="float16 is for GPUs"):
        Pt2Options(precision="float16")
    if not torch.cuda.is_available():
        with pytest.raises(D2ZeroError, match="torch sees no CUDA device"):
            Pt2Options(device="cuda")


@pytest.mark.parametrize("make", [tiny, lambda: build(shapes().model, vocabulary()).eval()], ids=["one", "three"])
def test_fused_attention_is_the_same_attention(make: Callable[[], D2Zero]) -> None:
    model, images = make(), torch.randn(2, 3, 64, 96)
    with torch.inference_mode():
        for ours, theirs in zip(InferenceGraph(model)(images), InferenceGraph(model, fused=True)(images), strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


@pytest.mark.slow
def test_a_graph_for_a_gpu_copies_nothing_from_the_host() -> None:
    # On a CUDA device that is not there, with tensors without content. A copy would keep CUDA graphs from capturing.
    model = cast_to(tiny(), "float16")
    model.set_deformable(triton_sample)
    with FakeTensorMode(allow_non_fake_inputs=True):
        for module in model.modules():
            for name, entry in module.named_parameters(recurse=False):
                module._parameters[name] = nn.Parameter(torch.empty_like(entry, device="cuda"))
            for name, buffer in module.named_buffers(recurse=False):
                module._buffers[name] = torch.empty_like(buffer, device="cuda")
        program = trace(model, GraphOptions(precision="float16"), "cuda", fused=True)
    values = [node.meta.get("val") for node in program.graph.nodes]
    assert {value.device.type for value in values if isinstance(value, Tensor)} == {"cuda"}
    attentions = [node for node in program.graph.nodes if "attention" in str(node.target)]
    if find_spec("triton"):
        assert [str(node.target) for node in attentions].count("d2zero.masked_attention.default") == 1
    for node in attentions:
        if "scaled_dot_product" in str(node.target):  # what fused kernels ask for
            assert all(entry.meta["val"].stride()[-1] == 1 for entry in node.args[:3])


@pytest.mark.slow
def test_fused_operators_are_what_torch_compiles() -> None:
    from torch._inductor.decomposition import select_decomp_table

    model = cast_to(tiny(), "bfloat16").to(memory_format=torch.channels_last)
    model.set_deformable(triton_sample)
    program = trace(model, GraphOptions(precision="bfloat16", size=(64, 96), batch=1), fused=True)
    nodes = program.run_decompositions(select_decomp_table()).graph.nodes
    by_name = {name: [node for node in nodes if name in str(node.target)] for name in ("softmax", "bmm", "convolution")}
    assert not by_name["softmax"]  # no attention falls back to matmuls
    precise = [node for node in by_name["bmm"] if node.args[0].meta["val"].dtype == torch.float32]
    assert max(node.meta["val"].numel() for node in precise) < 1000  # class logits and the background's convolution
    for node in by_name["convolution"]:
        shapes = [entry.meta["val"] for entry in (*node.args[:2], node)]
        assert all(entry.is_contiguous(memory_format=torch.channels_last) for entry in shapes)


@pytest.mark.parametrize("tf32", [False, True])
def test_float32_math_is_the_contracts(compiled: Path, tmp_path: Path, tf32: bool) -> None:
    description = described(compiled, contract=contract(tf32=tf32))
    backend = load(rewritten(compiled, tmp_path / "m.pt2", description.to_json())).backend
    seen, before = [], torch.backends.cudnn.allow_tf32
    assert isinstance(backend, Pt2Backend)
    network = backend._network
    backend._network = lambda *given: seen.append(torch.backends.cudnn.allow_tf32) or network(*given)
    images = np.zeros((1, 3, 32, 32), np.float32)
    words = np.zeros((CLASSES, WIDTH), np.float32)
    backend.run(images, words)
    backend.resident(images, words)()
    assert seen == [tf32, tf32] and torch.backends.cudnn.allow_tf32 == before
    assert backend.precision == "float32"  # a CPU has none


@pytest.mark.parametrize("channels_last", [False, True])
def test_images_have_the_layout_that_was_compiled(compiled: Path, tmp_path: Path, channels_last: bool) -> None:
    description = replace(described(compiled), channels_last=channels_last)
    backend = load(rewritten(compiled, tmp_path / "m.pt2", description.to_json())).backend
    assert isinstance(backend, Pt2Backend)
    (images,) = backend._moved(np.zeros((2, 3, 32, 64), np.float32), None)
    assert images.is_contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)


@pytest.mark.skipif(sys.platform != "linux" or not shutil.which("g++"), reason="needs g++ on Linux")
def test_what_is_compiled_for_a_gpu_needs_no_toolkit(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    if not (Path(torch.__file__).parents[1] / HEADERS[1]).is_dir():
        pytest.skip("this torch brings no CUDA 13")
    source = tmp_path / "headers.cpp"  # those of an AOTInductor package
    source.write_text("".join(f"#include <{name}>\n" for name in ("cuda.h", "cuda_runtime_api.h", "cuda_bf16.h")))
    with cuda_headers():
        subprocess.run(["g++", "-fsyntax-only", source], check=True)


@pytest.mark.slow
@pytest.mark.long
def test_a_model_is_compiled_and_verified(tmp_path: Path) -> None:
    path = tmp_path / "model.pt2"
    stages: list[str] = []
    model = tiny()
    model.set_vocabulary(replace(model.vocabulary, seen=np.array([True, False, True])))
    parity = export_pt2(model, path, stage=stages.append)
    assert stages == ["precision", "trace", "compile", "package", "verify"]
    assert parity is not None and all(entry.class_logits < 1e-3 for entry in parity.differences)
    assert read_exported(path).contract.deform_attn == "embedding_bag"
    image = drawn_image(np.random.default_rng(0), 50, 70)
    require_named_alike(load(path), image)
    assert Pt2Metadata.read(path).classifier == load(path).classifier.to_onnx()


@pytest.mark.slow
@pytest.mark.long
def test_a_model_calls_the_triton_forms_operator(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    folder = Path(__file__).parent
    paths = [str(folder.parent / "helpers"), *filter(None, sys.path)]
    done = subprocess.run(
        [sys.executable, folder / "interpreted_pt2.py", tmp_path],
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]


class FakeCuda:
    """CUDA graphs without CUDA: a captured graph runs the network again on its own inputs."""

    def __init__(self, fails: bool = False) -> None:
        self.fails, self.cuda, self.captured = fails, self, 0
        self.backends = SimpleNamespace(cudnn=SimpleNamespace(benchmark=False))
        self.stream = "the caller's"

    def current_stream(self) -> str:
        return self.stream

    def set_stream(self, stream: str) -> None:
        self.stream = stream

    def synchronize(self) -> None: ...

    def CUDAGraph(self) -> "FakeCuda":
        return self

    def graph_pool_handle(self) -> tuple[int, int]:
        return 0, 1

    def Stream(self) -> str:
        return "a stream"

    def graph(self, graph: object, pool: tuple[int, int], stream: str, capture_error_mode: str) -> "FakeCuda":
        assert (pool, stream, capture_error_mode) == ((0, 1), "a stream", "thread_local")
        return self

    def __enter__(self) -> None:
        self.stream = "a stream"
        self.captured += 1

    def __exit__(self, *error: object) -> None:
        if self.fails:  # as torch.cuda.graph does where ending the capture fails: the stream stays
            raise RuntimeError("operation failed due to a previous error during capture")
        self.stream = "the caller's"

    def replay(self) -> None: ...


def test_a_shape_is_captured_at_its_second_run_and_old_ones_are_forgotten() -> None:
    fake, runs = FakeCuda(), []
    network = GraphedNetwork(lambda entry: runs.append(entry.shape) or (entry + 1,), fake)
    for _ in range(3):
        network(torch.zeros(2))
    assert fake.captured == 1 and len(runs) == 2  # once plainly, once to capture; replays run nothing
    for size in range(3, 3 + MAX_SHAPES):
        network(torch.zeros(size))
    network(torch.zeros(2))
    assert len(runs) == 2 + MAX_SHAPES + 1  # forgotten, and run plainly again


def test_results_of_a_graph_are_not_overwritten_by_its_next_run() -> None:
    network = GraphedNetwork(lambda entry: (entry,), FakeCuda())
    network(torch.zeros(2))
    network(torch.ones(2))
    first = network(torch.full((2,), 5.0))[0]
    network(torch.full((2,), 7.0))
    assert first.tolist() == [5.0, 5.0]


def test_what_cannot_be_captured_runs_without_graphs_on_the_callers_stream() -> None:
    fake = FakeCuda()
    network = GraphedNetwork(lambda entry: (entry + 1,), fake)
    for _ in range(2):
        network(torch.zeros(3))
    fake.fails = True
    network(torch.zeros(2))
    with pytest.warns(UserWarning, match="no CUDA graph could be captured"):
        assert network(torch.zeros(2))[0].tolist() == [1.0, 1.0]
    assert fake.stream == "the caller's"
    captured = fake.captured
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for size in (2, 4, 4):
            assert network(torch.zeros(size))[0].tolist() == [1.0] * size
    assert fake.captured == captured
    assert network._seen[((3,),)] is not None  # what was captured before is still replayed


@pytest.mark.parametrize("search", [False, True])
def test_cudnn_searches_before_a_static_shape_is_captured(search: bool) -> None:
    fake, seen = FakeCuda(), []
    network = GraphedNetwork(lambda entry: seen.append(fake.backends.cudnn.benchmark) or (entry,), fake, search)
    for _ in range(3):
        network(torch.zeros(2))
    assert seen == ([False, True, True] if search else [False, False])
    assert fake.backends.cudnn.benchmark is False
