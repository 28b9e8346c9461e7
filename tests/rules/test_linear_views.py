"""RemoveLinearViews: the views around a linear of two dimensions go, and what follows the linear keeps them."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import et_cuda_passes as ecp
from et_cuda_passes.testing import assert_rewrites
from tests.helpers import names
from tests.quantized import Quantized

X = torch.randn(6, 1, 64, generator=torch.Generator().manual_seed(7)).bfloat16()
Use = Callable[[Tensor, Tensor, Tensor], Tensor]


@pytest.mark.parametrize("target", ["cuda", "cpu", "metal"])
def test_the_views_go(target: str) -> None:
    model = Quantized(48, 64, form=lambda x, w, b: F.linear(x.view(6, 64), w, b).view(6, 1, 48))
    program, report = assert_rewrites(torch.export.export(model, (X,)), target, expect={"linear_int4": 1})
    assert len(names(program)) == 1 and report.applied["remove_linear_views"] == 1


@pytest.mark.parametrize(
    "use",
    [
        lambda x, w, b: (F.linear(x.view(6, 64), w) + x.view(6, 64)[:, :48]).view(6, 1, 48),
        # Of the inner shape, but not of the outer one.
        lambda x, w, b: (F.linear(x.view(1, 6, 64), w) * x.view(1, 6, 64)[..., :48]).view(6, 1, 48),
        lambda x, w, b: F.silu(F.linear(x.view(6, 64), w, b)).view(6, 1, 48),
    ],
    ids=["sum", "product", "activation"],
)
def test_a_linear_that_does_more_is_left_alone_in_a_later_rewrite(use: Use) -> None:
    """``assert_rewrites`` looks that the second one changes nothing."""
    program, report = assert_rewrites(torch.export.export(Quantized(48, 64, form=use), (X,)), "cuda")
    assert "remove_linear_views" not in report.applied and any("view" in name for name in names(program))
    twice, report = ecp.rewrite(program, "cuda")
    assert not report.applied and twice.module()(X).shape == program.module()(X).shape


@pytest.mark.parametrize(
    ("use", "left"),
    [
        (lambda x, w, b: F.linear(x.view(2, 3, 64).view(6, 64), w, b).view(2, 3, 48).view(6, 1, 48), 1),
        (lambda x, w, b: F.linear(x.view(2, 3, 64).view(6, 64), w, b).view(3, 2, 48).view(6, 1, 48), 1),
        (lambda x, w, b: F.linear(x.view(2, 3, 64).view(6, 64), w, b).view(6, 1, 48), 1),
        (lambda x, w, b: F.linear(x.view(6, 64), w, b).view(2, 3, 48).view(3, 2, 48).view(6, 1, 48), 1),
        # What it is a view of has other rows, and the first view has the result's.
        (lambda x, w, b: F.linear(x.view(2, 3, 64).view(6, 64), w, b).view(2, 3, 48), 2),
        (lambda x, w, b: F.linear(x.view(2, 3, 64).view(6, 64), w, b).view(2, 3, 48).sum(0), 3),
    ],
)
@pytest.mark.parametrize("decompose", [False, True])
def test_views_of_views_go_in_one_rewrite(use: Use, left: int, decompose: bool) -> None:
    program = torch.export.export(Quantized(48, 64, form=use), (X,))
    program = program.run_decompositions({}) if decompose else program
    rewritten, report = assert_rewrites(program, "cuda", expect={"linear_int4": 1})
    assert report.applied["remove_linear_views"] == 1 and len(names(rewritten)) == left
