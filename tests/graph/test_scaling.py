"""Linear in the size of the graph: ten times the linears cost about ten times the time."""

import gc
import time

import pytest
from torch.export import ExportedProgram

import et_cuda_passes as ecp
from tests.helpers import chain


def cost(program: ExportedProgram, linears: int) -> float:
    """Processor time, in seconds, of a rewrite of a chain of ``linears``, its garbage included."""
    gc.collect()
    start = time.process_time()
    ecp.rewrite(program, "cuda", expect={"linear_int4": linears})
    gc.collect()
    return time.process_time() - start


def test_two_thousand_linears_cost_less_than_twelve_times_two_hundred() -> None:
    short, long = chain(200), chain(2000)
    cost(short, 200)
    small = large = float("inf")
    # The least of each: what else the machine does can only add. More rounds only where the first are over the limit.
    for _ in range(4):
        small = min(small, *(cost(short, 200) for _ in range(3)))
        large = min(large, cost(long, 2000))
        if large < 12 * small:
            return
    pytest.fail(f"{large:.2f} s for 2,000 linears, {small:.2f} s for 200: {large / small:.1f} times")
