"""What the machine is, and what torch and Triton choose there.

    python benchmarks/gpu/machine.py --json machine.json

Read only: nothing of the GPU is set.
"""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

if "--rehearsal" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"  # before torch, which imports Triton

import numpy as np
import torch
from masked import HEADS, exact, ours
from masked import draw as draw_masked
from stages import exit_code, parser_of, told, write_json
from torch.nn.attention import SDPBackend

from d2zero.model.deformable import grid_sample, triton_sample
from d2zero_bench.environment import environment
from d2zero_runtime.masks.device import Sizes, in_one_kernel, in_steps

QUERY = "name,driver_version,memory.total,clocks.sm,clocks.max.sm,clocks.mem,temperature.gpu,power.draw,power.limit"
# Queries, keys, whether there is a mask; heads of 32 channels.
ATTENTIONS = {
    "decoder, self": (100, 100, False),
    "decoder, cross, 950 keys": (100, 950, True),
    "decoder, cross, 3800 keys": (100, 3800, True),
    "decoder, cross, 15200 keys": (100, 15_200, True),
}


def smi() -> str:
    """What nvidia-smi says, if there is one."""
    try:
        command = ["nvidia-smi", f"--query-gpu={QUERY}", "--format=csv"]
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError) as error:
        return str(error)


def settings() -> dict[str, Any]:
    """Versions of libraries, and TF32 as it is by default."""
    backends = torch.backends
    gpu = torch.cuda.get_device_properties(0) if torch.cuda.is_available() else None
    return {
        "cuda": torch.version.cuda,
        "cudnn": backends.cudnn.version() if gpu else None,
        "gpu": gpu and {"name": gpu.name, "processors": gpu.multi_processor_count, "l2": gpu.L2_cache_size},
        "float32 matmul": backends.cuda.matmul.fp32_precision,
        "float32 convolution": backends.cudnn.conv.fp32_precision,
        "cudnn allows tf32": backends.cudnn.allow_tf32,
    }


def chosen_attention(device: str) -> dict[str, str]:
    """The kernels that torch's scaled dot product attention takes for our shapes."""
    found = {}
    for name, (queries, keys, masked) in ATTENTIONS.items():
        for dtype in (torch.float16, torch.bfloat16, torch.float32):
            asked, read = (torch.zeros(1, HEADS, count, 32, device=device, dtype=dtype) for count in (queries, keys))
            mask = torch.ones(1, HEADS, queries, keys, device=device, dtype=torch.bool) if masked else None
            choice = torch._fused_sdp_choice(asked, read, read, mask)
            found[f"{name}, {dtype}".replace("torch.", "")] = SDPBackend(choice).name
    return found


def deformable(device: str) -> float:
    """Error of the Triton kernel."""
    sizes, generator = [(3, 5), (6, 10)], torch.Generator(device).manual_seed(0)
    values = torch.randn(1, 75, 8, 32, generator=generator, device=device)
    locations = torch.rand(1, 4, 8, 2, 4, 2, generator=generator, device=device)
    weights = torch.rand(1, 4, 8, 2, 4, generator=generator, device=device)
    difference = triton_sample(values, sizes, locations, weights) - grid_sample(values, sizes, locations, weights)
    return difference.abs().max().item()


def masked(device: str) -> float:
    """Error of the Triton kernel."""
    inputs = draw_masked(5, 70, torch.float32, device)
    return (ours.masked_attention(*inputs, HEADS) - exact(inputs)).abs().max().item()


def masks(device: str) -> float:
    """Share of bits that the Triton kernel has otherwise than torch's operators."""
    logits = torch.randn(3, 8, 12, generator=torch.Generator(device).manual_seed(0), device=device)
    way = Sizes((32, 48), (32, 48), (32, 48))
    first, second = (find(logits, range(3), way, True)[1] for find in (in_one_kernel, in_steps))
    assert first is not None and second is not None
    return float(np.unpackbits(first ^ second).mean())


def main() -> int:
    """Write what is found as it is found; 1 if a kernel does not compile or is wrong."""
    given = parser_of(__doc__).parse_args()
    device = "cpu" if given.rehearsal else "cuda"
    found: dict[str, Any] = {"nvidia-smi": smi(), "environment": environment([], None, "benchmarks/gpu")}
    wrong = False
    questions: dict[str, Callable[[], object]] = {
        "settings": settings,
        "attention": lambda: chosen_attention(device),
        **{
            f"kernel of {call.__name__}": lambda call=call: checked(call, device)
            for call in (deformable, masked, masks)
        },
    }
    for name, question in questions.items():
        try:
            found[name] = question()
        except Exception as error:  # Triton's and CUDA's are of many kinds
            found[name], wrong = told(error), True
        write_json(given.json, found)
        print(f"{name}: {found[name]}", flush=True)
    return int(wrong)


def checked(call: Callable[[str], float], device: str) -> dict[str, float]:
    """Error of a kernel, which must be small, and seconds of its first call."""
    begin = time.perf_counter()
    error = call(device)
    assert error < 1e-4, f"{call.__name__} is off by {error:.1e}"
    return {"error": error, "seconds": round(time.perf_counter() - begin, 2)}


if __name__ == "__main__":
    sys.exit(exit_code(main))
