"""The predicted loss of a dynamic length with 4, 6 and 8 launches, against the best tiling of each length.

    python -m benchmarks.buckets [--group 32] [--launches 4 6 8]      # needs no GPU

The worst loss, the geometric mean over log(M) from 1 to 4096, and the descriptors of x that a call builds. Their host
time is part of the loss.
"""

import argparse
import math

import numpy as np
from rich.console import Console
from rich.table import Table

from et_cuda_passes.kernels.choose import DESCRIPTOR, Weight, buckets, costs_of, predicted
from et_cuda_passes.kernels.gpus import HOPPER

WEIGHTS = (
    (8192, 3072),
    (3072, 8192),
    (6144, 4096),
    (28672, 4096),
    (4096, 14336),
    (1280, 1280),
    (576, 576),
    (131072, 3072),
)
LONGEST = 4096


def losses(weight: Weight, launches: int) -> tuple[float, float, int]:
    """The worst and the mean loss, and the number of descriptors."""
    lengths = np.unique(np.round(np.geomspace(1, LONGEST, 200)).astype(int)).tolist()
    tilings, times = predicted(HOPPER, costs_of(HOPPER, weight.bits), weight, lengths)
    chosen = buckets(HOPPER, weight, launches).tilings
    heights = {rows for each in chosen.values() if each.bulk for rows in (each.block_m, each.extra_m) if rows}
    found = []
    for number, rows in enumerate(lengths):
        tiling = next(each for bound, each in chosen.items() if rows <= bound)
        own = tiling.bulk * (1 + (tiling.extra_m > 0))
        taken = times[tilings.index(tiling), number] + DESCRIPTOR * (len(heights) - own)
        found.append(taken / times[:, number].min())
    mean = np.trapezoid(np.log(found), np.log(lengths)) / math.log(LONGEST)
    return max(found), math.exp(mean), len(heights)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--group", type=int, default=32)
    parser.add_argument("--launches", type=int, nargs="+", default=[4, 6, 8])
    options = parser.parse_args()
    table = Table("N x K", *(f"{count} launches: worst, mean, descriptors" for count in options.launches))
    for n, k in WEIGHTS:
        cells = []
        for count in options.launches:
            worst, mean, descriptors = losses(Weight(n, k, options.group), count)
            cells.append(f"{worst:.2f}, {mean:.3f}, {descriptors}")
        table.add_row(f"{n} x {k}", *cells)
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
