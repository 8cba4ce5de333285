"""Which kernels take the time of one run: of the network, and from an array to packed detections.

    python benchmarks/gpu/top_kernels.py --json kernels.json --work FOLDER float16.pt2

On a GPU these are kernels of one replayed CUDA graph, by torch's profiler, with the times of the run with and without
the graph. On a CPU (`--rehearsal`), torch's operators.
"""

import re
import statistics
import sys
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from exports import SIZE, SMALL
from stages import exit_code, parser_of, write_json
from torch.profiler import ProfilerActivity, profile

import d2zero.model.operators  # noqa: F401 -- which the file may call
from d2zero_bench.candidates import elapsed_ms
from d2zero_bench.cases import drawn_image
from d2zero_runtime import load

TOP = 40
SHOWN = 12
GROUPS = {  # the first that fits; kernels of Triton have our names, or those of Inductor
    "copies": r"memcpy|memset|copy|nchwtonhwc|nhwctonchw|convert_element",
    "masks": r"^mask_kernel",
    "deformable attention": r"^forward_kernel|grid_sampl",
    "masked attention": r"^split_kernel|^combine_kernel",
    "attention": r"flash|fmha|attention|sdpa",
    "convolution": r"conv|fprop|dgrad|wgrad|winograd|implicit",
    "matmul": r"gemm|gemv|nvjet|cutlass|cublas|splitk|addmm|mm\b|linear",
    "elementwise": r"triton_|elementwise|vectorized|reduce|softmax|norm|unrolled|fused|aten::",
}


def group_of(kernel: str) -> str:
    """What a kernel is for, judged by its name."""
    found = (group for group, pattern in GROUPS.items() if re.search(pattern, kernel, re.IGNORECASE))
    return next(found, "other")


def profiled(run: Callable[[], object], on_gpu: bool) -> dict[str, Any]:
    """Kernels of one run by time, and their sums by group."""
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    run()
    with profile(activities=activities) as found:
        run()
    rows = []
    for event in found.key_averages():
        ours = "CUDA" in str(event.device_type) if on_gpu else True
        micros = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        if ours and micros > 0 and not event.key.startswith("ProfilerStep"):
            rows.append({"kernel": event.key[:200], "group": group_of(event.key), "count": event.count, "us": micros})
    rows.sort(key=lambda row: -row["us"])
    sums: Counter[str] = Counter()
    counts: Counter[str] = Counter()
    for row in rows:
        sums[row["group"]] += row["us"]
        counts[row["group"]] += row["count"]
    groups = {group: {"us": round(us, 1), "count": counts[group]} for group, us in sums.most_common()}
    return {"total_us": sum(sums.values()), "launches": sum(counts.values()), "groups": groups, "top": rows[:TOP]}


def show(name: str, found: dict[str, Any]) -> None:
    """A few lines for people."""
    print(f"{name}: {found['total_us']:.0f} us in {found['launches']} kernels")
    for group, row in found["groups"].items():
        print(f"  {group:>22} {row['us']:9.1f} us {row['count']:5d}")
    for row in found["top"][:SHOWN]:
        print(f"  {row['us']:9.1f} us {row['count']:4d}  {row['kernel'][:100]}", flush=True)


def main() -> int:
    """Profile, write after each part."""
    parser = parser_of(__doc__, work=True)
    parser.add_argument("name")
    given = parser.parse_args()
    on_gpu = torch.cuda.is_available()
    image = drawn_image(np.random.default_rng(0), *(SMALL if given.rehearsal else SIZE))
    found: dict[str, Any] = {}
    for graphs in (True, False):
        segmenter = load(given.work / given.name, cuda_graphs=graphs)
        embeddings = None if segmenter.contract.baked else segmenter.vocabulary.embeddings
        run = segmenter.backend.resident(segmenter.input_of([image], (image.shape[0], image.shape[1])), embeddings)
        whole = lambda model=segmenter: model(image, masks="packed")  # noqa: E731
        how = "with" if graphs else "without"
        for name, call in (("network", run), ("array → packed detections", whole)):
            for _ in range(3):
                call()
            times = [elapsed_ms(call) for _ in range(2 if given.rehearsal else 30)]
            found[f"{name}, ms {how} graph"] = {"p50": statistics.median(times), "least": min(times)}
            print(f"{name} {how} graph: {statistics.median(times):.3f} ms, least {min(times):.3f} ms", flush=True)
            write_json(given.json, found)
            if graphs:
                found[name] = profiled(call, on_gpu)
                write_json(given.json, found)
                show(name, found[name])
    return 0


if __name__ == "__main__":
    sys.exit(exit_code(main))
