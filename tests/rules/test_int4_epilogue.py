"""FuseActivation, FuseMultiply and FuseAdd: what follows an int4 linear becomes a part of it, if its kernel can.

The reference is the program with the linears alone packed: the same weights, each following operator by itself.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import ExportedProgram

import et_cuda_passes as ecp
from et_cuda_passes.ops import INT4_LINEARS
from et_cuda_passes.rules.epilogue import FuseActivation, FuseAdd, FuseMultiply, fused_epilogue
from et_cuda_passes.testing import assert_rewrites
from tests.helpers import DEQUANTIZE, apply, names
from tests.quantized import Quantized

aten = torch.ops.aten
OP = INT4_LINEARS["mma_tiled"].op
NAME = "et_cuda_passes.int4_linear_mma_tiled"
X = torch.randn(3, 64, generator=torch.Generator().manual_seed(7)).bfloat16()


class Net(nn.Module):
    """``use(net, x)`` of two quantized linears [64, 64] with biases."""

    def __init__(self, use: Callable[[Any, Tensor], Any]) -> None:
        super().__init__()
        self.a, self.b = Quantized(64, 64, seed=1), Quantized(64, 64, seed=2, zero_points="random")
        self.use = use

    def forward(self, x: Tensor) -> Any:
        return self.use(self, x)


def exported(use: Callable[[Any, Tensor], Any], x: Tensor = X) -> ExportedProgram:
    return torch.export.export(Net(use), (x,))


def epilogues(program: ExportedProgram) -> list[dict[str, Any]]:
    """What each int4 linear of ``program`` does after its product, nodes by name."""
    found = [fused_epilogue(node) for node in program.graph.nodes if NAME in str(node.target).replace("::", ".")]
    return [{name: getattr(value, "name", value) for name, value in given.items()} for given in found]


def fused(use: Callable[[Any, Tensor], Any], x: Tensor = X) -> ExportedProgram:
    """The program for cuda, found to compute what it does without the two rules."""
    before = exported(use, x)
    program, _ = ecp.rewrite(before, "cuda")
    plain, _ = ecp.rewrite(before, "cuda", [ecp.LinearInt4()])
    got, wanted, scale = program.module()(x).double(), plain.module()(x).double(), before.module()(x).double()
    # Each operator by itself rounds once more; the sums are of the size of the terms.
    assert (got - wanted).norm() <= 2**-7 * max(wanted.norm(), scale.norm())
    return program


ACTIVATIONS = [
    ("silu", F.silu),
    ("relu", F.relu),
    ("gelu", F.gelu),
    ("gelu_tanh", lambda y: F.gelu(y, approximate="tanh")),
]


@pytest.mark.parametrize(("name", "function"), ACTIVATIONS, ids=[name for name, _ in ACTIVATIONS])
def test_an_activation_becomes_a_part_of_the_linear(name: str, function: Callable[[Tensor], Tensor]) -> None:
    program = fused(lambda net, x: function(net.a(x)))
    assert names(program) == [NAME]
    assert epilogues(program) == [{"activation": name}]


@pytest.mark.parametrize("use", [lambda net, x: x + net.a(x), lambda net, x: net.a(x) + x], ids=["before", "behind"])
def test_a_residual_in_either_order(use: Any) -> None:
    program = fused(use)
    assert names(program) == [NAME]
    assert epilogues(program) == [{"addend": "x"}]


@pytest.mark.parametrize("use", [lambda net, x: x * net.a(x), lambda net, x: net.a(x) * x], ids=["before", "behind"])
def test_a_product_in_either_order(use: Any) -> None:
    program = fused(use)
    assert names(program) == [NAME]
    assert epilogues(program) == [{"factor": "x"}]


def test_a_product_and_a_sum_in_one_rewrite() -> None:
    program = exported(lambda net, x: torch.tanh(x) + F.silu(net.a(x)) * x)
    rewritten, _ = assert_rewrites(program, "cuda", expect={"linear_int4": 1})
    assert [set(given) for given in epilogues(rewritten)] == [{"activation", "factor", "addend"}]


def test_a_gated_layer_with_its_residual_is_two_linears() -> None:
    """silu(a(x)) * b(x): the activation in one, the product in the other; nothing is left between them."""
    program = fused(lambda net, x: F.silu(net.a(x)) * net.b(x))
    assert names(program) == [NAME, NAME]
    first, second = epilogues(program)
    assert first == {"activation": "silu"}
    assert set(second) == {"factor"}


def test_all_of_it_in_a_block() -> None:
    """The order in the operator is activation, product, sum."""
    program = fused(lambda net, x: F.gelu(net.a(x)) * torch.tanh(x) + net.b(x))
    found = epilogues(program)
    assert names(program).count(NAME) == 2
    assert "aten.gelu" not in names(program) and "aten.mul" not in names(program) and "aten.add" not in names(program)
    assert sum("addend" in given for given in found) == 1
    assert next(given for given in found if "activation" in given)["activation"] == "gelu"


def test_dynamic_rows() -> None:
    rows = torch.export.Dim("rows", min=2, max=64)
    program = torch.export.export(Net(lambda net, x: x + F.silu(net.a(x))), (X,), dynamic_shapes=({0: rows},))
    rewritten, _ = ecp.rewrite(program, "cuda")
    assert epilogues(rewritten) == [{"activation": "silu", "addend": "x"}]
    for count in (2, 5, 64):
        x = torch.randn(count, 64).bfloat16()
        wanted = program.module()(x).double()
        assert (rewritten.module()(x).double() - wanted).norm() <= 2**-7 * wanted.norm()


def test_the_edge_dialect_too() -> None:
    """There a sum must not be taken for a product: an operator has another form."""
    from executorch.exir import EdgeCompileConfig, to_edge

    config = EdgeCompileConfig(_core_aten_ops_exception_list=[DEQUANTIZE], _skip_dim_order=True)
    for use, wanted in (
        (lambda net, x: x + net.a(x), {"addend"}),
        (lambda net, x: x * net.a(x), {"factor"}),
        (lambda net, x: F.relu(net.a(x)), {"activation"}),
        (lambda net, x: x + F.gelu(net.a(x)), {"activation", "addend"}),
    ):
        before = to_edge(exported(use), compile_config=config).exported_program()
        program, _ = ecp.rewrite(before, "cuda")
        (node,) = (n for n in program.graph.nodes if "int4_linear" in str(n.target))
        assert set(fused_epilogue(node)) == wanted
        got, reference = program.module()(X), exported(use).module()(X)
        assert (got - reference).norm() <= 2**-6 * reference.norm()


def test_a_dynamic_number_is_no_tensor_that_a_kernel_takes() -> None:
    rows = torch.export.Dim("rows", min=2, max=64)
    for use in (lambda net, x: net.a(x) * x.shape[0], lambda net, x: F.silu(net.a(x)) + x.shape[0]):
        program = torch.export.export(Net(use), (X,), dynamic_shapes=({0: rows},))
        rewritten, _ = assert_rewrites(program, "cuda", expect={"linear_int4": 1, "missed": 0})
        assert not any({"factor", "addend"} & given.keys() for given in epilogues(rewritten))


def test_a_number_that_is_data_is_none_either() -> None:
    class Scaled(Net):
        def forward(self, x: Tensor, by: Tensor) -> Any:  # type: ignore[override]
            return self.a(x) * by.item()

    program = torch.export.export(Scaled(lambda net, x: x), (X, torch.tensor(3)))
    assert_rewrites(program, "cuda", expect={"linear_int4": 1, "missed": 0})


@pytest.mark.parametrize(
    ("use", "wanted"),
    [
        (lambda y, rows: y + rows[:1], set()),
        (lambda y, rows: y * rows[0], set()),
        (lambda y, rows: y[:, None] + rows[:1, None], set()),
        (lambda y, rows: y + rows, {"addend"}),
        (lambda y, rows: F.silu(y) * rows, {"activation", "factor"}),
    ],
)
def test_rows_that_are_data(use: Any, wanted: set[str]) -> None:
    """How many is not even assumed; what is broadcast to them is left, and what is of as many is taken."""

    def chosen(net: Any, x: Tensor) -> Tensor:
        some = x[(x[:, 0] < 1).nonzero().squeeze(1)]
        result: Tensor = use(net.a(some), x[:1] if wanted == set() else some)
        return result

    program, _ = assert_rewrites(exported(chosen), "cuda", expect={"linear_int4": 1, "missed": 0})
    assert [set(given) for given in epilogues(program)] == [wanted]


# What stays as it is -------------------------------------------------------------------------------------------------


def reasons(use: Any, rule: Any, target: Any, *before: Any) -> list[tuple[str, str]]:
    """Why ``rule`` leaves the one call of ``target`` alone, with the linears packed and ``before`` applied."""
    packed, _ = ecp.rewrite(exported(use), "cuda", [ecp.LinearInt4(), *before])
    program, report = apply(packed, [rule], target)
    assert names(program) == names(packed)
    (outcome,) = report.outcomes
    assert outcome.status == "missed"
    return [(reason.wanted, reason.found) for reason in outcome.reasons]


ALIKE = "a tensor of the same shape and dtype"


@pytest.mark.parametrize(
    ("use", "wanted", "found"),
    [
        (lambda net, x: net.a(x) + x[:1], ALIKE, "[1, 64] beside torch.bfloat16 [3, 64]"),
        (lambda net, x: net.a(x) + x[0], ALIKE, "torch.bfloat16 [64] beside"),
        (lambda net, x: net.a(x) + x[None], ALIKE, "[1, 3, 64] beside"),
        (lambda net, x: net.a(x) + x.float(), ALIKE, "torch.float32 [3, 64] beside torch.bfloat16"),
        (lambda net, x: net.a(x) + 2, ALIKE, "2"),
        (lambda net, x: torch.add(x, net.a(x), alpha=2), "aten.add(alpha=1)", "2"),
    ],
    ids=["one row", "a vector", "more dimensions", "another dtype", "a number", "alpha"],
)
def test_what_a_sum_needs(use: Any, wanted: str, found: str) -> None:
    (reason,) = reasons(use, FuseAdd(), aten.add.Tensor)
    assert reason[0] == wanted
    assert found in reason[1]
    assert epilogues(fused(use)) == [{}]


@pytest.mark.parametrize("function", [F.silu, lambda y: X + y])
def test_a_linear_that_something_else_reads_too_is_left_alone(function: Callable[[Tensor], Tensor]) -> None:
    def use(net: Any, x: Tensor) -> Tensor:
        y = net.a(x)
        return torch.cat([function(y), y])

    program = fused(use)
    assert epilogues(program) == [{}]
    target = aten.silu.default if function is F.silu else aten.add.Tensor
    rule = FuseActivation() if function is F.silu else FuseAdd()
    assert any("this one user" in wanted for wanted, _ in reasons(use, rule, target))


def test_an_activation_behind_a_sum_stays() -> None:
    """The kernel has one order, and relu(a + b) is another one."""
    use = lambda net, x: F.relu(net.a(x) + x)  # noqa: E731
    program = fused(use)
    assert names(program) == [NAME, "aten.relu"]
    assert reasons(use, FuseActivation(), aten.relu.default, FuseAdd()) == [
        ("a linear without a fused epilogue", "a linear with a fused addend")
    ]


def test_a_product_behind_a_sum_stays() -> None:
    use = lambda net, x: (net.a(x) + x) * torch.tanh(x)  # noqa: E731
    program = fused(use)
    assert names(program).count("aten.mul") == 1
    assert epilogues(program) == [{"addend": "x"}]


def test_kernels_without_an_epilogue_are_untouched() -> None:
    before = exported(lambda net, x: x + F.silu(net.a(x)))
    passes = [ecp.LinearInt4(kernel="tinygemm"), FuseActivation(), FuseMultiply(), FuseAdd()]
    program, report = ecp.rewrite(before, "cuda", passes)
    assert names(program) == ["et_cuda_passes.int4_linear_tile_packed_to_4d", "aten.silu", "aten.add"]
    assert report.applied == {"linear_int4": 1}


def test_what_stands_on_both_sides_of_a_preserved_module_stays_two_nodes() -> None:
    class Inner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.l = Quantized(64, 64)

        def forward(self, x: Tensor) -> Tensor:
            return F.silu(self.l(x))

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Inner()

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x) + x

    program, _ = ecp.rewrite(torch.export.export(Outer(), (X,), preserve_module_call_signature=("inner",)), "cuda")
    assert names(program) == [NAME, "aten.add"]
    assert epilogues(program) == [{"activation": "silu"}]
    assert torch.equal(torch.export.unflatten(program)(X), program.module()(X))


# The report ----------------------------------------------------------------------------------------------------------


def test_the_report_explains_which_tilings_a_linear_has() -> None:
    _, report = ecp.rewrite(exported(lambda net, x: net.b(net.a(x))), "cuda")
    assert [outcome.explanation.partition(": ")[0] for outcome in report.outcomes] == [
        "tilings on sm_90 for 64 x 64, group size 32"
    ] * 2
    assert all(outcome.explanation.partition(": ")[2].startswith("M = 3: ") for outcome in report.outcomes)
    assert report.to_dict()["outcomes"][0]["explanation"] == report.outcomes[0].explanation
    assert "tilings" not in str(report)
    rows = torch.export.Dim("rows", min=2, max=64)
    program = torch.export.export(Net(lambda net, x: net.a(x)), (X,), dynamic_shapes=({0: rows},))
    (outcome,) = ecp.rewrite(program, "cuda")[1].outcomes
    assert ": M <= " in outcome.explanation
    _, report = ecp.rewrite(program, "cuda", [ecp.LinearInt4(kernel="tinygemm")])
    assert report.outcomes[0].explanation == ""


def test_linears_that_became_one_are_explained_as_one() -> None:
    program, report = ecp.rewrite(exported(lambda net, x: torch.cat([net.a(x), net.b(x)])), "cuda")
    assert names(program).count(NAME) == 1
    assert {outcome.explanation.partition(": ")[0] for outcome in report.outcomes} == {
        "tilings on sm_90 for 128 x 64, group size 32"
    }
