"""Names that differ in indices, folded into one text."""

import itertools
import re

import pytest

from et_cuda_passes.graph.names import fold, form_of, without_numbers


@pytest.mark.parametrize(
    ("names", "folded"),
    [
        ([f"model.layers.{i}.mlp.up.weight" for i in range(30)], ["model.layers.{0..29}.mlp.up.weight"]),
        (["l.0.w", "l.1.w"], ["l.{0,1}.w"]),
        (["l.0.w", "l.2.w", "l.5.w", "l.6.w", "l.7.w"], ["l.{0,2,5..7}.w"]),
        (["head.weight"], ["head.weight"]),
        (["l.3.w"], ["l.3.w"]),
        (["0.weight", "2.weight"], ["{0,2}.weight"]),
        (["fc1.weight", "fc2.weight"], ["fc1.weight", "fc2.weight"]),
        (["l.01.w", "l.02.w"], ["l.01.w", "l.02.w"]),
        ([f"l.{i}.e.{j}.w" for i in range(4) for j in range(8)], ["l.{0..3}.e.{0..7}.w"]),
        (["l.0.e.0.w", "l.0.e.1.w", "l.1.e.0.w"], ["l.0.e.{0,1}.w", "l.1.e.0.w"]),
        ([f"l.{i}.q, l.{i}.k" for i in range(3)], ["l.{0..2}.q, l.{0..2}.k"]),
        (["l.0.a.w", "l.0.b.w", "l.1.a.w", "l.1.b.w"], ["l.{0,1}.a.w", "l.{0,1}.b.w"]),
        (["l.0.w", "l.0.w"], ["l.0.w"]),
        (["{}.0.w", "{}.1.w"], ["{}.{0,1}.w"]),
        ([], []),
    ],
)
def test_fold_joins_exactly_the_names_that_differ_in_indices(names: list[str], folded: list[str]) -> None:
    assert fold(names) == folded


def test_folded_names_of_two_indices_expand_to_the_names() -> None:
    """Every set of index pairs of a small grid, expanded again by another program."""
    grid = list(itertools.product(range(3), range(3)))
    for chosen in itertools.chain.from_iterable(itertools.combinations(grid, count) for count in (1, 4, 6, 8)):
        names = [f"a.{i}.b.{j}.c" for i, j in chosen]
        assert sorted(itertools.chain.from_iterable(map(expanded, fold(names)))) == sorted(names)


def expanded(text: str) -> list[str]:
    parts = re.split(r"\{([^}]*)\}", text)
    choices = [[part] if place % 2 == 0 else numbers(part) for place, part in enumerate(parts)]
    return ["".join(each) for each in itertools.product(*choices)]


def numbers(text: str) -> list[str]:
    found = []
    for run in text.split(","):
        first, _, last = run.partition("..")
        found += map(str, range(int(first), int(last or first) + 1))
    return found


def test_form_is_equal_for_the_same_layer_of_every_block_only() -> None:
    assert form_of("l.0.up.weight") == form_of("l.17.up.weight")
    assert form_of("l.0.up.weight") != form_of("l.0.down.weight")
    assert form_of("fc1.weight") != form_of("fc2.weight")


def test_texts_that_differ_in_counts_and_names_of_nodes_are_alike() -> None:
    one, other = (f"found {count} that are not, read by {node}; K = 40" for count, node in ((65, "add"), (1, "add_12")))
    assert without_numbers(one) == without_numbers(other)
    assert without_numbers("found K = 40") != without_numbers("found K = 48")
