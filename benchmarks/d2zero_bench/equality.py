"""Is a candidate the same model as the baseline? Raw outputs on the same photos, beside the speed."""

from d2zero_bench.cases import Case
from d2zero_bench.report import CandidateInfo, Equality
from d2zero_export.parity import LIMITS, difference
from d2zero_runtime.backends.base import Raw

_NARROWEST_FIRST = ("float32", "tf32", "float16", "bfloat16", "int8")


def compare(info: CandidateInfo, case: Case, theirs: Raw, ours: Raw, precision: str) -> Equality:
    """Compare with the baseline, as `d2zero verify` does.

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
    found = difference(str(case), theirs, ours)
    return Equality(
        info.name,
        case,
        found.class_logits,
        found.mask_logits,
        tuple(found.failures(LIMITS[precision])),
        found.class_most,
        found.mask_most,
    )


def lower_precision(one: str, other: str) -> str:
    """Of two, the one with the wider limits."""
    return max(one, other, key=_NARROWEST_FIRST.index)
