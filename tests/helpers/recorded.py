"""Comparing instances with the recorded ones of the published implementation (`../shared/reference`)."""

import json
from typing import Any

import numpy as np

from d2zero_runtime.masks import rle

MODES = ("gzsis", "zsis", "gzsis-copy-paste")


def require_recorded_detections(model: Any, out: Any, recorded: Any) -> None:
    """The hundred instances in three modes: of a checkpoint's model or an exported one, from its raw output."""
    masks = json.loads(str(recorded["instance_rles_json"]))
    output_size = tuple(int(side) for side in recorded["output_hw"])
    for mode in MODES:
        detections = model.postprocess(out, [recorded["image_u8"].shape[:2]], [output_size], mode)[0]
        key = mode.replace("-", "_")
        first = len(model.vocabulary.seen_names) if mode == "zsis" else 0  # ZSIS counts only unseen classes
        ours = sorted(
            zip(
                detections.class_ids, map(rle.area, detections.masks), detections.scores, detections.boxes, strict=True
            ),
            key=lambda row: row[:3],
        )
        theirs = sorted(
            zip(
                recorded[f"{key}_classes"] + first,
                recorded[f"{key}_mask_areas"],
                recorded[f"{key}_scores"],
                recorded[f"{key}_boxes"],
                strict=True,
            ),
            key=lambda row: row[:3],
        )
        assert [row[0] for row in ours] == [row[0] for row in theirs]
        for column, atol in ((1, 4), (2, 1e-5), (3, 1)):  # mask pixels, score, box pixels
            left, right = (np.array([row[column] for row in rows]) for rows in (ours, theirs))
            np.testing.assert_allclose(left, right, atol=atol, rtol=0, err_msg=f"{mode} {column}")
        if mode == "gzsis":
            assert matched_share(detections.bitmaps(), masks["gzsis"]) == 1.0


def matched_share(ours: np.ndarray, recorded: list[dict]) -> float:
    """Share of recorded masks that one of ours overlaps by more than 0.999."""
    theirs = np.stack([rle.decode(mask) for mask in recorded]).reshape(len(recorded), -1).astype(np.float32)
    flat = ours.reshape(len(ours), -1).astype(np.float32)
    overlap = flat @ theirs.T
    union = flat.sum(1)[:, None] + theirs.sum(1) - overlap
    return float(((overlap / union).max(0) > 0.999).mean())
