"""Times of one call: CUDA events around single calls with a cold L2, CUDA-graph replay over rotating inputs, or wall clock on the CPU."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

DO_BENCH = "CUDA events around each call, L2 flushed before it (triton.testing.do_bench)"
GRAPH = "CUDA-graph replay of many calls over rotating inputs of four times the L2's size, divided by the calls"
WALL = "wall clock, caches warm (torch.utils.benchmark.Timer)"

_QUANTILES = (0.5, 0.2, 0.8)
_REPLAYS = 25
_GRAPH_MS = 1.0
_MAX_CALLS = 64


@dataclass(frozen=True)
class Timing:
    """Median and 20th and 80th percentile of one call, in milliseconds, and how they were taken."""

    ms: float
    ms_p20: float
    ms_p80: float
    method: str

    @classmethod
    def of(cls, times_ms: Sequence[float], method: str) -> Timing:
        quantiles = torch.tensor(times_ms, dtype=torch.float64).quantile(torch.tensor(_QUANTILES, dtype=torch.float64))
        return cls(*quantiles.tolist(), method)

    def record(self) -> dict[str, Any]:
        return asdict(self)


def time_call(call: Callable[[], Any], device: torch.device, warmup_ms: float = 10, rep_ms: float = 50) -> Timing:
    """One call as a caller sees it: launch gaps are in it where the device waits for the host."""
    if device.type == "cuda":
        from triton.testing import do_bench

        return Timing(*do_bench(call, warmup=warmup_ms, rep=rep_ms, quantiles=list(_QUANTILES)), DO_BENCH)
    from torch.utils.benchmark import Timer

    timer = Timer("call()", globals={"call": call}, num_threads=torch.get_num_threads())
    return Timing.of([1e3 * each for each in timer.blocked_autorange(min_run_time=rep_ms / 1e3).times], WALL)


def rotation(bytes_of_one: int, device: torch.device) -> int:
    """How many input sets to rotate so that a set has left the L2 before its turn comes again: four times the L2's size of them."""
    l2 = torch.cuda.get_device_properties(device).L2_cache_size
    return min(_MAX_CALLS, max(1, math.ceil(4 * l2 / bytes_of_one)))


def time_graph(call: Callable[..., Any], operand_sets: Sequence[tuple[Tensor, ...]], estimate_ms: float) -> Timing:
    """Device time of one call without launch gaps: calls over `operand_sets`, about a millisecond of them, captured once and replayed."""
    calls = min(_MAX_CALLS, max(len(operand_sets), math.ceil(_GRAPH_MS / estimate_ms)))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call(*operand_sets[0])
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        # Kept, or the graph's pool would give every call the same output memory.
        kept = [call(*operand_sets[i % len(operand_sets)]) for i in range(calls)]
    for _ in range(3):
        graph.replay()
    times = []
    for _ in range(_REPLAYS):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / calls)
    del kept
    return Timing.of(times, GRAPH)
