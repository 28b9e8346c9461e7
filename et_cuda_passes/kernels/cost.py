"""A model of the time of a product in a tiling; ``python -m benchmarks.calibrate`` measures its numbers.

A launch consists of tiles, and a tile of steps along K. A multiprocessor computes ``q`` tiles at once, and then the
next ones, in waves. A wave takes::

    begin + q * each + steps * max(latency, q * step)

``latency`` is the time that one program waits for its own loads and products. ``q * step`` is the time of a
multiprocessor for the work of ``q`` steps. ``begin`` is spent once for all tiles, ``each`` once for every tile. Tiles
that do not fill the last wave may be split along K: their parts are shorter tiles, and a second launch adds them. The
time of memory and of the L2 cache is a lower bound. The maxima are smooth, since two limits that are nearly equal delay
a program more than one.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from et_cuda_passes.kernels.tiling import Tiling

Numbers = Any
"""A number, or an array of them."""


@dataclass(frozen=True)
class TilingCost:
    """The costs of a kernel in one tiling, for one group size and whole steps or not, on one GPU, in microseconds.

    Attributes:
        programs: number of programs that a multiprocessor holds at once.
        begin: begin and end of tiles that run at once, for any number of them.
        each: serial time of each tile.
        latency: least time of a step, for any number of tiles.
        step: least time of a step for each tile.
    """

    programs: int
    begin: float
    each: float
    latency: float
    step: float


@dataclass(frozen=True)
class GpuCost:
    """The costs that do not depend on the tiling, in microseconds and bytes a microsecond.

    Attributes:
        start: time of a launch.
        bandwidth: bandwidth of memory.
        cache_bandwidth: bandwidth of the L2 cache.
        second: time of the launch that adds parts.
        part: serial time of each part that is added.
        part_bandwidth: bandwidth of parts that are written, and of parts that are read.
        missing_row: time of a bulk copy for each row beyond M of a tile of x.
        sharpness: exponent of the smooth maxima; infinite for exact ones.
    """

    start: float
    bandwidth: float
    cache_bandwidth: float
    second: float
    part: float
    part_bandwidth: float
    missing_row: float
    sharpness: float


@dataclass(frozen=True)
class Work:
    """The facts about a product that determine its time.

    Attributes:
        m: rows of x.
        n: rows of the weight.
        k: columns of both.
        weight_bytes: bytes of a row of the weight with its scales.
        outputs: number of tensors [m, n] that the epilogue writes or reads: 1, and 1 for each of a factor and an
            addend.
        batch: number of such products in one launch, each with its own weight.
        uneven: whether ``m`` is only the mean of the rows of the products.
    """

    m: int
    n: int
    k: int
    weight_bytes: float
    outputs: float = 1.0
    batch: int = 1
    uneven: bool = False


def stacked(rows: Sequence[Any], *, column: bool = False) -> Any:
    """One dataclass from several of one type: its fields are arrays [len(rows)], or [len(rows), 1] if ``column``."""
    kind = type(rows[0])
    arrays = {field.name: np.array([getattr(row, field.name) for row in rows]) for field in fields(kind)}
    return kind(**{name: array[:, None] if column else array for name, array in arrays.items()})


def is_whole(tiling: Tiling, k: int) -> bool:
    """Whether the kernel has no masks along K."""
    return tiling.bulk > 0 or k % (tiling.block_k * tiling.segments) == 0


def rounded_max(sharpness: float, *values: Numbers) -> Numbers:
    """A smooth maximum: the largest value, increased by values near it. All are at least 0, the first one above 0."""
    largest = np.maximum.reduce(np.broadcast_arrays(*values))
    relative = sum((value / largest) ** sharpness for value in values)
    return largest * relative ** (1 / sharpness)


def time(tiling: Tiling, work: Work, cost: TilingCost, gpu: GpuCost, processors: int) -> Numbers:
    """Microseconds of a launch, and of the launch that adds parts, on a GPU with ``processors`` multiprocessors.

    The fields of ``tiling``, ``work`` and ``cost`` may be arrays, as :func:`stacked` builds them.
    """
    sharpness, q = gpu.sharpness, cost.programs
    across = -(-work.n // tiling.block_n)
    # With any number of rows, the last tile of a product is half full in the mean.
    of_rows = np.where(work.uneven, np.maximum(1, work.m / tiling.tile_m + 0.5), -(-work.m // tiling.tile_m))
    tiles = np.ceil(work.batch * of_rows) * across
    steps = -(-work.k // tiling.block_k)
    slots = tiling.waves * processors
    rest = np.where(slots > 0, tiles % np.maximum(slots, 1), 0)
    ways = np.minimum(slots // np.maximum(rest, 1), steps)
    is_cut = (rest > 0) & (ways > 1)
    rest, ways = np.where(is_cut, rest, 0), np.where(is_cut, ways, 1)
    parts = rest * np.where(is_cut, ways, 0)
    # Rows beyond M: see ``tiles.first_row``. Those beyond the rows of one product belong to the next.
    beyond = np.where(work.uneven, 0, np.maximum(tiling.tile_m - work.m, 0))
    missing = tiling.bulk * beyond * gpu.missing_row

    def stepping(count: Numbers) -> Numbers:
        """Time of a step of ``count`` tiles at once."""
        return np.maximum(rounded_max(sharpness, cost.latency, count * cost.step), count * missing)

    length = -(-steps // tiling.segments)
    alone = -(-(tiles - rest) // processors)  # whole tiles of the busiest multiprocessor
    waves, last = alone // q, alone % q
    # If a multiprocessor holds more programs than ``tiling.waves``, some get two whole tiles of one wave, and others
    # only parts. This happens often, not always; assuming the worse case loses less.
    last = np.where((parts > 0) & (alone == tiling.waves) & (q > alone), np.minimum(q, 2 * alone), last)
    busy = waves * (cost.begin + q * cost.each + length * stepping(q))
    # The last wave: whole tiles run beside parts of split tiles until the parts end.
    beside = -(-parts // processors)
    together = np.where(parts > 0, -(-steps // ways), 0)
    longer = np.where(last > 0, np.maximum(length - together, 0), 0)
    ending = cost.begin + (last + beside) * cost.each + together * stepping(last + beside) + longer * stepping(last)
    busy = busy + np.where(last + beside > 0, ending, 0.0)
    read = work.n * work.weight_bytes
    moved = read + 2 * work.m * (work.k + work.outputs * work.n)
    # A bulk copy also loads the rows of a tile that belong to the next product.
    loaded = np.where(np.logical_and(work.uneven, tiling.bulk > 0), of_rows * tiling.tile_m, work.m)
    through = read * of_rows + 2 * loaded * work.k * across
    bounds = work.batch * moved / gpu.bandwidth, work.batch * through / gpu.cache_bandwidth
    total = gpu.start + rounded_max(sharpness, busy, *bounds)
    used = -(-steps // -(-steps // ways))
    adding = gpu.second + used * gpu.part + 8 * parts * tiling.tile_m * tiling.block_n / gpu.part_bandwidth
    return total + np.where(parts > 0, adding, 0.0)
