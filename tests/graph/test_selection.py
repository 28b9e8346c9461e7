"""Conflicts: the exact choice against every subset, the same every time, earlier passes first, large components."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from hypothesis import given, settings
from hypothesis import strategies as st

from et_cuda_passes.graph.selection import select_matches


@dataclass(frozen=True)
class Claim:
    priority: int
    benefit: int
    nodes: Sequence[int]


claims = st.lists(
    st.builds(
        Claim,
        st.integers(0, 2),
        st.integers(1, 4),
        st.lists(st.integers(0, 6), min_size=1, max_size=3, unique=True).map(tuple),
    ),
    max_size=8,
)


def free(chosen: Sequence[Claim]) -> bool:
    """Whether no two of ``chosen`` want one node."""
    wanted = [node for claim in chosen for node in claim.nodes]
    return len(wanted) == len(set(wanted))


def best_by_trying_all(given: Sequence[Claim]) -> list[int]:
    """By priority the heaviest conflict-free set beside what is chosen already; the first in order among equals."""
    chosen: list[int] = []
    for priority in sorted({claim.priority for claim in given}):
        members = [i for i, c in enumerate(given) if c.priority == priority and free([c, *(given[j] for j in chosen)])]
        sets = [s for n in range(len(members) + 1) for s in itertools.combinations(members, n)]
        possible = [s for s in sets if free([given[i] for i in s])]
        chosen += min(possible, key=lambda s: (-sum(given[i].benefit for i in s), s))
    return sorted(chosen)


@given(claims)
@settings(max_examples=200)
def test_each_rank_s_choice_is_as_heavy_as_the_best_of_all_subsets(given: list[Claim]) -> None:
    chosen, lost = select_matches(given)
    assert free([given[i] for i in chosen])
    assert sorted([*chosen, *lost]) == list(range(len(given)))
    first = min((claim.priority for claim in given), default=0)
    members = [i for i, claim in enumerate(given) if claim.priority == first]
    best = best_by_trying_all([given[i] for i in members])
    assert sum(given[i].benefit for i in chosen if i in members) == sum(given[members[i]].benefit for i in best)
    for loser, winner in lost.items():
        assert winner in chosen
        assert set(given[loser].nodes) & set(given[winner].nodes)


@given(claims)
@settings(max_examples=200)
def test_among_equals_the_first_in_order_is_chosen(given: list[Claim]) -> None:
    assert select_matches(given)[0] == best_by_trying_all(given)


@given(claims)
@settings(max_examples=50)
def test_the_same_claims_give_the_same_choice(given: list[Claim]) -> None:
    assert select_matches(given) == select_matches(list(given))


def test_an_earlier_pass_wins_whatever_the_later_is_worth() -> None:
    given = [Claim(1, 1000, (0, 1)), Claim(0, 1, (1, 2)), Claim(1, 1, (2, 3)), Claim(1, 1, (3,))]
    assert select_matches(given) == ([1, 3], {0: 1, 2: 1})


def test_two_small_ones_beat_one_between_them_only_if_they_weigh_more() -> None:
    ends = [Claim(0, 2, (0, 1)), Claim(0, 2, (2, 3))]
    assert select_matches([*ends, Claim(0, 3, (1, 2))])[0] == [0, 1]
    assert select_matches([*ends, Claim(0, 5, (1, 2))])[0] == [2]


def test_a_component_too_large_to_search_still_leaves_no_place_that_was_free() -> None:
    given = [Claim(0, 1 + i % 3, (i, i + 1)) for i in range(5000)]
    chosen, lost = select_matches(given)
    assert free([given[i] for i in chosen])
    assert sorted([*chosen, *lost]) == list(range(len(given)))
    # Weights 1 2 3 1 2 3 ...: every 3 is taken, and beside them only the two ends are free.
    assert chosen == [0, *range(2, 5000, 3), 4999]


def test_without_claims() -> None:
    assert select_matches([]) == ([], {})
