"""The time of a rewrite, with and without packing: of chains of quantized linears, and of a saved program.

python -m benchmarks.rewrite [MODEL.pt2] [--target cuda]
python -m benchmarks.rewrite --check    # the time per linear must not grow with the number of linears
"""

import argparse
import gc
import platform
import time
from collections.abc import Callable
from typing import TypeVar

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.export import ExportedProgram

import et_cuda_passes as ecp
from et_cuda_passes.graph.constants import ConstantCache
from et_cuda_passes.testing import Quantized
from tests.helpers import chain

ROUNDS = 5
_T = TypeVar("_T")


def seconds(run: Callable[[], _T]) -> tuple[float, _T]:
    """Processor seconds of this process for the fastest of ``ROUNDS`` runs, and the result of the last one."""
    best = float("inf")
    for _ in range(ROUNDS):
        begin = time.process_time()
        result = run()
        best = min(best, time.process_time() - begin)
    return best, result


def row(name: str, program: ExportedProgram, target: str) -> tuple[str, ...]:
    """Name, nodes, linears, seconds of a whole rewrite, and of a rewrite with packed constants."""
    whole, (_, report) = seconds(lambda: ecp.rewrite(program, target))
    pool = ConstantCache()
    ecp.rewrite(program, target, pool=pool)
    packed, _ = seconds(lambda: ecp.rewrite(program, target, pool=pool))
    counts = report.counts()
    return name, str(len(program.graph.nodes)), str(counts["rewritten"]), f"{whole:.2f}", f"{packed:.2f}"


class InSubgraph(nn.Module):
    """``count`` quantized linears in one subgraph; each has four operands of the call."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Quantized(32, 32, seed=seed) for seed in range(count))

    def forward(self, x: Tensor) -> Tensor:
        """The layers one after another."""
        with torch.no_grad():
            for layer in self.layers:
                x = layer(x)
        return x


def in_subgraph(count: int) -> ExportedProgram:
    """A program of one subgraph with ``count`` quantized linears."""
    return torch.export.export(InSubgraph(count), (torch.randn(2, 32, dtype=torch.bfloat16),))


def cost(program: ExportedProgram, linears: int) -> float:
    """Processor time of the rewrite of ``linears`` linears, in seconds, garbage collection included."""
    gc.collect()
    start = time.process_time()
    ecp.rewrite(program, "cuda", expect={"linear_int4": linears})
    gc.collect()
    return time.process_time() - start


def check() -> None:
    """Check that ``times`` as many linears take at most 1.2 ``times`` as long.

    Raises:
        SystemExit: they take longer in each of four rounds.
    """
    for name, make, count, times in (("chain", chain, 200, 10), ("subgraph", in_subgraph, 30, 8)):
        short, long = make(count), make(count * times)
        cost(short, count)
        small = large = float("inf")
        # The minimum, since other processes only add time. More rounds only if the first ones exceed the limit.
        for _ in range(4):
            small = min(small, *(cost(short, count) for _ in range(3)))
            large = min(large, cost(long, count * times))
            if large < 1.2 * times * small:
                break
        print(f"{name}: {small:.2f} s for {count} linears, {large:.2f} s for {count * times}", flush=True)
        if large >= 1.2 * times * small:
            raise SystemExit(f"{name}: {times} times the linears take {large / small:.1f} times as long")


def main() -> None:
    """Print the table, or check that the time is linear."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", help="a .pt2 from torch.export.save")
    parser.add_argument("--target", default="cuda", choices=ecp.targets())
    parser.add_argument("--check", action="store_true", help="fail if the time per linear grows")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.check:
        check()
        return
    table = Table("program", "nodes", "rewritten", "seconds", "without packing", title=f"target {options.target}")
    for length in (200, 2000):
        table.add_row(*row(f"chain of {length}", chain(length), options.target))
    if options.model:
        table.add_row(*row(options.model.rpartition("/")[2], torch.export.load(options.model), options.target))
    Console().print(table, f"torch {torch.__version__}, Python {platform.python_version()}, one thread, processor time")


if __name__ == "__main__":
    main()
