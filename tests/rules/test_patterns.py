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


def assert_rewritten(model: torch.nn.Module, x: Tensor, dynamic: Any = None, decompose: bool = False) -> None:
    program = torch.export.export(model, (x,), dynamic_shapes=dynamic)
    if decompose:
        # Everything but the dequantize itself, which the default table takes apart too.
        table = torch.export.default_decompositions()
        table.pop(torch.ops.torchao.dequantize_affine.default, None)
        program = program.run_decompositions(table)
        assert torch.ops.aten.linear.default not in [node.target for node in program.graph.nodes]
    rewritten, report = ecp.rewrite(program, "cuda", expect={"linear_int4": 1, "missed": 0})
    called = [node.target for node in rewritten.graph.nodes if node.op == "call_function"]
    assert torch.ops.torchao.dequantize_affine.default not in called
    assert sum("view" in str(target) for target in called) <= (2 if x.dim() == 1 else 0), report
    given, wanted = rewritten.module()(x), model(x)
    assert given.shape == wanted.shape
    assert given.dtype == wanted.dtype
    assert (given - wanted).norm() / wanted.norm() < 6e-3


@pytest.mark.parametrize(
    ("rank", "decompose"),
    # A decomposition puts views around the product for every rank but 2; rank 4 repeats rank 3.
    [
        *((rank, False) for rank in SHAPES),
        (1, True),
        (3, True),
        *(pytest.param(n, True, marks=pytest.mark.slow) for n in (2, 4)),
    ],
)
@pytest.mark.parametrize("form", FORMS)
def test_linear_pattern_matches_every_form(form: str, rank: int, decompose: bool) -> None:
    assert_rewritten(Quantized(48, 64, form=FORMS[form]), torch.randn(SHAPES[rank]).bfloat16(), decompose=decompose)


@pytest.mark.parametrize("decompose", [False, True], ids=["as written", "decomposed"])
@pytest.mark.parametrize("form", MATRIX_FORMS)
def test_linear_pattern_matches_every_matrix_product(form: str, decompose: bool) -> None:
    assert_rewritten(Quantized(48, 64, form=MATRIX_FORMS[form]), torch.randn(5, 64).bfloat16(), decompose=decompose)


@pytest.mark.parametrize("decompose", [False, True], ids=["as written", "decomposed"])
@pytest.mark.parametrize("rank", [2, 3, 4])
def test_linear_pattern_matches_dynamic_lengths(rank: int, decompose: bool) -> None:
    model = Quantized(48, 64)
    dims = {rank - 2: Dim("length", min=1, max=512)} | ({0: Dim("batch", min=1, max=8)} if rank > 2 else {})
    x = torch.randn(SHAPES[rank]).bfloat16()
    assert_rewritten(model, x, dynamic=(dims,), decompose=decompose)
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
