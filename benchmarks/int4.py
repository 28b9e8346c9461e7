"""Shared by the benchmarks of the int4 kernels: layers of real models, random weights, and timing."""

import statistics
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from et_cuda_passes.layouts import mma_tiled

LAYERS = {
    "qkv": (6144, 3072),
    "k": (1024, 3072),
    "o": (3072, 4096),
    "gate and up": (16384, 3072),
    "up": (8192, 3072),
    "down": (3072, 8192),
    "lm_head": (131072, 3072),
    "encoder q": (1280, 1280),
    "encoder up": (5120, 1280),
    "encoder down": (1280, 5120),
    "Llama qkv": (6144, 4096),
    "Llama gate and up": (28672, 4096),
    "Llama down": (4096, 14336),
    "Qwen gate and up": (19456, 2560),
    "Qwen down": (2560, 9728),
    "SmolLM2 q": (576, 576),
    "SmolLM2 up": (1536, 576),
    "SmolLM2 down": (576, 1536),
}
"""N and K: Voxtral's decoder and encoder, Llama-3.1-8B, Qwen3-4B, SmolLM2-135M."""

REPLAYS = 20
QUICK_REPLAYS = (3, 15)
SPARE = 0.3
"""Fraction of the GPU's memory below which cached memory is released."""
ENOUGH = 4.0
"""Milliseconds of replays whose median :func:`quick_microseconds` returns."""


def copies(nbytes: int) -> int:
    """The number of weights of this size that exceed twice the cache."""
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    return max(2, -(-2 * cache // nbytes))


def captured(calls: Sequence[Callable[[], object]]) -> torch.cuda.CUDAGraph:
    """All of ``calls`` as one CUDA graph, after a run of the first two; the others use the same kernels.

    ``torch.cuda.graph`` would first collect garbage and release all cached memory, which takes longer than the rest.
    """
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls[:2]:
            call()
        torch.cuda.synchronize()
        graph.capture_begin()
        try:
            for call in calls:
                call()
        finally:
            graph.capture_end()
    torch.cuda.current_stream().wait_stream(stream)
    return graph


def microseconds(calls: Sequence[Callable[[], Tensor]]) -> float:
    """Median time of one call in a CUDA graph of all ``calls``, so that launches cost nothing."""
    graph = captured(calls)
    times: list[float] = []
    for _ in range(REPLAYS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1e3 / len(calls))
    return statistics.median(times)


def quick_microseconds(calls: Sequence[Callable[[], object]]) -> float:
    """A faster :func:`microseconds`: replays until ENOUGH milliseconds, within QUICK_REPLAYS."""
    elapsed = quickly_timed(captured(calls)) / len(calls)
    # The memory of the deleted graph stays in a pool that no other graph uses.
    free, total = torch.cuda.mem_get_info()
    if free < SPARE * total:
        torch.cuda.empty_cache()
    return elapsed


def quickly_timed(graph: torch.cuda.CUDAGraph) -> float:
    """Median microseconds of a replay."""

    def replays(count: int) -> list[float]:
        events = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
        events[0].record()
        for event in events[1:]:
            graph.replay()
            event.record()
        events[-1].synchronize()
        return [first.elapsed_time(second) for first, second in pairwise(events)]

    first = replays(2)[1]
    fewest, most = QUICK_REPLAYS
    times = replays(max(fewest, min(most, int(ENOUGH / max(first, 1e-3)) + 1)))
    return statistics.median(times) * 1e3


def int4_pair(q: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """A packed weight for the Triton kernel on the GPU, and its scales in bf16, without zeros."""
    pair = mma_tiled.scale_and_zero(scale, torch.zeros_like(scale), torch.bfloat16, q.shape[1])
    return mma_tiled.pack(q).cuda(), pair.cuda()


def random_weight(n: int, k: int, group: int) -> tuple[Tensor, Tensor]:
    """q uint8 [N, K] in 0..15 and scales fp32 [N, K / group], on the CPU."""
    return torch.randint(0, 16, (n, k), dtype=torch.uint8), torch.rand(n, k // group) * 0.01 + 0.01
