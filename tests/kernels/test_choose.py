"""The choice of tilings: the cheapest of a length, and buckets of rows with the smallest worst loss."""

import itertools
import json
import math
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from et_cuda_passes.kernels.choose import (
    BOUNDS,
    ENOUGH,
    MOST_HEIGHTS,
    MOST_LAUNCHES,
    PRICE,
    SLACK,
    Weight,
    buckets,
    candidates,
    costs_of,
    cover,
    describe,
    load_costs,
    predicted,
    tiling_for,
)
from et_cuda_passes.kernels.gpus import GPUS, HOPPER, KIB, GpuArch, gpu_arch
from et_cuda_passes.kernels.tiling import UNBOUNDED, Tiling

TABLES = Path(__file__).parents[2] / "et_cuda_passes" / "kernels" / "tuned"
RESOURCES = {4: TABLES / "resources.json", 8: TABLES / "resources_int8.json"}
WEIGHTS = [
    Weight(8192, 3072, 32),
    Weight(3072, 8192, 64),
    Weight(576, 576, 32),
    Weight(131072, 3072, 128),
    Weight(45, 96, 32),
    Weight(4096, 11008, 128, outputs=3),
    Weight(1024, 2048, 32, batch=64, experts=True),
    Weight(1024, 2048, 32, batch=64, experts=True, grouped=True),
    Weight(8192, 3072, 32, bits=8),
    Weight(3072, 8192, 8192, bits=8),
    Weight(1000, 1040, 16, bits=8),
]
ALL = pytest.mark.parametrize("weight", WEIGHTS, ids=str)


def every_cover(losses: np.ndarray, most: int) -> list[tuple[float, float]]:
    """The worst loss, and the mean logarithm with the price of the launches, of each cover with at most ``most``."""
    count = losses.shape[1]
    found = []
    for parts in range(most):
        for cuts in itertools.combinations(range(1, count), parts):
            ends = [*itertools.pairwise([0, *cuts, count])]
            for choices in itertools.product(range(len(losses)), repeat=len(ends)):
                of = [losses[choice, first:end] for choice, (first, end) in zip(choices, ends, strict=True)]
                mean = sum(np.log(each).sum() for each in of) / count
                found.append((max(each.max() for each in of), mean + PRICE * len(ends)))
    return found


def drawn_losses(seed: int) -> np.ndarray:
    chance = random.Random(seed)
    losses = np.array([[1 + chance.random() ** 3 for _ in range(6)] for _ in range(3)])
    return losses / losses.min(axis=0)


@pytest.mark.parametrize("most", [1, 2, 3, 4])
@pytest.mark.parametrize("seed", range(12))
def test_cover_has_the_smallest_worst_loss_and_then_the_smallest_mean(seed: int, most: int) -> None:
    losses = drawn_losses(seed)
    found = cover(losses, np.log(losses) / 6, most)
    assert 1 <= len(found) <= most
    assert [first for first, _, _ in found] == [0, *(end for _, end, _ in found[:-1])] and found[-1][1] == 6
    chosen = [losses[choice, first:end] for first, end, choice in found]
    worst = max(each.max() for each in chosen)
    mean = sum(np.log(each).sum() for each in chosen) / 6 + PRICE * len(found)
    every = every_cover(losses, most)
    limit = max(ENOUGH, min(loss for loss, _ in every)) * (1 + SLACK)
    assert worst <= limit
    assert mean == pytest.approx(min(mean for loss, mean in every if loss <= limit))


def test_cover_uses_further_launches_that_reduce_the_mean_loss_only() -> None:
    # No choice is better than 1.1 in the first interval; each of the others has a choice of its own.
    losses = np.array([[1.1, 1.1, 1.1, 1.1], [1.2, 1.0, 1.2, 1.2], [1.2, 1.2, 1.0, 1.2], [1.2, 1.2, 1.2, 1.0]])
    assert cover(losses, np.log(losses) / 4, 1) == [(0, 4, 0)]
    assert cover(losses, np.log(losses) / 4, 4) == [(0, 1, 0), (1, 2, 1), (2, 3, 2), (3, 4, 3)]


def test_cover_uses_one_choice_if_others_save_less_than_the_price_of_a_launch() -> None:
    losses = np.array([[1.0, 1.0 + PRICE, 1.0], [1.01, 1.0, 1.01]])
    assert cover(losses, np.log(losses) / 3, 3) == [(0, 3, 0)]


@ALL
def test_more_buckets_reduce_the_mean_loss(weight: Weight) -> None:
    lengths = np.unique(np.round(np.geomspace(1, 4096, 120)).astype(int)).tolist()
    tilings, times = predicted(HOPPER, costs_of(HOPPER, weight.bits), weight, lengths)

    def mean(most: int) -> float:
        chosen = buckets(HOPPER, weight, most).tilings
        own = [next(tiling for bound, tiling in chosen.items() if rows <= bound) for rows in lengths]
        lost = [times[tilings.index(tiling), number] for number, tiling in enumerate(own)] / times.min(axis=0)
        return float(np.trapezoid(np.log(lost), np.log(lengths)) / math.log(4096))

    assert mean(8) <= mean(4) + 0.005
    assert mean(8) <= 0.05


@ALL
def test_buckets_have_few_descriptors(weight: Weight) -> None:
    tilings = buckets(HOPPER, weight).tilings.values()
    heights = {rows for tiling in tilings if tiling.bulk for rows in (tiling.block_m, tiling.extra_m) if rows}
    assert len(heights) <= MOST_HEIGHTS


@pytest.mark.parametrize("gpu", GPUS.values(), ids=str)
@ALL
def test_buckets_ascend_from_one_row_to_any_number(weight: Weight, gpu: GpuArch) -> None:
    found = buckets(gpu, weight)
    bounds = [*found.tilings]
    assert bounds == sorted(bounds) and bounds[-1] == UNBOUNDED
    assert set(bounds[:-1]) <= set(BOUNDS)
    assert 1 <= len(bounds) <= MOST_LAUNCHES
    assert all(first != second for first, second in itertools.pairwise(found.tilings.values()))


@ALL
def test_more_launches_lose_no_more(weight: Weight) -> None:
    losses = [buckets(HOPPER, weight, most).loss for most in (1, 2, 4, 6, 8)]
    assert all(few >= many - 1e-2 for few, many in itertools.pairwise(losses))
    assert losses[-1] < 1.3


@ALL
def test_loss_is_relative_to_the_best_tiling_of_each_length(weight: Weight) -> None:
    found, costs = buckets(HOPPER, weight), costs_of(HOPPER, weight.bits)
    lengths = (1, 7, 8, 9, 33, 100, 129, 257, 700, 1500, 2049, 4096)
    tilings, times = predicted(HOPPER, costs, weight, lengths)
    for number, rows in enumerate(lengths):
        tiling = next(tiling for bound, tiling in found.tilings.items() if rows <= bound)
        best = tiling_for(HOPPER, weight, rows)
        chosen, least = (times[tilings.index(each), number] for each in (tiling, best))
        # The buckets sample three lengths of every interval between bounds.
        assert least <= chosen <= least * found.loss * 1.1, rows


@ALL
def test_choice_is_deterministic_for_a_weight(weight: Weight) -> None:
    first = buckets(HOPPER, weight), tiling_for(HOPPER, weight, 333)
    buckets.cache_clear()
    tiling_for.cache_clear()
    costs_of.cache_clear()
    assert (buckets(HOPPER, weight), tiling_for(HOPPER, weight, 333)) == first


@pytest.mark.parametrize(("first", "last"), [(2, 4096), (1, 16), (17, 17), (100, 5000), (5000, UNBOUNDED)])
def test_buckets_cover_only_the_possible_lengths(first: int, last: int) -> None:
    bounds = [*buckets(HOPPER, WEIGHTS[0], first=first, last=last).tilings]
    assert bounds[-1] == UNBOUNDED
    assert all(first <= bound < last for bound in bounds[:-1])


def test_known_length_gets_no_tiling_with_many_more_rows() -> None:
    for weight in WEIGHTS:
        assert tiling_for(HOPPER, weight, 1).block_m <= 32
        assert tiling_for(HOPPER, weight, 4096).block_m >= 64


def test_small_tilings_serve_many_rows_where_there_are_no_others() -> None:
    costs = costs_of(HOPPER, 4)
    small = {
        form: {tiling: cost for tiling, cost in tilings.items() if tiling.block_m <= 16}
        for form, tilings in costs.tilings.items()
    }
    _, times = predicted(HOPPER, replace(costs, tilings=small), WEIGHTS[0], [1, 4096])
    assert np.isfinite(times).any(axis=0).all()


@pytest.mark.parametrize("gpu", GPUS.values(), ids=str)
@pytest.mark.parametrize("bits", [4, 8])
def test_gpu_gets_only_tilings_that_fit(gpu: GpuArch, bits: int) -> None:
    costs = costs_of(gpu, bits)
    assert costs.measured == (gpu == HOPPER)
    found = [tiling for weight in WEIGHTS if weight.bits == bits for tiling, _ in candidates(costs, weight)]
    assert found
    if gpu != HOPPER:
        assert not any(tiling.bulk for tiling in found)
    # The tile of x in all stages is a lower bound of the shared memory.
    assert all(2 * t.segments * t.block_m * t.block_k * (t.stages - 1) <= gpu.program_memory for t in found), (
        "no tiling is larger than a program's shared memory"
    )


def test_fewer_multiprocessors_take_longer() -> None:
    small, costs = gpu_arch("sm_90:66"), costs_of(HOPPER, 4)
    assert costs_of(small, 4) is not None
    slow, fast = (predicted(gpu, costs, WEIGHTS[0], [2048])[1] for gpu in (small, HOPPER))
    assert np.isfinite(fast).sum() > 10
    assert (slow > fast)[np.isfinite(fast)].all()


def test_description_names_every_bucket() -> None:
    weight = WEIGHTS[0]
    assert describe(HOPPER, weight, None).startswith("M <= ")
    assert "; else " in describe(HOPPER, weight, None)
    assert describe(HOPPER, weight, 1) == f"M = 1: {tiling_for(HOPPER, weight, 1)}"


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("gpu", GPUS.values(), ids=str)
def test_less_shared_memory_leaves_the_tilings_that_fit(gpu: GpuArch, bits: int) -> None:
    small = replace(gpu, program_memory=64 * KIB)
    table = json.loads(RESOURCES[bits].read_text())[gpu.name]
    fits = {Tiling(*row[:-2]) for row in table if row[-1] <= small.program_memory}
    assert 0 < len(fits) < len(table)
    for weight in (each for each in WEIGHTS if each.bits == bits):
        found = {replace(tiling, waves=0) for tiling, _ in candidates(costs_of(small, bits), weight)}
        assert found and found <= {replace(tiling, waves=0) for tiling in fits}


@pytest.mark.parametrize("gpu", GPUS.values(), ids=str)
def test_too_little_shared_memory_for_any_tiling_is_an_error(gpu: GpuArch) -> None:
    with pytest.raises(ValueError, match=r"fits in 4096 bytes of shared memory: raise ET_CUDA_TARGET_SMEM_BYTES"):
        tiling_for(replace(gpu, program_memory=4096), WEIGHTS[0], 1)


@pytest.mark.parametrize("bits", [4, 8])
def test_tilings_of_a_table_are_supported_by_its_kernel(bits: int) -> None:
    for tilings in costs_of(HOPPER, bits).tilings.values():
        for tiling in tilings:
            assert tiling.block_k in (64, 128, 256)
            assert tiling.segments * tiling.block_n % (16 * tiling.warps) == 0
            assert tiling.waves == 0
            assert tiling.bulk == 0 or bits == 4


def _table(tmp_path: Path, tiling: list[int], costs: list[float]) -> Path:
    table = json.loads((TABLES / "sm_90.json").read_text())
    table["tilings"] = [{"tiling": tiling, "costs": {"32": [costs, None]}}]
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(table))
    return path


@pytest.mark.parametrize(
    ("tiling", "costs", "wanted"),
    [
        ([16, 64], [1, 1.0, 1.0, 1.0, 1.0], r"mine.json: \[16, 64\]: a tiling is \['block_m', "),
        ([16, 64, 128, 2, 0, 4, 3, 0, 16], [1, 1.0, 1.0, 1.0, 1.0], r"a second piece of rows is for one segment"),
        ([16, 64, 128, 1, 0, 4, 3, 1], [1, 1.0, 1.0, 1.0, 1.0], r"bulk copies are for steps of 64 in one segment"),
        ([16, 64, 128, 1, 0, 4, 3, 0], [1, 1.0, 1.0], r"group size 32: costs are \['programs', "),
        ([16, 64, 128, 1, 0, 4, 3, 0], [1, 1.0, 0.0, 1.0, 1.0], r"group size 32: costs are \['programs', "),
    ],
)
def test_malformed_table_is_rejected_with_its_entry(
    tmp_path: Path, tiling: list[int], costs: list[float], wanted: str
) -> None:
    with pytest.raises(ValueError, match=wanted):
        load_costs(_table(tmp_path, tiling, costs))


@pytest.mark.parametrize("wanted", [Tiling(16, 64, 128, 1, 0, 4, 3), Tiling(128, 64, 64, 1, 0, 4, 4, 1, 64)], ids=str)
def test_table_is_read_as_it_was_written(tmp_path: Path, wanted: Tiling) -> None:
    assert len(wanted.row) == (9 if wanted.extra_m else 8)
    costs = load_costs(_table(tmp_path, list(wanted.row), [2, 1.5, 0.25, 0.5, 0.125]))
    ((form, found),) = costs.tilings.items()
    ((tiling, cost),) = found.items()
    assert form == (32, True) and tiling == wanted
    assert (cost.programs, cost.begin, cost.each, cost.latency, cost.step) == (2, 1.5, 0.25, 0.5, 0.125)
    assert replace(cost, programs=1) != cost
