"""From the user's inputs to a training run: checks them and puts them together."""

import logging
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from d2zero.checkpoints.backbone import load_backbone
from d2zero.checkpoints.files import load_model
from d2zero.checkpoints.published import load_exactly, read_arrays
from d2zero.data.coco import CocoFile, find_annotations, find_image_folder, read_coco
from d2zero.data.training_set import TrainingSet, require_trainable
from d2zero.evaluation.pictures import draw_predictions, predictions
from d2zero.model import D2Zero, build
from d2zero.training.config import TrainConfig
from d2zero.training.distributed import joined
from d2zero.training.loop import STATE_FILE, Run
from d2zero.training.record import Record
from d2zero.training.step import TrainingStep
from d2zero_runtime import D2ZeroError, Vocabulary
from d2zero_runtime.errors import join_truncated

logger = logging.getLogger("d2zero")

PICTURES = 6


@dataclass(frozen=True)
class Inputs:
    """The files of a run."""

    data: Path
    vocabulary: Path
    annotations: Path | None = None
    images: Path | None = None
    init: Path | None = None
    backbone_weights: Path | None = None


def start(config: TrainConfig, inputs: Inputs, output: Path, resume: bool = False, device: str = "auto") -> Path | None:
    """Train to the end; returns the finished model's file, or None in all but the main process.

    Raises:
        D2ZeroError: Inputs are missing or do not belong together, or the folder holds another run.
    """
    vocabulary = Vocabulary.load(inputs.vocabulary)
    require_trainable(vocabulary)
    config = replace(config, model=replace(config.model, text_dim=vocabulary.width))
    if output.exists() and not output.is_dir():
        raise D2ZeroError(f"--output takes a folder, {output} is a file")
    if (output / STATE_FILE).exists() and not resume:
        raise D2ZeroError(f"{output} already holds a run; continue it with --resume, or choose another folder")
    split = str(vocabulary.source.get("split", ""))
    if not inputs.annotations and not split:
        raise D2ZeroError("the vocabulary records no split: name the training file with --annotations")
    path = inputs.annotations or find_annotations(inputs.data, split, "seen")
    images = inputs.images or find_image_folder(inputs.data, path)
    data = TrainingSet(read_coco(path, leave_out=True), images, vocabulary, config.augment, config.cache)
    torch.manual_seed(config.seed)
    model = build(config.model, vocabulary)
    if inputs.init:
        load_exactly(model, load_model(inputs.init).state_dict())
    if inputs.backbone_weights:
        load_backbone(model.backbone, read_arrays(inputs.backbone_weights))
    output.mkdir(parents=True, exist_ok=True)
    with joined(device) as processes:
        record = Record(output, config.steps, config.log_every, processes.is_main)
        draw = _drawer(config, inputs.data, split)
        # No name for the step or the run: on torch 2.10 a process hung that still held the network after this block.
        return _finished(Run(TrainingStep(config, model, processes), output, data, record, draw), resume, path)


def _finished(run: Run, resume: bool, annotations: Path) -> Path | None:
    if resume:
        run.resume()
    if run.processes.is_main:
        _announce(run, annotations)
    finished = run.train()
    problems = run.all_bad_files()
    if not run.processes.is_main:
        return None
    _report_problems(problems)
    _report_left_out(run.data.annotations)  # again: what was said first has scrolled away
    return finished


def _drawer(config: TrainConfig, data: Path, split: str) -> Callable[[D2Zero, Path], None] | None:
    """Draws predictions on a few test images, if the test files are there."""
    if not config.picture_every:
        return None
    try:
        path = find_annotations(data, split, "gzsi")
        annotations, folder = read_coco(path, leave_out=True), find_image_folder(data, path)
    except D2ZeroError as error:
        logger.warning("no pictures are drawn: %s", error)
        return None
    chosen = list(annotations.annotations)[:PICTURES]

    def draw(model: D2Zero, file: Path) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        found = predictions(model, annotations, folder, chosen)
        title = file.stem.replace("_", " ")
        draw_predictions(annotations, folder, model.vocabulary, found, title=title).save(file)

    return draw


def _announce(run: Run, annotations: Path) -> None:
    parameters = sum(parameter.numel() for parameter in run.model.parameters()) / 1e6
    print(
        f"{len(run.data)} images of {annotations.name}, {len(run.model.vocabulary.seen_names)} seen classes,"
        f" {parameters:.1f} M parameters, {run.processes.count} process(es) on {run.processes.device},"
        f" steps {run.step} to {run.config.steps}",
        file=sys.stderr,
    )
    if run.data.missing:
        lost = run.data.missing
        logger.warning("%d images are missing and left out: %s", len(lost), join_truncated(lost))
    _report_left_out(run.data.annotations)


def _report_left_out(annotations: CocoFile) -> None:
    if annotations.left_out.count:
        logger.warning("%s: %s; they are left out", annotations.path.name, annotations.left_out)


def _report_problems(problems: list[str]) -> None:
    if problems:
        logger.warning(
            "%d images could not be used and were replaced by others: %s", len(problems), join_truncated(problems)
        )
