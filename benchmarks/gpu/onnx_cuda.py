"""Measures ONNX Runtime's CUDA provider, after asking it where it places each node.

    python benchmarks/gpu/onnx_cuda.py --json onnxruntime.json --work FOLDER float32.onnx float16.onnx

`onnxruntime` is the package that is found first; the one with the CUDA provider is carried (README.md).
"""

import json
import sys
from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from exports import SIZE, SMALL
from inference import measure, options_of, plan_of
from stages import exit_code, told, write_json

from d2zero_runtime import D2ZeroError

CONSUMERS = 12  # kinds of nodes that are named


def placement(path: Path, provider: str, size: tuple[int, int]) -> dict[str, Any]:
    """Nodes and their time by provider, from ONNX Runtime's own profile of one run."""
    import onnxruntime

    from d2zero_runtime.backends.onnxruntime_gpu import require_startable

    name = {"cuda": "CUDAExecutionProvider", "cpu": "CPUExecutionProvider"}[provider]
    require_startable(onnxruntime, [name])
    with TemporaryDirectory() as folder:
        options = onnxruntime.SessionOptions()
        options.enable_profiling = True
        options.profile_file_prefix = f"{folder}/profile"
        session = onnxruntime.InferenceSession(str(path), options, providers=[name], enable_fallback=0)
        session.run(None, {"images": np.zeros((1, 3, *size), np.float32)})
        events = json.loads(Path(session.end_profiling()).read_text())
    nodes = [
        event for event in events if "provider" in event.get("args", {}) and event["name"].endswith("_kernel_time")
    ]
    count = Counter(event["args"]["provider"] for event in nodes)
    on_cpu = Counter(event["args"]["op_name"] for event in nodes if event["args"]["provider"] != name)
    spent: Counter[str] = Counter()
    for event in nodes:
        spent[event["args"]["op_name"]] += event["dur"]
    return {
        "onnxruntime": onnxruntime.__version__,
        "providers": session.get_providers(),
        "nodes": dict(count),
        "elsewhere": dict(on_cpu.most_common()),
        "host_ms": {operator: micros / 1000 for operator, micros in spent.most_common(CONSUMERS)},
    }


def main() -> int:
    """Placement first, then times; 1 if something went wrong."""
    given = options_of(__doc__).parse_args()
    given.provider = "cpu" if given.rehearsal else given.provider
    found: dict[str, Any] = {"placement": {}}
    report = given.json.with_name("onnxruntime times.json")  # joined as a stage of its own
    for name in given.names:
        try:
            found["placement"][name] = placement(given.work / name, given.provider, SMALL if given.rehearsal else SIZE)
        except Exception as error:  # onnxruntime has its own exceptions
            found["placement"][name] = {"error": told(error)}
        print(f"{name}: {found['placement'][name]}", flush=True)
        write_json(given.json, found)
    given.variants = "model"  # the baseline, for equality and for peers that know no provider
    plan = plan_of(given)
    try:
        measure(plan, report, {})
    except D2ZeroError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return int(bool(plan.left_out) or any("error" in entry for entry in found["placement"].values()))


if __name__ == "__main__":
    sys.exit(exit_code(main))
