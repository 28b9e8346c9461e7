"""Measure the costs of the Triton kernel's tilings on the GPU of this machine.

    python -m benchmarks.calibrate [--bits 4] [--seconds 480] [--new-tilings] [--out calibration.jsonl]
    python -m benchmarks.calibrate --dry-run                    # needs no GPU: lists the kernels and points

Each measurement is written immediately as a line of JSON: about the machine, a kernel's resources, or a point. A point
is a tiling, a group size, and a product of M rows with a weight [N, K]. A run resumes a file that was begun on the same
GPU. With ``--new-tilings`` it measures only tilings for which the file has no point. The order of points gives a run
that is interrupted some points of every kind.

- ``fit``: every tiling in every group size, with whole and partial steps, for several K and numbers of tiles.
- ``cut``: tilings that split the tiles which do not fill the last wave.
- ``held``: random products, each in all tilings that could be chosen for it and by cuBLAS. They show the loss of a
  choice by predicted costs, and nothing is fitted to them.
"""

import argparse
import json
import math
import random
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TextIO

import torch
from rich.console import Console

from benchmarks.compiling import Job, compile_all, distinct
from benchmarks.grid import drawn
from benchmarks.int4 import quick_microseconds
from benchmarks.limit import Limit
from benchmarks.pool import Pool
from et_cuda_passes.kernels.cost import is_whole
from et_cuda_passes.kernels.device import gpu_of
from et_cuda_passes.kernels.int4_matmul import int4_matmul
from et_cuda_passes.kernels.int8_matmul import int8_matmul
from et_cuda_passes.kernels.tiling import Tiling

GROUPS = {4: (32, 64, 128), 8: (32, 128, 0)}
"""Group sizes by bits; 0 is one scale a row."""
WHOLE_K = (512, 1024, 1536, 2048, 3072, 4096, 6144, 8192, 12288, 16384)
OTHER_K = (544, 576, 800, 896, 1120, 1216, 1600, 2144, 2880, 3104, 4160, 4928, 6560, 9856, 11296, 13888)
HELD_ROWS = (1, 3, 7, 12, 24, 40, 90, 150, 333, 600, 777, 1100, 2040, 3500)
MOST_N, LEAST_N, MOST_M, MOST_WEIGHT = 160_000, 512, 4096, 6e8
# Triton compiles a separate kernel for integers that 16 divides, and another for 1. Here most are of one kind, so that
# there is less to compile.
FEW_ROWS = 64
HELD_SEED = 1000
MOST_FAILURES = 60
"""Failures in a row: more indicate an error of the GPU, after which nothing runs."""
TWO_PIECES = [
    *[(32, 16, 64, 4, 6), (32, 16, 128, 4, 6), (64, 16, 64, 4, 6), (64, 32, 64, 4, 6), (64, 32, 64, 4, 4)],
    *[(64, 32, 128, 4, 4), (64, 32, 128, 8, 4), (128, 16, 64, 4, 4), (128, 32, 64, 4, 3), (128, 32, 64, 4, 4)],
    *[(128, 32, 128, 4, 3), (128, 32, 128, 8, 4), (128, 64, 64, 4, 3), (128, 64, 64, 4, 4), (128, 64, 128, 8, 4)],
    *[(256, 32, 128, 8, 4), (256, 64, 128, 8, 3), (256, 64, 128, 8, 4), (256, 128, 128, 8, 3)],
    *[(64, 16, 128, 4, 4), (128, 16, 128, 8, 4)],
]
"""BLOCK_M, EXTRA_M, BLOCK_N, warps and stages of tilings with two pieces of rows. Both pieces are copied in bulk."""
MEMORY = 228 * 1024
"""Shared memory of a multiprocessor, for a first estimate of its number of programs."""


@dataclass(frozen=True)
class Measurement:
    """One point: its kind, the tiling (None is cuBLAS), and the product."""

    kind: str
    tiling: Tiling | None
    group: int
    m: int
    n: int
    k: int

    def entry(self) -> dict[str, Any]:
        """The entry of the file, without the time."""
        tiling = None if self.tiling is None else self.tiling.row
        return {"kind": self.kind, "tiling": tiling, "group": self.group, "m": self.m, "n": self.n, "k": self.k}


def candidates(bits: int, wgmma: bool) -> list[Tiling]:
    """Every tiling without split tiles that may be chosen: BLOCK_M, N, K, segments, warps, stages."""
    few = {
        8: [
            *[(16, 256, 4, 4, 3), (16, 128, 4, 4, 4), (16, 64, 4, 4, 6), (32, 256, 2, 4, 3), (32, 128, 2, 4, 4)],
            *[(32, 64, 2, 4, 6), (64, 256, 1, 4, 3), (64, 128, 1, 4, 4), (64, 64, 1, 4, 6), (64, 256, 2, 8, 3)],
            *[(16, 128, 2, 2, 4), (16, 64, 2, 2, 6), (32, 256, 1, 2, 3), (32, 128, 1, 2, 4)],
            *[(32, 64, 1, 2, 6)],
        ],
        16: [
            *[(16, 256, 4, 4, 3), (16, 128, 4, 4, 3), (16, 64, 4, 4, 4), (32, 256, 2, 4, 3), (32, 128, 2, 4, 3)],
            *[(32, 64, 2, 4, 6), (64, 256, 1, 4, 3), (64, 128, 1, 4, 4), (64, 64, 1, 4, 6), (128, 128, 1, 8, 4)],
            *[(16, 128, 2, 2, 4), (16, 64, 2, 2, 6), (32, 128, 1, 2, 4), (32, 64, 1, 2, 6)],
        ],
        32: [
            *[(16, 128, 4, 4, 3), (16, 64, 4, 4, 4), (32, 256, 2, 4, 3), (32, 128, 2, 4, 3), (32, 64, 2, 4, 4)],
            *[(64, 256, 1, 4, 3), (64, 128, 1, 4, 4), (64, 64, 1, 4, 6), (128, 128, 1, 8, 4), (128, 64, 1, 8, 6)],
            *[(32, 128, 1, 2, 4), (32, 64, 1, 2, 6)],
        ],
        64: [
            *[(16, 64, 4, 4, 4), (32, 128, 2, 4, 3), (32, 64, 2, 4, 4), (64, 64, 1, 4, 6), (64, 64, 1, 4, 4)],
            *[(64, 128, 1, 4, 4), (64, 128, 1, 4, 3), (64, 256, 1, 4, 3), (128, 128, 1, 8, 4), (128, 128, 1, 8, 3)],
            *[(128, 64, 1, 8, 6)],
        ],
        128: [
            *[(64, 64, 1, 4, 4), (64, 64, 1, 4, 6), (64, 128, 1, 4, 3), (128, 64, 1, 8, 4), (128, 64, 1, 4, 4)],
            *[(128, 128, 1, 8, 3)],
        ],
        256: [(64, 64, 1, 4, 3), (64, 64, 1, 4, 4), (128, 64, 1, 8, 4), (128, 64, 1, 8, 5)],
    }
    found = [Tiling(m, n, k, s, 0, w, st) for m, rows in few.items() for n, k, s, w, st in rows]
    if bits == 4 and wgmma:  # GPUs with this instruction also have bulk copies
        found += [
            replace(tiling, bulk=1)
            for tiling in found
            if tiling.block_k == 64 and tiling.segments == 1 and tiling.warps >= 4
        ]
        more = [(128, 128, 4, 3), (128, 64, 4, 3), (128, 256, 8, 4), (64, 256, 8, 4), (64, 128, 4, 4), (64, 128, 4, 6)]
        more += [(32, 128, 4, 6), (16, 128, 4, 6)]
        found += [Tiling(m, n, 64, 1, 0, warps, stages, 1) for m, n, warps, stages in more]
        found += [Tiling(m, n, 64, 1, 0, warps, stages, 1, extra) for m, extra, n, warps, stages in TWO_PIECES]
    return found


def programs(tiling: Tiling) -> int:
    """An estimate of the programs on a multiprocessor, by the bytes of the steps and the registers of the sums."""
    step = tiling.segments * tiling.block_k * (2 * tiling.tile_m + tiling.block_n // 2)
    registers = tiling.segments**2 * tiling.tile_m * tiling.block_n // (32 * tiling.warps) + 90
    return max(1, min(MEMORY // (tiling.stages * step + 2048), 65536 // (registers * 32 * tiling.warps), 16))


def product_for(tiling: Tiling, ks: Sequence[int], share: float, processors: int, chance: random.Random) -> Any:
    """M, N and K that give about ``share`` tiles for a multiprocessor, within the bounds."""
    tiles = max(1, round(share * processors))
    if tiling.tile_m <= 32:
        high = chance.choice((1, 1, 1, 1, 2, 3, 4))
    else:
        high = chance.choice([c for c in (1, 2, 3, 4, 6, 8, 12, 16, 27, 64) if c * tiling.tile_m <= MOST_M])
    high = min(high, tiles)
    m = high * tiling.tile_m - chance.choice((0, 0, chance.randrange(tiling.tile_m // 2 + 1)))
    m = max(16, m // 16 * 16) if tiling.tile_m > 8 else m - (m % 16 == 0) + (m == 1)
    k = chance.choice(ks)
    most = min(MOST_N, int(MOST_WEIGHT / k))
    n = max(LEAST_N, min(most, max(1, round(tiles / high)) * tiling.block_n)) // 16 * 16
    return m, n, k


def of_tiling(tiling: Tiling, group: int, bits: int, count: int, whole: bool, processors: int) -> list[Measurement]:
    """``count`` points with several K and numbers of tiles for a multiprocessor."""
    chance = random.Random(f"{tiling.row} {group} {whole}")
    ks = [k for k in (*WHOLE_K, *OTHER_K) if is_whole(tiling, k) == whole and k % (group or 1) == 0]
    if not tiling.bulk:
        ks = [k for k in ks if (k in WHOLE_K) == whole] or ks
    if bits == 8:  # the power of two that divides K is a constant of this kernel
        ks = [k for k in ks if k & -k in (32, 1024) or k % 4096 == 0]
    kind = "cut" if tiling.waves else "fit"
    most = 3 * tiling.waves if tiling.waves else 14
    shares = [0.12 * (most / 0.12) ** ((number + chance.random()) / count) for number in range(count)]
    chance.shuffle(shares)
    found = [
        Measurement(kind, tiling, group or k, m, n, k)
        for m, n, k in (product_for(tiling, ks, share, processors, chance) for share in shares if ks)
    ]
    return list(dict.fromkeys(found))


def heights(m: int) -> list[int]:
    """BLOCK_M of the tilings with one piece of rows that may be chosen for ``m`` rows."""
    least = min(256, max(8, 1 << (m - 1).bit_length()))
    if m > 2 * FEW_ROWS:
        return [64, 128, 256] if m < 1024 else [128, 256]
    return [least, least // 2] if least > 8 and m > FEW_ROWS else [least]


def may_suit(tiling: Tiling, m: int) -> bool:
    """Whether a tiling may be chosen for ``m`` rows. With two pieces, at most a third of its rows may be beyond M."""
    if not tiling.extra_m:
        return tiling.block_m in heights(m)
    return 2 * tiling.tile_m > min(heights(m)) and -(-m // tiling.tile_m) * tiling.tile_m <= 1.5 * m


def held_out(tilings: Sequence[Tiling], groups: Sequence[int], count: int) -> list[list[Measurement]]:
    """Random products, each with all tilings for its rows and with cuBLAS."""
    chance = random.Random(HELD_SEED)
    shapes = [shape for seed in range(-(-count // 24)) for shape in drawn(HELD_SEED + seed, 24)][:count]
    found = []
    for number, (n, k) in enumerate(shapes):
        # Every second shape is a real one, and each kind has its own rotation of rows.
        place = number // 2 + number % 2 * (len(HELD_ROWS) // 2)
        m, n = HELD_ROWS[place % len(HELD_ROWS)], n // 16 * 16
        group = chance.choice([group for group in groups if k % (group or 1) == 0])
        fitting = [tiling for tiling in tilings if may_suit(tiling, m)]
        cut = [
            replace(tiling, waves=waves)
            for tiling in fitting
            if tiling.may_be_cut
            for waves in (1, 2)
            if waves <= programs(tiling)
        ]
        points = [Measurement("held", None, 0, m, n, k)]
        found.append(points + [Measurement("held", t, group or k, m, n, k) for t in (*fitting, *cut)])
    return found


def plan(bits: int, wgmma: bool, processors: int, held: int) -> list[Measurement]:
    """All measurements in their order."""
    tilings, groups = candidates(bits, wgmma), GROUPS[bits]
    series: list[list[Measurement]] = []
    for tiling in tilings:
        for group in groups:
            first = group == groups[0]
            series.append(of_tiling(tiling, group, bits, 32 if first else 18, True, processors))
            if not tiling.bulk:
                series.append(of_tiling(tiling, group, bits, 14 if first else 6, False, processors))
        if tiling.may_be_cut:
            for waves in range(1, min(3, programs(tiling)) + 1):
                series.append(of_tiling(replace(tiling, waves=waves), groups[0], bits, 12, True, processors))
    spread = [(number / len(points), point) for points in series for number, point in enumerate(points)]
    together = held_out(tilings, groups, held)
    spread += [(number / len(together), point) for number, points in enumerate(together) for point in points]
    return [point for _, point in sorted(spread, key=lambda pair: pair[0])]


def jobs_of(points: Iterable[Measurement], bits: int) -> list[Job]:
    """The kernels to compile for them."""
    return [Job(p.tiling, bits, p.n, p.k, p.group, p.m) for p in points if p.tiling is not None]


class Resources:
    """Registers and shared memory of each loaded kernel, from Triton."""

    def __init__(self, bits: int) -> None:
        """``bits`` selects the kernel."""
        self._kernel = int4_matmul if bits == 4 else int8_matmul
        self._seen = 0

    def newest(self) -> dict[str, int] | None:
        """The resources of the kernel that was loaded since the last call."""
        try:
            cache = self._kernel.device_caches[torch.cuda.current_device()][0]
            if len(cache) == self._seen:
                return None
            self._seen = len(cache)
            kernel = list(cache.values())[-1]
            return {"registers": kernel.n_regs, "spills": kernel.n_spills, "shared": kernel.metadata.shared}
        except (AttributeError, IndexError, TypeError):  # another version of Triton; the times are valid anyway
            return None


def machine(bits: int) -> dict[str, Any]:
    """The first line of the file."""
    properties, limit = torch.cuda.get_device_properties(0), Limit.measured()
    return {
        "kind": "machine",
        "bits": bits,
        "gpu": properties.name,
        "capability": [properties.major, properties.minor],
        "processors": properties.multi_processor_count,
        "cache": properties.L2_cache_size,
        "shared": getattr(properties, "shared_memory_per_multiprocessor", None),
        "bandwidth": limit.bandwidth,
        "rate": limit.rate,
        "start": limit.start,
        "torch": str(torch.__version__),
    }


def lines_of(path: Path) -> list[dict[str, Any]]:
    """The lines of a file, none if it does not exist."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def of_new_tilings(points: Iterable[Measurement], lines: Iterable[Mapping[str, Any]]) -> list[Measurement]:
    """The points of tilings without a time in ``lines``, with or without split tiles."""
    known = {replace(Tiling(*line["tiling"]), waves=0) for line in lines if line.get("tiling") and "us" in line}
    return [p for p in points if p.tiling is not None and replace(p.tiling, waves=0) not in known]


def begun(path: Path, bits: int, gpu: str) -> list[dict[str, Any]]:
    """The lines of an existing file.

    Raises:
        ValueError: the file is for another GPU, or for other bits.
    """
    lines = lines_of(path)
    if lines and (lines[0]["gpu"], lines[0]["bits"]) != (gpu, bits):
        was = f"int{lines[0]['bits']} on {lines[0]['gpu']}"
        raise ValueError(f"{path} has measurements of {was}; give --out a new file for int{bits} on {gpu}")
    return lines


def key(entry: Mapping[str, Any]) -> str:
    """The key of a point's line."""
    return json.dumps([entry[name] for name in ("kind", "tiling", "group", "m", "n", "k")])


def measure(pool: Pool, points: Iterable[Measurement], file: TextIO, bits: int, end: float) -> Iterator[float]:
    """Time points and write a line for each, until the clock reaches ``end``; yields the times."""
    resources = Resources(bits)
    known: set[tuple[object, ...]] = set()
    checked: set[tuple[object, ...]] = set()
    failures = 0
    for point in points:
        if time.monotonic() > end:
            return
        if failures == MOST_FAILURES:
            print(f"{failures} points failed one after another: the GPU may be in an error state", flush=True)
            return
        entry = point.entry()
        kernel = (point.tiling, point.group, point.tiling is not None and is_whole(point.tiling, point.k))
        try:
            if point.tiling is None:
                elapsed = quick_microseconds(pool.dense_calls(point.n, point.k, point.m))
            else:
                place = (point.n, point.k, point.group, point.m, point.tiling)
                elapsed = pool.time(*place, check=kernel not in checked or point.kind != "fit")
                checked.add(kernel)
            entry["us"] = round(elapsed, 3)
            failures = 0
        except Exception as error:  # shared memory, ptxas or a wrong result: the other points are still measured
            entry["error"] = f"{type(error).__name__}: {error}"[:200]
            failures += 1
        if point.tiling is not None:
            loaded = resources.newest()
            group = point.group if point.group != point.k or bits == 4 else 0
            cut = replace(point.tiling, waves=int(point.tiling.waves > 0))
            named = {"kind": "kernel", "tiling": cut.row, "group": group, "whole": kernel[2]}
            if loaded is not None and (cut, group, kernel[2]) not in known:
                known.add((cut, group, kernel[2]))
                file.write(json.dumps(named | loaded) + "\n")
        file.write(json.dumps(entry) + "\n")
        file.flush()
        yield entry.get("us", math.nan)


def main() -> None:
    """Measure until the time is over, and print a summary."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bits", type=int, default=4, choices=(4, 8))
    parser.add_argument("--seconds", type=float, default=480)
    parser.add_argument("--held", type=int, default=70, help="products that are drawn, nothing being fitted to them")
    parser.add_argument("--most", type=int, help="measure no more points than this")
    parser.add_argument("--out", type=Path, default=Path("calibration.jsonl"))
    parser.add_argument("--jobs", type=int, help="processes that compile side by side")
    parser.add_argument("--new-tilings", action="store_true", help="measure only tilings without a point in --out")
    parser.add_argument("--dry-run", action="store_true")
    options = parser.parse_args()
    begin, console = time.monotonic(), Console(width=160)
    gpu = gpu_of(torch.device("cuda"))
    processors = gpu.processors
    points = plan(options.bits, gpu.wgmma, processors, options.held)
    if options.new_tilings:
        points = of_new_tilings(points, lines_of(options.out))
    points = points[: options.most]
    if options.dry_run:
        kinds = {kind: sum(p.kind == kind for p in points) for kind in ("fit", "cut", "held")}
        operations = sum(2 * p.m * p.n * p.k for p in points) / 1e12
        kernels = len(distinct(jobs_of(points, options.bits), processors))
        console.print(f"{kinds} points, {kernels} kernels, {operations:.0f} TFLOP for one call of each")
        return
    if not torch.cuda.is_available():
        parser.error("needs a CUDA device")
    earlier = begun(options.out, options.bits, torch.cuda.get_device_name(0))
    done = {key(entry) for entry in earlier if "us" in entry}
    points = [point for point in points if key(json.loads(json.dumps(point.entry()))) not in done]
    console.print(f"{torch.cuda.get_device_name(0)}: {len(points)} points, {len(done)} were measured before")
    compile_all(distinct(jobs_of(points, options.bits), processors), options.jobs)
    console.print(f"compiled after {time.monotonic() - begin:.0f} s")
    shapes = [(p.n, p.k, p.group or p.k) for p in points]
    with options.out.open("a") as file:
        if not earlier:
            file.write(json.dumps(machine(options.bits)) + "\n")
        pool = Pool(shapes, max(p.m for p in points), options.bits)
        times = [*measure(pool, points, file, options.bits, begin + options.seconds)]
    failed = sum(math.isnan(elapsed) for elapsed in times)
    console.print(f"{options.out}: {len(times)} of {len(points)} points in {time.monotonic() - begin:.0f} s", end="")
    console.print(f", {failed} of them failed")


if __name__ == "__main__":
    main()
