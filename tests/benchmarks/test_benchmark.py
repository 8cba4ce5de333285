"""`d2zero benchmark` on the demo's model: variants, peers, processes, flags, limits."""

import json
import mmap
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commands import Command

from d2zero.demo.run import packaged_checkpoint
from d2zero_bench.candidates import Candidate, Spec, open_segmenter
from d2zero_bench.cases import Case, Photos
from d2zero_bench.memory import gpu_peak_mb, host_peak_mb, reset_host_peak
from d2zero_bench.peers import Peer
from d2zero_bench.report import NETWORK, STAGES, Report
from d2zero_bench.worker import Worker, prepare, read_memory, run
from d2zero_runtime import D2ZeroError, read_image
from d2zero_runtime.images import PADDING_LOGIT
from d2zero_runtime.masks.postprocess import ModeName

CASE = Case(64, 96)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Photos:
    return Photos.of(tmp_path_factory.mktemp("photos"), None, [CASE])


@pytest.mark.parametrize("mode", ["gzsis", "zsis", "gzsis-copy-paste"])
def test_the_published_variant_is_equal_to_the_model(mode: ModeName, shapes_data: Path) -> None:
    ours, theirs = (
        open_segmenter(Spec(name, packaged_checkpoint(), name, device="cpu")) for name in ("model", "published")
    )
    images = [read_image(path) for path in sorted((shapes_data / "val").iterdir())[:3]]
    raw, published = ours.predict_raw(images), theirs.predict_raw(images)
    for left, right in ((raw.class_logits, published.class_logits), (raw.mask_logits, published.mask_logits)):
        np.testing.assert_allclose(right[right > PADDING_LOGIT], left[right > PADDING_LOGIT], atol=1e-4)
    sizes, outputs = [image.shape[:2] for image in images], [(150, 201)] * 3
    for expected, found in zip(
        ours.postprocess(raw, sizes, outputs, mode), theirs.postprocess(raw, sizes, outputs, mode), strict=True
    ):
        assert len(found) == len(expected) > 10
        np.testing.assert_allclose(found.scores, expected.scores, atol=2e-5)
        assert (found.class_ids == expected.class_ids).mean() > 0.97  # equal scores may change places
        same = (found.class_ids == expected.class_ids) & (found.boxes == expected.boxes).all(1)
        assert same.mean() > 0.95
        areas = [detections.bitmaps().sum((1, 2)) for detections in (expected, found)]
        assert np.abs(areas[0] - areas[1])[same].max() <= 2


def test_the_published_variant_does_the_published_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """All heads are classified, and every top instance's mask is dense: not the model under another name."""
    segmenter = open_segmenter(Spec("m", packaged_checkpoint(), "published", device="cpu"))
    model = segmenter.backend.model  # type: ignore[attr-defined]
    calls: list[int] = []
    model.classifier.register_forward_hook(lambda *_: calls.append(1))
    shapes: list[tuple[int, ...]] = []
    real = torch.nn.functional.interpolate
    out = segmenter.predict_raw([np.zeros((64, 96, 3), np.uint8)])
    assert len(calls) == model.config.decoder_layers + 1

    def noted(source: torch.Tensor, size: tuple[int, int], **options: Any) -> torch.Tensor:
        shapes.append((source.shape[1], *size))
        return real(source, size, **options)

    monkeypatch.setattr("d2zero_bench.published.F.interpolate", noted)
    segmenter.postprocess(out, [(64, 96)], [(128, 192)])
    assert shapes == [(100, 64, 96), (100, 128, 192)]


@pytest.mark.parametrize("kind", ["model", "published", "onnx"])
def test_a_candidate_has_all_stages(kind: str, exported: Path, photos: Photos) -> None:
    path = exported if kind == "onnx" else packaged_checkpoint()
    candidate = Candidate(Spec(kind, path, "model" if kind == "onnx" else kind, threads=1, device="auto"))
    for case in (Case(64, 96, 2), Case(64, 96, 1, 50)):
        candidate.prepare(case)
        started = time.perf_counter()
        sample, logits = candidate.run(case, photos.batch(case, 0))
        elapsed = 1000 * (time.perf_counter() - started)
        assert tuple(sample) == (*STAGES, NETWORK) and all(value > 0 for value in sample.values())
        assert 0 < sum(sample[stage] for stage in STAGES) <= elapsed
        assert sample[NETWORK] == sample["inference"]  # nothing is copied on a CPU, so it is not run again
        assert logits is None
        logits = candidate.run(case, photos.batch(case, 0), with_logits=True).logits
        assert logits is not None and logits[0].shape == (case.batch, 15, (case.classes or 36) + 1)
        assert logits[1].shape == (case.batch, 15, 16, 24)


def test_threads_reach_post_processing(exported: Path, photos: Photos, monkeypatch: pytest.MonkeyPatch) -> None:
    from concurrent.futures import ThreadPoolExecutor

    used: list[int] = []
    monkeypatch.setattr(
        "d2zero_runtime.masks.queries.ThreadPoolExecutor", lambda count: used.append(count) or ThreadPoolExecutor(1)
    )
    for threads in (1, 3):
        candidate = Candidate(Spec("m.onnx", exported, threads=threads))
        candidate.prepare(CASE)
        candidate.run(CASE, photos.batch(CASE, 0))
    assert used == [1, 3]


def test_on_a_gpu_the_network_is_timed_again_with_resident_inputs(
    exported: Path, photos: Photos, monkeypatch: pytest.MonkeyPatch
) -> None:
    candidate = Candidate(Spec("m.onnx", exported))
    backend, calls = candidate.segmenter.backend, list[str]()
    real = backend.resident

    def resident(images: np.ndarray, embeddings: np.ndarray | None) -> Callable[[], None]:
        run_once = real(images, embeddings)
        calls.append("moved")
        return lambda: (calls.append("run"), run_once())[1]

    monkeypatch.setattr(backend, "on_gpu", True)
    monkeypatch.setattr(backend, "resident", resident)
    candidate.prepare(CASE)
    sample = candidate.run(CASE, photos.batch(CASE, 0)).sample
    assert calls == ["moved", "run", "run"]  # the first is not timed
    assert 0 < sample[NETWORK] != sample["inference"]


def test_an_exported_model_of_one_batch_says_so(exported: Path) -> None:
    candidate = Candidate(Spec("m.onnx", exported))
    object.__setattr__(candidate.segmenter.contract, "batch", 4)
    with pytest.raises(D2ZeroError, match="measure it with --batch 4"):
        candidate.prepare(CASE)


def test_a_peer_runs_its_network() -> None:
    pytest.importorskip("transformers")
    from transformers import ResNetConfig

    stages: dict[str, Any] = {"out_features": ["stage1", "stage2", "stage3", "stage4"]}
    backbone = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 1, 1], **stages)
    small = dict.fromkeys(("feature_size", "mask_feature_size", "hidden_dim"), 32)
    peer = Peer(
        Spec("mask2former", peer="mask2former", queries=7, classes=5, device="cpu"),
        backbone_config=backbone,
        encoder_layers=1,
        decoder_layers=2,
        num_attention_heads=4,
        **small,
    )
    shapes = []
    assert isinstance(peer.network, torch.nn.Module)
    peer.network.register_forward_hook(
        lambda module, inputs, out: shapes.append((out.class_queries_logits.shape, out.masks_queries_logits.shape))
    )
    peer.prepare(Case(60, 96, 2))
    found = peer.run(CASE, [], with_logits=True)
    assert list(found.sample) == ["network"] and found.logits is None
    assert shapes == [((2, 7, 6), (2, 7, 16, 24))]
    assert peer.info.kind == "peer" and "random" not in peer.info.name


def test_gpu_memory_is_this_processs_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    listed = tmp_path / "nvidia-smi"
    listed.write_text(f"#!/bin/sh\nprintf '{os.getpid()}, 1000\\n1, 7000\\n{os.getpid()}, 24\\n2, [N/A]\\n'\n")
    listed.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert gpu_peak_mb() == pytest.approx(1024 * 2**20 / 1e6)
    listed.write_text("#!/bin/sh\necho '1, 7000'\n")
    assert gpu_peak_mb() is None


def test_the_memory_mark_follows_what_is_allocated() -> None:
    reset_host_peak()
    before = host_peak_mb()
    with mmap.mmap(-1, 60_000_000) as block:  # the system's own: an allocator may reuse and keep what was freed
        np.frombuffer(block, np.uint8)[:] = 1
        after = host_peak_mb()
    assert before is not None and after is not None and 40 < after - before < 120
    reset_host_peak()
    now = host_peak_mb()
    assert now is not None and (sys.platform != "linux" or now < after - 40)


@pytest.mark.slow
def test_a_worker_answers_refuses_and_ends(photos: Photos) -> None:
    with pytest.raises(D2ZeroError, match=r"checkpoint absent\.safetensors does not exist"):
        Worker(Spec("absent", Path("absent.safetensors"))).open()
    worker, paths = Worker(Spec("m", packaged_checkpoint(), threads=1)).open(), photos.batch(CASE, 0)
    try:
        worker.ask(prepare, CASE)
        assert set(worker.ask(run, CASE, paths).sample) == {*STAGES, NETWORK}
        with pytest.raises(D2ZeroError, match=r"nowhere\.jpg does not exist"):
            worker.ask(run, CASE, [Path("nowhere.jpg")])
        assert set(worker.ask(run, CASE, paths).sample) == {*STAGES, NETWORK}  # goes on after an error
        assert 50 < (worker.ask(read_memory).host_mb or 0) < 5000
        worker.process.kill()
        with pytest.raises(D2ZeroError, match="its process"):
            worker.ask(run, CASE, paths)
    finally:
        worker.close()


@pytest.mark.slow
def test_the_command_measures_compares_and_holds_to_limits(
    exported: Path, shapes_data: Path, tmp_path: Path, command: Command
) -> None:
    arguments = (
        "benchmark", exported, packaged_checkpoint(), "--size", "64x96", "--rounds", "2", "--warmup", "1",
        "--threads", "1", "--limit", "6", "--baseline", "shapes.safetensors",
        "--images", shapes_data / "val", "--annotations", shapes_data / "annotations/instances_val_gzsi_shapes.json",
        "--json", tmp_path / "r.json", "--html", tmp_path / "r.html",
    )  # fmt: skip
    outcome = command(*arguments, "--max-p90", "demo.onnx=0.001", "--min-hm", "99.5")
    assert outcome.code == 1, outcome.err
    assert "FAILED: demo.onnx: p90 of file → detections" in outcome.err and "(limit 0.001 ms)" in outcome.err
    assert "FAILED: demo.onnx: HM AP50" in outcome.err and "(limit 99.5)" in outcome.err
    assert "64×96, batch 1" in outcome.out and "unseen R@100" in outcome.out
    report = Report.read(tmp_path / "r.json")
    assert report.complete and report.baseline == "shapes.safetensors"
    assert [info.name for info in report.candidates] == ["demo.onnx", "shapes.safetensors"]
    assert all(len(result.samples) == 2 and result.host_mb for result in report.results)
    (equal,) = report.equality
    assert equal.candidate == "demo.onnx" and equal.failures == () and 0 < (equal.class_logits or 0) < 1e-3
    hm = [entry.figures["hm_ap50"] for entry in report.accuracy]
    assert hm[0] == pytest.approx(hm[1], abs=0.1) and report.accuracy[0].images == 6
    assert "Latency against accuracy" in (tmp_path / "r.html").read_text()
    for text in ((tmp_path / "r.json").read_text(), (tmp_path / "r.html").read_text()):
        assert str(tmp_path) not in text and str(shapes_data) not in text


WRONG = [
    (["absent.onnx"], "no such file: absent.onnx"),
    (["{model}", "--size", "800"], "--size must be HEIGHTxWIDTH"),
    (["{model}", "--batch", "1,0"], "--batch must be whole numbers"),
    (["{model}", "--classes", "x"], "--classes must be whole numbers"),
    (["{model}", "--variant", "slow"], "--variant must be among model, published"),
    (["{onnx}", "--variant", "published"], "--variant is for checkpoints"),
    (["{model}", "--providers", "cpu"], "--providers is for exported models"),
    (["{model}", "--baseline", "other"], "--baseline must be one of shapes.safetensors"),
    (["{model}", "{model}"], "two candidates are called"),
    (["{model}", "--peers", "yolo"], "--peers must be all, or some of mask2former"),
    (["{model}", "--min-hm", "5"], "--min-hm needs accuracy"),
    (["{model}", "--annotations", "{model}"], "give --images"),
    (["{model}", "--max-p90", "fast"], "--max-p90 must be a number"),
    (["{model}", "--max-p90", "z=1"], "a limit is for 'z'"),
    (["{model}", "--images", "nowhere"], "nowhere does not exist"),
    (["{model}", "--masks", "round"], "--masks must be one of rle, bitmap, packed, none"),
    (["{text}"], "is not a .safetensors checkpoint"),
]


@pytest.mark.parametrize(("arguments", "message"), WRONG, ids=[message for _, message in WRONG])
def test_wrong_flags_give_one_clear_line(
    arguments: list[str], message: str, exported: Path, tmp_path: Path, command: Command
) -> None:
    (tmp_path / "text.pth").write_text("x")
    places = {"model": packaged_checkpoint(), "onnx": exported, "text": tmp_path / "text.pth"}
    outcome = command("benchmark", *(argument.format(**places) for argument in arguments), "--rounds", "1")
    assert outcome.code == 2 and message in outcome.err and outcome.err.count("\n") == 1, outcome.err


def test_a_missing_transformers_is_named(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    from importlib import metadata

    def absent(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", absent)
    outcome = command("benchmark", packaged_checkpoint(), "--peers", "mask2former")
    assert outcome.code == 2 and "pip install 'd2zero[bench]'" in outcome.err


@pytest.mark.parametrize(("flag", "packages"), [("--html", "jinja2 and matplotlib"), ("--annotations", "pycocotools")])
def test_missing_packages_are_named_before_any_work(
    flag: str, packages: str, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("d2zero_bench.cli.find_spec", lambda name: None)
    outcome = command("benchmark", packaged_checkpoint(), flag, packaged_checkpoint())
    assert outcome.code == 2 and outcome.out == ""
    assert outcome.err == f"error: {flag} needs {packages}; run: pip install 'd2zero[bench]'\n"


SAYING_ROUNDS = """
import sys
from d2zero.cli.main import main
from d2zero_bench import session

def tracked(items, length, label):
    for item in items:
        print("round", item, flush=True)
        yield item

session.tracked = tracked
main(sys.argv[1:])
"""


@pytest.mark.skipif(os.name != "posix", reason="sends a signal")
def test_ctrl_c_writes_what_was_measured(tmp_path: Path) -> None:
    arguments = ["benchmark", packaged_checkpoint(), "--size", "64x64", "--rounds", "100000", "--threads", "1"]
    running = subprocess.Popen(
        [sys.executable, "-c", SAYING_ROUNDS, *map(str, arguments), "--json", str(tmp_path / "r.json")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert running.stdout is not None
    for line in running.stdout:
        if line == "round 5\n":
            break
    os.killpg(running.pid, signal.SIGINT)  # as a terminal does: parent and children
    out, err = running.communicate(timeout=60)
    assert running.returncode == 130, out + err
    report = Report.read(tmp_path / "r.json")
    assert not report.complete and 5 <= len(report.results[0].samples) < 100_000
    assert "stopped before the end" in err and json.loads((tmp_path / "r.json").read_text())["complete"] is False


def test_an_exported_model_is_measured_without_torch(exported: Path, photos: Photos) -> None:
    """Its memory would be torch's otherwise."""
    code = """
import sys
from pathlib import Path
from d2zero_bench.candidates import Candidate, Spec
from d2zero_bench.cases import Case
from d2zero_bench.worker import prepare, read_memory, run
candidate = Candidate(Spec("m", Path(sys.argv[1]), threads=1))
prepare(candidate, Case(64, 96))
run(candidate, Case(64, 96), [Path(sys.argv[2])])
print("torch" in sys.modules, round(read_memory(candidate).host_mb))
"""
    image = photos.batch(CASE, 0)[0]
    found = subprocess.run([sys.executable, "-c", code, exported, image], capture_output=True, text=True, check=True)
    with_torch, megabytes = found.stdout.split()
    assert with_torch == "False" and 40 < int(megabytes) < 400


def test_the_command_itself_is_light() -> None:
    heavy = ["torch", "transformers", "onnxruntime", "psutil", "matplotlib", "jinja2"]
    modules = "import d2zero_bench.cli, d2zero_bench.session, d2zero_bench.tables, studies.standard, studies.growth"
    code = f"{modules}; import sys; print([name for name in {heavy} if name in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
