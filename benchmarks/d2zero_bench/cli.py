"""`d2zero benchmark`: how fast, how large, how equal, how accurate, side by side."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from d2zero_runtime import D2ZeroError
from d2zero_runtime.errors import listed
from d2zero_runtime.masks.postprocess import MASK_KINDS

if TYPE_CHECKING:
    from d2zero_bench.gates import Gate
    from d2zero_bench.report import Report
    from d2zero_bench.session import Session


def benchmark(
    models: Annotated[
        list[Path],
        typer.Argument(help="Checkpoints (.safetensors) and exported models (.onnx, .engine, .pt2), side by side."),
    ],
    variant: Annotated[
        str | None, typer.Option("--variant", help="Of each checkpoint: model, published; several with commas.")
    ] = None,
    peers: Annotated[
        str | None,
        typer.Option(
            "--peers", help="Others' networks, random weights: mask2former, its -tf32, -float16, -compiled, or all."
        ),
    ] = None,
    baseline: Annotated[
        str | None, typer.Option("--baseline", help="The candidate to compare with, by name; the first by default.")
    ] = None,
    size: Annotated[
        str | None,
        typer.Option("--size", help="Heights x widths, as 800x1216,480x640; the baseline's own for a 480x640 photo."),
    ] = None,
    batch: Annotated[str, typer.Option("--batch", help="Images at a time, as 1,4,8.")] = "1",
    classes: Annotated[
        str | None,
        typer.Option("--classes", help="Numbers of drawn classes, as 65,80,1203; the model's own if left out."),
    ] = None,
    grid: Annotated[
        bool,
        typer.Option("--grid", help="All combinations; else one thing varies at a time, around the first of each."),
    ] = False,
    images: Annotated[Path | None, typer.Option("--images", help="A folder of photos; drawn ones without it.")] = None,
    annotations: Annotated[
        Path | None, typer.Option("--annotations", help="COCO JSON of those photos: measure accuracy too.")
    ] = None,
    limit: Annotated[
        int | None, typer.Option("--limit", min=1, help="Accuracy on the first so many images only.")
    ] = None,
    rounds: Annotated[int, typer.Option("--rounds", min=1, help="Of each case, every candidate in each.")] = 20,
    warmup: Annotated[int, typer.Option("--warmup", min=0, help="Runs before the first round.")] = 2,
    seed: Annotated[int, typer.Option("--seed", help="Of the candidates' order in each round.")] = 0,
    threads: Annotated[
        int | None, typer.Option("--threads", min=1, help="Of each candidate; the libraries' own choice if left out.")
    ] = None,
    providers: Annotated[
        str | None,
        typer.Option(
            "--providers", help="What runs an .onnx, a candidate each: cpu,cuda,tensorrt,openvino,openvino-bf16."
        ),
    ] = None,
    device: Annotated[str, typer.Option("--device", help="auto, cpu or cuda:N: where torch runs.")] = "auto",
    masks: Annotated[
        str, typer.Option("--masks", help="What post-processing makes: rle, bitmap, packed (fastest on a GPU) or none.")
    ] = "rle",
    json_file: Annotated[Path | None, typer.Option("--json", help="Write all samples and figures.")] = None,
    html_file: Annotated[Path | None, typer.Option("--html", help="Write a report with plots, one file.")] = None,
    max_p90: Annotated[
        list[str] | None,
        typer.Option("--max-p90", help="Exit with 1 if file → detections is slower, in ms: 120, or NAME=120."),
    ] = None,
    min_hm: Annotated[
        list[str] | None,
        typer.Option("--min-hm", help="Exit with 1 if HM AP50 is lower: 50, or NAME=50. Needs --annotations."),
    ] = None,
) -> None:
    """Measure models side by side: latency by stage, throughput, memory, equality, accuracy.

    Each candidate runs in a process of its own, one at a time, in turns. Interrupted, what was measured is kept.
    """
    from d2zero_bench.cases import parse_counts, parse_sizes
    from d2zero_bench.gates import Gate
    from d2zero_bench.measure import Settings
    from d2zero_bench.session import Plan, Session

    if annotations and not images:
        raise D2ZeroError("--annotations need the folder of their images: give --images")
    if min_hm and not annotations:
        raise D2ZeroError("--min-hm needs accuracy: give --annotations and --images")
    if masks not in MASK_KINDS:
        raise D2ZeroError(f"--masks must be one of {', '.join(MASK_KINDS)}, got {masks!r}")
    _require_files([*models, *([annotations] if annotations else [])])
    slowest = [Gate.parse("--max-p90", text) for text in max_p90 or ()]
    least = [Gate.parse("--min-hm", text) for text in min_hm or ()]
    plan = Plan(
        models=tuple(models),
        variants=None if variant is None else tuple(part.strip() for part in variant.split(",")),
        peers=peers,
        baseline=baseline,
        sizes=tuple(parse_sizes(size)) if size else (),
        batches=tuple(parse_counts("--batch", batch)),
        classes=tuple(parse_counts("--classes", classes)) if classes else (None,),
        grid=grid,
        images=images,
        annotations=annotations,
        limit=limit,
        threads=threads,
        providers=tuple(part.strip() for part in providers.split(",")) if providers else None,
        device=device,
        masks=masks,
        settings=Settings(rounds, warmup, seed),
    )
    session = Session(plan, sys.argv[2:])
    _require_named([*slowest, *least], session)
    try:
        report = session.run()
    finally:
        if session.report is not None and session.report.cases:
            show(session.report, json_file, html_file)
    _end(report, slowest, least)


def show(report: "Report", json_file: Path | None = None, html_file: Path | None = None) -> None:
    """Print the tables and write the files."""
    from d2zero.cli.terminal import console
    from d2zero_bench.html import write_html
    from d2zero_bench.table import tables

    screen = console()
    for table in tables(report):
        screen.print(table)
    for line in dict.fromkeys(
        failure for entry in report.equality for failure in _differences(entry.candidate, entry.failures)
    ):
        print(f"warning: {line}", file=sys.stderr)
    if not report.complete:
        print("stopped before the end: this is what was measured")
    if json_file:
        report.write(json_file)
        print(f"all figures: {json_file}")
    if html_file:
        write_html(report, html_file)
        print(f"report: {html_file}")


def _differences(candidate: str, failures: Sequence[str]) -> list[str]:
    return [f"{candidate} is not the baseline's model: {failure}" for failure in failures]


def _end(report: "Report", slowest: "list[Gate]", least: "list[Gate]") -> None:
    from d2zero_bench.gates import failures

    found = failures(report, slowest, least)
    for line in found:
        print(f"FAILED: {line}", file=sys.stderr)
    if report.failures:
        raise D2ZeroError("; ".join(f"{name} was left out: {why}" for name, why in report.failures.items()))
    if found:
        raise typer.Exit(1)


def _require_files(paths: Sequence[Path]) -> None:
    """Known before seconds of loading."""
    missing = [str(path) for path in paths if not path.is_file()]
    if missing:
        raise D2ZeroError(f"no such file: {listed(missing)}")


def _require_named(gates: "Sequence[Gate]", session: "Session") -> None:
    known = [spec.name for spec in session.specs]
    for gate in gates:
        if gate.candidate and gate.candidate not in known:
            raise D2ZeroError(f"a limit is for {gate.candidate!r}, but there are only {listed(known)}")
