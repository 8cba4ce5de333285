"""From the user's inputs to a training run: checks them and puts them together."""

import json
import logging
import shlex
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

from d2zero.checkpoints.backbone import load_backbone
from d2zero.checkpoints.files import load_model, load_vocabulary
from d2zero.checkpoints.published import load_exactly, read_arrays
from d2zero.checkpoints.runs import CONFIG_FILE, STATE_FILE
from d2zero.data.coco import CocoFile, read_coco
from d2zero.data.dataset import Dataset
from d2zero.data.splits import Split, with_split
from d2zero.data.training_set import TrainingSet, require_trainable
from d2zero.evaluation.metrics import METRICS
from d2zero.evaluation.pictures import draw_predictions, predictions
from d2zero.evaluation.processes import evaluate_share
from d2zero.evaluation.run import EvaluationRun
from d2zero.model import D2Zero, ModelConfig, build
from d2zero.model.closed import closed_vocabulary
from d2zero.model.config import HeadName
from d2zero.processes import Processes, joined
from d2zero.training.config import TrainConfig, config_to_dict
from d2zero.training.loop import Run
from d2zero.training.record import Record
from d2zero.training.step import TrainingStep
from d2zero_runtime import D2ZeroError, Mode, Vocabulary
from d2zero_runtime.errors import join_truncated
from d2zero_runtime.files import write_text
from d2zero_runtime.vocabulary import CLOSED, check_vocabulary

logger = logging.getLogger("d2zero")

PICTURES = 6
LONGEST_WAIT = timedelta(hours=6)  # of processes, while the main one sums up an evaluation or draws
EVALUATION_FOLDER = "evaluation"  # of the run's, while it is evaluated
_SEMANTIC = (  # settings of a semantic classifier, which a closed model does not have
    "semantic_dim", "logit_scale", "softmax_temperature",
    "adaptation_layers", "adaptation_heads", "adaptation_ffn_dim", "adaptation_dropout",
)  # fmt: skip
_BY_CLASSES = ("head", "text_dim", "softmax_temperature")  # settings that the vocabulary decides


@dataclass(frozen=True)
class Inputs:
    """What a run is begun with, beside its settings.

    Args:
        data: Where the annotations and images are.
        vocabulary: Seen and unseen classes; the data set's own if left out. A closed model needs none: it has the
            classes that are annotated.
        split: Says which classes of the vocabulary are seen, instead of the vocabulary itself.
        init: A checkpoint whose weights to start from.
        skip: Parts of it that are not taken, such as `classifier`.
        backbone_weights: ImageNet weights of the backbone.
    """

    data: Dataset
    vocabulary: Path | None = None
    split: Split | None = None
    init: Path | None = None
    skip: tuple[str, ...] = ()
    backbone_weights: Path | None = None

    def classes(self) -> Vocabulary:
        """The vocabulary to train with.

        Raises:
            D2ZeroError: There is none, or it cannot be trained with.
        """
        path = self.vocabulary or self.data.vocabulary
        if path is None:
            raise D2ZeroError("training needs classes: give --vocabulary V.npz, or name it in the data set's YAML file")
        vocabulary = Vocabulary.load(path)
        if vocabulary.encoder == CLOSED:
            raise D2ZeroError(
                f"{path} has the classes of a closed model and no text embeddings; to train a closed model, leave the"
                " vocabulary out"
            )
        vocabulary = with_split(vocabulary, self.split)
        require_trainable(vocabulary)
        return vocabulary

    def is_closed(self, config: TrainConfig, source: D2Zero | None) -> bool:
        """Whether a closed model is trained: by its configuration, or as no vocabulary is given for closed weights.

        Raises:
            D2ZeroError: It is, and a vocabulary or a split is given.
        """
        named = self.vocabulary or self.data.vocabulary
        closed = config.model.head == "closed" or (named is None and source is not None and _is_closed(source))
        if closed and named:
            raise D2ZeroError("a closed model has the classes that are annotated; leave the vocabulary out")
        if closed and self.split:
            raise D2ZeroError(f"a closed model has no unseen classes; leave the split {self.split.name} out")
        return closed


@dataclass(frozen=True)
class _Validation:
    """What is evaluated on, and drawn, during training."""

    annotations: CocoFile
    images: Path


def start(config: TrainConfig, inputs: Inputs, output: Path, resume: bool = False, device: str = "auto") -> Path | None:
    """Train to the end; returns the finished model's file, or None in all but the main process.

    Raises:
        D2ZeroError: Inputs are missing or do not belong together, or the folder holds another run.
    """
    if output.exists() and not output.is_dir():
        raise D2ZeroError(f"--output takes a folder, {output} is a file")
    if (output / STATE_FILE).exists() and not resume:
        raise D2ZeroError(f"{output} already holds a run; continue it with --resume, or choose another folder")
    source = load_model(inputs.init) if inputs.init else None
    vocabulary = None if inputs.is_closed(config, source) else inputs.classes()
    part = inputs.data.training_part(vocabulary.split if vocabulary else "")
    annotations = read_coco(part.annotations, leave_out=True)
    if vocabulary is None:
        vocabulary = load_vocabulary(output / STATE_FILE) if resume else _closed_classes(annotations, source)
    config = replace(config, model=_model_config(config.model, vocabulary, source))
    data = TrainingSet(annotations, part.images, vocabulary, config.augment, config.cache)
    recipe, config = config, config.for_images(len(data))
    torch.manual_seed(config.seed)
    model = build(config.model, vocabulary)
    if source:
        start_from(model, source, _skipped(model, source, inputs.skip))
    if inputs.backbone_weights:
        load_backbone(model.backbone, read_arrays(inputs.backbone_weights))
    validation = _validation(config, inputs.data, vocabulary.split)
    evaluate = _evaluator(config, model, validation, output) if config.eval_every and validation else None
    draw = _drawer(validation or _Validation(data.annotations, part.images)) if config.picture_every else None
    output.mkdir(parents=True, exist_ok=True)
    with joined(device, timeout=LONGEST_WAIT) as processes:
        record = Record(output, config.steps, config.log_every, processes.is_main)
        return _finished(  # no name for the run: on torch 2.10 a process hung that held the network after this block
            Run(TrainingStep(config, model, processes), output, data, record, draw, evaluate),
            recipe,
            part.annotations,
            resume,
        )


def _closed_classes(annotations: CocoFile, source: D2Zero | None) -> Vocabulary:
    """Of a closed model: all that its weights know, if they know what is annotated, and else what is annotated."""
    names = tuple(annotations.categories)
    if source and _is_closed(source) and set(names) <= set(source.vocabulary.names):
        return source.vocabulary
    return closed_vocabulary(names)


def _model_config(config: ModelConfig, vocabulary: Vocabulary, source: D2Zero | None) -> ModelConfig:
    """The run's model: its sizes are those of the Mask2Former whose weights it starts from, if there is one."""
    head: HeadName = "closed" if vocabulary.encoder == CLOSED else "semantic"
    if source and _is_closed(source):
        kept = {} if head == "closed" else {name: getattr(config, name) for name in _SEMANTIC}
        asked, config = config, replace(source.config, **kept)
        _report_unused(asked, config)
    config = replace(config, head=head, text_dim=vocabulary.width)
    return replace(config, softmax_temperature=1.0) if head == "closed" else config


def _report_unused(asked: ModelConfig, used: ModelConfig) -> None:
    """Warn of settings of the model that a closed checkpoint decides, if they are neither its own nor the default."""
    default, decided = ModelConfig(), [field.name for field in fields(ModelConfig) if field.name not in _BY_CLASSES]
    unused = [name for name in decided if getattr(asked, name) not in (getattr(default, name), getattr(used, name))]
    if unused:
        logger.warning(
            "the model is built as the checkpoint's; these settings are not used: %s",
            join_truncated([f"model.{name}" for name in unused], len(unused)),
        )


def _skipped(model: D2Zero, source: D2Zero, skip: tuple[str, ...]) -> tuple[str, ...]:
    """Parts that do not start from a checkpoint's weights: its head, too, where that is for other classes."""
    ours, known = model.vocabulary, source.vocabulary
    if not _is_closed(source) or (_is_closed(model) and ours.layer_classes == known.layer_classes):
        return skip
    trained_on = [name for name in ours.unseen_names if name in known.names]
    if trained_on:
        logger.warning(
            "NOT ZERO-SHOT: the weights that this run starts from were trained on %d of its %d unseen classes (%s);"
            " their accuracy will say nothing about classes that were never seen",
            len(trained_on),
            len(ours.unseen_names),
            join_truncated(trained_on),
        )
    elif _is_closed(model):
        unknown = [name for name in ours.names if name not in known.names]
        logger.warning(
            "the checkpoint does not know %d of the %d annotated classes (%s): the head is fresh",
            len(unknown),
            len(ours),
            join_truncated(unknown),
        )
    else:
        logger.warning(
            "the weights that this run starts from were trained on %s: what looks like one of these was seen, whatever"
            " it is called here",
            join_truncated(known.names),
        )
    return tuple(dict.fromkeys((*skip, "classifier")))


def _is_closed(model: D2Zero) -> bool:
    return model.config.head == "closed"


def start_from(model: D2Zero, source: D2Zero, skip: Sequence[str] = ()) -> None:
    """Take over another model's weights.

    Args:
        model: Filled.
        source: Has weights for all of it, except what is skipped.
        skip: Parts that keep their own weights, by the beginning of their names.

    Raises:
        D2ZeroError: An array is missing, left over or of another shape; a part to skip has no array; or the classifier
            was trained with another text encoder.
    """
    if "classifier" not in skip:
        check_vocabulary(model.vocabulary, source.config.text_dim, source.vocabulary)
    arrays, own = source.state_dict(), model.state_dict()

    def skipped(name: str) -> bool:
        return any(name == part or name.startswith(f"{part}.") for part in skip)

    unknown = [part for part in skip if not any(n == part or n.startswith(f"{part}.") for n in (*arrays, *own))]
    if unknown:
        raise D2ZeroError(f"--init-skip names {join_truncated(unknown)}, which neither model has")
    taken = {name: value for name, value in arrays.items() if not skipped(name)}
    kept = {name: value for name, value in own.items() if skipped(name)}
    try:
        load_exactly(model, {**taken, **kept})
    except D2ZeroError as error:
        hint = "; give the recipe of its training, such as --config RUN/config.json, or leave parts out by --init-skip"
        raise D2ZeroError(f"{error}{hint}") from error
    if kept:
        logger.warning("%d arrays are fresh, not from the checkpoint: %s", len(kept), join_truncated(kept, 5))


def next_command(run: Path, inputs: Inputs) -> str:
    """The command that evaluates a finished run, or one that shows what it finds where nothing is to evaluate on."""
    try:
        split = inputs.classes().split if inputs.vocabulary or inputs.data.vocabulary else ""
        part = inputs.data.test_part(split, [Mode.GZSIS])
    except D2ZeroError:
        return shlex.join(["d2zero", "predict", "PHOTOS", "-m", str(run), "-o", "found"])
    files = ["--annotations", str(part.annotations), "--images", str(part.images)]
    return shlex.join(["d2zero", "eval", str(run), *files])


def _finished(run: Run, recipe: TrainConfig, annotations: Path, resume: bool) -> Path | None:
    changed = not resume or run.resume()
    if changed and run.processes.is_main:
        write_text(run.output / CONFIG_FILE, json.dumps(config_to_dict(recipe), indent=1))
    if run.processes.is_main:
        _announce(run, annotations)
    finished = run.train()
    problems = run.all_bad_files()
    if not run.processes.is_main:
        return None
    _report_problems(problems)
    _report_left_out(run.data.annotations)  # again: what was said first has scrolled away
    return finished


def _validation(config: TrainConfig, data: Dataset, split: str) -> _Validation | None:
    """Test files, if they are there.

    Raises:
        D2ZeroError: They are not, and evaluations are wanted; or they cannot be evaluated on.
    """
    if not config.picture_every and not config.eval_every:
        return None
    try:
        part = data.test_part(split, [Mode.GZSIS])
    except D2ZeroError as error:
        if config.eval_every:
            raise D2ZeroError(
                "nothing to evaluate on: give --val-annotations and --val-images, or --set eval_every=0"
            ) from error
        return None
    return _Validation(read_coco(part.annotations, leave_out=not config.eval_every), part.images)


def _evaluator(
    config: TrainConfig, model: D2Zero, validation: _Validation, output: Path
) -> Callable[[D2Zero, Processes], dict[str, Any]]:
    """Computes the metrics of a model, each process some images; what cannot be evaluated is refused now."""

    def run_of(evaluated: D2Zero) -> EvaluationRun:
        folder = output / EVALUATION_FOLDER
        limit = config.eval_images or None
        return EvaluationRun(
            evaluated.segmenter(), validation.annotations, validation.images, folder, [Mode.GZSIS], limit=limit
        )

    run_of(model)

    def evaluate(evaluated: D2Zero, processes: Processes) -> dict[str, Any]:
        run = run_of(evaluated)
        if processes.is_main:
            shutil.rmtree(run.folder, ignore_errors=True)  # of a run that was killed
        evaluate_share(run, processes)
        if not processes.is_main:
            return {}
        masks = run.summaries()[Mode.GZSIS]["segm"]
        shutil.rmtree(run.folder)
        return {key: masks.get(key) for key in METRICS if key in masks}

    return evaluate


def _drawer(validation: _Validation) -> Callable[[D2Zero, Path], None]:
    """Draws predictions on a few images: of the test files, or of training if there are none."""
    annotations, folder = validation.annotations, validation.images
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
        f" steps {run.step} to {run.config.steps} of {run.config.batch_size} images"
        f" ({run.config.steps * run.config.batch_size / len(run.data):.3g} epochs), lr {run.config.optim.lr:g}",
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
