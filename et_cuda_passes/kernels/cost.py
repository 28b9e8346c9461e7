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

import math
from dataclasses import dataclass

from et_cuda_passes.kernels.tiling import Tiling


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
        part_bandwidth: of parts that are written, and of parts that are read.
        sharpness: of the rounded maxima; infinite for sharp ones.
    """

    start: float
    bandwidth: float
    cache_bandwidth: float
    second: float
    part_bandwidth: float
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
    """

    m: int
    n: int
    k: int
    weight_bytes: float
    outputs: float = 1.0


def is_whole(tiling: Tiling, k: int) -> bool:
    """Whether the kernel has no masks along K."""
    return tiling.bulk > 0 or k % (tiling.block_k * tiling.segments) == 0


def at_once(cost: TilingCost, count: int, steps: int, sharpness: float, parts: int = 0, part_steps: int = 0) -> float:
    """Time of ``count`` tiles of ``steps``, and of ``parts`` of fewer, that a multiprocessor works at at once."""
    together = part_steps if parts else 0
    all_of_them = rounded_max(sharpness, cost.latency, (count + parts) * cost.step)
    tiles_alone = rounded_max(sharpness, cost.latency, count * cost.step)
    stepping = together * all_of_them + (max(steps, together) - together) * tiles_alone
    return cost.begin + (count + parts) * cost.each + stepping


def rounded_max(sharpness: float, *values: float) -> float:
    """The largest value, and more where others are near."""
    largest = max(values)
    relative: float = sum((value / largest) ** sharpness for value in values)
    return largest * math.exp(math.log(relative) / sharpness)


def time(tiling: Tiling, work: Work, cost: TilingCost, gpu: GpuCost, processors: int) -> float:
    """Microseconds of a launch, and of the one that adds parts, on a GPU of so many multiprocessors."""
    tiles = -(-work.m // tiling.block_m) * -(-work.n // tiling.block_n)
    steps = -(-work.k // tiling.block_k)
    slots, parts, ways, rest = tiling.waves * processors, 0, 1, 0
    if slots:
        rest = tiles % slots
        ways = min(slots // max(rest, 1), steps)
        if rest and ways > 1:
            parts = rest * ways
        else:
            rest = 0
    length = -(-steps // tiling.segments)
    alone = -(-(tiles - rest) // processors)  # whole tiles of the multiprocessor that has most
    waves, remainder = divmod(alone, cost.programs)
    sharpness = gpu.sharpness
    busy = waves * at_once(cost, cost.programs, length, sharpness) if waves else 0.0
    if parts:
        busy += at_once(
            cost, remainder, length * (remainder > 0), sharpness, -(-parts // processors), -(-steps // ways)
        )
    elif remainder:
        busy += at_once(cost, remainder, length, sharpness)
    moved = work.n * work.weight_bytes + 2 * work.m * (work.k + work.outputs * work.n)
    through = work.n * work.weight_bytes * -(-work.m // tiling.block_m)
    through += 2 * work.m * work.k * -(-work.n // tiling.block_n)
    bounds = busy, moved / gpu.bandwidth, through / gpu.cache_bandwidth
    total = gpu.start + rounded_max(sharpness, *bounds)
    if parts:
        total += gpu.second + 8 * parts * tiling.block_m * tiling.block_n / gpu.part_bandwidth
    return total
