"""The int4 kernel beside cuBLAS in bf16 on random shapes, half of them from real models.

    python -m benchmarks.grid [--seed 0] [--groups 32 64 128] [--shapes 24] [--rows 1 2 5 ...] [--seconds 540]
                              [--beside NAME=FILE ...] [--out FILE]
    python -m benchmarks.grid --write-choices FILE      # needs no GPU
    python -m benchmarks.grid --dry-run                 # nor this: lists the kernels and points
    python -m benchmarks.grid --summary FILE            # the tables of an earlier run's FILE

N is a multiple of 8 from 512 to 160,000, and K a multiple of 32 from 512 to 16,384. Group sizes that do not divide K
are omitted. A time is that of a call in a CUDA graph, with weights rotated past the L2 cache, the median of a few
replays. At every point cuBLAS, tinygemm (up to 16 rows, the better of two inner_k_tiles) and each choice of tilings are
timed in sequence. Every result is first compared with fp64.

The package's own choice is always timed. ``--beside`` adds choices from files of ``--write-choices``, for example of
another version of the package, so that two are compared in one run. ``--out`` gets a line of JSON for each point as
soon as it is measured.
"""

import argparse
import json
import math
import random
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any, TextIO

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.compiling import Job, compile_all, distinct
from benchmarks.int4 import quick_microseconds
from benchmarks.limit import Limit
from benchmarks.pool import Pool, geometric_mean
from et_cuda_passes.kernels.choose import Weight, tiling_for
from et_cuda_passes.kernels.device import gpu_of
from et_cuda_passes.kernels.gpus import HOPPER, GpuArch
from et_cuda_passes.kernels.tiling import Tiling

REAL = {
    "Voxtral": [(6144, 3072), (1024, 3072), (3072, 4096), (16384, 3072), (3072, 8192), (131072, 3072)],
    "Voxtral's encoder": [(1280, 1280), (3840, 1280), (5120, 1280), (1280, 5120)],
    "Llama-3.1-8B": [(6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336), (128256, 4096)],
    "Llama-3.2-1B": [(3072, 2048), (2048, 2048), (16384, 2048), (2048, 8192)],
    "Llama-2-7B": [(12288, 4096), (22016, 4096), (4096, 11008)],
    "Llama-2-13B": [(15360, 5120), (27648, 5120), (5120, 13824)],
    "Qwen3-4B": [(6144, 2560), (2560, 4096), (19456, 2560), (2560, 9728)],
    "Qwen2.5-0.5B": [(1152, 896), (896, 896), (9728, 896), (896, 4864), (151936, 896)],
    "Qwen2.5-7B": [(4608, 3584), (3584, 3584), (37888, 3584)],
    "Gemma-3-1B": [(1536, 1152), (1152, 1024), (13824, 1152), (1152, 6912)],
    "Gemma-2-2B": [(4096, 2304), (2304, 2048), (18432, 2304), (2304, 9216)],
    "Phi-3-mini": [(9216, 3072), (3072, 3072), (32064, 3072)],
    "SmolLM2-135M": [(960, 576), (576, 576), (3072, 576), (576, 1536), (49152, 576)],
    "gpt-oss": [(5120, 2880), (2880, 4096), (2880, 2880)],
    "Whisper-small": [(768, 768), (2304, 768), (3072, 768), (768, 3072)],
}
"""N and K by model; q, k and v are one weight, and so are gate and up."""
ROWS = (1, 2, 5, 8, 12, 24, 48, 96, 160, 333, 600, 777, 1100, 2048, 3500)
GROUPS = (32, 64, 128)
OURS = "package"
TINYGEMM_ROWS = 16
BIG = 4 * 2**20
"""Bytes of a packed weight from which on the lower aim for few rows applies."""
AIMS = [
    ("1 to 16", 1, 16, 0, 0.60, 1.0),
    ("1 to 16, weights of 4 MB and more packed", 1, 16, BIG, 0.50, 1.0),
    ("17 to 64", 17, 64, 0, 0.75, 1.1),
    ("65 to 512", 65, 512, 0, 1.05, 1.35),
    ("513 to 4096", 513, 4096, 0, 1.03, 1.2),
]
"""Rows from and to, minimum bytes of the weight, and upper limits of the geometric mean and the worst."""
TINYGEMM_AIM = 1.1
WORST = 12
Point = dict[str, Any]
Chooser = Callable[[int, int, int, int], Tiling | None]


def drawn(seed: int, count: int) -> list[tuple[int, int]]:
    """``count`` shapes N, K: every second one of a real model, the others with random logarithms."""
    chance = random.Random(seed)
    real = chance.sample(sorted({shape for shapes in REAL.values() for shape in shapes}), count // 2)

    def one(low: int, high: int, multiple: int) -> int:
        return round(math.exp(chance.uniform(math.log(low), math.log(high))) / multiple) * multiple

    random_shapes = [(one(512, 160_000, 8), one(512, 16_384, 32)) for _ in range(count - len(real))]
    pairs = [*zip(random_shapes, real, strict=False)]
    return [shape for pair in pairs for shape in pair] + random_shapes[len(real) :]


def points_of(shapes: Sequence[tuple[int, int]], groups: Sequence[int], rows: Sequence[int]) -> list[Point]:
    """Every point: shape, rows and group size."""
    return [
        {"n": n, "k": k, "rows": m, "group": group}
        for (n, k), m, group in product(shapes, rows, groups)
        if k % group == 0
    ]


def place(point: Mapping[str, Any]) -> tuple[int, int, int, int]:
    """The key of a point: N, K, group size, rows."""
    return point["n"], point["k"], point["group"], point["rows"]


def package_choice(gpu: GpuArch) -> Chooser:
    """The package's choice for a known number of rows."""
    return lambda n, k, group, rows: tiling_for(gpu, Weight(n, k, group), rows)


def choices_in(path: Path) -> Chooser:
    """Choices from a file of ``--write-choices``; None for points that it lacks."""
    found = {place(entry): Tiling(*entry["tiling"]) for entry in map(json.loads, path.read_text().splitlines())}
    return lambda n, k, group, rows: found.get((n, k, group, rows))


def write_choices(path: Path, points: Iterable[Point], choose: Chooser) -> None:
    """A line for each point: the package's tiling."""
    with path.open("w") as file:
        for point in points:
            tiling = choose(*place(point))
            assert tiling is not None
            file.write(json.dumps(point | {"tiling": tiling.row}) + "\n")


def chosen(points: Iterable[Point], choosers: Mapping[str, Chooser]) -> Iterator[tuple[Point, dict[str, Tiling]]]:
    """Each point with the tiling of every choice that has one."""
    for point in points:
        found = {name: choose(*place(point)) for name, choose in choosers.items()}
        yield point, {name: tiling for name, tiling in found.items() if tiling is not None}


def jobs_of(both: Iterable[tuple[Point, Mapping[str, Tiling]]]) -> list[Job]:
    """The kernels to compile for them."""
    return [Job(tiling, 4, p["n"], p["k"], p["group"], p["rows"]) for p, tilings in both for tiling in tilings.values()]


def measured(pool: Pool, point: Point, tilings: Mapping[str, Tiling], dense: float) -> Point:
    """The point with its times; a failure has an error instead of a time."""
    n, k, group, m = place(point)
    found: Point = dict(point) | {"cublas": dense, "times": {}, "tilings": {}, "errors": {}}
    if m <= TINYGEMM_ROWS:
        inner = {8 if k % 128 == 0 else 4 if k % 64 == 0 else 2, 2}
        try:
            found["tinygemm"] = min(quick_microseconds(pool.tinygemm_calls(n, k, group, m, i)) for i in inner)
        except RuntimeError as error:
            found["errors"]["tinygemm"] = str(error)[:200]
    known: dict[Tiling, float] = {}
    for name, tiling in tilings.items():
        found["tilings"][name] = tiling.row
        try:
            if tiling not in known:
                known[tiling] = pool.time(n, k, group, m, tiling)
            found["times"][name] = known[tiling]
        except Exception as error:  # shared memory, ptxas or a wrong result: the others are still timed
            found["errors"][name] = f"{type(error).__name__}: {error}"[:200]
    return found


def run_grid(
    points: Sequence[Point], choosers: Mapping[str, Chooser], seconds: float, out: TextIO | None, jobs: int | None
) -> list[Point]:
    """Compile, then time until ``seconds`` are over."""
    begin = time.monotonic()
    processors = gpu_of(torch.device("cuda")).processors
    both = [*chosen(points, choosers)]
    compile_all(distinct(jobs_of(both), processors), jobs)
    print(f"compiled after {time.monotonic() - begin:.0f} s", flush=True)
    pool = Pool([place(point)[:3] for point in points], max(point["rows"] for point in points))
    found: list[Point] = []
    dense: dict[tuple[int, int, int], float] = {}
    for point, tilings in both:
        if time.monotonic() - begin > seconds:
            print(f"{seconds:.0f} s are over: {len(found)} of {len(points)} points were measured", flush=True)
            break
        n, k, _, m = place(point)
        if (n, k, m) not in dense:
            dense[n, k, m] = quick_microseconds(pool.dense_calls(n, k, m))
        found.append(measured(pool, point, tilings, dense[n, k, m]))
        if out:
            out.write(json.dumps(found[-1]) + "\n")
            out.flush()
    print(f"done after {time.monotonic() - begin:.0f} s", flush=True)
    return found


def ratios(points: Iterable[Point], name: str, of: str = "cublas") -> list[float]:
    """The time of a choice divided by that of cuBLAS or tinygemm."""
    return [p["times"][name] / p[of] for p in points if name in p["times"] and of in p]


def shown(values: Sequence[float]) -> list[str]:
    """Geometric mean and worst, as cells."""
    return [f"{geometric_mean(values):.2f}", f"{max(values):.2f}"] if values else ["", ""]


def rows_table(points: Sequence[Point], names: Sequence[str]) -> Table:
    """Geometric mean and worst for each number of rows."""
    table = Table("rows", "points", title="time over cuBLAS bf16: geometric mean, worst")
    for name in names:
        table.add_column(name)
        table.add_column("worst")
    for other in names[1:]:
        table.add_column(f"{names[0]} / {other}")
        table.add_column("worst")
    table.add_column(f"{names[0]} / tinygemm")
    table.add_column("worst")
    for m in sorted({point["rows"] for point in points}):
        of_rows = [point for point in points if point["rows"] == m]
        cells = [cell for name in names for cell in shown(ratios(of_rows, name))]
        for other in names[1:]:
            both = [p["times"] for p in of_rows if names[0] in p["times"] and other in p["times"]]
            cells += shown([times[names[0]] / times[other] for times in both])
        table.add_row(str(m), str(len(of_rows)), *cells, *shown(ratios(of_rows, names[0], "tinygemm")))
    return table


def aims_table(points: Sequence[Point], names: Sequence[str]) -> Table:
    """The classes of rows, compared with their limits."""
    table = Table("rows", "points", "choice", "mean", "aim", "worst", "aim", "reached")
    for text, first, last, nbytes, mean, worst in AIMS:
        within = [p for p in points if first <= p["rows"] <= last and p["n"] * p["k"] / 2 >= nbytes]
        for name in names:
            found = ratios(within, name)
            if found:
                good = geometric_mean(found) <= mean, max(found) <= worst
                reached = " and ".join(w for w, ok in zip(("mean", "worst"), good, strict=True) if ok) or "no"
                cells = [f"{geometric_mean(found):.3f}", f"{mean}", f"{max(found):.2f}", f"{worst}", reached]
                table.add_row(text, str(len(found)), name, *cells)
    for name in names:
        found = ratios(points, name, "tinygemm")
        if found:
            over = sum(value > TINYGEMM_AIM for value in found)
            cells = [f"{geometric_mean(found):.3f}", "", f"{max(found):.2f}", f"{TINYGEMM_AIM}", f"{over} are above"]
            table.add_row("1 to 16, over tinygemm", str(len(found)), name, *cells)
    return table


def worst_table(points: Sequence[Point], name: str) -> Table:
    """The points that exceed the limit of their class most."""

    def above(point: Point) -> float:
        aim = next(worst for _, first, last, _, _, worst in AIMS if first <= point["rows"] <= last)
        return float(point["times"][name] / point["cublas"] / aim)

    table = Table("N x K", "group", "rows", "µs", "cuBLAS", "ratio", "tiling", title="furthest above their aim")
    for p in sorted((p for p in points if name in p["times"]), key=above)[: -WORST - 1 : -1]:
        time_, dense = p["times"][name], p["cublas"]
        cells = [f"{time_:.1f}", f"{dense:.1f}", f"{time_ / dense:.2f}", str(p["tilings"][name])]
        table.add_row(f"{p['n']} x {p['k']}", str(p["group"]), str(p["rows"]), *cells)
    return table


def print_summary(points: Sequence[Point], console: Console) -> None:
    """All tables, and what failed."""
    names = [OURS, *sorted({name for point in points for name in point["times"]} - {OURS})]
    for point in points:
        for name, error in point["errors"].items():
            console.print(f"{point['n']} x {point['k']}, group {point['group']}, {point['rows']} rows, {name}: {error}")
    console.print(worst_table(points, OURS), rows_table(points, names), aims_table(points, names))


def main() -> None:
    """Time the grid, write its choices, or print the tables of an earlier run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--groups", type=int, nargs="+", default=GROUPS, choices=GROUPS)
    parser.add_argument("--shapes", type=int, default=24)
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS)
    parser.add_argument("--seconds", type=float, default=540)
    parser.add_argument("--beside", nargs="+", default=[], metavar="NAME=FILE")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--jobs", type=int, help="processes that compile side by side")
    parser.add_argument("--write-choices", type=Path, metavar="FILE")
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--summary", type=Path, metavar="FILE")
    options = parser.parse_args()
    console = Console(width=180)
    if options.summary:
        print_summary([json.loads(line) for line in options.summary.read_text().splitlines()], console)
        return
    points = points_of(drawn(options.seed, options.shapes), options.groups, options.rows)
    if options.write_choices:
        write_choices(options.write_choices, points, package_choice(HOPPER))
        return
    gpu = gpu_of(torch.device("cuda"))
    choosers = {OURS: package_choice(gpu)}
    choosers |= {name: choices_in(Path(path)) for name, _, path in (each.partition("=") for each in options.beside)}
    if options.dry_run:
        kernels = len(distinct(jobs_of([*chosen(points, choosers)]), gpu.processors))
        operations = sum(2 * point["n"] * point["k"] * point["rows"] for point in points)
        console.print(f"{len(points)} points, {kernels} kernels, {operations / 1e12:.0f} TFLOP for one call of each")
        return
    if not torch.cuda.is_available():
        parser.error("needs a CUDA device")
    console.print(
        f"{torch.cuda.get_device_name(0)}, torch {torch.__version__}, seed {options.seed}, {Limit.measured()}; "
        f"{len(points)} points: {', '.join(f'{n}x{k}' for n, k in drawn(options.seed, options.shapes))}"
    )
    out = options.out.open("w") if options.out else None
    found = run_grid(points, choosers, options.seconds, out, options.jobs)
    print_summary(found, console)


if __name__ == "__main__":
    main()
