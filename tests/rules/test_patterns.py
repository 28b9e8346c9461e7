"""The shared patterns: a linear in every form and rank, static and dynamic, as written and decomposed."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.export import Dim

import et_cuda_passes as ecp
from et_cuda_passes.testing import Quantized
from tests.helpers import Together

Form = Callable[[Tensor, Tensor, Tensor], Tensor]

FORMS: dict[str, Form] = {
    "linear": lambda x, w, b: F.linear(x, w, b),
    "linear without bias": lambda x, w, b: F.linear(x, w),
    "matmul t": lambda x, w, b: x @ w.t(),
    "matmul T": lambda x, w, b: x @ w.T,
    "matmul mT": lambda x, w, b: x @ w.mT,
    "matmul transpose": lambda x, w, b: x @ w.transpose(-1, -2),
    "matmul permute": lambda x, w, b: x @ w.permute(1, 0),
}
MATRIX_FORMS: dict[str, Form] = {
    "mm": lambda x, w, b: torch.mm(x, w.t()),
    "mm transpose": lambda x, w, b: torch.mm(x, w.transpose(0, 1)),
    "addmm": lambda x, w, b: torch.addmm(b, x, w.t()),
    "addmm permute": lambda x, w, b: torch.addmm(b, x, w.permute(1, 0)),
}
SHAPES = {1: (64,), 2: (5, 64), 3: (2, 5, 64), 4: (2, 3, 5, 64)}


def assert_rewritten(
    models: list[torch.nn.Module], xs: list[Tensor], dynamic: Any = None, decompose: bool = False
) -> None:
    """Rewrite a program of linears, each with its own x of one rank."""
    together, given = Together(models), [(x,) for x in xs]
    shapes = None if dynamic is None else ([(dynamic,)] * len(xs),)
    program = torch.export.export(together, (given,), dynamic_shapes=shapes)
    if decompose:
        # Everything but the dequantize itself, which the default table takes apart too.
        table = torch.export.default_decompositions()
        table.pop(torch.ops.torchao.dequantize_affine.default, None)
        program = program.run_decompositions(table)
        assert torch.ops.aten.linear.default not in [node.target for node in program.graph.nodes]
    rewritten, report = ecp.rewrite(program, "cuda", expect={"linear_int4": len(models), "missed": 0})
    assert sorted(outcome.fqn for outcome in report.outcomes) == [f"parts.{n}.data" for n in range(len(models))]
    called = [node.target for node in rewritten.graph.nodes if node.op == "call_function"]
    assert torch.ops.torchao.dequantize_affine.default not in called
    assert sum("view" in str(target) for target in called) <= (2 * len(models) if xs[0].dim() == 1 else 0), report
    for number, (y, right) in enumerate(zip(rewritten.module()(given), together(given), strict=True)):
        assert (y.shape, y.dtype) == (right.shape, right.dtype), number
        assert (y - right).norm() / right.norm() < 6e-3, number


def rows(rank: int, count: int) -> list[Tensor]:
    return [torch.randn(SHAPES[rank]).bfloat16() for _ in range(count)]


@pytest.mark.parametrize("decompose", [False, True], ids=["as written", "decomposed"])
@pytest.mark.parametrize("rank", SHAPES)
def test_linear_pattern_matches_every_form(rank: int, decompose: bool) -> None:
    """A decomposition puts views around the product for every rank but 2."""
    models = [Quantized(48, 64, form=form, seed=seed) for seed, form in enumerate(FORMS.values())]
    assert_rewritten(models, rows(rank, len(models)), decompose=decompose)


@pytest.mark.parametrize("decompose", [False, True], ids=["as written", "decomposed"])
def test_linear_pattern_matches_every_matrix_product(decompose: bool) -> None:
    models = [Quantized(48, 64, form=form, seed=seed) for seed, form in enumerate(MATRIX_FORMS.values())]
    assert_rewritten(models, rows(2, len(models)), decompose=decompose)


@pytest.mark.parametrize("decompose", [False, True], ids=["as written", "decomposed"])
@pytest.mark.parametrize("rank", [2, 3, 4])
def test_linear_pattern_matches_dynamic_lengths(rank: int, decompose: bool) -> None:
    model = Quantized(48, 64)
    dims = {rank - 2: Dim("length", min=1, max=512)} | ({0: Dim("batch", min=1, max=8)} if rank > 2 else {})
    x = torch.randn(SHAPES[rank]).bfloat16()
    assert_rewritten([model], [x], dynamic=dims, decompose=decompose)
    program = torch.export.export(model, (x,), dynamic_shapes=(dims,))
    rewritten, _ = ecp.rewrite(program, "cuda")
    for length in (1, 7, 300):
        other = torch.randn((*SHAPES[rank][: rank - 2], length, 64)).bfloat16()
        wanted = model(other)
        assert (rewritten.module()(other) - wanted).norm() / wanted.norm() < 6e-3


def test_linear_pattern_rejects_addmm_with_other_factors() -> None:
    model = Quantized(48, 64, form=lambda x, w, b: torch.addmm(b, x, w.t(), alpha=2))
    program = torch.export.export(model, (torch.randn(5, 64).bfloat16(),))
    _, report = ecp.rewrite(program, "cuda", [ecp.LinearInt4()], expect={"missed": 1})
    (reason,) = report.outcomes[0].reasons
    assert reason.stage == "match"
    assert reason.found == "2"


def test_linear_pattern_rejects_weight_on_the_left() -> None:
    model = Quantized(64, 64, form=lambda x, w, b: torch.mm(w, x))
    _, report = ecp.rewrite(torch.export.export(model, (torch.randn(64, 3).bfloat16(),)), "cuda")
    assert report.counts() == {"rewritten": 0, "kept": 0, "missed": 1}
