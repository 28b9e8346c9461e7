"""The model of a tiling's time: what it says where the answer is known."""

import math

import pytest

from et_cuda_passes.kernels.cost import GpuCost, TilingCost, Work, is_whole, rounded_max, time
from et_cuda_passes.kernels.tiling import Tiling

SHARP = GpuCost(2.0, 1e12, 1e12, 3.0, 1e12, math.inf)
"""A GPU whose bytes cost nothing."""
COST = TilingCost(2, 1.0, 0.25, 0.5, 0.3)
TILING = Tiling(128, 64, 64, 1, 0, 4, 4, 1)
PROCESSORS = 10


def of(tiles: int, k: int = 640, tiling: Tiling = TILING, gpu: GpuCost = SHARP) -> float:
    return time(tiling, Work(tiling.block_m, tiles * tiling.block_n, k, 0), COST, gpu, PROCESSORS)


def test_one_tile_takes_its_begin_and_its_steps() -> None:
    assert of(1) == pytest.approx(2 + 1 + 0.25 + 10 * 0.5)


def test_two_tiles_on_a_multiprocessor_share_it() -> None:
    assert of(10) == of(1)
    assert of(11) == of(20) == pytest.approx(2 + 1 + 2 * 0.25 + 10 * 0.6)


def test_a_third_one_is_another_wave() -> None:
    assert of(21) == pytest.approx(of(20) + of(1) - 2)
    assert of(40) == pytest.approx(2 * of(20) - 2)


def test_segments_share_the_steps() -> None:
    tiling = Tiling(8, 64, 64, 2, 0, 4, 4)
    assert of(1, 1280, tiling) == of(1, 640)


def test_tiles_that_are_cut_are_shorter_and_cost_a_launch() -> None:
    cut = Tiling(128, 64, 64, 1, 1, 4, 4, 1)
    # One tile for ten programs, of one step each.
    assert of(1, tiling=cut) == pytest.approx(2 + 1 + 0.25 + 0.5 + 3, abs=1e-3)
    assert of(10, tiling=cut) == of(10)  # a wave of their own
    # Of twelve two are cut into five parts of two steps, each beside a whole tile.
    assert of(12, tiling=cut) == pytest.approx(2 + 1 + 2 * 0.25 + 2 * 0.6 + 8 * 0.5 + 3, abs=1e-3)


def test_bytes_are_a_floor() -> None:
    slow = GpuCost(2.0, 1e3, 1e12, 3.0, 1e12, math.inf)
    work = Work(1, 8192, 3072, 1600.0)
    moved = 8192 * 1600 + 2 * (3072 + 8192)
    assert time(TILING, work, COST, slow, PROCESSORS) == pytest.approx(2 + moved / 1e3)


def test_rounded_max_lies_between_the_largest_and_the_sum() -> None:
    assert rounded_max(math.inf, 3.0, 4.0) == 4.0
    assert rounded_max(2.0, 3.0, 4.0) == pytest.approx(5.0)
    assert rounded_max(1.0, 3.0, 4.0) == pytest.approx(7.0)


@pytest.mark.parametrize(("tiling", "k", "whole"), [(TILING, 96, True), (Tiling(8, 16, 128, 4, 0, 4, 4), 576, False)])
def test_copies_in_bulk_need_no_masks(tiling: Tiling, k: int, whole: bool) -> None:
    assert is_whole(tiling, k) == whole
