"""Times of calls on a GPU: with CUDA events, or as replays of a CUDA graph where a call is many small launches."""

import statistics
from collections.abc import Callable

import torch

from d2zero_bench.candidates import elapsed_ms

CALLS = 10  # in one graph


def milliseconds(run: Callable[[], object], device: str, times: int) -> list[float]:
    """Times of calls; on a GPU after three to warm up."""
    if device == "cpu":
        return [elapsed_ms(run) for _ in range(times)]
    spans = []
    for _ in range(times + 3):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run()
        end.record()
        end.synchronize()
        spans.append(start.elapsed_time(end))
    return spans[3:]


def graphed_ms(run: Callable[[], object], device: str, times: int) -> float:
    """The median time of a call without the host's share: replays of a graph of `CALLS` calls."""
    if device == "cpu":
        return statistics.median(milliseconds(run, device, times))
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(CALLS):
            run()
    return statistics.median(milliseconds(graph.replay, device, times)) / CALLS
