"""Which einsums are products of rows with experts' matrices."""

import pytest

from et_cuda_passes.graph.errors import Unmet
from et_cuda_passes.quant.einsum import ExpertEinsum, parse_einsum


def test_the_axes_of_a_product() -> None:
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
        "enk,enk->en",  # no product of rows
        "ak,eank->ean",  # x lies along the second axis of the matrices only
        "tks,enk->ten",  # an axis of x summed alone
    ],
)
def test_any_other_sum_is_none(equation: str) -> None:
    with pytest.raises(Unmet, match="the equation"):
        parse_einsum(equation, 1)
