"""Evaluation by several processes: metrics equal to one process's to the last digit, whatever was killed before."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from commands import Command

from d2zero.checkpoints.files import save_model
from d2zero.cli import models
from d2zero.data.coco import read_coco
from d2zero.data.coco_values import Id
from d2zero.evaluation.processes import run_jobs
from d2zero.evaluation.run import EvaluationRun
from d2zero.model import D2Zero
from d2zero_runtime import D2ZeroError, Mode

pytest.importorskip("pycocotools")
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone"]


def evaluation(model: D2Zero, data: Path, output: Path, images: Path | None = None, **options: Any) -> EvaluationRun:
    truth = read_coco(data / "annotations/instances_val_gzsi_shapes.json")
    return EvaluationRun(model.segmenter(), truth, images or data / "val", output, list(Mode), **options)


def evaluate_in_shards(run: EvaluationRun, count: int, leave_out: int | None = None) -> None:
    """What `count` processes do, one after the other; one of them may be killed before it does anything."""
    batches = run.plan()
    for shard in range(count):
        if shard != leave_out:
            run.evaluate(batches[shard::count], shard)


def whole_lines(path: Path) -> list[dict[str, Any]]:
    """Those of a file whose last one may be cut: no process has appended to it since."""
    return [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]


@pytest.mark.parametrize("batch_size", [1, 5])
def test_shards_have_the_metrics_of_one_process(
    batch_size: int, small_model: D2Zero, shapes_data: Path, tmp_path: Path
) -> None:
    whole = evaluation(small_model, shapes_data, tmp_path / "one", limit=12, batch_size=batch_size)
    expected = whole.run()
    run = evaluation(small_model, shapes_data, tmp_path / "three", limit=12, batch_size=batch_size)
    evaluate_in_shards(run, 3)
    assert run.summaries() == expected
    assert len(list(run.folder.iterdir())) == 3 * len(Mode)
    some = run.image_ids[::-3]
    left, right = (one.detections(Mode.ZSIS, some) for one in (run, whole))
    assert list(left) == list(right) == some
    assert all(left[number].scores.tolist() == right[number].scores.tolist() for number in some)


@pytest.mark.parametrize("counts", [(3, 1), (1, 3), (2, 4, 3)])
def test_another_number_of_processes_continues(
    counts: tuple[int, ...], small_model: D2Zero, shapes_data: Path, tmp_path: Path
) -> None:
    """Each time, one process was killed before its share, and another in the middle of a line."""
    expected = evaluation(small_model, shapes_data, tmp_path / "whole", limit=12).run()
    for count in counts[:-1]:
        begun = evaluation(small_model, shapes_data, tmp_path / "o", limit=6 if count == 1 else 12)
        evaluate_in_shards(begun, count, leave_out=count - 1 if count > 1 else None)
        for file in begun.folder.glob("*.jsonl"):
            file.write_bytes(file.read_bytes()[:-10])
    run = evaluation(small_model, shapes_data, tmp_path / "o", limit=12)
    evaluate_in_shards(run, counts[-1])
    assert 0 < run.kept < 12
    assert run.summaries() == expected
    for mode in Mode:
        found = [
            line["image_id"] for file in run.folder.glob(f"detections_{mode}.*jsonl") for line in whole_lines(file)
        ]
        assert sorted(found) == sorted(run.image_ids)


def test_unreadable_images_count_once(small_model: D2Zero, shapes_data: Path, tmp_path: Path) -> None:
    images = shutil.copytree(shapes_data / "val", tmp_path / "val")
    truth = read_coco(shapes_data / "annotations/instances_val_gzsi_shapes.json")
    broken = [images / entry["file_name"] for entry in list(truth.images.values())[:2]]
    contents = [path.read_bytes() for path in broken]
    for path in broken:
        path.write_bytes(b"")
    for count in (1, 2, 3):
        run = evaluation(small_model, shapes_data, tmp_path / "o", images, limit=6)
        evaluate_in_shards(run, count)
        assert len(run.summaries()[Mode.GZSIS]["unreadable"]) == 2 and run.kept == (4 if count > 1 else 0)
        assert len(run.detections(Mode.GZSIS, run.image_ids)) == 4
    for path, content in zip(broken, contents, strict=True):
        path.write_bytes(content)
    run = evaluation(small_model, shapes_data, tmp_path / "o", images, limit=6)
    evaluate_in_shards(run, 2)
    assert run.summaries() == evaluation(small_model, shapes_data, tmp_path / "fresh", images, limit=6).run()
    assert list(run.detections(Mode.GZSIS, run.image_ids)) == run.image_ids


def test_images_that_no_process_evaluated_are_missed(small_model: D2Zero, shapes_data: Path, tmp_path: Path) -> None:
    run = evaluation(small_model, shapes_data, tmp_path, limit=6)
    evaluate_in_shards(run, 3, leave_out=1)
    with pytest.raises(D2ZeroError, match="2 of 6 images have no detections"):
        run.summaries()


@pytest.mark.skipif(sys.platform == "win32", reason="files are not locked there")
def test_two_evaluations_do_not_write_the_same_file(
    small_model: D2Zero, shapes_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("d2zero_runtime.files.PATIENCE", 0.2)
    runs = [evaluation(small_model, shapes_data, tmp_path, limit=2) for _ in range(2)]

    def meanwhile(items: Iterator[list[Id]], _length: int, _label: str) -> Iterator[list[Id]]:
        for batch in items:
            yield batch
            with pytest.raises(D2ZeroError, match=r"another evaluation is writing .*detections_gzsis\.jsonl"):
                runs[1].evaluate(runs[1].plan() or [batch])
            runs[1].evaluate([batch], shard=1)

    assert runs[0].run(meanwhile) == runs[1].summaries()


@pytest.mark.parametrize(
    ("environment", "flags", "message"),
    [
        (
            {},
            ("--detections", "d.json", "--annotations", "a.json", "--jobs", 2),
            "--detections are evaluated as they are",
        ),
        ({"WORLD_SIZE": "2"}, ("--detections", "d.json"), "start the command without torchrun"),
        ({"WORLD_SIZE": "2"}, ("m.onnx", "--jobs", 2), "--jobs starts processes itself"),
        ({}, ("m.onnx", "--jobs", 0), "--jobs"),
    ],
)
def test_flags_that_do_not_go_together(
    environment: dict[str, str],
    flags: tuple[object, ...],
    message: str,
    command: Command,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    outcome = command("eval", *flags)
    assert outcome.code == 2 and message in outcome.err and outcome.err.count("\n") == 1


@pytest.mark.parametrize(
    ("file", "device", "expected"),
    [
        ("m.onnx", "auto", ([("cuda", {"device_id": 3}), "cpu"], None)),
        ("m.engine", "auto", (["cuda", "cpu"], None, 3)),
        ("m.pt2", "cuda", (["cuda", "cpu"], None, 3)),
        ("m.pt2", "cuda:1", (["cuda", "cpu"], None, 1)),
    ],
)
def test_each_process_of_torchrun_takes_a_gpu(
    file: str, device: str, expected: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[tuple[Any, ...]] = []
    monkeypatch.setattr(models, "load", lambda path, *options: opened.append(options))
    models.open_segmenter(Path(file), ["cuda", "cpu"], device, local_rank=3)
    assert opened == [expected]


@pytest.mark.parametrize(
    ("open_model", "message"),
    [
        (partial(os._exit, 7), r"worker 1 of 1 \(process \d+\) ended with code 7; what was evaluated is kept"),
        (
            partial(signal.raise_signal, signal.SIGTERM),
            r"worker 1 of 1 .* was killed by signal 15; was there too little",
        ),
        (partial(models.open_segmenter, Path("none.onnx")), r"none\.onnx"),
    ],
)
def test_a_worker_that_dies_is_named(
    open_model: Callable[[], Any], message: str, small_model: D2Zero, shapes_data: Path, tmp_path: Path
) -> None:
    with pytest.raises(D2ZeroError, match=message):
        run_jobs(evaluation(small_model, shapes_data, tmp_path, limit=1), open_model, 2)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import torch

    from d2zero.data.shapes import vocabulary
    from d2zero.model import build
    from d2zero.training.config import shapes

    torch.manual_seed(0)
    return save_model(build(shapes().model, vocabulary()).eval(), tmp_path_factory.mktemp("model") / "m.safetensors")


def arguments(model: Path, data: Path, output: Path, *more: str) -> list[str]:
    """A command line; of an exported model, without a device."""
    device = ["--device", "cpu"] if model.suffix == ".safetensors" else []
    return [
        "-m", "d2zero", "eval", str(model), "--data", str(data), "--mode", "gzsis,zsis", "--threads", "1", *device,
        "--output", str(output / "o"), "--json", str(output / "o.json"), *more,
    ]  # fmt: skip


def evaluated(launcher: list[str], arguments: list[str]) -> subprocess.CompletedProcess[str]:
    found = subprocess.run([*launcher, *arguments], capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    assert found.stdout.count("gzsis: ") == 1
    return found


@pytest.fixture(scope="module")
def expected(checkpoint: Path, shapes_data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, bytes]:
    """The metrics and the pictures of one process."""
    output = tmp_path_factory.mktemp("one")
    evaluated([sys.executable], arguments(checkpoint, shapes_data, output, "--pictures", str(output / "sheet.png")))
    return (output / "o.json").read_text(), (output / "sheet.png").read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "jobs"),
    [
        ([sys.executable], ("--jobs", "2")),
        pytest.param([*TORCHRUN, "--nproc-per-node=2"], (), marks=pytest.mark.long),
    ],
    ids=["jobs", "torchrun"],
)
def test_two_processes_equal_one(
    launcher: list[str],
    jobs: tuple[str, ...],
    checkpoint: Path,
    expected: tuple[str, bytes],
    shapes_data: Path,
    tmp_path: Path,
) -> None:
    pictures = ("--pictures", str(tmp_path / "sheet.png"))
    evaluated(launcher, arguments(checkpoint, shapes_data, tmp_path, *pictures, *jobs))
    assert ((tmp_path / "o.json").read_text(), (tmp_path / "sheet.png").read_bytes()) == expected
    assert len(list(tmp_path.glob("o/*/detections_gzsis.*jsonl"))) == 2


@pytest.mark.slow
def test_jobs_equal_one_process_of_an_exported_model(exported: Path, shapes_data: Path, tmp_path: Path) -> None:
    for jobs in ("1", "3"):
        evaluated([sys.executable], arguments(exported, shapes_data, tmp_path / jobs, "--jobs", jobs))
    assert (tmp_path / "1/o.json").read_text() == (tmp_path / "3/o.json").read_text()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "more", "kill", "again"),
    [
        pytest.param([sys.executable], ("--jobs", "2"), signal.SIGKILL, ([sys.executable], ()), marks=pytest.mark.long),
        pytest.param(
            [sys.executable],
            ("--jobs", "2"),
            signal.SIGINT,
            ([*TORCHRUN, "--nproc-per-node=3"], ()),
            marks=pytest.mark.long,
        ),
        pytest.param(
            [*TORCHRUN, "--nproc-per-node=2"],
            (),
            signal.SIGKILL,
            ([sys.executable], ("--jobs", "3")),
            marks=pytest.mark.long,
        ),
    ],
    ids=["jobs, then one", "jobs interrupted, then torchrun", "torchrun, then jobs"],
)
def test_killed_and_continued(
    launcher: list[str],
    more: tuple[str, ...],
    kill: signal.Signals,
    again: tuple[list[str], tuple[str, ...]],
    checkpoint: Path,
    expected: tuple[str, bytes],
    shapes_data: Path,
    tmp_path: Path,
) -> None:
    """Workers end with a command that is killed, those of torchrun do not; Ctrl-C reaches all."""
    psutil = pytest.importorskip("psutil")
    command = [*launcher, *arguments(checkpoint, shapes_data, tmp_path / "killed", *more)]
    process = subprocess.Popen(command, start_new_session=True, stderr=subprocess.PIPE, text=True)
    while process.poll() is None and len(finished(tmp_path / "killed")) < 5:
        time.sleep(0.01)
    assert process.poll() is None, "it ended before it could be killed"
    if kill is signal.SIGINT:
        os.killpg(process.pid, kill)
    else:
        children = [] if more else psutil.Process(process.pid).children(recursive=True)
        for running in (process, *children):
            running.kill()
    _, told = process.communicate()
    if kill is signal.SIGINT:
        assert process.returncode == 130 and told.endswith("interrupted\n") and "Traceback" not in told
    before = finished(tmp_path / "killed")
    assert len(before) < 24
    result = evaluated(again[0], arguments(checkpoint, shapes_data, tmp_path / "killed", *again[1]))
    kept = int(result.stderr.split(" of 24 images were evaluated before")[0].split()[-1])
    assert len(before) - 2 <= kept < 24
    assert (tmp_path / "killed/o.json").read_text() == expected[0]
    assert len(finished(tmp_path / "killed")) == 24


def finished(output: Path) -> list[Id]:
    """Images that have a whole line in the last mode's files."""
    found = [whole_lines(path) for path in output.glob("o/*/detections_zsis.*jsonl")]
    return [line["image_id"] for shard in found for line in shard]


@pytest.mark.slow
@pytest.mark.long
def test_a_killed_worker_ends_the_command(checkpoint: Path, shapes_data: Path, tmp_path: Path) -> None:
    psutil = pytest.importorskip("psutil")
    command = [sys.executable, *arguments(checkpoint, shapes_data, tmp_path, "--jobs", "2")]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    while process.poll() is None and len(finished(tmp_path)) < 4:
        time.sleep(0.01)
    workers = [child for child in psutil.Process(process.pid).children() if "spawn_main" in " ".join(child.cmdline())]
    assert len(workers) == 2
    workers[-1].kill()
    _, told = process.communicate()
    assert (
        process.returncode == 2 and f"error: worker 2 of 2 (process {workers[-1].pid}) was killed by signal 9" in told
    )
    assert not any(worker.is_running() for worker in workers)
    evaluated([sys.executable], arguments(checkpoint, shapes_data, tmp_path, "--jobs", "2"))
    assert sorted(finished(tmp_path)) == sorted(set(finished(tmp_path))) and len(finished(tmp_path)) == 24
