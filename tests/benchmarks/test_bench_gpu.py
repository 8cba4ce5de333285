"""The scripts for a GPU machine (`benchmarks/gpu`): what can be checked of them without one."""

import argparse
import json
import sys
import time
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from subprocess import CompletedProcess
from types import ModuleType

import pytest

from d2zero.demo.run import packaged_checkpoint
from d2zero_bench.plan import Plan
from d2zero_bench.session import Session
from d2zero_runtime import D2ZeroError

SCRIPTS = Path(__file__).parents[2] / "benchmarks/gpu"
SLEEPS = """
import json, pathlib, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
pathlib.Path(sys.argv[1]).write_text(json.dumps({"child": child.pid}))
try:
    time.sleep(60)
finally:
    pathlib.Path(sys.argv[1]).write_text(json.dumps({"child": child.pid, "end": "measured until then"}))
"""
STUBBORN = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); time.sleep(60)"
WRITES = "import pathlib, sys; pathlib.Path(sys.argv[1]).write_text('[1]'); print('a line')"


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets the scripts be imported, which import each other by name."""
    monkeypatch.syspath_prepend(str(SCRIPTS))
    for path in SCRIPTS.glob("*.py"):
        monkeypatch.delitem(sys.modules, path.stem, raising=False)


@pytest.fixture
def stages(scripts: None, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    module = import_module("stages")
    monkeypatch.setattr(module, "GRACE_S", 1.0)
    return module


def alive(process: int) -> bool:
    """Whether a process runs; one that has ended and was not yet collected does not."""
    status = Path(f"/proc/{process}/status")
    return status.exists() and "State:\tZ" not in status.read_text()


def found(folder: Path, name: str = "call") -> dict:
    return json.loads((folder / f"{name}.json").read_text())


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="looks processes up in Linux's /proc")
def test_interrupted_and_failing_stages_keep_findings_and_do_not_stop_the_rest(
    stages: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    session = stages.Session("call", tmp_path / "results", tmp_path / "work", seconds=60)
    outcomes = session.run(
        {
            "long": stages.Stage(("-c", SLEEPS, "{json}"), 4),
            "stubborn": stages.Stage(("-c", STUBBORN), 2),
            "wrong": stages.Stage(("-c", "raise SystemExit(3)"), 25),
            "good": stages.Stage(("-c", f"import d2zero_bench, d2zero_runtime; {WRITES}", "{json}"), 25),
        }
    )
    assert [outcomes[name].interrupted for name in outcomes] == [True, True, False, False]
    assert [outcomes["wrong"].code, outcomes["good"].code] == [3, 0]
    joined = found(tmp_path / "results")
    assert joined["long"]["found"]["end"] == "measured until then" and joined["long"]["outcome"]["interrupted"]
    assert joined["good"]["found"] == [1] and "found" not in joined["wrong"]
    end = time.monotonic() + 10
    while alive(joined["long"]["found"]["child"]) and time.monotonic() < end:
        time.sleep(0.1)
    assert not alive(joined["long"]["found"]["child"])
    shown = capsys.readouterr().out
    assert all(text in shown for text in ("a line", "out of time", "wrong: 0 s, exit code 3", "== good"))
    assert "[good] a line" in (tmp_path / "results/call.log").read_text()
    assert sorted(path.name for path in (tmp_path / "results").iterdir()) == ["call.json", "call.log"]


def test_findings_are_joined_while_a_stage_runs(stages: ModuleType, tmp_path: Path) -> None:
    """Whatever ends the session, even without a signal that can be handled."""
    seen = []
    session = stages.Session("call", tmp_path, tmp_path / "work")
    join = session._join
    session._join = lambda: (join(), seen.append(found(tmp_path)))
    code = "import pathlib, sys, time; pathlib.Path(sys.argv[1]).write_text('[1]'); time.sleep(3)"
    session.run({"long": stages.Stage(("-c", code, "{json}"))})
    assert any(content.get("long", {}).get("found") == [1] and "outcome" not in content["long"] for content in seen)


def test_quiet_stages_wait_for_the_background_and_others_do_not(stages: ModuleType, tmp_path: Path) -> None:
    def stamp(seconds: float = 0.0) -> tuple[str, ...]:
        code = (
            f"import pathlib, sys, time; time.sleep({seconds}); pathlib.Path(sys.argv[1]).write_text(str(time.time()))"
        )
        return ("-c", code, "{json}")

    session = stages.Session("call", tmp_path, tmp_path / "work")
    session.run(
        {
            "exports": stages.Stage(stamp(3), background=True),
            "tests": stages.Stage(stamp()),
            "timed": stages.Stage(stamp(), quiet=True),
        }
    )
    ended = {name: entry["found"] for name, entry in found(tmp_path).items()}
    assert ended["tests"] < ended["exports"] < ended["timed"]


def test_the_background_ends_where_the_rest_needs_the_time(stages: ModuleType, tmp_path: Path) -> None:
    session = stages.Session("call", tmp_path, tmp_path / "work", seconds=20)
    outcomes = session.run(
        {
            "exports": stages.Stage(("-c", "import time; time.sleep(60)"), 3, background=True),
            "timed": stages.Stage(("-c", ""), 17, quiet=True),
        }
    )
    assert outcomes["exports"].interrupted and outcomes["exports"].seconds < 10 and outcomes["timed"].code == 0


def test_unused_time_goes_to_the_next_stage(
    stages: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, limits = [0.0], []

    class Running:
        def ended(self, limit: float, meanwhile: object) -> object:
            limits.append(limit + stages.GRACE_S)
            clock[0] += 30
            return stages.Outcome(0)

    monkeypatch.setattr(stages.Session, "_started", lambda *_: Running())
    monkeypatch.setattr(stages.time, "monotonic", lambda: clock[0])
    todo = {name: stages.Stage((), seconds) for name, seconds in (("a", 120), ("b", 60), ("c", 180))}
    stages.Session("call", tmp_path, tmp_path / "work", 360).run(todo)
    assert limits == [120, 150, 300]  # 30 s used of 120, then of 150
    clock[0] = 0
    stages.Session("call", tmp_path, tmp_path / "work", 120).run(todo)  # too little for all: the first come first
    assert limits[3:] == [120, 60, 60]


def test_nothing_begins_without_time(stages: ModuleType, tmp_path: Path) -> None:
    session = stages.Session("call", tmp_path, tmp_path / "work", seconds=0.5)
    outcomes = session.run({"late": stages.Stage(("-c", "raise SystemExit(3)"), 60)})
    assert outcomes["late"].code is None and "not begun" in str(outcomes["late"])


@pytest.mark.parametrize("name", ["first", "second"])
@pytest.mark.parametrize("rehearsal", [False, True])
def test_plans_name_scripts_and_exports_that_exist(scripts: None, name: str, rehearsal: bool, tmp_path: Path) -> None:
    plan = import_module(name).plan(argparse.Namespace(work=tmp_path, rehearsal=rehearsal))
    made = import_module("exports").NAME
    for stage in plan.values():
        words = [word for word in stage.command if word.endswith(".py")]
        assert all(Path(word).is_file() for word in words) and "{json}" in stage.command
        files = [word for word in stage.command if word.endswith((".pt2", ".onnx"))]
        assert all(made.fullmatch(word) and word in plan["exports"].command for word in files)


@pytest.mark.slow
def test_without_a_gpu_it_says_so_in_one_line(
    scripts: None, tmp_path: Path, capfd: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is one")
    call, first = import_module("call"), import_module("first")

    def run(*arguments: str) -> int:
        places = ("--work", str(tmp_path / "work"), "--results", str(tmp_path / "results"))
        return call.run("first", "about", first.plan, 1.0, [*places, *arguments])

    for wrong, python in (("torch sees no CUDA device here", sys.executable), ("No module named", "without torch")):
        if python != sys.executable:  # one that finds no packages
            (tmp_path / "python").write_text(f'#!/bin/sh\nexec {sys.executable} -I -S "$@"\n')
            (tmp_path / "python").chmod(0o755)
            monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
        assert run() == 2
        said = capfd.readouterr()
        assert said.err.startswith("error: ") and wrong in said.err and said.err.count("\n") == 1 and not said.out
        assert not (tmp_path / "results").exists()
    with pytest.raises(SystemExit, match="2"):
        run("--only", "speed")
    assert "machine,exports,tests,ours,kernels" in capfd.readouterr().err
    (tmp_path / "results").touch()
    with pytest.raises(SystemExit, match="2"):
        run("--rehearsal")
    assert "--results and --work take folders" in capfd.readouterr().err


def test_a_package_that_the_machine_lacks_is_named(stages: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    assert all(find_spec(name) for name in stages.NEEDED)
    missing = CompletedProcess([], 1, "", "Traceback\n  …\nModuleNotFoundError: No module named 'msgspec'\n")
    monkeypatch.setattr(stages.subprocess, "run", lambda *_, **__: missing)
    version = f"{sys.version_info[0]}.{sys.version_info[1]}"
    assert stages.unusable() == (
        "ModuleNotFoundError: No module named 'msgspec'; carry that package in"
        f" .carried/python{version} (benchmarks/gpu/README.md)"
    )


@pytest.mark.slow
@pytest.mark.long
def test_exports_keep_what_is_good(scripts: None, tmp_path: Path) -> None:
    exports = import_module("exports")
    notes: dict[str, dict] = {}
    exports.export_all(["float32.onnx", "wrong.txt"], tmp_path, True, notes.__setitem__)
    assert (tmp_path / "float32.onnx").is_file() and notes["float32.onnx"]["megabytes"] > 0
    assert "wrong.txt" in notes["wrong.txt"]["error"]


def test_the_summary_tells_targets_from_findings(scripts: None, tmp_path: Path) -> None:
    summary = import_module("summary")
    assert summary.text(tmp_path).count("–") == len(summary.FIGURES)
    sample = {"decode": 10.0, "preprocess": 1.0, "inference": 3.0, "postprocess": 1.0, "network": 2.0}
    report = {"results": [{"candidate": "float16.pt2", "samples": [sample, sample]}]}
    peers = {"results": [*report["results"], {"candidate": "mask2former", "samples": [{"network": 9.0}] * 2}]}
    tests = {"passed": 3, "failed": {}}
    content = {"ours": {"found": report}, "tests": {"found": tests}, "kernels": {"outcome": {"code": 1}}}
    (tmp_path / "first.json").write_text(json.dumps(content))
    (tmp_path / "second.json").write_text(json.dumps({"peers": {"found": peers}}))
    lines = {line[:42].strip(): line[42:].split() for line in summary.text(tmp_path).splitlines()}
    assert lines["tests that failed"][-1] == "yes"
    assert lines["array → packed detections, float16"] == ["≤", "6", "ms", "5", "ms", "yes"]
    assert lines["JPEG → packed detections, float16"][-3:] == ["15", "ms", "yes"]
    assert lines["network against eager float32 peer"] == ["≥", "5×", "4.5×", "no"]


def test_kernels_are_grouped_by_what_they_do(scripts: None) -> None:
    group_of = import_module("top_kernels").group_of
    kernels = {
        "split_kernel": "masked attention",
        "forward_kernel": "deformable attention",
        "mask_kernel": "masks",
        "sm90_xmma_fprop_implicit_gemm_f16f16_nhwc": "convolution",
        "nvjet_hsh_128x128_64x6_2x1_v_bz_TNT": "matmul",
        "flash_fwd_kernel": "attention",
        "triton_poi_fused_add_relu_3": "elementwise",
        "Memcpy DtoD (Device -> Device)": "copies",
        "nchwToNhwcKernel": "copies",
        "something else": "other",
    }
    assert {kernel: group_of(kernel) for kernel in kernels} == kernels


@pytest.mark.slow
def test_what_cannot_be_opened_is_left_out_where_the_plan_says_so(tmp_path: Path) -> None:
    damaged = tmp_path / "damaged.onnx"
    damaged.write_bytes(b"no model")
    plan = Plan(
        (packaged_checkpoint(), damaged), sizes=((64, 64),), rounds=1, warmup=0, all_must_open=False,
        left_out={"other.pt2": "no compiler"},
    )  # fmt: skip
    report = Session(plan, []).run()
    assert set(report.failures) == {"damaged.onnx", "other.pt2"} and "damaged" in report.failures["damaged.onnx"]
    assert [info.name for info in report.candidates] == [packaged_checkpoint().name] and report.complete
    with pytest.raises(D2ZeroError, match="damaged"):
        Session(Plan((damaged,), sizes=((64, 64),), all_must_open=False), []).run()
