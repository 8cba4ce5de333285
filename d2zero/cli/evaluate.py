"""`d2zero eval`: accuracy of a checkpoint, of a file of detections, or of vocabularies over an index."""

import json
import logging
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from d2zero.cli.models import DeviceOption, ProviderOption
from d2zero_runtime import D2ZeroError, Mode, Segmenter, Vocabulary
from d2zero_runtime.errors import join_truncated
from d2zero_runtime.files import check_output, write_text

if TYPE_CHECKING:
    from d2zero.data.coco import CocoFile
    from d2zero.data.dataset import Part
    from d2zero.data.splits import Split
    from d2zero.evaluation.run import EvaluationRun

logger = logging.getLogger("d2zero")

PICTURES = 12  # images on a contact sheet
PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg")


def evaluate(
    checkpoint: Annotated[
        Path | None,
        typer.Argument(
            help="A checkpoint (.safetensors, a run's folder or last.pt) or an exported model; leave it out with"
            " --detections or --index."
        ),
    ] = None,
    data: Annotated[
        Path | None, typer.Option("--data", help="The data folder: annotations/ and image folders; or a .yaml.")
    ] = None,
    mode: Annotated[
        str, typer.Option("--mode", help="gzsis, zsis or gzsis-copy-paste; several, with commas, share one pass.")
    ] = "gzsis",
    detections: Annotated[
        Path | None, typer.Option("--detections", help="COCO results to evaluate without a model.")
    ] = None,
    index: Annotated[
        Path | None,
        typer.Option(
            "--index", help="A folder that `d2zero index` made of the test images: the network does not run again."
        ),
    ] = None,
    annotations: Annotated[
        Path | None, typer.Option("--annotations", help="The test file, if not in DIR/annotations.")
    ] = None,
    images: Annotated[Path | None, typer.Option("--images", help="The folder of its images, if not in DIR.")] = None,
    split: Annotated[
        str | None,
        typer.Option("--split", help="coco-48-17, coco-65-15 or a file (.yaml, .json); the model's own by default."),
    ] = None,
    vocabularies: Annotated[
        list[Path] | None,
        typer.Option(
            "--vocabulary",
            "-v",
            help="Classes to use instead of the model's, or to judge --detections by. Several over an --index are"
            " compared.",
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="The folder for detections; a run that was stopped continues there."),
    ] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write all metrics to this file.")] = None,
    per_class: Annotated[bool, typer.Option("--per-class", help="Print one row per class.")] = False,
    pictures: Annotated[Path | None, typer.Option("--pictures", help="Draw a contact sheet (.png or .jpg).")] = None,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1)] = 1,
    limit: Annotated[int | None, typer.Option("--limit", min=1, help="Evaluate at most this many images.")] = None,
    device: DeviceOption = "auto",
    threads: Annotated[
        int | None,
        typer.Option(
            "--threads",
            min=1,
            help="CPU threads of the network; if left out, the library chooses, and several processes share the cores.",
        ),
    ] = None,
    jobs: Annotated[
        int,
        typer.Option("--jobs", "-j", min=1, help="Processes that share the images, on one machine's CPU or one GPU."),
    ] = 1,
    provider: ProviderOption = None,
) -> None:
    """Evaluate: AP and Recall@100 of seen and unseen classes, and their harmonic means.

    Start it with `torchrun` to share the images among several GPUs or machines.
    """
    modes = [Mode.parse(name.strip()) for name in mode.split(",")]
    if [checkpoint, detections, index].count(None) != 2:
        raise D2ZeroError("give a checkpoint, --detections FILE or --index FOLDER, one of them")
    check_output(output, folder=True)
    check_output(json_file, "--json")
    check_output(pictures, "--pictures")
    if pictures and pictures.suffix.lower() not in PICTURE_SUFFIXES:
        raise D2ZeroError(f"--pictures must end in {' or '.join(PICTURE_SUFFIXES)}, got {pictures.name!r}")
    if detections is not None and any((data, images, output, pictures, limit, jobs > 1)):
        raise D2ZeroError("--detections are evaluated as they are: leave out flags that are for a model and its images")
    network_only = (data, images, output, pictures, limit, provider, jobs > 1, batch_size > 1, device != "auto")
    if index is not None and any(network_only):
        raise D2ZeroError("--index has what a network found: leave out flags that are for a network and its images")
    if index is None and len(vocabularies or []) > 1:
        raise D2ZeroError(f"{len(vocabularies or [])} vocabularies are compared over an --index; give one")
    _check_processes(jobs, "--detections are" if detections else "--index is" if index else "")
    from d2zero.data.splits import check_split, find_split
    from d2zero.processes import torchrun

    run, summaries = None, None
    chosen = find_split(split) if split else None
    if index is not None:
        from d2zero.cli.index_evaluation import evaluate_index

        evaluate_index(index, annotations, chosen, vocabularies or [], modes, threads, json_file, per_class)
        return
    vocabulary = vocabularies[0] if vocabularies else None
    if detections is not None:
        summaries = _of_detections(detections, annotations, chosen, vocabulary, modes)
    else:
        from d2zero.checkpoints.runs import checkpoint_file
        from d2zero.cli.models import open_segmenter
        from d2zero.data.dataset import Dataset
        from d2zero.evaluation.run import EvaluationRun
        from d2zero_runtime.files import file_hash

        assert checkpoint is not None
        checkpoint = checkpoint_file(checkpoint)
        files = Dataset.of(data)
        vocabulary = vocabulary or files.vocabulary
        threads = threads or _threads_each(checkpoint, jobs)
        model = open_segmenter(checkpoint, provider, device, vocabulary, threads, torchrun().local_rank)
        if chosen:
            check_split(model.vocabulary, chosen)
        name = chosen.name if chosen else model.vocabulary.split
        truth, folder = _test_data(files.with_val(annotations, images).test_part(name, modes))
        truth = grouped(truth, chosen)
        output = output or Path("runs") / f"eval-{checkpoint.stem}"
        identity = f"{file_hash(checkpoint)} {model.backend.name}"
        run = EvaluationRun(model, truth, folder, output, modes, batch_size, identity, limit)
        open_model = partial(open_segmenter, checkpoint, provider, device, vocabulary, threads)
        summaries = _metrics(run, open_model, jobs, "cpu" if checkpoint.suffix == ".onnx" else device)
        if summaries is None:
            return
        if run.kept:
            known = f"{run.kept} of {len(run.image_ids)} images were evaluated before, and not again"
            print(f"{known}: their detections are in {run.folder}", file=sys.stderr)
    if json_file:  # before anything is printed, which a terminal may refuse
        write_text(json_file, json.dumps(by_mode(summaries), indent=1))
    show(list(summaries.values()), per_class)
    if json_file:
        print(f"all metrics: {json_file}", file=sys.stderr)
    if pictures and run is not None:
        _draw(run, pictures, checkpoint.name if checkpoint else "")


def by_mode(summaries: dict[Mode, dict[str, Any]]) -> dict[str, Any]:
    """What is written as JSON: a single mode's summary as it is."""
    if len(summaries) == 1:
        return next(iter(summaries.values()))
    return {str(mode): summary for mode, summary in summaries.items()}


def _check_processes(jobs: int, alone: str) -> None:
    """Refuse what cannot be shared out; of the processes that `torchrun` started, only the main one warns."""
    from d2zero.processes import torchrun

    started = torchrun()
    if started.count > 1 and jobs > 1:
        raise D2ZeroError("--jobs starts processes itself; leave it out, or start the command without torchrun")
    if started.count > 1 and alone:
        raise D2ZeroError(f"{alone} evaluated by one process; start the command without torchrun")
    if started.rank:
        logger.setLevel(logging.ERROR)


def _threads_each(checkpoint: Path, jobs: int) -> int | None:
    """Several processes on one machine share its cores; a single one leaves the number to its library."""
    from d2zero.processes import torchrun, usable_cores
    from d2zero_runtime.formats import format_of, is_exported

    processes = max(jobs, torchrun().local_count)
    if processes == 1 or (is_exported(checkpoint) and not format_of(checkpoint).takes_threads):
        return None
    return max(1, usable_cores() // processes)


def _metrics(
    run: "EvaluationRun", open_model: Callable[[], Segmenter], jobs: int, device: str
) -> dict[Mode, dict[str, Any]] | None:
    """Evaluate in this process, in workers, or as one of `torchrun`'s processes: None in all but the main one."""
    from d2zero.cli.terminal import tracked
    from d2zero.evaluation.processes import run_jobs, run_joined
    from d2zero.processes import torchrun

    if jobs > 1:
        run.model.close()  # the workers open their own
        return run_jobs(run, open_model, jobs, tracked)
    if torchrun().count > 1:
        return run_joined(run, device, tracked)
    return run.run(tracked)


def show(summaries: list[dict[str, Any]], per_class: bool) -> None:
    """Tables of one evaluation, for each mode."""
    from d2zero.cli.terminal import console
    from d2zero.evaluation.table import groups_table, per_class_table, summary_table

    screen = console()
    for summary in summaries:
        screen.print(summary_table(summary))
        if "groups" in summary["segm"]:
            screen.print(groups_table(summary))
        if per_class:
            screen.print(per_class_table(summary))
    if "unverified" in summaries[0]:
        print(
            f"images say which classes were looked for: {summaries[0]['unverified']} of {summaries[0]['detections']}"
            " detections are of others and do not count",
            file=sys.stderr,
        )
    unreadable = summaries[0].get("unreadable")
    if unreadable:
        logger.warning(
            "%d images could not be read and count as without detections: %s", len(unreadable), unreadable[0]
        )


def _of_detections(
    detections: Path, annotations: Path | None, split: "Split | None", vocabulary: Path | None, modes: list[Mode]
) -> dict[Mode, dict[str, Any]]:
    from d2zero.data.coco import open_coco
    from d2zero.data.splits import Split
    from d2zero.evaluation.metrics import score
    from d2zero.evaluation.result_entries import open_results

    if annotations is None or (split is None) == (vocabulary is None):
        raise D2ZeroError(
            "--detections needs --annotations FILE, and what says which classes are seen: --split NAME, or --vocabulary"
            " FILE for other splits"
        )
    if len(modes) > 1:
        raise D2ZeroError("a file of detections was made in one mode; give that one as --mode")
    if vocabulary is not None:
        classes = Vocabulary.load(vocabulary)
        chosen = Split("vocabulary", classes.seen_names, classes.unseen_names)
    else:
        assert split is not None
        chosen = split
    with open_coco(annotations) as truth:
        report_without_pixels(truth)
        chosen.is_seen(truth.categories)  # refuses a file of another split
        with open_results(detections, truth) as found:
            return {modes[0]: score(grouped(truth, split), found, chosen.seen, modes[0])}


def grouped(truth: "CocoFile", split: "Split | None") -> "CocoFile":
    """The groups of classes that a split has take the place of the file's own."""
    groups = split.groups if split else {}
    return replace(truth, groups=groups) if groups else truth


def report_without_pixels(truth: "CocoFile") -> None:
    """Warn of annotations that nothing can match."""
    if truth.without_pixels:
        logger.warning(
            "%d annotations of %s have masks of no pixel (ids %s): they count, as in pycocotools, and nothing can match"
            " them",
            len(truth.without_pixels),
            truth.path.name,
            join_truncated(truth.without_pixels),
        )


def _test_data(part: "Part") -> "tuple[CocoFile, Path]":
    from d2zero.data.coco import read_coco

    truth = read_coco(part.annotations)
    report_without_pixels(truth)
    return truth, part.images


def _draw(run: "EvaluationRun", file: Path, title: str) -> None:
    from d2zero.evaluation.pictures import draw_predictions

    found = run.detections(run.modes[0], run.image_ids[:PICTURES])
    sheet = draw_predictions(run.annotations, run.images, run.model.vocabulary, found, cell=420, title=title)
    file.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(file)
    print(f"pictures: {file}", file=sys.stderr)
