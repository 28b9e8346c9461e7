"""The calibration measures every tiling, and the fit recovers the costs of synthetic measurements."""

import json
import math
import random
from collections import Counter
from dataclasses import astuple, replace
from pathlib import Path

import numpy as np
import pytest

from benchmarks.calibrate import GROUPS, begun, candidates, heights, key, may_suit, of_new_tilings, plan
from benchmarks.fit import MISSING_ROW, Fit, load, table_text, weight_bytes
from et_cuda_passes.kernels.choose import load_costs
from et_cuda_passes.kernels.cost import GpuCost, TilingCost, Work, is_whole, time
from et_cuda_passes.kernels.gpus import HOPPER
from et_cuda_passes.kernels.tiling import BULK_K, Tiling

GPU = GpuCost(1.6, 2.7e6, 7e6, 2.2, 0.1, 3e6, MISSING_ROW, 5.0)
TILINGS = [Tiling(8, 16, 128, 4, 0, 4, 4), Tiling(64, 64, 128, 1, 0, 4, 4), Tiling(128, 64, 64, 1, 0, 4, 4, 1)]
RESOURCES = {TILINGS[0]: (92, 46592), TILINGS[1]: (121, 79360), TILINGS[2]: (106, 73248)}


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("wgmma", [True, False])
def test_candidates_are_all_tilings_of_their_kernel(bits: int, wgmma: bool) -> None:
    tried = candidates(bits, wgmma)
    assert len(set(tried)) == len(tried)
    assert any(tiling.bulk for tiling in tried) == (bits == 4 and wgmma)
    for tiling in tried:
        assert tiling.segments * tiling.block_n % (16 * tiling.warps) == 0, tiling
        assert tiling.waves == 0
        assert not tiling.bulk or (tiling.block_k, tiling.segments) == (BULK_K, 1), tiling


@pytest.mark.parametrize("bits", [4, 8])
def test_prefix_of_the_plan_has_all_kinds_of_products(bits: int) -> None:
    points = plan(bits, True, 132, 28)
    assert len(set(points)) == len(points)
    for part in (points, points[: len(points) // 4]):
        fitted = [point for point in part if point.kind == "fit" and point.tiling is not None]
        groups = {(p.tiling, 0 if bits == 8 and p.group == p.k else p.group) for p in fitted}
        assert groups == {(tiling, group) for tiling in candidates(bits, True) for group in GROUPS[bits]}
        assert {point.kind for point in part} == {"fit", "cut", "held"}
    for point in points:
        assert 1 <= point.m <= 4096 and 512 <= point.n <= 160_000 and point.k % (point.group or 1) == 0


@pytest.mark.parametrize("rows", [1, 8, 9, 17, 64, 65, 129, 1023, 4096])
def test_product_is_timed_in_plausible_tilings(rows: int) -> None:
    found = heights(rows)
    assert min(256, rows) <= 2 * max(found) and min(found) <= max(8, 2 * rows)


@pytest.mark.parametrize(("rows", "heights_of_two"), [(12, set()), (40, {48}), (150, {48, 96, 160, 192}), (3500, {96})])
def test_product_is_timed_in_tilings_of_two_pieces_that_it_fills(rows: int, heights_of_two: set[int]) -> None:
    found = {tiling.tile_m for tiling in candidates(4, True) if tiling.extra_m and may_suit(tiling, rows)}
    assert heights_of_two <= found
    assert all(-(-rows // height) * height <= 1.5 * rows for height in found)
    assert found or rows < 32


def test_run_for_new_tilings_has_exactly_their_points() -> None:
    points = plan(4, True, 132, 28)
    old = [point.entry() | {"us": 1.0} for point in points if point.tiling is None or not point.tiling.extra_m]
    # One of them has a line, but no time.
    failed = next(point for point in points if point.tiling is not None and point.tiling.extra_m)
    found = of_new_tilings(points, [*old, failed.entry() | {"error": "shared memory"}])
    assert found == [point for point in points if point.tiling is not None and point.tiling.extra_m]
    assert {point.kind for point in found} == {"fit", "cut", "held"}
    assert of_new_tilings(points, [point.entry() | {"us": 1.0} for point in points]) == []


def costs_of(tiling: Tiling, group: int, whole: bool) -> TilingCost:
    chance = random.Random(f"{tiling} {group} {whole}")
    registers, shared = RESOURCES[tiling]
    programs = HOPPER.resident(registers, shared, tiling.warps)
    numbers = (chance.uniform(0.8, 2), chance.uniform(0.1, 0.4), chance.uniform(0.3, 0.8), chance.uniform(0.1, 0.3))
    return TilingCost(programs, *numbers)


@pytest.fixture
def calibration(tmp_path: Path) -> Path:
    """A calibration file with the times of the model and 2 % noise."""
    chance = random.Random(0)
    machine = {"kind": "machine", "bits": 4, "gpu": "a GPU", "capability": [9, 0], "processors": 132, "start": 1.3}
    lines = [machine | {"bandwidth": 2.6e12, "rate": 7e14}]
    for tiling, (registers, shared) in RESOURCES.items():
        for whole in (True, False):
            named = {"kind": "kernel", "tiling": astuple(tiling), "group": 32, "whole": whole}
            lines.append(named | {"registers": registers, "shared": shared})
    for point in plan(4, True, 132, 0):
        if point.tiling is None or replace(point.tiling, waves=0) not in TILINGS:
            continue
        cost = costs_of(replace(point.tiling, waves=0), point.group, is_whole(point.tiling, point.k))
        work = Work(point.m, point.n, point.k, weight_bytes(4, point.k, point.group))
        measured = time(point.tiling, work, cost, GPU, 132) * math.exp(chance.gauss(0, 0.02))
        lines.append(point.entry() | {"us": measured})
    path = tmp_path / "calibration.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_fit_recovers_the_costs_of_synthetic_times(calibration: Path, tmp_path: Path) -> None:
    fit = Fit(load(calibration))
    fit.run()
    points = fit.calibration.points
    off = np.abs(np.log(fit.predicted(points) / [point.us for point in points]))
    assert np.quantile(off, 0.5) < 0.03
    assert np.quantile(off, 0.95) < 0.1
    table = tmp_path / "table.json"
    table.write_text(table_text(fit))
    read = load_costs(table)
    assert read.source == "calibrated on a GPU" and read.measured
    assert Counter(len(tilings) for tilings in read.tilings.values())[len(TILINGS)] >= 3
    for (group, whole), tilings in read.tilings.items():
        for tiling, cost in tilings.items():
            assert cost.programs == costs_of(tiling, group, whole).programs


def test_file_of_another_gpu_is_rejected(calibration: Path) -> None:
    assert begun(calibration.with_name("none"), 4, "a GPU") == []
    measured = {key(line) for line in begun(calibration, 4, "a GPU") if "us" in line}
    assert measured <= {key(json.loads(json.dumps(point.entry()))) for point in plan(4, True, 132, 0)}
    with pytest.raises(ValueError, match=r"has measurements of int4 on a GPU; give --out a new file for int4 on B"):
        begun(calibration, 4, "B")
