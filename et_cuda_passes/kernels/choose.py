"""Chooses the tiling of a weight: the cheapest by the model of :mod:`et_cuda_passes.kernels.cost`.

If the number of rows is unknown at export, each bucket of rows gets a tiling and a launch. The bounds of the buckets
are chosen for each weight, to minimise the worst loss against the best tiling of a length, and then the mean loss. The
descriptors of all buckets cost host time in every call. The set of descriptors has the smallest product of the worst
loss and the square of the mean loss.
"""

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cache
from itertools import combinations
from pathlib import Path

import numpy as np

from et_cuda_passes.kernels.cost import GpuCost, Numbers, TilingCost, Work, is_whole, stacked, time
from et_cuda_passes.kernels.gpus import HOPPER, GpuArch
from et_cuda_passes.kernels.tiling import BULK_K, UNBOUNDED, Tiling

BOUNDS = (
    *(8, 16, 24, 32, 48, 64, 96, 128, 160, 192, 256, 320, 384, 448, 512),
    *(640, 768, 896, 1024, 1280, 1536, 1792, 2048, 2560, 3072, 3584, 4096),
)
"""Possible ends of a bucket of rows. A length beyond the last end has the last bucket's tiling."""
MOST_LAUNCHES = 8
ENOUGH = 1.02
"""A worst loss so small that it is not reduced further."""
SLACK = 0.005
"""The relative amount by which the worst loss may exceed its minimum, to make the mean loss smaller."""
PRICE = 0.002
"""The decrease of the mean over log(M) of the logarithm of the time that justifies a further launch: 0.1 us of 50. A
launch needs 0.1 to 0.2 us of a call with a length outside its bucket, and 0.1 s of lowering (Inductor needs 30 s for
330 launches)."""
MOST_WAVES = 3
CUT = 1.0
"""Microseconds of host time for a further launch and an allocation."""
DESCRIPTOR = 0.5
"""Microseconds of host time for a descriptor of x for bulk copies. AOTInductor builds each in every call, also those of
launches without programs. An estimate, not a measurement: a program of eight linears took 28 us longer than in a run
before tiles of two pieces, which need 16 descriptors more; its kernels explain 7."""
MOST_HEIGHTS = 3
"""The number of descriptors that the buckets of a weight may have: one for each number of rows in a block."""
EFFICIENCY = 0.7
"""The fraction of the tensor cores' data-sheet rate that a kernel reaches."""


@dataclass(frozen=True)
class Costs:
    """A GPU's costs.

    Attributes:
        source: their origin, as in ``calibrated on NVIDIA H100 80GB HBM3``.
        measured: whether they were measured on such a GPU.
        gpu: costs that do not depend on the tiling.
        tilings: costs of each tiling, by group size (0: one scale a row) and whether steps along K are whole.
    """

    source: str
    measured: bool
    gpu: GpuCost
    tilings: Mapping[tuple[int, bool], Mapping[Tiling, TilingCost]]


def load_costs(path: Path) -> Costs:
    """A table as ``python -m benchmarks.fit`` writes it.

    Raises:
        ValueError: a tiling or one of its costs is malformed; the message names the file and the entry.
    """
    table = json.loads(path.read_text())
    found: dict[tuple[int, bool], dict[Tiling, TilingCost]] = {}
    for entry in table["tilings"]:
        if len(entry["tiling"]) not in (len(fields(Tiling)) - 1, len(fields(Tiling))):
            names = [field.name for field in fields(Tiling)]
            raise ValueError(f"{path.name}: {entry['tiling']}: a tiling is {names}; the last number may be absent")
        tiling = Tiling(*entry["tiling"])
        if tiling.bulk and (tiling.block_k, tiling.segments) != (BULK_K, 1):
            raise ValueError(f"{path.name}: {entry['tiling']}: bulk copies are for steps of {BULK_K} in one segment")
        if tiling.extra_m and tiling.segments != 1:
            raise ValueError(f"{path.name}: {entry['tiling']}: a second piece of rows is for one segment")
        for group, costs in entry["costs"].items():
            for whole, numbers in zip((True, False), costs, strict=True):
                if numbers is None:
                    continue
                if len(numbers) != len(fields(TilingCost)) or min(numbers) <= 0:
                    names = [field.name for field in fields(TilingCost)]
                    raise ValueError(f"{path.name}: {entry['tiling']}, group size {group}: costs are {names}")
                found.setdefault((int(group), whole), {})[tiling] = TilingCost(*numbers)
    return Costs(table["source"], table["measured"], GpuCost(**table["gpu"]), found)


def predicted_costs(measured: Costs, gpu: GpuArch, resources: Mapping[Tiling, tuple[int, int]]) -> Costs:
    """Costs of a GPU without measurements, from the costs of Hopper and from data sheets.

    Latencies are equal. The work of a step takes the same time, or the time of the tensor cores at EFFICIENCY of their
    rate, whichever is longer. Memory bandwidth scales as on the data sheets, and that of the L2 cache with the number
    of multiprocessors. ``resources`` are registers and bytes of shared memory of the tilings that compile for the GPU.
    """
    rate = EFFICIENCY * gpu.rate / gpu.processors
    found: dict[tuple[int, bool], dict[Tiling, TilingCost]] = {}
    for form, tilings in measured.tilings.items():
        for tiling, cost in tilings.items():
            registers, shared = resources.get(tiling, (0, 0))
            programs = gpu.resident(registers, shared, tiling.warps) if registers else 0
            if programs:
                operations = 2 * tiling.tile_m * tiling.block_n * tiling.block_k * tiling.segments**2
                step = max(cost.step, operations / rate)
                found.setdefault(form, {})[tiling] = replace(cost, programs=programs, step=step)
    memory, cache_ = gpu.bandwidth / HOPPER.bandwidth, gpu.processors / HOPPER.processors
    costs = replace(
        measured.gpu,
        bandwidth=measured.gpu.bandwidth * memory,
        part_bandwidth=measured.gpu.part_bandwidth * memory,
        cache_bandwidth=measured.gpu.cache_bandwidth * cache_,
    )
    return Costs(f"predicted, not measured, for {gpu}", False, costs, found)


@cache
def costs_of(gpu: GpuArch, bits: int) -> Costs:
    """The costs on a GPU, from its table ``tuned/<name>.json`` or ``tuned/<name>_int8.json``, or predicted.

    The prediction starts from Hopper's table for the same bits. ``tuned/resources.json`` and
    ``tuned/resources_int8.json`` list, by GPU, the tilings whose machine code passes the tests of compilation, with its
    registers and bytes of shared memory. A GPU gets those that fit in its shared memory, and no others.
    """
    folder, suffix = Path(__file__).with_name("tuned"), "" if bits == 4 else f"_int{bits}"
    resources = json.loads((folder / f"resources{suffix}.json").read_text())[gpu.name]
    known = {Tiling(*row[:-2]): (row[-2], row[-1]) for row in resources if row[-1] <= gpu.program_memory}
    own = folder / f"{gpu.name}{suffix}.json"
    if not own.exists():
        return predicted_costs(load_costs(folder / f"{HOPPER.name}{suffix}.json"), gpu, known)
    costs = load_costs(own)
    offered = {
        form: {tiling: cost for tiling, cost in tilings.items() if tiling in known}
        for form, tilings in costs.tilings.items()
    }
    return replace(costs, tilings=offered)


@dataclass(frozen=True)
class Weight:
    """The facts about a weight that determine its tilings.

    Attributes:
        n: out_features; for a gated pair, the sum of both halves.
        k: in_features.
        group_size: group size along K.
        bits: bits of an element.
        outputs: see :class:`~et_cuda_passes.kernels.cost.Work`.
        batch: as in ``Work``; each product is that of one expert.
        experts: whether the experts' kernel reads it. That kernel has no segments, no split tiles and no second piece
            of rows.
        grouped: for experts, whether the rows of x are sorted by expert: only then are there bulk copies.
    """

    n: int
    k: int
    group_size: int
    bits: int = 4
    outputs: float = 1.0
    batch: int = 1
    experts: bool = False
    grouped: bool = False

    def has(self, tiling: Tiling) -> bool:
        """Whether the weight's kernel supports this tiling."""
        plain = (tiling.segments, tiling.waves, tiling.extra_m) == (1, 0, 0) and tiling.bulk <= self.grouped
        # In these tiles of 128 x 128 the experts' kernel spills registers, on a Hopper or an A100.
        spills = (tiling.block_m, tiling.block_n) == (128, 128) and (tiling.warps == 4 or tiling.block_k > 64)
        return (plain and not spills) or not self.experts

    def work(self, m: Numbers) -> Work:
        """The product with ``m`` rows of x."""
        return Work(m, self.n, self.k, self.weight_bytes, self.outputs, self.batch, self.grouped)

    @property
    def weight_bytes(self) -> float:
        """Bytes of a row with its scales."""
        return self.k * self.bits / 8 + 2 * (self.k / self.group_size)


def nearest_group(costs: Costs, weight: Weight) -> int:
    """The group size in the table that is nearest to the weight's; 0 for an empty table."""
    known = sorted({group for group, _ in costs.tilings})
    if weight.group_size == weight.k and 0 in known:
        return 0
    groups = (group for group in known if group)
    return min(groups, key=lambda group: abs(math.log(group / weight.group_size)), default=0)


def candidates(costs: Costs, weight: Weight) -> Iterator[tuple[Tiling, TilingCost]]:
    """The tilings that a weight can have, with and without split tiles."""
    group = nearest_group(costs, weight)
    for whole in (True, False):
        for tiling, cost in costs.tilings.get((group, whole), {}).items():
            if is_whole(tiling, weight.k) == whole:
                most = min(MOST_WAVES, cost.programs) if tiling.may_be_cut else 0
                each = (replace(tiling, waves=waves) for waves in range(most + 1))
                yield from ((one, cost) for one in each if weight.has(one))


def predicted(gpu: GpuArch, costs: Costs, weight: Weight, rows: Sequence[int]) -> tuple[list[Tiling], np.ndarray]:
    """The tilings that a weight can have, and microseconds of each (first dimension) for each number of rows.

    The time is infinite for a tiling whose rows are so many or so few that it is never the cheapest.

    Raises:
        ValueError: no tiling fits in the shared memory that a kernel may use.
    """
    if not (found := list(candidates(costs, weight))):
        raise ValueError(
            f"no tiling of the {weight.bits}-bit kernel fits in {gpu.program_memory} bytes of shared memory: raise "
            "ET_CUDA_TARGET_SMEM_BYTES, or unset it"
        )
    tilings, known = zip(*found, strict=True)
    shapes, numbers = stacked(tilings, column=True), np.array(rows)
    times = time(shapes, weight.work(numbers), stacked(known, column=True), costs.gpu, gpu.processors)
    likely = (shapes.tile_m * 8 >= np.minimum(numbers, 1024)) & (shapes.tile_m <= np.maximum(16, 4 * numbers))
    likely |= ~likely.any(axis=0)  # a kernel with few tilings may have none of a likely size
    descriptors = np.array([len(_heights(tiling)) for tiling in tilings])[:, None]
    host = CUT * (shapes.waves > 0) + DESCRIPTOR * descriptors
    return [*tilings], np.where(likely, times + host, np.inf)


def _heights(tiling: Tiling) -> frozenset[int]:
    """The rows of the blocks that a tiling copies in bulk: each needs a descriptor."""
    return frozenset({tiling.block_m, tiling.extra_m} - {0}) if tiling.bulk else frozenset()


@cache
def tiling_for(gpu: GpuArch, weight: Weight, rows: int) -> Tiling:
    """The cheapest tiling of a weight for a number of rows."""
    tilings, times = predicted(gpu, costs_of(gpu, weight.bits), weight, [rows])
    return tilings[int(np.argmin(times[:, 0]))]


def lengths(first: int, last: int) -> list[int]:
    """Sample numbers of rows from ``first`` to ``last``: the edge of every tile is near one of them."""
    return sorted({first, (first + last) // 2, last})


@dataclass(frozen=True)
class Buckets:
    """Tilings by the largest number of rows of each, ascending, and the worst loss against the best of a length."""

    tilings: Mapping[int, Tiling]
    loss: float


@cache
def buckets(gpu: GpuArch, weight: Weight, most: int = MOST_LAUNCHES, first: int = 1, last: int = UNBOUNDED) -> Buckets:
    """At most ``most`` buckets of rows for lengths from ``first`` to ``last``; the last bucket's bound is UNBOUNDED."""
    costs = costs_of(gpu, weight.bits)
    ends = [*(bound for bound in BOUNDS if first <= bound < last), min(last, BOUNDS[-1])]
    ends = sorted(set(ends)) if first <= BOUNDS[-1] else [first]
    begins = [first, *(bound + 1 for bound in ends[:-1])]
    intervals = [lengths(*pair) for pair in zip(begins, ends, strict=True)]
    rows = [number for interval in intervals for number in interval]
    choices, times = predicted(gpu, costs, weight, rows)
    # The worst loss of each tiling within each interval, and the interval's share of its mean loss over log(M).
    best, starts = times.min(axis=0), np.cumsum([0, *(len(interval) for interval in intervals[:-1])])
    widths = np.array([math.log((interval[-1] + 1) / interval[0]) / len(interval) for interval in intervals])
    heights = [_heights(choice) for choice in choices]
    own = np.array([len(each) for each in heights])[:, None]
    chosen: list[tuple[int, int, int]] = []
    worst, least = math.inf, math.inf
    for allowed in _sets_of_heights(heights):
        among = np.array([each <= allowed for each in heights])[:, None]
        # A call builds the descriptors of all buckets.
        lost = np.where(among, times + DESCRIPTOR * (len(allowed) - own), np.inf) / best
        losses = np.maximum.reduceat(lost, starts, axis=1)
        means = np.add.reduceat(np.log(lost), starts, axis=1) * widths / math.log((ends[-1] + 1) / first)
        if np.isinf(losses.min(axis=0)).any():
            continue
        found = cover(losses, means, most)
        largest = float(max(losses[choice, begin:end].max() for begin, end, choice in found))
        both = math.log(largest) + 2 * sum(means[choice, begin:end].sum() for begin, end, choice in found)
        if both < least:
            chosen, worst, least = found, largest, both
    tilings: dict[int, Tiling] = {}
    for _, end, choice in chosen:
        earlier = next(reversed(tilings), None)
        if earlier is not None and tilings[earlier] == choices[choice]:
            del tilings[earlier]
        tilings[ends[end - 1] if end < len(ends) else UNBOUNDED] = choices[choice]
    return Buckets(tilings, worst)


def _sets_of_heights(heights: Iterable[frozenset[int]]) -> Iterator[frozenset[int]]:
    """The sets of at most MOST_HEIGHTS of all ``heights``."""
    every = sorted(frozenset[int]().union(*heights))
    for count in range(min(len(every), MOST_HEIGHTS) + 1):
        yield from map(frozenset, combinations(every, count))


def cover(losses: np.ndarray, means: np.ndarray, most: int) -> list[tuple[int, int, int]]:
    """At most ``most`` launches (first, end, choice) that cover all intervals, with two objectives in this order:

    - the worst loss: the smallest possible one or ENOUGH, whichever is larger, and at most SLACK above it;
    - the smallest sum of ``means``, with PRICE added for each launch.

    ``losses`` contains the worst loss of each choice (first dimension) in each interval. ``means`` contains the
    interval's share of the mean logarithm of the choice's loss.
    """
    count = losses.shape[1]
    # For each first interval: the worst loss of each choice up to each later interval.
    worst = [np.maximum.accumulate(losses[:, first:], axis=1) for first in range(count)]
    limit = max(ENOUGH, _smallest_worst_loss([each.min(axis=0) for each in worst], most)) * (1 + SLACK)
    sums = [
        np.where(each <= limit, np.cumsum(means[:, first:], axis=1), np.inf) + PRICE for first, each in enumerate(worst)
    ]
    # For each number of launches: the smallest sum up to each interval, and the begin of the last launch.
    least = np.array([0.0, *[np.inf] * count])
    begins: list[np.ndarray] = []
    ways = np.full((count, count + 1), np.inf)
    for first, each in enumerate(sums):
        ways[first, first + 1 :] = each.min(axis=0)
    totals = []
    for _ in range(most):
        reached = least[:-1, None] + ways
        begins.append(reached.argmin(axis=0))
        least = reached.min(axis=0)
        totals.append(least[-1])
    found: list[tuple[int, int, int]] = []
    end = count
    for number in range(int(np.argmin(totals)), -1, -1):
        first = int(begins[number][end])
        found.append((first, end, int(sums[first][:, end - first - 1].argmin())))
        end = first
    return found[::-1]


def _smallest_worst_loss(worst: Sequence[np.ndarray], most: int) -> float:
    """The smallest worst loss of at most ``most`` launches that cover all intervals.

    ``worst`` contains, for each first interval, the smallest worst loss of one launch up to each later interval.
    """
    count = len(worst)
    ways = np.full((count, count + 1), np.inf)
    for first, each in enumerate(worst):
        ways[first, first + 1 :] = each
    least = np.array([0.0, *[np.inf] * count])
    smallest = np.inf
    for _ in range(most):
        least = np.maximum(least[:-1, None], ways).min(axis=0)
        smallest = min(smallest, least[-1])
    return float(smallest)


def describe(gpu: GpuArch, weight: Weight, rows: int | None) -> str:
    """The tilings of a weight as text for a report: for ``rows``, or one for each bucket if ``rows`` is None."""
    if rows is not None:
        return f"M = {rows}: {tiling_for(gpu, weight, rows)}"
    chosen = buckets(gpu, weight).tilings.items()
    parts = [f"M <= {bound}: {tiling}" if bound != UNBOUNDED else f"else {tiling}" for bound, tiling in chosen]
    return "; ".join(parts)
