"""Is a candidate the same model as the baseline? Raw outputs on the same photos, beside the speed."""

from importlib.util import find_spec
from typing import Any

import numpy as np

from d2zero_bench.cases import Case
from d2zero_bench.report import CandidateInfo, Equality
from d2zero_runtime.segmenter import Raw

_NARROWEST_FIRST = ("float32", "float16", "bfloat16", "int8")


def compare(info: CandidateInfo, case: Case, theirs: Raw, ours: Raw, precision: str) -> Equality:
    """Compare with the baseline.

    Args:
        info: of the candidate.
        case: where.
        theirs: the baseline's class and mask logits.
        ours: the candidate's.
        precision: the lower one of the two, whose limits hold.
    """
    for tensor, left, right in zip(("class logits", "mask logits"), theirs, ours, strict=True):
        if left.shape != right.shape:
            failure = f"another model: {tensor} have shape {right.shape}, the baseline's {left.shape}"
            return Equality(info.name, case, None, None, (failure,))
    largest = [float(np.abs(left - right).max()) for left, right in zip(theirs, ours, strict=True)]
    means = [_relative(left, right) for left, right in zip(theirs, ours, strict=True)]
    if not find_spec("torch"):
        return Equality(info.name, case, largest[0], largest[1], judged=False)
    flipped = float(((theirs[1] > 0) != (ours[1] > 0)).mean())
    failures = _failures(str(case), [*largest, *means, flipped], precision)
    return Equality(info.name, case, largest[0], largest[1], tuple(failures))


def _relative(left: Any, right: Any) -> float:
    return float(np.abs(left - right).mean() / max(float(np.abs(left).mean()), 1e-12))


def _failures(case: str, figures: list[float], precision: str) -> list[str]:
    """What `d2zero verify` would say of these differences."""
    from d2zero_export.verify import LIMITS, Difference, RawParity

    return RawParity((Difference(case, *figures),)).failures(LIMITS[precision])


def lower_precision(one: str, other: str) -> str:
    """Of two, the one with the wider limits."""
    return max(one, other, key=_NARROWEST_FIRST.index)
