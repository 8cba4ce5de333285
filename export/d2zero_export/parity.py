"""How far raw outputs of two versions of a model are apart, and how far they may be.

The decoder attends where mask logits are not negative. A logit that is nearer to 0 than rounding errors falls to
either side, and its query then looks at a pixel more or less. At 800×1216 that happens to a few of six million such
bits in every two versions of a model, the published one in float32 and in float64 among them: single queries differ
by some 5e-3 then, the others, who attend to them, by 1e-4 and sometimes more. So single logits are limited where the
checkpoint attends by the file's own masks, which an ONNX file can be asked for (`same_attention`): those of all
queries. Where no file was asked, those of nine queries in ten are. All logits are limited on average in every case
(docs/decisions/0014, 0024).

Letters: B batch, Q queries, K classes.
"""

import math
from copy import copy
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from d2zero_runtime import D2ZeroError, Preprocessing, Segmenter, Vocabulary
from d2zero_runtime.images import PADDING_LOGIT

MOST = 0.9  # of an image's queries


@dataclass(frozen=True)
class Limits:
    """What may differ between a checkpoint and an exported model."""

    logits: float = 1e-3  # class and mask logits, largest difference
    relative: float = 1e-3  # the same, mean difference of all as a share of the mean size
    matched: float = 0.99  # minimum share of instances found by both, and named alike
    points: float = 0.1  # AP and recall, in points of percent
    hm_points: float = 0.1  # of their harmonic means over seen and unseen classes

    def points_of(self, metric: str) -> float:
        """The limit of an accuracy metric."""
        return self.hm_points if metric.startswith("hm") else self.points


# In low precision the bits of attention masks that flip are too many for limits on single logits.
_LOW = Limits(logits=math.inf, relative=0.05, points=0.5, hm_points=0.5)
LIMITS = {
    "float32": Limits(),
    # Rounded on a CPU, matmuls and convolutions of the demo: up to 0.34 %.
    "tf32": replace(_LOW, relative=0.01),
    "float16": _LOW,
    "bfloat16": replace(_LOW, relative=0.1),
    # Measured on the demo's model, by calibration photos, method and library: logits 3 to 11 % on drawn images; 99.1 %
    # matched; unseen AP50 within 0.8 points, harmonic means within 0.4.
    "int8": replace(_LOW, relative=0.2, matched=0.98, points=1.0),
}


def limits_for(precision: str, max_logits: float | None = None) -> Limits:
    """What may differ in a precision.

    Args:
        precision: The precision, as `Segmenter.precision` gives it.
        max_logits: Another limit on the largest difference of logits.
    """
    limits = LIMITS[precision]
    return limits if max_logits is None else replace(limits, logits=max_logits)


@dataclass(frozen=True)
class Difference:
    """One comparison of raw outputs.

    Args:
        case: The name of what was compared.
        class_logits: Largest absolute difference.
        mask_logits: Largest absolute difference.
        class_most: Largest of most queries (nine in ten, unless said otherwise), in the worst image.
        mask_most: The same of mask logits.
        class_relative: Mean difference of class logits, as a share of their mean size.
        mask_relative: The same of mask logits.
        flipped: Share of mask pixels whose sign flips.
    """

    case: str
    class_logits: float
    mask_logits: float
    class_most: float
    mask_most: float
    class_relative: float
    mask_relative: float
    flipped: float

    def failures(self, limits: Limits) -> list[str]:
        """What exceeds a limit or is no number: the tensor, the value, the limit, the case."""
        found = []
        for kind in ("class", "mask"):
            most, mean = getattr(self, f"{kind}_most"), getattr(self, f"{kind}_relative")
            if not most <= limits.logits:
                found.append(f"{kind}_logits differ by {most:.2e} (limit {limits.logits:.0e}) for {self.case}")
            elif not mean <= limits.relative:
                found.append(
                    f"{kind}_logits differ by {mean:.2%} on average (limit {limits.relative:.1%}) for {self.case}"
                )
        return found


def difference(
    case: str,
    ours: tuple[NDArray[np.float32], NDArray[np.float32]],
    theirs: tuple[NDArray[np.float32], NDArray[np.float32]],
    *,
    most: float = MOST,
) -> Difference:
    """Compare class logits (B, Q, K+1) and mask logits (B, Q, H/4, W/4); what is padding in ours does not count.

    Args:
        case: The name of what is compared.
        ours: Those of the reference.
        theirs: Those of what is compared with it.
        most: The share of queries whose largest difference is `class_most` and `mask_most`.
    """
    classes, masks = (np.abs(left - right) for left, right in zip(ours, theirs, strict=True))
    real = ours[1] > PADDING_LOGIT
    return Difference(
        case,
        class_logits=float(classes.max()),
        mask_logits=float(masks.max()),
        class_most=_most(classes, most),
        mask_most=_most(masks, most),
        class_relative=_relative(classes, ours[0]),
        mask_relative=_relative(masks[real], ours[1][real]),
        flipped=float(((ours[1] > 0) != (theirs[1] > 0)).mean()),
    )


def _most(differences: NDArray[np.float32], share: float) -> float:
    """The largest difference (B, Q, …) except for the queries that differ most, in the worst image."""
    by_query = differences.reshape(*differences.shape[:2], -1).max(axis=2)
    return float(np.quantile(by_query, share, axis=1, method="higher").max())


def _relative(differences: NDArray[np.float32], values: NDArray[np.float32]) -> float:
    return float(differences.mean() / max(float(np.abs(values).mean()), 1e-12))


@dataclass(frozen=True)
class RawParity:
    """What was compared.

    Args:
        differences: Each by its own attention masks.
        same_attention: Both by the file's masks, all queries; if there are any, only these limit single logits.
    """

    differences: tuple[Difference, ...]
    same_attention: tuple[Difference, ...] = ()

    def failures(self, limits: Limits) -> list[str]:
        """What exceeds a limit in any case."""
        of_own = replace(limits, logits=math.inf) if self.same_attention else limits
        found = [failure for entry in self.same_attention for failure in entry.failures(limits)]
        return found + [failure for entry in self.differences for failure in entry.failures(of_own)]

    def require(self, limits: Limits) -> None:
        """Pass, or refuse.

        Raises:
            D2ZeroError: Names the tensor, the value and the limit.
        """
        failures = self.failures(limits)
        if failures:
            raise D2ZeroError(f"the exported model is not the checkpoint's: {failures[0]}; the file was not written")


def drawn_image(random: np.random.Generator, height: int, width: int) -> NDArray[np.uint8]:
    """A picture with structure: coarse blocks of colour and some noise."""
    blocks = random.integers(0, 256, (-(-height // 16), -(-width // 16), 3)).repeat(16, 0).repeat(16, 1)
    noisy = blocks[:height, :width] + random.normal(0, 10, (height, width, 3))
    return noisy.clip(0, 255).astype(np.uint8)


def partly_padded(height: int, width: int) -> tuple[int, int]:
    """The size of an image that leaves a part of an input of this size to padding."""
    return height - height // 3, width - width // 4


def alike(reference: Segmenter, preprocessing: Preprocessing, vocabulary: Vocabulary) -> Segmenter:
    """The reference with another's preprocessing and vocabulary, for comparing like with like."""
    contract = replace(reference.contract, preprocessing=preprocessing)
    same = copy(reference)
    same.contract = contract
    same.set_vocabulary(replace(vocabulary, source=reference.vocabulary.source))
    return same
