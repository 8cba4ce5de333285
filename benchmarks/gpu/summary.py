"""The targets, from the results of both calls.

    python benchmarks/gpu/summary.py FOLDER

Needs nothing but the standard library. A report of d2zero benchmark in the results becomes a page with:
`python benchmarks/gpu/summary.py FOLDER --html`, which needs the project.
"""

import argparse
import json
import statistics
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

SHAPE = "800x1216"
OURS = "float16.pt2"
PIPELINE = ("preprocess", "inference", "postprocess")
Findings = dict[str, Any]  # by stage


def read(results: Path) -> Findings:
    """What the stages of both calls found; stages that found nothing are absent."""
    found: Findings = {}
    for name in ("first", "second"):
        path = results / f"{name}.json"
        stages = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        found |= {stage: entry["found"] for stage, entry in stages.items() if "found" in entry}
    return found


def failed_tests(found: Findings) -> float:
    """How many failed, if any ran."""
    if not found["passed"] and not found["failed"]:
        raise ValueError("all were skipped")
    return len(found["failed"])


def samples(report: Findings, candidate: str) -> list[dict[str, float]]:
    """Rounds of a candidate of a report of `d2zero benchmark`."""
    return next(result["samples"] for result in report["results"] if result["candidate"] == candidate)


def median(report: Findings, candidate: str, parts: Iterable[str]) -> float:
    """Milliseconds of some stages together."""
    chosen = tuple(parts)
    return statistics.median(sum(sample[part] for part in chosen) for sample in samples(report, candidate))


def ratio(report: Findings, slower: str, faster: str) -> float:
    """Of networks, round by round."""
    pairs = zip(samples(report, slower), samples(report, faster), strict=False)
    return statistics.median(one["network"] / other["network"] for one, other in pairs)


def deformable(found: Findings) -> float:
    """grid_sample's time over the Triton kernel's: forward, float16, batch 1."""
    rows = {
        row["form"]: row["median_ms"]
        for row in found["timings"]
        if (row["shape"], row["batch"], row["type"], row["pass"]) == (SHAPE, 1, "float16", "forward")
    }
    return rows["grid_sample"] / rows["triton"]


def training(found: Findings) -> float:
    """The published step's time over that of the fastest variant."""
    totals = {
        result["variant"]: [sum(sample.values()) for sample in result["samples"]]
        for result in found["results"]
        if result["samples"]
    }
    base = totals.pop("published")
    return max(statistics.median(a / b for a, b in zip(base, other, strict=False)) for other in totals.values())


def batched(report: Findings) -> float:
    """Images per second of the networks' runs in batches of eight."""
    return 8000 / median(report, "float16-batch8.pt2", ("network",))


def nodes_elsewhere(found: Findings) -> float:
    """Nodes that ONNX Runtime places on the CPU, of the float16 file."""
    return sum(found["placement"]["float16.onnx"]["elsewhere"].values())


def best_masked(found: Findings) -> float:
    """Torch's attention over ours at the largest level in float16."""
    row = next(row for row in found["levels"] if row["type"] == "float16")
    return row["ms"]["torch, with making the mask"] / row["ms"]["ours"]


Figure = tuple[str, str, str, float | None, Callable[[Findings], float]]  # figure, unit, stage, target, how
AT_MOST = " ms"
FIGURES: tuple[Figure, ...] = (
    ("tests that failed", " failed", "tests", 0, failed_tests),
    ("array → packed detections, float16", AT_MOST, "ours", 6, lambda found: median(found, OURS, PIPELINE)),
    ("JPEG → packed detections, float16", AT_MOST, "ours", 15,
     lambda found: median(found, OURS, ("decode", *PIPELINE))),
    ("network, float16", AT_MOST, "ours", None, lambda found: median(found, OURS, ("network",))),
    ("network against eager float32 peer", "×", "peers", 5, lambda found: ratio(found, "mask2former", OURS)),
    ("network against eager TF32 peer", "×", "peers", None, lambda found: ratio(found, "mask2former-tf32", OURS)),
    ("network against compiled float16 peer", "×", "compiled peer", 2,
     lambda found: ratio(found, "mask2former-float16-compiled", OURS)),
    ("deformable attention against grid_sample", "×", "deformable", 5, deformable),
    ("masked attention against torch's", "×", "masked attention", None, best_masked),
    ("training step against the published form", "×", "training", 2, training),
    ("network, batch 8", " images/s", "batch 8", None, batched),
    ("ONNX Runtime, CUDA: network, float16", AT_MOST, "onnxruntime times", None,
     lambda found: median(found, "float16.onnx", ("network",))),
    ("ONNX Runtime, CUDA: nodes elsewhere", " nodes", "onnxruntime", None, nodes_elsewhere),
)  # fmt: skip


def text(results: Path) -> str:
    """A short table: metric, target, measured, met."""
    found, lines = read(results), [f"{'metric':<42} {'target':>10} {'measured':>16}  met"]
    for name, unit, stage, target, how in FIGURES:
        try:
            value: float | None = how(found[stage])
        except (KeyError, StopIteration, TypeError, ValueError, ZeroDivisionError):  # not (fully) measured
            value = None
        aim = "" if target is None else f"{'≥' if unit == '×' else '≤'} {target:g}{unit}"
        met = ""
        if target is not None and value is not None:
            met = "yes" if (value >= target if unit == "×" else value <= target) else "no"
        lines.append(f"{name:<42} {aim:>10} {'–' if value is None else f'{value:.4g}{unit}':>16}  {met}")
    return "\n".join(lines)


def write_pages(results: Path) -> None:
    """Each report of `d2zero benchmark` as HTML, beside the results."""
    from d2zero_bench.page import write_html
    from d2zero_bench.report import Report

    for stage, content in read(results).items():
        if isinstance(content, dict) and "baseline" in content:
            write_html(Report.from_dict(content), results / f"{stage.replace(' ', '-')}.html")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    parser.add_argument("--html", action="store_true")
    given = parser.parse_args()
    if given.html:
        write_pages(given.results)
    print(text(given.results))
