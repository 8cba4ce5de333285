"""Measures exported files, variants of the checkpoint and peers side by side, as `d2zero benchmark` does.

    python benchmarks/gpu/inference.py --json ours.json --work FOLDER --variants published,model float16.pt2
    python benchmarks/gpu/inference.py --json peers.json --work FOLDER --peers mask2former float16.pt2

Packed masks, 800×1216. The report is written after each round. What is missing or cannot be opened is left out with
the reason.
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

from exports import CHECKPOINT, SIZE, SMALL
from stages import exit_code, parser_of, write_json

from d2zero.cli.terminal import console
from d2zero_bench.plan import Plan
from d2zero_bench.session import Session
from d2zero_bench.tables import tables
from d2zero_runtime import D2ZeroError
from studies.standard import floors

ROUNDS, WARMUP = 20, 3
PRECISIONS = ("float32", "tf32", "float16", "bfloat16")  # whose floors are measured


def plan_of(given: argparse.Namespace) -> Plan:
    """What to measure: the files that are there.

    Raises:
        D2ZeroError: There are none.
    """
    missing = [name for name in given.names if not (given.work / name).is_file()]
    files = [given.work / name for name in given.names if name not in missing]
    variants = tuple(given.variants.split(",")) if given.variants else None
    models = ((given.work / CHECKPOINT,) if variants else ()) + tuple(files)
    if not models:
        raise D2ZeroError(f"none of {', '.join(given.names)} was exported")
    return Plan(
        models=models,
        variants=variants,
        peers=tuple(given.peers.split(",")) if given.peers else (),
        providers=(given.provider,) if any(path.suffix == ".onnx" for path in files) else None,
        sizes=(SMALL if given.rehearsal else SIZE,),
        batches=(given.batch,),
        device="cpu" if given.rehearsal else "cuda",
        masks="packed",
        rounds=2 if given.rehearsal else given.rounds,
        warmup=1 if given.rehearsal else WARMUP,
        left_out=dict.fromkeys(missing, "was not exported"),
        all_must_open=False,
        title="The demo's model (rehearsal)" if given.rehearsal else "The published architecture, random weights",
    )


def measure(plan: Plan, path: Path, facts: dict[str, str]) -> None:
    """Measure, and write the report after each round and at the end, however that comes."""

    def saved(items: Iterator[int], length: int, label: str) -> Iterator[int]:
        for item in items:
            yield item
            write()

    def write() -> None:
        if session.report is not None:
            session.report.write(path)

    session = Session(plan, ["(benchmarks/gpu)"], saved)
    try:
        session.run(facts)
    finally:
        write()
        if session.report is not None:
            for table in tables(session.report):
                console().print(table.for_terminal())
            for name, why in session.report.failures.items():
                print(f"left out: {name}: {why}")
            for entry in session.report.equality:
                for failure in entry.failures:
                    print(f"differs: {entry.candidate}: {failure}")


def options_of(about: str | None) -> argparse.ArgumentParser:
    """Options that `onnx_cuda.py` has too."""
    parser = parser_of(about, work=True)
    add = parser.add_argument
    add("names", nargs="*", help="files in the work folder, as exports.py calls them")
    add("--variants", help="of the checkpoint")
    add("--peers", help="as of d2zero benchmark")
    add("--batch", type=int, default=1)
    add("--rounds", type=int, default=ROUNDS)
    add("--provider", default="cuda", help="of .onnx files")
    add("--floors", action="store_true", help="measure the hardware's lower bounds, in each precision")
    return parser


def main() -> int:
    """Measure; 1 if something was left out, 2 if nothing can be measured."""
    given = options_of(__doc__).parse_args()
    try:
        plan = plan_of(given)
        facts = {}
        if given.floors:
            precisions = PRECISIONS[:1] if given.rehearsal else PRECISIONS
            facts = floors(plan, precisions)
            for name, line in facts.items():
                print(f"{name}: {line}", flush=True)
        measure(plan, given.json, facts)
    except D2ZeroError as error:
        print(f"error: {error}", file=sys.stderr)
        if not given.json.is_file():
            write_json(given.json, {"error": str(error)})
        return 2
    return int(bool(plan.left_out))


if __name__ == "__main__":
    sys.exit(exit_code(main))
