"""What a tiling costs for a product: a model of its time, whose numbers ``python -m benchmarks.calibrate`` measures.

A launch is tiles, each of them steps along K. A multiprocessor works at some tiles at once, and at the others after
them, in waves. For ``q`` tiles at once::

    begin + q * each + steps * max(latency, q * step)

``latency`` is how long one program waits for its own loads and products; ``q * step`` what the multiprocessor needs to
do the work of ``q`` steps, whoever waits meanwhile. ``begin`` passes once for all of them, ``each`` for one after the
other. Tiles that do not fill the last wave may be cut along K: their parts are shorter tiles, and adding them up is a
second launch. Under all this lies what memory and the L2 cache need for the bytes. The maxima are rounded off: who is
nearly held up by two things takes longer than by one.
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
    """What a kernel in one tiling, for one group size, whole steps or not, takes on one GPU, in microseconds.

    Attributes:
        programs: that a multiprocessor holds at once.
        begin: of tiles that run at once, the begin and end, whatever their number.
        each: of every one of them, what they do one after the other.
        latency: of a step, however few run.
        step: of every one of them at least, for a step.
    """

    programs: int
    begin: float
    each: float
    latency: float
    step: float


@dataclass(frozen=True)
class GpuCost:
    """What does not depend on the tiling, in microseconds and bytes a microsecond.

    Attributes:
        start: of a launch.
        bandwidth: of memory.
        cache_bandwidth: of the L2 cache.
        second: of the launch that adds parts, and its start.
        part: of a part that is added, one after the other.
        part_bandwidth: of parts that are written, and of parts that are read.
        missing_row: that a bulk copy needs for each row beyond M of a tile of x.
        sharpness: of the rounded maxima; infinite for sharp ones.
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
    """A product, as far as its time depends on it.

    Attributes:
        m: rows of x.
        n: rows of the weight.
        k: columns of both.
        weight_bytes: of a row of the weight and its scales.
        outputs: tensors of [m, n] that are written or read at the end: 1, and one for a factor and an addend each.
        batch: how many such products one launch makes, each of a weight of its own.
    """

    m: int
    n: int
    k: int
    weight_bytes: float
    outputs: float = 1.0
    batch: int = 1


def stacked(rows: Sequence[Any], *, column: bool = False) -> Any:
    """Equal dataclasses as one, whose fields are arrays [len(rows)], or [len(rows), 1] if ``column``."""
    kind = type(rows[0])
    arrays = {field.name: np.array([getattr(row, field.name) for row in rows]) for field in fields(kind)}
    return kind(**{name: array[:, None] if column else array for name, array in arrays.items()})


def is_whole(tiling: Tiling, k: int) -> bool:
    """Whether the kernel has no masks along K."""
    return tiling.bulk > 0 or k % (tiling.block_k * tiling.segments) == 0


def rounded_max(sharpness: float, *values: Numbers) -> Numbers:
    """The largest value, and more where others are near; each is at least 0, the first one more than that."""
    largest = np.maximum.reduce(np.broadcast_arrays(*values))
    relative = sum((value / largest) ** sharpness for value in values)
    return largest * relative ** (1 / sharpness)


def time(tiling: Tiling, work: Work, cost: TilingCost, gpu: GpuCost, processors: int) -> Numbers:
    """Microseconds of a launch, and of the one that adds parts, on a GPU of so many multiprocessors.

    The fields of ``tiling``, ``work`` and ``cost`` may be arrays, as :func:`stacked` makes them.
    """
    sharpness, q = gpu.sharpness, cost.programs
    across = -(-work.n // tiling.block_n)
    tiles = work.batch * -(-work.m // tiling.tile_m) * across
    steps = -(-work.k // tiling.block_k)
    slots = tiling.waves * processors
    rest = np.where(slots > 0, tiles % np.maximum(slots, 1), 0)
    ways = np.minimum(slots // np.maximum(rest, 1), steps)
    is_cut = (rest > 0) & (ways > 1)
    rest, ways = np.where(is_cut, rest, 0), np.where(is_cut, ways, 1)
    parts = rest * np.where(is_cut, ways, 0)
    # Rows that are not there: see ``tiles.first_row``.
    missing = tiling.bulk * np.maximum(tiling.tile_m - work.m, 0) * gpu.missing_row

    def stepping(count: Numbers) -> Numbers:
        """A step of ``count`` tiles at once."""
        return np.maximum(rounded_max(sharpness, cost.latency, count * cost.step), count * missing)

    length = -(-steps // tiling.segments)
    alone = -(-(tiles - rest) // processors)  # whole tiles of the multiprocessor that has most
    waves, last = alone // q, alone % q
    # Where a multiprocessor holds more programs than ``tiling.waves``, some have two whole tiles of the one wave, and
    # others only parts. That is seen often, not always: a choice by the worse case loses less.
    last = np.where((parts > 0) & (alone == tiling.waves) & (q > alone), np.minimum(q, 2 * alone), last)
    busy = waves * (cost.begin + q * cost.each + length * stepping(q))
    # The last wave: whole tiles, beside parts of cut ones until those end.
    beside = -(-parts // processors)
    together = np.where(parts > 0, -(-steps // ways), 0)
    longer = np.where(last > 0, np.maximum(length - together, 0), 0)
    ending = cost.begin + (last + beside) * cost.each + together * stepping(last + beside) + longer * stepping(last)
    busy = busy + np.where(last + beside > 0, ending, 0.0)
    read = work.n * work.weight_bytes
    moved = read + 2 * work.m * (work.k + work.outputs * work.n)
    through = read * -(-work.m // tiling.tile_m) + 2 * work.m * work.k * across
    bounds = work.batch * moved / gpu.bandwidth, work.batch * through / gpu.cache_bandwidth
    total = gpu.start + rounded_max(sharpness, busy, *bounds)
    used = -(-steps // -(-steps // ways))
    adding = gpu.second + used * gpu.part + 8 * parts * tiling.tile_m * tiling.block_n / gpu.part_bandwidth
    return total + np.where(parts > 0, adding, 0.0)
