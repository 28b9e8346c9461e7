"""Buckets of rows: intervals are covered with as few choices, and as small a loss, as can be."""

import itertools
import random

import pytest

from et_cuda_passes.kernels.choose import ENOUGH, cover


def smallest_loss(losses: list[list[float]], most: int) -> float:
    """By trying every way to divide the intervals among at most ``most`` choices."""
    count = len(losses[0])
    found = float("inf")
    for parts in range(most):
        for cuts in itertools.combinations(range(1, count), parts):
            ends = [0, *cuts, count]
            worst = max(min(max(row[a:b]) for row in losses) for a, b in itertools.pairwise(ends))
            found = min(found, worst)
    return found


@pytest.mark.parametrize("seed", range(20))
def test_cover_reaches_the_smallest_loss(seed: int) -> None:
    chance = random.Random(seed)
    losses = [[1 + chance.random() for _ in range(7)] for _ in range(4)]
    for i in range(7):
        losses[chance.randrange(4)][i] = 1.0
    for most in (1, 2, 3, 4):
        found = cover(losses, most)
        assert len(found) <= most
        assert [first for first, _, _ in found] == [0, *(end for _, end, _ in found[:-1])] and found[-1][1] == 7
        worst = max(losses[choice][i] for first, end, choice in found for i in range(first, end))
        assert worst <= max(ENOUGH, smallest_loss(losses, most)) + 1e-3


def test_cover_takes_one_choice_where_it_is_good_enough() -> None:
    losses = [[1.0, 1.01, 1.0], [1.01, 1.0, 1.01]]
    assert cover(losses, 3) == [(0, 3, 0)]
