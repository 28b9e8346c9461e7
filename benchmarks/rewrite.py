"""What a rewrite costs: seconds for chains of quantized linears and for a saved program, packing told apart.

python -m benchmarks.rewrite [MODEL.pt2] [--target cuda]
"""

import argparse
import platform
import time
from collections.abc import Callable
from typing import TypeVar

import torch
from rich.console import Console
from rich.table import Table
from torch.export import ExportedProgram

import et_cuda_passes as ecp
from et_cuda_passes.graph.constants import ConstantCache
from tests.helpers import chain

ROUNDS = 5
_T = TypeVar("_T")


def seconds(run: Callable[[], _T]) -> tuple[float, _T]:
    """Processor seconds of this process for the fastest of ``ROUNDS`` runs, and what the last of them gave."""
    best = float("inf")
    for _ in range(ROUNDS):
        begin = time.process_time()
        result = run()
        best = min(best, time.process_time() - begin)
    return best, result


def row(name: str, program: ExportedProgram, target: str) -> tuple[str, ...]:
    """Name, nodes, linears, seconds of a whole rewrite, and of one whose constants are packed already."""
    whole, (_, report) = seconds(lambda: ecp.rewrite(program, target))
    pool = ConstantCache()
    ecp.rewrite(program, target, pool=pool)
    packed, _ = seconds(lambda: ecp.rewrite(program, target, pool=pool))
    counts = report.counts()
    return name, str(len(program.graph.nodes)), str(counts["rewritten"]), f"{whole:.2f}", f"{packed:.2f}"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", help="a .pt2 from torch.export.save")
    parser.add_argument("--target", default="cuda", choices=ecp.targets())
    options = parser.parse_args()
    torch.set_num_threads(1)
    table = Table("program", "nodes", "rewritten", "seconds", "without packing", title=f"target {options.target}")
    for length in (200, 2000):
        table.add_row(*row(f"chain of {length}", chain(length), options.target))
    if options.model:
        table.add_row(*row(options.model.rpartition("/")[2], torch.export.load(options.model), options.target))
    Console().print(table, f"torch {torch.__version__}, Python {platform.python_version()}, one thread, processor time")


if __name__ == "__main__":
    main()
