"""Is an exported file the same model as its checkpoint?

Raw tensors (batches, sizes, class counts), instances as sets, and accuracy on seen and unseen classes.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from numpy.typing import NDArray

from d2zero.data.coco import CocoFile
from d2zero.evaluation.run import EvaluationRun
from d2zero.model import D2Zero
from d2zero_export.instances import InstanceAgreement, instance_agreement
from d2zero_runtime import D2ZeroError, Mode, Segmenter, Vocabulary, read_image

FIGURES = ("seen_ap50", "unseen_ap50", "hm_ap50", "seen_recall50", "unseen_recall50", "hm_recall50", "ap")


@dataclass(frozen=True)
class Difference:
    """One comparison: largest absolute differences, and the share of mask pixels that flip."""

    case: str
    class_logits: float
    mask_logits: float
    flipped: float


@dataclass(frozen=True)
class RawParity:
    """What was compared."""

    differences: tuple[Difference, ...]

    def failures(self, tolerance: float) -> list[str]:
        """What exceeds the tolerance or is no number: the tensor, the value, the limit, the case."""
        return [
            f"{tensor} differ by {getattr(entry, tensor):.2e} (limit {tolerance:.0e}) for {entry.case}"
            for entry in self.differences
            for tensor in ("class_logits", "mask_logits")
            if not getattr(entry, tensor) <= tolerance
        ]

    def require(self, tolerance: float) -> None:
        """Pass, or refuse.

        Raises:
            D2ZeroError: names the tensor, the value and the limit.
        """
        failures = self.failures(tolerance)
        if failures:
            raise D2ZeroError(f"the exported model is not the checkpoint's: {failures[0]}; the file was not written")


@dataclass(frozen=True)
class Limits:
    """What may differ between a checkpoint and its float32 export."""

    logits: float = 1e-3  # class and mask logits
    matched: float = 0.99  # least share of instances found by both, and named alike
    points: float = 0.1  # AP and recall, in points of percent


@dataclass(frozen=True)
class Verification:
    """All that was compared, and what of it failed."""

    parity: RawParity
    instances: InstanceAgreement
    accuracy: dict[str, dict[str, tuple[float, float]]]  # mode -> figure -> (checkpoint, exported), percent
    failures: tuple[str, ...]


def verify(
    model: D2Zero,
    segmenter: Segmenter,
    images: Sequence[Path] = (),
    annotations: CocoFile | None = None,
    image_folder: Path | None = None,
    limits: Limits | None = None,
) -> Verification:
    """Compare an exported model with its checkpoint.

    Args:
        model: of the checkpoint.
        segmenter: the exported file.
        images: files to compare instances on; drawn pictures without any.
        annotations: to compare accuracy on, in every mode that the vocabulary allows.
        image_folder: of the annotations' images.
        limits: what may differ.
    """
    limits = limits or Limits()
    parity = raw_parity(model, segmenter)
    pictures = [read_image(path) for path in images] or [
        _drawn(np.random.default_rng(number), 120, 160) for number in range(4)
    ]
    ours = [model.predict([picture])[0] for picture in pictures]
    theirs = [segmenter(picture) for picture in pictures]
    agreement = instance_agreement(ours, theirs)
    accuracy = _accuracy(model, segmenter, annotations, image_folder) if annotations and image_folder else {}
    failures = parity.failures(limits.logits)
    for what, value in (("matched", agreement.matched), ("same_label", agreement.same_label)):
        if value < limits.matched:
            failures.append(f"instances {what} {value:.4f} (limit {limits.matched})")
    failures += [
        f"{mode} {figure} differs by {abs(left - right):.2f} points: {left:.2f} and {right:.2f} (limit {limits.points})"
        for mode, figures in accuracy.items()
        for figure, (left, right) in figures.items()
        if abs(left - right) > limits.points
    ]
    return Verification(parity, agreement, accuracy, tuple(failures))


def _accuracy(
    model: D2Zero, segmenter: Segmenter, annotations: CocoFile, images: Path
) -> dict[str, dict[str, tuple[float, float]]]:
    has_unseen = bool((~model.vocabulary.seen).any())
    modes = list(Mode) if has_unseen else [Mode.GZSIS]
    both = []
    for candidate in (model, segmenter):
        with TemporaryDirectory() as folder:
            both.append(EvaluationRun(candidate, annotations, images, Path(folder), modes).run())
    return {
        str(mode): {
            f"{kind} {figure}": (both[0][mode][kind][figure], both[1][mode][kind][figure])
            for kind in ("segm", "bbox")
            for figure in FIGURES
            if both[0][mode][kind].get(figure) is not None
        }
        for mode in modes
    }


def raw_parity(model: D2Zero, segmenter: Segmenter) -> RawParity:
    """Compare raw output on drawn images: a batch, its images alone, other sizes, other class counts."""
    random = np.random.default_rng(0)
    wide, tall, square = (_drawn(random, *size) for size in ((96, 160), (150, 90), (64, 64)))
    own = model.vocabulary
    found = [
        _compare("one image, 96 x 160", model, segmenter, [wide]),
        _compare("one image, 150 x 90", model, segmenter, [tall]),
        _compare("a batch of three equal sizes", model, segmenter, [square, square[::-1].copy(), square]),
        _compare("a list of three sizes", model, segmenter, [wide, tall, square]),
    ]
    for count in (1, 7, len(own) + 5):
        rows = random.standard_normal((count, own.width)).astype(np.float32)
        words = Vocabulary(tuple(f"class {i}" for i in range(count)), rows)
        found.append(_compare(f"{count} other classes", model, segmenter, [square], words))
    return RawParity(tuple(found))


def _compare(
    case: str,
    model: D2Zero,
    segmenter: Segmenter,
    images: list[NDArray[np.uint8]],
    words: Vocabulary | None = None,
) -> Difference:
    before = model.vocabulary, segmenter.vocabulary
    if words is not None:
        model.set_vocabulary(replace(words, source=before[0].source))
        segmenter.set_vocabulary(replace(words, source=before[1].source))
    try:
        ours, theirs = model.predict_raw(images), segmenter.predict_raw(images)
    finally:
        model.set_vocabulary(before[0])
        segmenter.set_vocabulary(before[1])
    masks = ours.mask_logits.numpy()
    return Difference(
        case,
        class_logits=float(np.abs(ours.class_logits.numpy() - theirs.class_logits).max()),
        mask_logits=float(np.abs(masks - theirs.mask_logits).max()),
        flipped=float(((masks > 0) != (theirs.mask_logits > 0)).mean()),
    )


def _drawn(random: np.random.Generator, height: int, width: int) -> NDArray[np.uint8]:
    """A picture with structure: coarse blocks of colour and some noise."""
    blocks = random.integers(0, 256, (-(-height // 16), -(-width // 16), 3)).repeat(16, 0).repeat(16, 1)
    noisy = blocks[:height, :width] + random.normal(0, 10, (height, width, 3))
    return noisy.clip(0, 255).astype(np.uint8)
