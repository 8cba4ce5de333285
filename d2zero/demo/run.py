"""The demo: draw a zero-shot data set, segment it, and show metrics and pictures.

Two controls are beside the metrics, in which each unseen class is given the embedding of another one. If
the model named unseen objects by anything but their text, the controls would not fall.
"""

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields, replace
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

import numpy as np
from rich import box
from rich.table import Table
from scipy.optimize import linear_sum_assignment

from d2zero.checkpoints.files import load_model
from d2zero.checkpoints.runs import MODEL_FILE, STATE_FILE
from d2zero.data.coco import read_coco
from d2zero.data.dataset import Dataset
from d2zero.data.shapes import ShapesConfig, write_dataset
from d2zero.evaluation.metrics import METRICS
from d2zero.evaluation.pictures import draw_predictions, predictions
from d2zero.evaluation.run import EvaluationRun
from d2zero.model import D2Zero
from d2zero.training.config import shapes, with_settings
from d2zero.training.start import Inputs, start
from d2zero_runtime import D2ZeroError, Mode, Vocabulary

Progress = Callable[[Iterator[Any], int, str], Iterator[Any]]
BATCH_SIZE = 8
SHEET_IMAGES = 9


@dataclass(frozen=True)
class Row:
    """One line of the demo's table: keys of `METRICS`, in percent."""

    label: str
    seen_ap50: float | None
    unseen_ap50: float | None
    hm_ap50: float | None
    unseen_recall50: float | None
    images: int


@dataclass(frozen=True)
class DemoResult:
    """What the demo made."""

    rows: list[Row]
    pictures: Path
    checkpoint: Path


def run_demo(
    output: Path, images: int, progress: Progress, train: bool = False, settings: list[str] | None = None
) -> DemoResult:
    """Draw, perhaps train, evaluate, and make pictures.

    Args:
        output: The folder for all of it.
        images: Validation images of each of the two sets.
        progress: Wraps loops, as `d2zero.cli.terminal.tracked` does.
        train: Train from nothing instead of using the checkpoint that comes with the package.
        settings: `key=value` changes to the training preset.
    """
    data = output / "data"
    write_dataset(data, ShapesConfig(val_images=images, train_images=6000 if train else 0), progress)
    if train:
        config = with_settings(shapes(), settings or [])
        trained = start(
            config,
            Inputs(Dataset(data), data / "vocabulary.npz"),
            output / "run",
            resume=(output / "run" / STATE_FILE).exists(),
        )
        checkpoint = trained or output / "run" / MODEL_FILE
    else:
        checkpoint = packaged_checkpoint()
    model = load_model(checkpoint)
    rows = _evaluate(model, data, output, model.checkpoint, progress)
    return DemoResult(rows, _draw(model, data, output), checkpoint)


def packaged_checkpoint() -> Path:
    """The small checkpoint that comes with the package.

    Raises:
        D2ZeroError: It is not there.
    """
    with as_file(files("d2zero.demo") / "shapes.safetensors") as path:
        if not path.is_file():
            raise D2ZeroError("this installation has no demo checkpoint; train one with `d2zero demo --train`")
        return path


def misnamed(vocabulary: Vocabulary) -> Vocabulary:
    """Give each unseen class the embedding of another unseen one, on the whole the least similar."""
    unseen = np.flatnonzero(~vocabulary.seen)
    rows = vocabulary.embeddings[unseen]
    rows = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    similarity = rows @ rows.T
    np.fill_diagonal(similarity, 10.0)
    _, other = linear_sum_assignment(similarity)
    embeddings = vocabulary.embeddings.copy()
    embeddings[unseen] = vocabulary.embeddings[unseen[other]]
    return replace(vocabulary, embeddings=embeddings)


def results_table(rows: list[Row]) -> Table:
    """The results as a table."""
    table = Table(title="masks, percent", box=box.SIMPLE)
    table.add_column("")
    metrics = [field.name for field in fields(Row) if field.name in METRICS]
    for column in ("images", *(METRICS[key].label for key in metrics)):
        table.add_column(column, justify="right")
    for row in rows:
        values = map(asdict(row).get, metrics)
        table.add_row(row.label, str(row.images), *("" if value is None else f"{value:.1f}" for value in values))
    return table


def _evaluate(model: D2Zero, data: Path, output: Path, identity: str, progress: Progress) -> list[Row]:
    named, shuffled = model.vocabulary, misnamed(model.vocabulary)
    segmenter = model.segmenter()
    mixed, alone = "instances_val_gzsi_shapes.json", "instances_val_unseen_only_unseen_shapes.json"

    def metrics(vocabulary: Vocabulary, name: str, annotations: str, images: str, modes: list[Mode]) -> dict[Mode, Any]:
        segmenter.set_vocabulary(vocabulary)
        truth = read_coco(data / "annotations" / annotations)
        run = EvaluationRun(segmenter, truth, data / images, output / name, modes, BATCH_SIZE, identity)
        return run.run(lambda items, length, _: progress(items, length, f"evaluating {name}"))

    normal = metrics(named, "mixed", mixed, "val", [Mode.GZSIS, Mode.GZSIS_COPY_PASTE, Mode.ZSIS])
    single = metrics(named, "unseen-only", alone, "val_unseen_only", [Mode.ZSIS])
    control = metrics(shuffled, "mixed-shuffled", mixed, "val", [Mode.GZSIS])
    control_single = metrics(shuffled, "unseen-only-shuffled", alone, "val_unseen_only", [Mode.ZSIS])
    return [
        _row("GZSIS, seen and unseen objects", normal[Mode.GZSIS]),
        _row("GZSIS with copy-paste", normal[Mode.GZSIS_COPY_PASTE]),
        _row("ZSIS, the same images", normal[Mode.ZSIS]),
        _row("ZSIS, unseen objects only", single[Mode.ZSIS]),
        _row("control: GZSIS, unseen embeddings shuffled", control[Mode.GZSIS]),
        _row("control: ZSIS unseen only, shuffled", control_single[Mode.ZSIS]),
    ]


def _row(label: str, summary: dict[str, Any]) -> Row:
    masks = summary["segm"]
    return Row(
        label,
        masks.get("seen_ap50"),
        masks["unseen_ap50"],
        masks.get("hm_ap50"),
        masks["unseen_recall50"],
        summary["images"],
    )


def _draw(model: D2Zero, data: Path, output: Path) -> Path:
    truth = read_coco(data / "annotations" / "instances_val_gzsi_shapes.json")
    seen = {truth.categories[name] for name in model.vocabulary.seen_names}
    both = [n for n, found in truth.annotations.items() if {a["category_id"] in seen for a in found} == {True, False}]
    chosen = (both or list(truth.annotations))[:SHEET_IMAGES]
    found = predictions(model, truth, data / "val", chosen)
    title = "D2Zero demo: classes by colour and shape, 27 seen, 9 never seen"
    sheet = draw_predictions(truth, data / "val", model.vocabulary, found, title=title)
    path = output / "contact-sheet.png"
    sheet.save(path)
    return path
