"""The time that an even distribution of the work over all multiprocessors could save, by the model of a tiling's cost.

    python -m benchmarks.distribution [--seed 0] [--shapes 24] [--group 32]      # needs no GPU

A product whose tiles do not fill its last wave leaves multiprocessors idle. The package splits such tiles along K where
each can have two or more programs. With full stream-K, every program would compute the same number of steps, at the
price of a second begin and end of a tile and of parts to add. The table has the cheapest tiling of such a kernel, over
the cheapest of the package, for the shapes of ``benchmarks.grid``.
"""

import argparse
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.grid import ROWS, drawn
from benchmarks.pool import geometric_mean
from et_cuda_passes.kernels.choose import CUT, DESCRIPTOR, Weight, candidates, costs_of, predicted
from et_cuda_passes.kernels.cost import GpuCost, Work, rounded_max, stacked
from et_cuda_passes.kernels.gpus import HOPPER


def even_time(tilings: Any, work: Work, costs: Any, gpu: GpuCost, processors: int) -> Any:
    """Microseconds of launches whose programs all compute the same number of steps, as ``cost.time`` counts them."""
    tiles = -(-work.m // tilings.tile_m) * -(-work.n // tilings.block_n)
    missing = tilings.bulk * np.maximum(tilings.tile_m - work.m, 0) * gpu.missing_row
    steps = tiles * -(-work.k // tilings.block_k) / processors
    step = rounded_max(gpu.sharpness, costs.latency, costs.programs * costs.step)
    step = np.maximum(step, costs.programs * missing) / costs.programs
    # One more begin and end of a tile than without the split.
    ends = (tiles / processors + 1) * costs.each + np.ceil(tiles / processors / costs.programs + 1) * costs.begin
    read = work.n * work.weight_bytes
    through = read * -(-work.m // tilings.tile_m) + 2 * work.m * work.k * -(-work.n // tilings.block_n)
    moved = read + 2 * work.m * (work.k + work.n)
    parts = gpu.second + 2 * gpu.part + 8 * processors * tilings.tile_m * tilings.block_n / gpu.part_bandwidth
    host = CUT + DESCRIPTOR * tilings.bulk * (1 + (tilings.extra_m > 0))
    limits = moved / gpu.bandwidth, through / gpu.cache_bandwidth
    return gpu.start + rounded_max(gpu.sharpness, steps * step + ends, *limits) + parts + host


def saving(n: int, k: int, group: int, rows: int) -> float:
    """The time with an even distribution, where that is faster, over the time of the package's choice."""
    costs, weight = costs_of(HOPPER, 4), Weight(n, k, group)
    _, times = predicted(HOPPER, costs, weight, [rows])
    whole = [(tiling, cost) for tiling, cost in candidates(costs, weight) if not tiling.waves and tiling.may_be_cut]
    fitting = [each for each in whole if each[0].tile_m <= max(16, 4 * rows) and each[0].tile_m * 8 >= min(rows, 1024)]
    tilings, known = zip(*fitting or whole, strict=True)
    work = weight.work(np.array([rows]))
    even = even_time(stacked(tilings, column=True), work, stacked(known, column=True), costs.gpu, HOPPER.processors)
    return min(float(even.min() / times.min()), 1.0)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--shapes", type=int, default=24)
    parser.add_argument("--group", type=int, default=32)
    options = parser.parse_args()
    shapes = [shape for shape in drawn(options.seed, options.shapes) if shape[1] % options.group == 0]
    table = Table("rows", "geometric mean", "best")
    for rows in ROWS:
        ratios = [saving(*shape, options.group, rows) for shape in shapes]
        table.add_row(f"{rows}", f"{geometric_mean(ratios):.3f}", f"{min(ratios):.2f}")
    Console().print(table)


if __name__ == "__main__":
    main()
