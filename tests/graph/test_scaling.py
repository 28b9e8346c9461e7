"""The time of a rewrite is linear in the size of the graph, with subgraphs too."""

import gc
import time
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

import et_cuda_passes as ecp
from tests.helpers import chain
from tests.quantized import Quantized


def cost(program: ExportedProgram, linears: int) -> float:
    """Processor time, in seconds, of the rewrite of a chain of ``linears``, garbage collection included."""
    gc.collect()
    start = time.process_time()
    ecp.rewrite(program, "cuda", expect={"linear_int4": linears})
    gc.collect()
    return time.process_time() - start


class Inside(nn.Module):
    """``count`` quantized linears in one subgraph; each has four operands of the call."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Quantized(32, 32, seed=seed) for seed in range(count))

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            for layer in self.layers:
                x = layer(x)
        return x


def inside(count: int) -> ExportedProgram:
    return torch.export.export(Inside(count), (torch.randn(2, 32, dtype=torch.bfloat16),))


@pytest.mark.parametrize(("make", "count", "times"), [(chain, 200, 10), (inside, 30, 8)], ids=["chain", "inside"])
def test_cost_per_linear_does_not_grow_with_the_number_of_linears(
    make: Callable[[int], ExportedProgram], count: int, times: int
) -> None:
    short, long = make(count), make(count * times)
    cost(short, count)
    small = large = float("inf")
    # The minimum, since other processes only add time. More rounds only if the first ones exceed the limit.
    for _ in range(4):
        small = min(small, *(cost(short, count) for _ in range(3)))
        large = min(large, cost(long, count * times))
        if large < 1.2 * times * small:
            return
    pytest.fail(f"{large:.2f} s for {times} times the linears of {small:.2f} s: {large / small:.1f} times")
