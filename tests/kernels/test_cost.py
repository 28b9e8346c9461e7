"""The model of a tiling's time, in cases with a known result."""

import math
from dataclasses import replace

import numpy as np
import pytest

from et_cuda_passes.kernels.cost import GpuCost, TilingCost, Work, is_whole, rounded_max, stacked, time
from et_cuda_passes.kernels.tiling import Tiling

SHARP = GpuCost(2.0, 1e12, 1e12, 3.0, 0.0, 1e12, 0.0, math.inf)
"""A GPU with unlimited bandwidth."""
COST = TilingCost(2, 1.0, 0.25, 0.5, 0.3)
TILING = Tiling(128, 64, 64, 1, 0, 4, 4, 1)
PROCESSORS = 10


def of(tiles: int, k: int = 640, tiling: Tiling = TILING, gpu: GpuCost = SHARP) -> float:
    return time(tiling, Work(tiling.block_m, tiles * tiling.block_n, k, 0), COST, gpu, PROCESSORS)


def test_one_tile_costs_its_begin_and_its_steps() -> None:
    assert of(1) == pytest.approx(2 + 1 + 0.25 + 10 * 0.5)


def test_two_tiles_on_a_multiprocessor_share_its_time() -> None:
    assert of(10) == of(1)
    assert of(11) == of(20) == pytest.approx(2 + 1 + 2 * 0.25 + 10 * 0.6)


@pytest.mark.parametrize("rows", [1, 128, 192, 193, 500])
@pytest.mark.parametrize("waves", [0, 1])
def test_tile_of_two_pieces_costs_the_rows_of_both(rows: int, waves: int) -> None:
    gpu = replace(SHARP, missing_row=0.01, part_bandwidth=1e4, cache_bandwidth=1e3)
    two, one = (replace(TILING, waves=waves, block_m=m, extra_m=extra) for m, extra in ((128, 64), (192, 0)))
    both = [time(each, Work(rows, 700, 640, 330), COST, gpu, PROCESSORS) for each in (two, one)]
    assert both[0] == both[1]


def test_third_tile_is_another_wave() -> None:
    assert of(21) == pytest.approx(of(20) + of(1) - 2)
    assert of(40) == pytest.approx(2 * of(20) - 2)


def test_segments_divide_the_steps() -> None:
    tiling = Tiling(8, 64, 64, 2, 0, 4, 4)
    assert of(1, 1280, tiling) == of(1, 640)


def test_split_tiles_are_shorter_and_cost_a_launch() -> None:
    cut = Tiling(128, 64, 64, 1, 1, 4, 4, 1)
    # One tile is split among ten programs, with one step each.
    assert of(1, tiling=cut) == pytest.approx(2 + 1 + 0.25 + 0.5 + 3, abs=1e-3)
    assert of(10, tiling=cut) == of(10)  # a full wave has no split tiles


def test_bytes_are_a_lower_bound() -> None:
    slow = replace(SHARP, bandwidth=1e3)
    work = Work(1, 8192, 3072, 1600.0)
    moved = 8192 * 1600 + 2 * (3072 + 8192)
    assert time(TILING, work, COST, slow, PROCESSORS) == pytest.approx(2 + moved / 1e3)


def test_added_part_costs_its_time() -> None:
    cut, gpu = Tiling(128, 64, 64, 1, 1, 4, 4, 1), replace(SHARP, part=0.5)
    assert of(1, tiling=cut, gpu=gpu) == pytest.approx(of(1, tiling=cut) + 10 * 0.5)
    assert of(1, gpu=gpu) == of(1)


def test_whole_tiles_of_one_wave_may_share_a_multiprocessor_with_more_room() -> None:
    cut = Tiling(128, 64, 64, 1, 1, 4, 4, 1)
    # Twelve tiles: ten whole ones, two of which share a multiprocessor, and parts of two steps.
    assert of(12, tiling=cut) == pytest.approx(2 + 1 + 3 * 0.25 + 2 * 0.9 + 8 * 0.6 + 3, abs=1e-3)


def test_bulk_copy_costs_time_for_rows_beyond_m() -> None:
    gpu = replace(SHARP, missing_row=0.1)
    bulk, plain = (replace(TILING, bulk=bulk) for bulk in (1, 0))
    for tiling, rows, step in [(bulk, 120, 0.8), (bulk, 128, 0.5), (bulk, 129, 0.6), (plain, 120, 0.5)]:
        tiles = -(-rows // 128)
        work = Work(rows, 64 * PROCESSORS, 640, 0)
        assert time(tiling, work, COST, gpu, PROCESSORS) == pytest.approx(2 + 1 + tiles * 0.25 + 10 * step)


def test_arrays_have_the_times_of_their_elements() -> None:
    tilings = [TILING, Tiling(8, 16, 128, 4, 0, 4, 4), Tiling(128, 64, 64, 1, 2, 4, 4)]
    costs, rows = [COST, TilingCost(3, 0.5, 0.1, 0.9, 0.2), COST], [1, 100, 1000]
    gpu = GpuCost(1.5, 2e6, 6e6, 2.0, 0.1, 3e6, 0.007, 2.5)
    work = Work(1, 3000, 4096, 2300.0)
    arrays = replace(work, m=np.array(rows))
    found = time(stacked(tilings, column=True), arrays, stacked(costs, column=True), gpu, PROCESSORS)
    one = [
        [float(time(tiling, replace(work, m=m), cost, gpu, PROCESSORS)) for m in rows]
        for tiling, cost in zip(tilings, costs, strict=True)
    ]
    assert found.tolist() == one


def test_rounded_max_lies_between_the_largest_and_the_sum() -> None:
    assert rounded_max(math.inf, 3.0, 4.0) == 4.0
    assert rounded_max(2.0, 3.0, 4.0) == pytest.approx(5.0)
    assert rounded_max(1.0, 3.0, 4.0) == pytest.approx(7.0)


@pytest.mark.parametrize(("tiling", "k", "whole"), [(TILING, 96, True), (Tiling(8, 16, 128, 4, 0, 4, 4), 576, False)])
def test_bulk_copies_need_no_masks(tiling: Tiling, k: int, whole: bool) -> None:
    assert is_whole(tiling, k) == whole


def test_products_with_any_number_of_rows_end_in_half_a_tile_in_the_mean() -> None:
    gpu = replace(SHARP, missing_row=0.1)
    for rows, tile, tiles in [(64, 64, 6), (64, 128, 4), (30, 64, 4), (150, 64, 12)]:
        tiling = replace(TILING, block_m=tile)
        uneven = time(tiling, Work(rows, 64 * 5, 640, 0, batch=4, uneven=True), COST, gpu, PROCESSORS)
        even = time(tiling, Work(tile, 64 * 5 * tiles, 640, 0), COST, gpu, PROCESSORS)
        assert uneven == pytest.approx(even), (rows, tile)
