"""Which tiling a weight gets: the cheapest by the model of :mod:`et_cuda_passes.kernels.cost`.

A number of rows that is not known at export is a launch for each bucket of rows. The bounds of the buckets are chosen
for each weight, so that the worst loss against the best tiling of every length is smallest.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cache
from itertools import pairwise
from pathlib import Path

from et_cuda_passes.kernels.cost import GpuCost, TilingCost, Work, is_whole, time
from et_cuda_passes.kernels.gpus import GpuArch
from et_cuda_passes.kernels.tiling import UNBOUNDED, Tiling

BOUNDS = (
    *(8, 16, 24, 32, 48, 64, 96, 128, 160, 192, 256, 320, 384, 448, 512),
    *(640, 768, 896, 1024, 1280, 1536, 1792, 2048, 2560, 3072, 3584, 4096),
)
"""Where a bucket of rows may end. Beyond the last one every length has the last bucket's tiling."""
MOST_LAUNCHES = 8
ENOUGH = 1.02
"""A loss that is not worth another launch."""
MOST_WAVES = 3
CUT = 1.0
"""Microseconds that a launch more, and an allocation, cost besides the GPU's time."""
ROUNDS = 12


@dataclass(frozen=True)
class Costs:
    """A GPU's costs.

    Attributes:
        source: where they come from, as in ``calibrated on NVIDIA H100 80GB HBM3``.
        measured: whether they were measured on such a GPU.
        gpu: the GPU's own.
        tilings: by group size (0: one scale a row) and whether steps along K are whole.
    """

    source: str
    measured: bool
    gpu: GpuCost
    tilings: Mapping[tuple[int, bool], Mapping[Tiling, TilingCost]]


def load_costs(path: Path) -> Costs:
    """A table as ``python -m benchmarks.fit`` writes it.

    Raises:
        ValueError: a tiling, or a cost of it, is not as it should be, naming the file and the entry.
    """
    table = json.loads(path.read_text())
    found: dict[tuple[int, bool], dict[Tiling, TilingCost]] = {}
    for entry in table["tilings"]:
        if len(entry["tiling"]) != len(fields(Tiling)):
            raise ValueError(f"{path.name}: {entry['tiling']}: a tiling is {[f.name for f in fields(Tiling)]}")
        tiling = Tiling(*entry["tiling"])
        for group, costs in entry["costs"].items():
            for whole, numbers in zip((True, False), costs, strict=True):
                if numbers is None:
                    continue
                if len(numbers) != len(fields(TilingCost)) or min(numbers) <= 0:
                    names = [field.name for field in fields(TilingCost)]
                    raise ValueError(f"{path.name}: {entry['tiling']}, group size {group}: costs are {names}")
                found.setdefault((int(group), whole), {})[tiling] = TilingCost(*numbers)
    return Costs(table["source"], table["measured"], GpuCost(**table["gpu"]), found)


@cache
def costs_of(name: str, bits: int) -> Costs:
    """The costs of ``tuned/<name>.json``, or ``tuned/<name>_int8.json``."""
    return load_costs(Path(__file__).with_name("tuned") / (f"{name}.json" if bits == 4 else f"{name}_int{bits}.json"))


@dataclass(frozen=True)
class Weight:
    """What a choice is made for.

    Attributes:
        n: out_features, those of both halves of a gated pair.
        k: in_features.
        group_size: along K.
        bits: of a weight.
        outputs: see :class:`~et_cuda_passes.kernels.cost.Work`.
    """

    n: int
    k: int
    group_size: int
    bits: int = 4
    outputs: float = 1.0

    def work(self, m: int) -> Work:
        """With so many rows of x."""
        return Work(m, self.n, self.k, self.k * self.bits / 8 + 2 * (self.k / self.group_size), self.outputs)


def candidates(costs: Costs, weight: Weight) -> Iterator[tuple[Tiling, TilingCost]]:
    """The tilings that a weight can have, those that cut tiles too."""
    group = 0 if weight.bits == 8 and weight.group_size == weight.k else weight.group_size
    for whole in (True, False):
        for tiling, cost in costs.tilings.get((group, whole), {}).items():
            if is_whole(tiling, weight.k) == whole:
                most = min(MOST_WAVES, cost.programs) if tiling.segments == 1 and tiling.block_m >= 16 else 0
                yield from ((replace(tiling, waves=waves), cost) for waves in range(most + 1))


def likely(tiling: Tiling, rows: int) -> bool:
    """Whether a tiling is worth a look for so many rows: one with much fewer or more never wins."""
    return tiling.block_m * 8 >= min(rows, 1024) and tiling.block_m < max(16, 4 * rows)


def predicted(gpu: GpuArch, costs: Costs, weight: Weight, rows: int, tiling: Tiling, cost: TilingCost) -> float:
    """Microseconds of a launch."""
    return time(tiling, weight.work(rows), cost, costs.gpu, gpu.processors) + CUT * (tiling.waves > 0)


@cache
def tiling_for(gpu: GpuArch, weight: Weight, rows: int) -> Tiling:
    """The cheapest tiling of a weight for a number of rows."""
    costs = costs_of(gpu.name, weight.bits)
    timed = [
        (predicted(gpu, costs, weight, rows, tiling, cost), number, tiling)
        for number, (tiling, cost) in enumerate(candidates(costs, weight))
        if likely(tiling, rows)
    ]
    return min(timed)[2]


def lengths(first: int, last: int) -> list[int]:
    """Numbers of rows from ``first`` to ``last`` that stand for all between: every tile's edge is near one."""
    return sorted({first, (first + last) // 2, last})


@dataclass(frozen=True)
class Buckets:
    """Tilings by the most rows each serves, ascending, and the worst loss against the best tiling of a length."""

    tilings: Mapping[int, Tiling]
    loss: float


@cache
def buckets(gpu: GpuArch, weight: Weight, most: int = MOST_LAUNCHES) -> Buckets:
    """At most ``most`` buckets of rows from 1 to UNBOUNDED."""
    costs = costs_of(gpu.name, weight.bits)
    ends = (0, *BOUNDS)
    intervals = [lengths(first + 1, last) for first, last in pairwise(ends)]
    choices = list(candidates(costs, weight))
    infinite = float("inf")
    times = [
        [
            [
                predicted(gpu, costs, weight, rows, tiling, cost) if likely(tiling, rows) else infinite
                for rows in interval
            ]
            for interval in intervals
        ]
        for tiling, cost in choices
    ]
    best = [[min(each) for each in zip(*(row[i] for row in times), strict=True)] for i in range(len(intervals))]
    # Of each tiling, the worst loss within each interval.
    losses = [
        [max(a / b for a, b in zip(row[i], best[i], strict=True)) for i in range(len(intervals))] for row in times
    ]
    chosen = cover(losses, most)
    worst = max(losses[choice][i] for first, last, choice in chosen for i in range(first, last))
    found: dict[int, Tiling] = {}
    for _, last, choice in chosen:
        earlier = next(reversed(found), None)
        if earlier is not None and found[earlier] == choices[choice][0]:
            del found[earlier]
        found[BOUNDS[last - 1] if last < len(BOUNDS) else UNBOUNDED] = choices[choice][0]
    return Buckets(found, worst)


def cover(losses: Sequence[Sequence[float]], most: int) -> list[tuple[int, int, int]]:
    """Intervals as (first, end, choice), at most ``most``, whose worst loss is as small as it can be.

    ``losses`` is of each choice in each interval. Fewer are taken where the loss is below ENOUGH anyway, or hardly
    larger.
    """
    count = len(losses[0])

    def greedy(limit: float) -> list[tuple[int, int, int]] | None:
        """As few as cover all with no loss above ``limit``: each reaches as far as it can."""
        found: list[tuple[int, int, int]] = []
        first = 0
        while first < count:
            reach, _, choice = max((end_of(row, first, limit), -number, number) for number, row in enumerate(losses))
            if reach == first or len(found) == most:
                return None
            found.append((first, reach, choice))
            first = reach
        return found

    def end_of(row: Sequence[float], first: int, limit: float) -> int:
        return next((i for i in range(first, count) if row[i] > limit), count)

    low, high = 1.0, max(min(row[i] for row in losses) for i in range(count))
    while greedy(high) is None:
        high *= 2
    found = greedy(high) or []
    low = max(1.0, ENOUGH)
    if (enough := greedy(low)) is not None:
        found = enough
    else:
        for _ in range(ROUNDS):
            middle = (low + high) / 2
            tried = greedy(middle)
            low, high, found = (middle, high, found) if tried is None else (low, middle, tried)
    return [best_within(losses, first, end) for first, end, _ in found]


def best_within(losses: Sequence[Sequence[float]], first: int, end: int) -> tuple[int, int, int]:
    """The choice of an interval: with the smallest worst loss, and of those the smallest sum."""
    scored = ((max(row[first:end]), sum(row[first:end]), number) for number, row in enumerate(losses))
    return first, end, min(scored)[2]


def describe(gpu: GpuArch, weight: Weight, rows: int | None) -> str:
    """The tilings chosen for a weight, as a report says it: for ``rows``, or by rows where they are not known."""
    costs = costs_of(gpu.name, weight.bits)
    origin = f"{costs.source}" if costs.measured else f"predicted, not measured, for {gpu}"
    if rows is not None:
        return f"M = {rows}: {tiling_for(gpu, weight, rows)} ({origin})"
    chosen = buckets(gpu, weight).tilings.items()
    parts = [f"M <= {bound}: {tiling}" if bound != UNBOUNDED else f"else {tiling}" for bound, tiling in chosen]
    return f"{'; '.join(parts)} ({origin})"
