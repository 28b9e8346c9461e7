"""parse_einsum: the einsums that multiply rows by the matrices of experts, and those that do not."""

import pytest

from et_cuda_passes.graph.errors import Unmet
from et_cuda_passes.quant.einsum import ExpertEinsum, parse_einsum


def test_product_is_parsed_into_its_axes() -> None:
    assert parse_einsum("ti,taoi->tao", 1) == ExpertEinsum("ti", "tao", "ta", "t", "", "o", "i", False)
    assert parse_einsum("tao, taoi -> tai", 1) == ExpertEinsum("tao", "tai", "ta", "ta", "", "i", "o", True)
    assert parse_einsum("enk,tk->ten", 0) == ExpertEinsum("tk", "ten", "e", "", "t", "n", "k", False)
    assert parse_einsum("etk,ekn->etn", 1) == ExpertEinsum("etk", "etn", "e", "e", "t", "n", "k", True)


@pytest.mark.parametrize(
    "equation",
    [
        "tk,enk",  # without an arrow its result is in alphabetical order
        "...k,enk->...en",
        "tk,enk,en->te",
        "tt,ent->en",
        "etk,enk->tn",  # summed over experts
        "etk,enk->e",  # summed over all
        "enk,enk->en",  # not a product of rows
        "ak,eank->ean",  # x lies along the second axis of the matrices only
        "tks,enk->ten",  # sums over an axis of x only
    ],
)
def test_other_sum_is_refused_by_its_equation(equation: str) -> None:
    with pytest.raises(Unmet, match="the equation"):
        parse_einsum(equation, 1)
