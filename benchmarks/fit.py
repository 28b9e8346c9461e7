"""Fit the model of :mod:`et_cuda_passes.kernels.cost` to measurements of ``python -m benchmarks.calibrate``.

    python -m benchmarks.fit calibration.jsonl [--out et_cuda_passes/kernels/tuned/sm_90.json]
    python -m benchmarks.fit benchmarks/calibrations/sm_90.jsonl.gz         # the data of that table

It needs no GPU. The fit is to the logarithms of times, with equal weights, so that errors are relative. It prints the
errors of the predictions, for the fitted points and for random products that were not fitted, and the loss of the
choice by prediction against the fastest measurement.
"""

import argparse
import gzip
import json
import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, astuple, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.calibrate import candidates
from benchmarks.pool import geometric_mean
from et_cuda_passes.kernels import cost as model
from et_cuda_passes.kernels.cost import GpuCost, TilingCost, Work, is_whole
from et_cuda_passes.kernels.gpus import GpuArch, gpu_of_capability
from et_cuda_passes.kernels.tiling import Tiling
from et_cuda_passes.layouts import mma_tiled

Key = tuple[Tiling, int, bool]
"""A tiling without split tiles, the group size (0: one scale a row), and whether steps along K are whole."""
FIRST = (1.0, 0.5, 0.5, 0.1)
"""Initial microseconds of the fit of a tiling, in the order of :class:`TilingCost`."""
LOOSE, TIED = 0.02, 0.2
"""The weight of a deviation by a factor of e from the start of the fit, relative to such an error of a point: from
FIRST and from the costs of the same tiling in all group sizes."""
ROBUST = 0.2
"""Relative error beyond which the influence of a point does not grow."""
ROUNDS = 3
MISSING_ROW = 0.0072
"""Microseconds of a bulk copy for a row beyond M: a program of 256 x 64 with 106 to 179 such rows takes 0.8 to 1.4 for
a step instead of 0.45. The fitted points have too few of them."""
CUT = ("second", "part", "part_bandwidth")
"""Costs of the GPU that only split tiles have."""


@dataclass(frozen=True)
class Measured:
    """A point."""

    kind: str
    tiling: Tiling | None
    key: Key | None
    work: Work
    us: float


@dataclass(frozen=True)
class Calibration:
    """A file of measurements."""

    machine: Mapping[str, Any]
    gpu: GpuArch
    programs: Mapping[Key, int]
    points: Sequence[Measured]


def weight_bytes(bits: int, k: int, group: int) -> float:
    """Bytes of a row of a weight and its scales."""
    if bits == 4:
        return mma_tiled.padded(k) / 2 + 2 * mma_tiled.scale_row(k, group)
    return k + 2 * (k / group)


def load(path: Path) -> Calibration:
    """A file of ``benchmarks.calibrate``, possibly compressed by gzip."""
    text = gzip.decompress(path.read_bytes()).decode() if path.suffix == ".gz" else path.read_text()
    lines = [json.loads(line) for line in text.splitlines()]
    machine = lines[0]
    bits, gpu = machine["bits"], gpu_of_capability(tuple(machine["capability"]), machine["processors"])
    programs: dict[Key, int] = {}
    points: dict[tuple[Any, ...], Measured] = {}
    for line in lines[1:]:
        tiling = None if line.get("tiling") is None else Tiling(*line["tiling"])
        if line["kind"] == "kernel" and tiling is not None:
            found = gpu.resident(line["registers"], line["shared"], tiling.warps)
            programs.setdefault((replace(tiling, waves=0), line["group"], line["whole"]), found)
        elif "us" in line:
            m, n, k, group = line["m"], line["n"], line["k"], line["group"]
            key = None
            if tiling is not None:
                by_row = bits == 8 and group == k
                key = (replace(tiling, waves=0), 0 if by_row else group, is_whole(tiling, k))
            work = Work(m, n, k, weight_bytes(bits, k, group) if tiling else 2 * k)
            points[line["kind"], tiling, group, m, n, k] = Measured(line["kind"], tiling, key, work, line["us"])
    return Calibration(machine, gpu, programs, [*points.values()])


def least_squares(
    residuals: Callable[[np.ndarray], np.ndarray], first: Sequence[float], rounds: int = 30
) -> tuple[np.ndarray, float]:
    """Levenberg and Marquardt's method: the minimum of the sum of squares near ``first``, and this sum."""
    at = np.array(first, dtype=float)
    value = residuals(at)
    best, damping = float(value @ value), 1e-2
    for _ in range(rounds):
        jacobian = np.stack([(residuals(at + step) - value) / 1e-4 for step in np.eye(len(at)) * 1e-4], axis=1)
        normal, gradient = jacobian.T @ jacobian, jacobian.T @ value
        for _ in range(6):
            moved = at - np.linalg.solve(normal + damping * np.diag(np.diag(normal) + 1e-6), gradient)
            moved = np.clip(moved, at - 1.5, at + 1.5)
            there = residuals(moved)
            total = float(there @ there)
            if total < best:
                break
            damping *= 4
        else:
            return at, best
        gained = best - total
        at, value, best, damping = moved, there, total, damping / 3
        if gained < 1e-5 * best:
            break
    return at, best


def bounded(errors: np.ndarray) -> np.ndarray:
    """Errors whose squares grow only linearly beyond ROBUST."""
    size = np.abs(errors)
    return np.sign(errors) * np.where(size <= ROBUST, size, np.sqrt(ROBUST * np.maximum(2 * size - ROBUST, 0)))


def both(points: Sequence[Measured]) -> tuple[Any, Any]:
    """The tilings and products of ``points``, stacked."""
    return model.stacked([point.tiling for point in points]), model.stacked([point.work for point in points])


class Fit:
    """Costs of all tilings on one GPU."""

    def __init__(self, calibration: Calibration) -> None:
        """Groups the fitted points by kernel."""
        self.calibration, machine = calibration, calibration.machine
        self.processors = machine["processors"]
        self.by_kernel: dict[Key, list[Measured]] = defaultdict(list)
        tried = candidates(machine["bits"], calibration.gpu.wgmma)  # a file may have tilings that no longer exist
        for point in calibration.points:
            if point.kind == "fit" and point.key is not None and point.key[0] in tried:
                self.by_kernel[point.key].append(point)
        self.cut = [point for point in calibration.points if point.kind == "cut"]
        bandwidth = machine["bandwidth"] / 1e6
        self.gpu = GpuCost(machine["start"], bandwidth, 2.5 * bandwidth, 2.0, 0.1, bandwidth, MISSING_ROW, 4.0)
        self.costs: dict[Key, TilingCost] = {}
        self.alike: dict[tuple[Tiling, bool], np.ndarray] = {}

    def programs(self, key: Key) -> int:
        """Programs of this kernel on a multiprocessor, or of the most similar kernel with known resources."""
        known = self.calibration.programs
        alike = [count for (tiling, _, whole), count in known.items() if tiling == key[0] and whole == key[2]]
        alike += [count for (tiling, _, _), count in known.items() if tiling == key[0]]
        return max(1, known.get(key) or (alike[0] if alike else 1))

    def predicted(self, points: Sequence[Measured], gpu: GpuCost | None = None) -> np.ndarray:
        """Predicted microseconds of each point."""
        costs = model.stacked([self.costs[point.key] for point in points if point.key])
        return np.asarray(model.time(*both(points), costs, gpu or self.gpu, self.processors))

    def fit_kernel(self, key: Key, gpu: GpuCost) -> tuple[TilingCost, float]:
        """The costs of one kernel, given the GPU's, and the sum of squares.

        They are tied to those of the same tiling in all group sizes, since some kernels have few points.
        """
        points, programs = self.by_kernel[key], self.programs(key)
        (tilings, works), measured = both(points), np.log([point.us for point in points])
        near = self.alike.get((key[0], key[2]))
        first, tied = (np.log(FIRST), LOOSE) if near is None else (near, TIED)

        def residuals(at: np.ndarray) -> np.ndarray:
            cost = TilingCost(programs, *np.exp(at).tolist())
            errors = np.log(model.time(tilings, works, cost, gpu, self.processors)) - measured
            return np.concatenate([bounded(errors), tied * (at - first)])

        at, total = least_squares(residuals, first)
        return TilingCost(programs, *np.exp(at).tolist()), total

    def fit_alike(self) -> None:
        """The costs of each tiling for all group sizes together, for whole and for partial steps."""
        for tiling, whole in {(key[0], key[2]) for key in self.by_kernel}:
            keys = [key for key in self.by_kernel if (key[0], key[2]) == (tiling, whole)]
            points = [point for key in keys for point in self.by_kernel[key]]
            programs = np.array([self.programs(point.key) for point in points if point.key])
            (tilings, works), measured = both(points), np.log([point.us for point in points])

            def residuals(at: np.ndarray, tilings: Any, works: Any, measured: Any, programs: Any) -> np.ndarray:
                errors = np.log(
                    model.time(tilings, works, TilingCost(programs, *np.exp(at)), self.gpu, self.processors)
                )
                return np.concatenate([bounded(errors - measured), LOOSE * (at - np.log(FIRST))])

            given = partial(residuals, tilings=tilings, works=works, measured=measured, programs=programs)
            self.alike[tiling, whole], _ = least_squares(given, np.log(FIRST))

    def fit_gpu(self, names: Sequence[str], keys: Sequence[Key]) -> None:
        """The GPU's costs ``names``, fitted with ``kernels``, whose own costs are fitted again each time."""
        for name in names:
            tried: dict[float, float] = {}
            for factor in (0.8, 0.9, 1.0, 1.12, 1.25):
                gpu = replace(self.gpu, **{name: getattr(self.gpu, name) * factor})
                tried[factor] = sum(self.fit_kernel(key, gpu)[1] for key in keys)
            self.gpu = replace(self.gpu, **{name: getattr(self.gpu, name) * min(tried, key=tried.__getitem__)})

    def fit_cut(self) -> None:
        """The costs of adding parts, with fixed costs of tilings."""
        points = [point for point in self.cut if point.key in self.costs]
        measured = np.log([point.us for point in points])
        if not points:
            return

        def residuals(at: np.ndarray) -> np.ndarray:
            gpu = replace(self.gpu, **dict(zip(CUT, np.exp(at).tolist(), strict=True)))
            return bounded(np.log(self.predicted(points, gpu)) - measured)

        at, _ = least_squares(residuals, np.log([getattr(self.gpu, name) for name in CUT]))
        self.gpu = replace(self.gpu, **dict(zip(CUT, np.exp(at).tolist(), strict=True)))

    def run(self) -> None:
        """Everything."""
        sample = [*self.by_kernel][:: max(1, len(self.by_kernel) // 40)]
        for _ in range(ROUNDS):
            for key in sample:
                self.costs[key] = self.fit_kernel(key, self.gpu)[0]
            self.fit_gpu(("start", "bandwidth", "cache_bandwidth", "sharpness"), sample)
        self.fit_alike()
        self.costs = {key: self.fit_kernel(key, self.gpu)[0] for key in self.by_kernel}
        self.fit_cut()

    def known(self, points: Iterable[Measured]) -> list[Measured]:
        """The points whose kernels have costs."""
        return [point for point in points if point.key in self.costs]


def rounded(value: float) -> float:
    """Rounded to four digits; more would be noise."""
    return float(f"{value:.4g}")


def table_text(fit: Fit) -> str:
    """The table of costs, with one line for each tiling."""
    machine = fit.calibration.machine
    head = {"source": f"calibrated on {machine['gpu']}", "measured": True}
    gpu = {name: rounded(value) for name, value in asdict(fit.gpu).items()}
    lines = ["{", *(f" {json.dumps(name)}: {json.dumps(value)}," for name, value in head.items())]
    lines += [f' "gpu": {json.dumps(gpu)},', ' "tilings": [']
    rows = []
    for tiling in sorted({key[0] for key in fit.costs}, key=astuple):
        groups = sorted({group for each, group, _ in fit.costs if each == tiling})
        both = {str(group): [cost_row(fit.costs.get((tiling, group, w))) for w in (True, False)] for group in groups}
        rows.append(f'  {{"tiling": {json.dumps(tiling.row)}, "costs": {json.dumps(both)}}}')
    return "\n".join([*lines, ",\n".join(rows), " ]", "}"]) + "\n"


def cost_row(cost: TilingCost | None) -> list[float] | None:
    """The form of the table."""
    return None if cost is None else [cost.programs, *(rounded(value) for value in astuple(cost)[1:])]


def percentile(values: Sequence[float], part: float) -> float:
    """A quantile of sorted values."""
    return sorted(values)[min(len(values) - 1, int(part * len(values)))]


def error_table(fit: Fit) -> Table:
    """Relative errors by kind of point and rows of a tile."""
    table = Table("points", "tile's rows", "number", "median", "90 %", "worst", "within 15 %")
    by: dict[tuple[str, int], list[float]] = defaultdict(list)
    points = fit.known(fit.calibration.points)
    for point, predicted in zip(points, fit.predicted(points), strict=True):
        assert point.tiling is not None
        off = abs(math.log(predicted / point.us))
        by[point.kind, 0].append(off)
        by[point.kind, point.tiling.tile_m].append(off)
    for (kind, height), errors in sorted(by.items()):
        within = sum(off <= math.log(1.15) for off in errors) / len(errors)
        figures = [statistics.median(errors), percentile(errors, 0.9), max(errors)]
        cells = [f"{math.expm1(value):.1%}" for value in figures]
        table.add_row(kind, str(height or "all"), str(len(errors)), *cells, f"{within:.1%}")
    return table


def held_products(points: Iterable[Measured]) -> dict[tuple[int, int, int], list[Measured]]:
    """The random products with all of their measurements."""
    found: dict[tuple[int, int, int], list[Measured]] = defaultdict(list)
    for point in points:
        if point.kind == "held":
            found[point.work.m, point.work.n, point.work.k].append(point)
    return found


def choice_table(fit: Fit) -> Table:
    """The loss of the choice by prediction, and the ratio of it and of the fastest to cuBLAS, by rows."""
    table = Table("rows", "products", "lost", "worst", "chosen / cuBLAS", "fastest / cuBLAS", title="products drawn")
    lost: dict[int, list[float]] = defaultdict(list)
    chosen_ratio, best_ratio = defaultdict(list), defaultdict(list)
    for (m, _, _), points in held_products(fit.calibration.points).items():
        dense = next((point.us for point in points if point.tiling is None), None)
        timed = fit.known(points)
        if not timed:
            continue
        fastest, chosen = min(point.us for point in timed), timed[int(np.argmin(fit.predicted(timed)))].us
        for place in (m, 0):
            lost[place].append(chosen / fastest)
            if dense is not None:
                chosen_ratio[place].append(chosen / dense)
                best_ratio[place].append(fastest / dense)
    for m, values in sorted(lost.items()):
        cells = [f"{geometric_mean(each):.3f}" for each in (values, chosen_ratio[m], best_ratio[m])]
        table.add_row(str(m or "all"), str(len(values)), cells[0], f"{max(values):.2f}", *cells[1:])
    return table


def main() -> None:
    """Fit and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("calibration", type=Path)
    parser.add_argument("--out", type=Path, help="the table of costs, as the package has it in kernels/tuned/")
    options = parser.parse_args()
    fit, console = Fit(load(options.calibration)), Console(width=140)
    fit.run()
    if options.out:
        options.out.write_text(table_text(fit))
    console.print(fit.gpu, error_table(fit), choice_table(fit))


if __name__ == "__main__":
    main()
