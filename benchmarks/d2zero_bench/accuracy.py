"""Seen, unseen, harmonic mean: a candidate's accuracy on annotated images, as `d2zero eval` finds it."""

from pathlib import Path
from tempfile import TemporaryDirectory

from d2zero.cli.terminal import tracked
from d2zero.data.coco import read_coco
from d2zero.evaluation.run import EvaluationRun
from d2zero_bench.report import Accuracy
from d2zero_runtime import Mode, Segmenter

FIGURES = ("seen_ap50", "unseen_ap50", "hm_ap50", "seen_recall50", "unseen_recall50", "hm_recall50", "ap")


def measure_accuracy(name: str, segmenter: Segmenter, annotations: Path, images: Path, limit: int | None) -> Accuracy:
    """Evaluate in GZSIS mode, where seen and unseen classes compete.

    Args:
        name: the candidate's.
        segmenter: with its own vocabulary.
        annotations: COCO JSON.
        images: the folder of its images.
        limit: only the first so many.

    Raises:
        D2ZeroError: the annotations are of other classes, or images are missing.
    """
    with TemporaryDirectory() as folder:
        truth, modes = read_coco(annotations), [Mode.GZSIS]
        run = EvaluationRun(segmenter, truth, images, Path(folder), modes, limit=limit, require_all=True)
        summary = run.run(lambda items, length, _: tracked(items, length, f"accuracy of {name}"))[Mode.GZSIS]
    masks = summary["segm"]
    return Accuracy(name, str(Mode.GZSIS), summary["images"], {figure: masks.get(figure) for figure in FIGURES})
