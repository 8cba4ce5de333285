"""The run of everything on a GPU: what can be checked of it without one."""

import importlib.util
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest

from d2zero.checkpoints.files import save_model
from d2zero.demo.run import packaged_checkpoint
from d2zero.model import D2Zero
from d2zero_bench.measure import Settings
from d2zero_bench.session import Plan, Session
from d2zero_bench.standard import _exported_at_once
from d2zero_export.onnx_export import ExportConfig
from d2zero_runtime import D2ZeroError

SCRIPT = Path(__file__).parents[2] / "benchmarks/gpu/everything.py"
SLEEPS = """
import pathlib, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
pathlib.Path(sys.argv[1]).write_text(str(child.pid))
try:
    time.sleep(60)
finally:
    pathlib.Path(sys.argv[2]).write_text("measured until then")
"""
STUBBORN = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); time.sleep(60)"


@pytest.fixture
def everything(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location("everything", SCRIPT)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "everything", module)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "GRACE_S", 1.0)
    return module


def alive(process: int) -> bool:
    """Whether a process runs; one that has ended and was not yet collected does not."""
    status = Path(f"/proc/{process}/status")
    return status.exists() and "State:\tZ" not in status.read_text()


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="looks processes up in Linux's /proc")
def test_a_step_out_of_time_writes_what_it_has_and_the_next_runs(everything: ModuleType, tmp_path: Path) -> None:
    number, written = tmp_path / "number", tmp_path / "written"
    step = everything.Step
    found = everything.run(
        {
            "long": step(("-c", SLEEPS, str(number), str(written)), 4 / 60),
            "stubborn": step(("-c", STUBBORN), 2 / 60),
            "wrong": step(("-c", "raise SystemExit(3)"), 1.0),
            "good": step(("-c", "import d2zero_bench, d2zero_runtime"), 1.0),
        },
        minutes=1.0,
    )
    assert [found[name].interrupted for name in found] == [True, True, False, False]
    assert [found["wrong"].code, found["good"].code] == [3, 0]
    assert written.read_text() == "measured until then"
    end = time.monotonic() + 10
    while alive(int(number.read_text())) and time.monotonic() < end:
        time.sleep(0.1)
    assert not alive(int(number.read_text()))
    assert "out of time" in str(found["long"]) and "exit code 3" in str(found["wrong"]) and "good" in str(found["good"])


def test_what_a_step_leaves_is_the_next_ones(everything: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    clock, limits = [0.0], []

    def ended(step: object, limit: float) -> object:
        limits.append(limit + everything.GRACE_S)
        clock[0] += 30
        return everything.Outcome(0)

    monkeypatch.setattr(everything, "_ended", ended)
    monkeypatch.setattr(everything.time, "monotonic", lambda: clock[0])
    todo = {name: everything.Step((), minutes) for name, minutes in (("a", 2), ("b", 1), ("c", 3))}
    everything.run(todo, minutes=6)
    assert limits == [120, 150, 300]  # half a minute used of two, of one and a half more
    clock[0] = 0
    everything.run(todo, minutes=2)  # too little for all: the first come first
    assert limits[3:] == [120, 60, 60]


def test_nothing_begins_without_time(everything: ModuleType) -> None:
    found = everything.run({"late": everything.Step(("-c", "raise SystemExit(3)"), 1.0)}, minutes=0.5 / 60)
    assert found["late"].code is None and "not begun" in str(found["late"])


def test_its_time_fits_a_machine_that_is_lent_for_a_quarter_of_an_hour(everything: ModuleType) -> None:
    steps = everything.steps(Path("results"))
    spent = [step.minutes for step in steps.values()]
    assert list(steps) == ["tests", "kernel", "inference", "training", "compiled", "loading"]
    assert sum(spent[:3]) <= 9.5  # a command ends after ten
    assert sum(spent[:4]) <= 11  # and the machine after fifteen, from being asked for
    for step in steps.values():
        scripts = [part for part in step.command if part.endswith(".py")]
        assert all(Path(part).is_file() for part in scripts)


def test_without_a_gpu_it_says_so_at_once(
    everything: ModuleType, tmp_path: Path, capfd: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is one")
    for wrong, python in (("torch sees no CUDA device here", sys.executable), ("No module named", "without torch")):
        if python != sys.executable:  # one that finds no packages
            (tmp_path / "python").write_text(f'#!/bin/sh\nexec {sys.executable} -I -S "$@"\n')
            (tmp_path / "python").chmod(0o755)
            monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
        assert everything.main([str(tmp_path / "results")]) == 2
        said = capfd.readouterr()
        assert said.err.startswith("error: ") and wrong in said.err and said.err.count("\n") == 1 and not said.out
        assert not (tmp_path / "results").exists()
    monkeypatch.setattr(everything, "_unfit", lambda: "")
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit, match="2"):
        everything.main([str(tmp_path / "file")])
    assert "results takes a folder" in capfd.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        everything.main([str(tmp_path), "--only", "speed"])
    assert "tests,kernel,inference,training,compiled,loading" in capfd.readouterr().err


def test_exports_at_once_keep_what_is_good(small_model: D2Zero, tmp_path: Path) -> None:
    checkpoint, good, wrong = (tmp_path / name for name in ("m.safetensors", "good.onnx", "wrong.txt"))
    save_model(small_model, checkpoint)
    config = ExportConfig(verify=False)
    found = _exported_at_once(checkpoint, {good: config, wrong: config})
    assert good.is_file() and list(found) == [wrong] and ".onnx" in found[wrong]


def test_what_cannot_be_opened_is_left_out_where_the_plan_says_so(tmp_path: Path) -> None:
    damaged = tmp_path / "damaged.onnx"
    damaged.write_bytes(b"no model")
    plan = Plan(
        (packaged_checkpoint(), damaged), sizes=((64, 64),), settings=Settings(rounds=1, warmup=0), all_must_open=False,
        left_out={"other.pt2": "no compiler"},
    )  # fmt: skip
    report = Session(plan, []).run()
    assert set(report.failures) == {"damaged.onnx", "other.pt2"} and "damaged" in report.failures["damaged.onnx"]
    assert [info.name for info in report.candidates] == [packaged_checkpoint().name] and report.complete
    with pytest.raises(D2ZeroError, match="damaged"):
        Session(Plan((damaged,), sizes=((64, 64),), all_must_open=False), []).run()
