"""Check and measure all that needs a GPU, what matters most first, within so many minutes.

    python benchmarks/gpu/everything.py benchmarks/results
    python benchmarks/gpu/everything.py results --minutes 13               # of a machine that is lent
    python benchmarks/gpu/everything.py results --minutes 9.5 --only tests,kernel,inference

Each step is a process. One that fails, or is out of time, does not keep the others from running; those that measure
write what they have when they are interrupted. Nothing is installed: run it with a Python that has torch for CUDA.
"""

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
ROOMS = (".", "runtime", "export", "benchmarks")
GRACE_S = 20.0  # to write what was measured, after an interruption


@dataclass(frozen=True)
class Step:
    """A command and its share of the time.

    Args:
        command: what follows `python`.
        minutes: its share, where time is limited; what earlier steps leave of theirs comes on top.
    """

    command: tuple[str, ...]
    minutes: float


@dataclass(frozen=True)
class Outcome:
    """How a step ended: its exit code, None where no time was left for it."""

    code: int | None
    seconds: float = 0.0
    interrupted: bool = False

    def __str__(self) -> str:
        if self.code is None:
            return "not begun, no time was left"
        how = "good" if self.code == 0 else f"exit code {self.code}"
        return f"{self.seconds:.0f} s, {'out of time' if self.interrupted else how}"


def steps(results: Path) -> dict[str, Step]:
    """By name, what matters most first."""

    def training(file: str, minutes: float, *options: str) -> Step:
        command = ("-m", "d2zero_bench.training", "--device", "cuda", *options)
        return Step((*command, "--json", str(results / "training" / file)), minutes)

    eager = "published,model,kernel,amp,kernel+amp"
    compiled = "published,compiled,kernel+amp+compiled"  # apart, since compiling takes minutes
    return {
        # Tests that compare times would disturb each other, and the other steps measure the same.
        "tests": Step(("-m", "pytest", "-m", "gpu and not timed", "-vv", "-n", "4", str(ROOT / "tests")), 2.5),
        "kernel": Step((str(ROOT / "benchmarks/gpu/deformable.py"), str(results / "kernel/gpu.json")), 1.0),
        "inference": Step(("-m", "d2zero_bench.standard", "--gpu", "--output", str(results)), 6.0),
        "training": training("gpu.json", 1.5, "--only", "steps", "--variants", eager),
        "compiled": training("gpu-compiled.json", 2.5, "--only", "steps", "--variants", compiled),
        "loading": training("loading.json", 1.0, "--only", "loading"),
    }


def run(todo: Mapping[str, Step], minutes: float | None = None) -> dict[str, Outcome]:
    """Run steps in their order.

    Args:
        todo: by name.
        minutes: for all of them; without a limit if left out.
    """
    begin, found = time.monotonic(), dict[str, Outcome]()
    later = sum(step.minutes for step in todo.values())
    for name, step in todo.items():
        limit = None
        later -= step.minutes
        if minutes is not None:
            left = 60 * minutes - (time.monotonic() - begin)
            limit = min(left, max(60 * step.minutes, left - 60 * later))
            if limit <= GRACE_S:
                found[name] = Outcome(None)
                continue
            limit -= GRACE_S
        print(f"== {name}", flush=True)
        found[name] = _ended(step, limit)
    return found


def _ended(step: Step, limit: float | None) -> Outcome:
    paths = os.pathsep.join([*(str(ROOT / room) for room in ROOMS), os.environ.get("PYTHONPATH", "")])
    begin, interrupted = time.monotonic(), False
    child = subprocess.Popen(
        [sys.executable, *step.command], env=os.environ | {"PYTHONPATH": paths}, start_new_session=True
    )
    try:
        child.wait(limit)
    except subprocess.TimeoutExpired:
        interrupted = True
    finally:  # of an interruption of this program, too
        if child.poll() is None:
            _stop(child)
    return Outcome(child.returncode, time.monotonic() - begin, interrupted)


def _stop(child: "subprocess.Popen[bytes]") -> None:
    """Interrupt a process with all that it started, and end what goes on."""
    os.killpg(child.pid, signal.SIGINT)
    try:
        child.wait(GRACE_S)
    except subprocess.TimeoutExpired:
        os.killpg(child.pid, signal.SIGKILL)
        child.wait()


def _unfit() -> str:
    """Why this Python cannot use a GPU, if it cannot; torch is left to the steps."""
    seen = "import torch, sys; sys.exit(0 if torch.cuda.is_available() else 'torch sees no CUDA device here')"
    done = subprocess.run([sys.executable, "-c", seen], capture_output=True, text=True, check=False)
    last = (done.stderr.strip().splitlines() or ["it ended without a word"])[-1]
    return f"{last}; name a Python with torch for CUDA, on a machine with a GPU" if done.returncode else ""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run and say how each step ended; 1 if one was not good."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, help="folder for what is measured")
    parser.add_argument("--minutes", type=float, help="for all steps together")
    parser.add_argument("--only", help=f"some of {','.join(steps(Path()))}")
    given = parser.parse_args(arguments)
    todo = steps(given.results.resolve())
    chosen = given.only.split(",") if given.only else list(todo)
    strangers = [name for name in chosen if name not in todo]
    if strangers:
        parser.error(f"--only takes some of {','.join(todo)}, got {strangers[0]!r}")
    wrong = _unfit()
    if wrong:
        print(f"error: {wrong}", file=sys.stderr)
        return 2
    try:
        for name in ("kernel", "training"):
            (given.results / name).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"results takes a folder, cannot make {given.results / name}: {error.strerror}")
    try:
        found = run({name: step for name, step in todo.items() if name in chosen}, given.minutes)
    except KeyboardInterrupt:
        return 130
    for name, outcome in found.items():
        print(f"{name:>10}: {outcome}")
    return int(any(outcome.code != 0 or outcome.interrupted for outcome in found.values()))


if __name__ == "__main__":
    sys.exit(main())
