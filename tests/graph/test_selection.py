"""Overlapping matches of one rule: the largest first, in graph order among equals, and every other one that is free."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from et_cuda_passes.graph.selection import select_claims


@dataclass(frozen=True)
class Claim:
    """Only what the selection reads of a claim; numbers stand for nodes."""

    benefit: int
    nodes: Sequence[int]


def select(claims: Sequence[Any]) -> tuple[list[int], dict[int, int]]:
    return select_claims(claims)


claims = st.lists(
    st.builds(Claim, st.integers(1, 4), st.lists(st.integers(0, 6), min_size=1, max_size=3, unique=True).map(tuple)),
    max_size=8,
)


def overlap(a: Claim, b: Claim) -> bool:
    return not set(a.nodes).isdisjoint(b.nodes)


@given(claims)
@settings(max_examples=300)
def test_lost_claim_overlaps_a_chosen_one_that_is_first_by_benefit_and_order(
    given: list[Claim],
) -> None:
    chosen, lost = select(given)
    assert chosen == sorted(chosen)
    assert sorted([*chosen, *lost]) == list(range(len(given)))
    assert not any(overlap(given[a], given[b]) for a in chosen for b in chosen if a < b)
    for loser, winner in lost.items():
        assert winner in chosen
        assert overlap(given[loser], given[winner])
        assert (-given[winner].benefit, winner) < (-given[loser].benefit, loser)


def test_largest_claim_is_chosen_before_smaller_ones_on_both_sides() -> None:
    ends = [Claim(2, (0, 1)), Claim(2, (2, 3))]
    assert select([*ends, Claim(3, (1, 2))]) == ([2], {0: 2, 1: 2})
    assert select([*ends, Claim(2, (1, 2))]) == ([0, 1], {2: 0})


def test_claims_along_a_chain_leave_no_free_claim_out() -> None:
    given = [Claim(1 + i % 3, (i, i + 1)) for i in range(5000)]
    chosen, _ = select(given)
    # Benefits 1 2 3 1 2 3 ...: every 3 is chosen, and beside them only the two ends are free.
    assert chosen == [0, *range(2, 5000, 3), 4999]


def test_selection_from_no_claims_is_empty() -> None:
    assert select([]) == ([], {})
