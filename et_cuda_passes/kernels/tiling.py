"""How the Triton kernel is shaped for a weight and a number of rows: tilings as data, and which one is chosen."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cache
from pathlib import Path

ROWS = (8, 16, 32, 64, 128, 256, 512, 2048)
"""Rows M up to which one tiling serves; more than the last have one of their own."""

UNBOUNDED = 2**31 - 1
"""The bound of the last bucket of rows."""

DYNAMIC_ROWS = (8, 16, 64, 256)
"""The buckets of a length that is not known at export: fewer, since each is a kernel in the program. All longer ones
have the tiling of up to 2048 rows: there are more prompts of hundreds of tokens than of thousands."""

BULK_K = 64
"""Step along K of a tiling with bulk copies: 128 bytes of a row. AOTInductor describes no tile that is wider."""

MOST_STAGES = 6
"""Steps in flight at most, where they are made shorter and more."""


@dataclass(frozen=True)
class Tiling:
    """The kernel's shape. See :mod:`et_cuda_passes.kernels.int4_matmul`.

    Attributes:
        block_m: rows of x in a tile.
        block_n: rows of the weight in a tile.
        block_k: step along K, 64, 128 or 256.
        segments: places along K that a tile works at side by side.
        waves: 0, or programs that a multiprocessor holds at once: tiles that do not fill the last wave are cut.
        warps: warps of a program.
        stages: steps whose loads are in flight.
        bulk: 1 if one thread copies a tile of x by its tensor descriptor (TMA, from sm_90 on), 0 if all copy parts of
            it. ``block_k`` is BULK_K then and ``segments`` 1.
    """

    block_m: int
    block_n: int
    block_k: int
    segments: int
    waves: int
    warps: int
    stages: int
    bulk: int = 0

    def __str__(self) -> str:
        """As in ``64x64x256, 2 segments``: BLOCK_M x BLOCK_N x BLOCK_K."""
        parts = [f"{self.block_m}x{self.block_n}x{self.block_k}"]
        parts += [f"{self.segments} segments"] * (self.segments > 1)
        parts += ["cut along K"] * (self.waves > 0)
        parts += ["bulk copies"] * self.bulk
        return ", ".join(parts)


@dataclass(frozen=True)
class Family:
    """GPUs that one table serves.

    Attributes:
        name: as in ``sm_90``; the tables are ``tuned/<name>.json`` and, for int8, ``tuned/<name>_int8.json``.
        wgmma: whether the compiler uses ``wgmma`` there.
    """

    name: str
    wgmma: bool


HOPPER = Family("sm_90", wgmma=True)
OTHER = Family("default", wgmma=False)


def family(capability: tuple[int, int]) -> Family:
    """The family of a GPU by its compute capability: Hopper, or any other."""
    return HOPPER if capability == (9, 0) else OTHER


@dataclass(frozen=True)
class Tuned:
    """One weight's tilings, by the most rows each serves.

    Attributes:
        n: out_features.
        k: in_features.
        group_size: group size along K.
        tilings: bound of the bucket -> tiling.
    """

    n: int
    k: int
    group_size: int
    tilings: Mapping[int, Tiling]


def load_table(path: Path) -> tuple[Tuned, ...]:
    """A table as ``python -m benchmarks.tune`` writes it.

    Raises:
        ValueError: a tiling or a bucket is missing or unknown, naming the file and the entry.
    """
    names = [field.name for field in fields(Tiling)]
    table = []
    for entry in json.loads(path.read_text())["tuned"]:
        where = f"{path.name}: {entry.get('n')} x {entry.get('k')}, group size {entry.get('group_size')}"
        found = {UNBOUNDED if bound == "more" else int(bound): row for bound, row in entry["tilings"].items()}
        if sorted(found) != [*ROWS, UNBOUNDED]:
            raise ValueError(f"{where}: rows {sorted(found)}, where {[*ROWS, 'more']} are needed")
        if any(len(row) != len(names) for row in found.values()):
            raise ValueError(f"{where}: a tiling is {names}")
        tilings = {bound: Tiling(*row) for bound, row in found.items()}
        if any(one.bulk and (one.block_k, one.segments) != (BULK_K, 1) for one in tilings.values()):
            raise ValueError(f"{where}: bulk copies are for steps of {BULK_K} in one segment")
        table.append(Tuned(int(entry["n"]), int(entry["k"]), int(entry["group_size"]), tilings))
    return tuple(table)


@cache
def _table(name: str) -> tuple[Tuned, ...]:
    return load_table(Path(__file__).with_name("tuned") / f"{name}.json")


def nearest(table: Sequence[Tuned], n: int, k: int, group_size: int) -> Tuned:
    """The entry of this weight, or of the one most like it: by the ratio of N, of K, and at last of the group size."""

    def distance(entry: Tuned) -> tuple[float, float, int, int]:
        shape = abs(math.log(entry.n / n)) + abs(math.log(entry.k / k))
        return shape, abs(math.log(entry.group_size / group_size)), entry.n, entry.k

    return min(table, key=distance)


def tilings(
    gpu: Family, n: int, k: int, group_size: int, bounds: Sequence[int] = ROWS, bits: int = 4
) -> dict[int, Tiling]:
    """The tiling of each bucket of rows, those of equal tilings merged: bound -> tiling, ascending, to UNBOUNDED."""
    entry = nearest(_table(gpu.name if bits == 4 else f"{gpu.name}_int{bits}"), n, k, group_size)
    last_entry = UNBOUNDED if bounds[-1] == ROWS[-1] else ROWS[-1]
    chosen: dict[int, Tiling] = {}
    for bound in (*bounds, UNBOUNDED):
        tiling = entry.tilings[bound if bound != UNBOUNDED else last_entry]
        if entry.k != k:  # else it was measured as it is
            tiling = even(tiling, k)
        last = next(reversed(chosen), None)
        if last is not None and chosen[last] == tiling:
            del chosen[last]
        chosen[bound] = tiling
    return chosen


def tiling_for(gpu: Family, n: int, k: int, group_size: int, rows: int, bits: int = 4) -> Tiling:
    """The tiling of a weight for a number of rows."""
    return next(t for bound, t in tilings(gpu, n, k, group_size, bits=bits).items() if rows <= bound)


def describe(rows: int | None, n: int, k: int, group_size: int, gpu: Family = HOPPER, bits: int = 4) -> str:
    """The tilings chosen for a weight, as a report says it: for ``rows``, or by rows where they are not known."""
    if rows is not None:
        return f"M = {rows}: {tiling_for(gpu, n, k, group_size, rows, bits)}"
    chosen = tilings(gpu, n, k, group_size, DYNAMIC_ROWS, bits)
    parts = [f"M <= {bound}: {tiling}" if bound != UNBOUNDED else f"else {tiling}" for bound, tiling in chosen.items()]
    return "; ".join(parts)


def even(tiling: Tiling, k: int) -> Tiling:
    """Shorter steps, and more of them in flight, where that makes ``k`` whole steps.

    Others are masked, which can take twice the time.
    """
    step = tiling.block_k
    while k % (step * tiling.segments) and step // 2 >= 64:
        step //= 2
    if step == tiling.block_k or k % (step * tiling.segments):
        return tiling
    return replace(tiling, block_k=step, stages=min(MOST_STAGES, tiling.stages * tiling.block_k // step))
