"""`d2zero benchmark`: how fast, how large, how equal, how accurate, side by side."""

import sys
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from d2zero_runtime import D2ZeroError
from d2zero_runtime.errors import join_truncated

if TYPE_CHECKING:
    from d2zero_bench.plan import Plan
    from d2zero_bench.report import Report


def benchmark(
    models: Annotated[
        list[Path],
        typer.Argument(
            help="Checkpoints (.safetensors), exported models (.onnx, .engine, .pt2) and folders of transformers with a"
            " Mask2Former, side by side."
        ),
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
    batch: Annotated[str, typer.Option("--batch", help="Images per batch, as 1,4,8.")] = "1",
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
    rounds: Annotated[int, typer.Option("--rounds", min=1, help="Rounds per case, every candidate in each.")] = 20,
    warmup: Annotated[int, typer.Option("--warmup", min=0, help="Runs before the first round.")] = 2,
    seed: Annotated[int, typer.Option("--seed", help="Seed of the candidates' order in each round.")] = 0,
    threads: Annotated[
        int | None,
        typer.Option("--threads", min=1, help="Threads of each candidate; the libraries' own choice if left out."),
    ] = None,
    providers: Annotated[
        str | None,
        typer.Option(
            "--provider",
            "--providers",
            help="Providers of an .onnx, one candidate per provider: cpu,cuda,tensorrt,openvino,openvino-bf16.",
        ),
    ] = None,
    device: Annotated[str, typer.Option("--device", help="auto, cpu or cuda:N: where torch runs.")] = "auto",
    masks: Annotated[
        str, typer.Option("--masks", help="What post-processing makes: rle, bitmap, packed (fastest on a GPU) or none.")
    ] = "rle",
    json_file: Annotated[Path | None, typer.Option("--json", help="Write all samples and metrics.")] = None,
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

    Each candidate runs in a process of its own; one runs at a time, interleaved. Interrupted, what was measured is
    kept.
    """
    from d2zero_bench.cases import parse_counts, parse_sizes
    from d2zero_bench.gates import Gate
    from d2zero_bench.plan import Plan

    missing = [str(path) for path in [*models, *([annotations] if annotations else [])] if not path.exists()]
    if missing:  # known before seconds of loading
        raise D2ZeroError(f"no such file: {join_truncated(missing)}")
    if annotations and annotations.is_dir():
        raise D2ZeroError(f"--annotations takes a COCO JSON file, {annotations} is a folder")
    if html_file:
        require_packages("--html", "jinja2", "matplotlib")
    if annotations:
        require_packages("--annotations", "pycocotools")
    plan = Plan(
        models=tuple(_model_file(path) for path in models),
        variants=_names(variant),
        peers=_names(peers) or (),
        baseline=baseline,
        sizes=tuple(parse_sizes(size)) if size else (),
        batches=tuple(parse_counts("--batch", batch)),
        classes=tuple(parse_counts("--classes", classes)) if classes else (None,),
        grid=grid,
        images=images,
        annotations=annotations,
        limit=limit,
        rounds=rounds,
        warmup=warmup,
        seed=seed,
        threads=threads,
        providers=_names(providers),
        device=device,
        masks=masks,
        max_p90=tuple(Gate.parse("--max-p90", text) for text in max_p90 or ()),
        min_hm=tuple(Gate.parse("--min-hm", text) for text in min_hm or ()),
    )
    _check(run_and_show(plan, sys.argv[2:], json_file, html_file), plan)


def _model_file(path: Path) -> Path:
    """The file or folder that is measured: of a training run's folder its checkpoint."""
    from d2zero.checkpoints.runs import BEST_FILE, STATE_FILE, checkpoint_file

    is_run = any((path / name).is_file() for name in (BEST_FILE, STATE_FILE))  # a transformers folder has neither
    return checkpoint_file(path) if is_run else path


def run_and_show(
    plan: "Plan",
    command: list[str],
    json_file: Path | None,
    html_file: Path | None,
    facts: dict[str, str] | None = None,
) -> "Report":
    """Measure, print the tables and write the files, also of what was measured before something ended it."""
    from d2zero_bench.session import Session

    session = Session(plan, command)
    try:
        return session.run(facts)
    finally:
        if session.report is not None and session.report.cases:
            show(session.report, json_file, html_file)


def show(report: "Report", json_file: Path | None = None, html_file: Path | None = None) -> None:
    """Print the tables and write the files."""
    from d2zero.cli.terminal import console
    from d2zero_bench.tables import tables

    screen = console()
    for table in tables(report):
        screen.print(table.for_terminal())
    differences = [
        f"{entry.candidate} is not the baseline's model: {failure}"
        for entry in report.equality
        for failure in entry.failures
    ]
    for line in dict.fromkeys(differences):
        print(f"warning: {line}", file=sys.stderr)
    if not report.complete:
        print("stopped before the end: this is what was measured", file=sys.stderr)
    if json_file:
        report.write(json_file)
        print(f"all measurements: {json_file}", file=sys.stderr)
    if html_file:
        from d2zero_bench.page import write_html

        write_html(report, html_file)
        print(f"report: {html_file}", file=sys.stderr)


def require_packages(what: str, *names: str) -> None:
    """Refuse before any work.

    Raises:
        D2ZeroError: A package is not installed; names the extra that installs it.
    """
    missing = [name for name in names if not find_spec(name)]
    if missing:
        raise D2ZeroError(f"{what} needs {' and '.join(missing)}; run: pip install 'd2zero[bench]'")


def _names(text: str | None) -> tuple[str, ...] | None:
    return tuple(part.strip() for part in text.split(",")) if text else None


def _check(report: "Report", plan: "Plan") -> None:
    from d2zero_bench.gates import failures

    found = failures(report, plan.max_p90, plan.min_hm)
    for line in found:
        print(f"FAILED: {line}", file=sys.stderr)
    if report.failures:
        raise D2ZeroError("; ".join(f"{name} was left out: {why}" for name, why in report.failures.items()))
    if found:
        raise typer.Exit(1)
