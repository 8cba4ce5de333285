"""Do two models find the same instances? Compared as sets, by Hungarian matching on mask overlap.

Letters: N instances of one model, M of the other.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

from d2zero_runtime import Detections

MATCHED = 0.5  # mask IoU from which two instances are the same
CLEAR_SCORE = 0.05  # instances below it are not compared: among the weakest, order is chance


@dataclass(frozen=True)
class InstanceAgreement:
    """How far the instances of two models agree.

    Args:
        instances: Compared, of the first model.
        matched: Share that the other model finds too, mask IoU at least 0.5, in 0..1.
        mean_iou: Mean IoU of the matched instances.
        same_label: Share of the matched that are named alike.
        score_difference: Largest among those.
    """

    instances: int
    matched: float
    mean_iou: float
    same_label: float
    score_difference: float


def instance_agreement(ours: Sequence[Detections], theirs: Sequence[Detections]) -> InstanceAgreement:
    """Compare the results of two models on the same images, image by image."""
    count, overlaps, same, differences = 0, [], [], []
    for left, right in zip(ours, theirs, strict=True):
        left, right = left.above(CLEAR_SCORE), right.above(CLEAR_SCORE * 0.5)
        count += len(left)
        if not len(left) or not len(right):
            continue
        iou_NM = _mask_iou(left.bitmaps(), right.bitmaps())
        # Among equal masks (a query named twice), the label decides.
        alike_NM = left.class_ids[:, None] == right.class_ids[None]
        rows, columns = linear_sum_assignment(iou_NM + 0.01 * alike_NM, maximize=True)
        for row, column in zip(rows, columns, strict=True):
            if iou_NM[row, column] >= MATCHED:
                overlaps.append(iou_NM[row, column])
                same.append(bool(alike_NM[row, column]))
                if alike_NM[row, column]:
                    differences.append(abs(float(left.scores[row] - right.scores[column])))
    return InstanceAgreement(
        instances=count,
        matched=len(overlaps) / count if count else 1.0,
        mean_iou=float(np.mean(overlaps)) if overlaps else 1.0,
        same_label=float(np.mean(same)) if same else 1.0,
        score_difference=max(differences, default=0.0),
    )


def _mask_iou(left_NHW: NDArray[np.bool_], right_MHW: NDArray[np.bool_]) -> NDArray[np.float64]:
    left = left_NHW.reshape(len(left_NHW), -1).astype(np.float32)
    right = right_MHW.reshape(len(right_MHW), -1).astype(np.float32)
    overlap = (left @ right.T).astype(np.float64)
    union = left.sum(1)[:, None] + right.sum(1)[None] - overlap
    iou_NM: NDArray[np.float64] = np.divide(overlap, union, out=np.zeros_like(overlap), where=union > 0)
    return iou_NM
