"""Plain pycocotools over a result file, in a process of its own: what `d2zero eval --detections` is compared with.

Imports nothing of ours, whose loading would count as pycocotools' time.
"""

import argparse
import json
from pathlib import Path

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

IOU_TYPES = ("segm", "bbox")


def main() -> None:
    """Evaluate masks and boxes, write AP and recall of every class that has annotations."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("annotations", type=Path)
    parser.add_argument("detections", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--thresholds", type=float, nargs="+", help="IoU; without it, all of pycocotools' defaults")
    given = parser.parse_args()
    truth = COCO(str(given.annotations))
    found = truth.loadRes(str(given.detections))
    metrics = {kind: evaluate(truth, found, kind, given.thresholds) for kind in IOU_TYPES}
    given.output.write_text(json.dumps(metrics))


def evaluate(truth: COCO, found: COCO, kind: str, thresholds: list[float] | None) -> dict[str, dict[str, float]]:
    """`{class: {ap50, recall50}}` in percent.

    With thresholds given, only what zero-shot metrics need is evaluated: objects of any size, 100 detections.
    """
    run = COCOeval(truth, found, kind)
    if thresholds:
        run.params.iouThrs = np.array(thresholds)
        run.params.areaRng, run.params.areaRngLbl = [[0, 1e10]], ["all"]
        run.params.maxDets = [100]
    run.evaluate()
    run.accumulate()
    level = int(np.argmin(np.abs(run.params.iouThrs - 0.5)))
    precision, recall = run.eval["precision"][level, :, :, 0, -1], run.eval["recall"][level, :, 0, -1]
    return {
        truth.cats[number]["name"]: {
            "ap50": 100 * float(precision[:, place].mean()),
            "recall50": 100 * float(recall[place]),
        }
        for place, number in enumerate(run.params.catIds)
        if recall[place] >= 0  # -1 where a class has no annotations
    }


if __name__ == "__main__":
    main()
