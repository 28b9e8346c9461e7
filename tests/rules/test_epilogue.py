"""Rules that fuse operators around a packed linear: which are fused and which are not, the numbers, and the constants.

The reference is the program with only its linears packed: it has the same weights, and every other operator by itself.
"""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from executorch.exir import EdgeCompileConfig, to_edge
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

import et_cuda_passes as ecp
from et_cuda_passes.graph.constants import ConstantCache
from et_cuda_passes.graph.operators import arguments, op_of
from et_cuda_passes.ops import INT4_LINEARS
from et_cuda_passes.rules.epilogue import FuseActivation, FuseAdd, FuseMultiply, fused_epilogue
from et_cuda_passes.testing import Quantized, assert_rewrites
from tests.helpers import DEQUANTIZE, apply, names

aten = torch.ops.aten
OP = INT4_LINEARS["mma_tiled"].op
NAME = "et_cuda_passes.int4_linear_mma_tiled"
X = torch.randn(3, 64, generator=torch.Generator().manual_seed(7)).bfloat16()
PASSES = ecp.default_passes("cuda")
Use = Callable[[Tensor, Tensor, Tensor], Tensor]


# FuseActivation, FuseMultiply and FuseAdd -----------------------------------------------------------------------------


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
    """The epilogue of each int4 linear of ``program``, nodes by name."""
    found = [fused_epilogue(node) for node in program.graph.nodes if NAME in str(node.target).replace("::", ".")]
    return [{name: getattr(value, "name", value) for name, value in given.items()} for given in found]


def fused(use: Callable[[Any, Tensor], Any], x: Tensor = X) -> ExportedProgram:
    """The program for cuda, after a comparison of its results with those of the packed linears alone."""
    before = exported(use, x)
    program, _ = ecp.rewrite(before, "cuda")
    plain, _ = ecp.rewrite(before, "cuda", [ecp.LinearInt4()])
    got, wanted, scale = program.module()(x).double(), plain.module()(x).double(), before.module()(x).double()
    # A separate operator rounds once more. The sums have the size of their terms.
    assert (got - wanted).norm() <= 2**-7 * max(wanted.norm(), scale.norm())
    return program


ACTIVATIONS = [
    ("silu", F.silu),
    ("relu", F.relu),
    ("gelu", F.gelu),
    ("gelu_tanh", lambda y: F.gelu(y, approximate="tanh")),
]


@pytest.mark.parametrize(("name", "function"), ACTIVATIONS, ids=[name for name, _ in ACTIVATIONS])
def test_activation_is_fused_into_the_linear(name: str, function: Callable[[Tensor], Tensor]) -> None:
    program = fused(lambda net, x: function(net.a(x)))
    assert names(program) == [NAME]
    assert epilogues(program) == [{"activation": name}]


@pytest.mark.parametrize("use", [lambda net, x: x + net.a(x), lambda net, x: net.a(x) + x], ids=["before", "behind"])
def test_residual_is_fused_in_either_order(use: Any) -> None:
    program = fused(use)
    assert names(program) == [NAME]
    assert epilogues(program) == [{"addend": "x"}]


@pytest.mark.parametrize("use", [lambda net, x: x * net.a(x), lambda net, x: net.a(x) * x], ids=["before", "behind"])
def test_product_is_fused_in_either_order(use: Any) -> None:
    program = fused(use)
    assert names(program) == [NAME]
    assert epilogues(program) == [{"factor": "x"}]


def test_product_and_sum_are_fused_in_one_rewrite() -> None:
    program = exported(lambda net, x: torch.tanh(x) + F.silu(net.a(x)) * x)
    rewritten, _ = assert_rewrites(program, "cuda", expect={"linear_int4": 1})
    assert [set(given) for given in epilogues(rewritten)] == [{"activation", "factor", "addend"}]


def test_gate_with_other_zeros_is_a_factor_of_the_other_linear() -> None:
    """The weights of a and b have different forms. One linear has the activation and the other the product."""
    program = fused(lambda net, x: F.silu(net.a(x)) * net.b(x))
    assert names(program) == [NAME, NAME]
    first, second = epilogues(program)
    assert first == {"activation": "silu"}
    assert set(second) == {"factor"}


def test_activation_product_and_sum_of_a_block_are_fused() -> None:
    """The order of the operator is activation, product, sum."""
    program = fused(lambda net, x: F.gelu(net.a(x)) * torch.tanh(x) + net.b(x))
    found = epilogues(program)
    assert names(program).count(NAME) == 2
    assert "aten.gelu" not in names(program) and "aten.mul" not in names(program) and "aten.add" not in names(program)
    assert sum("addend" in given for given in found) == 1
    assert next(given for given in found if "activation" in given)["activation"] == "gelu"


def test_epilogue_is_fused_with_dynamic_rows() -> None:
    rows = Dim("rows", min=2, max=64)
    program = torch.export.export(Net(lambda net, x: x + F.silu(net.a(x))), (X,), dynamic_shapes=({0: rows},))
    rewritten, _ = ecp.rewrite(program, "cuda")
    assert epilogues(rewritten) == [{"activation": "silu", "addend": "x"}]
    for count in (2, 5, 64):
        x = torch.randn(count, 64).bfloat16()
        wanted = program.module()(x).double()
        assert (rewritten.module()(x).double() - wanted).norm() <= 2**-7 * wanted.norm()


def test_epilogue_is_fused_in_the_edge_dialect() -> None:
    """Operators have another form there, and a sum must not match as a product."""
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


def test_dynamic_number_is_not_fused_as_an_operand() -> None:
    rows = Dim("rows", min=2, max=64)
    for use in (lambda net, x: net.a(x) * x.shape[0], lambda net, x: F.silu(net.a(x)) + x.shape[0]):
        program = torch.export.export(Net(use), (X,), dynamic_shapes=({0: rows},))
        rewritten, _ = assert_rewrites(program, "cuda", expect={"linear_int4": 1, "missed": 0})
        assert not any({"factor", "addend"} & given.keys() for given in epilogues(rewritten))


def test_number_from_data_is_not_fused_as_an_operand() -> None:
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
def test_operand_with_unbacked_rows_is_fused_only_if_alike(use: Any, wanted: set[str]) -> None:
    """Nothing is known about the number of rows. An operand that is broadcast stays; one with as many rows is fused."""

    def chosen(net: Any, x: Tensor) -> Tensor:
        some = x[(x[:, 0] < 1).nonzero().squeeze(1)]
        result: Tensor = use(net.a(some), x[:1] if wanted == set() else some)
        return result

    program, _ = assert_rewrites(exported(chosen), "cuda", expect={"linear_int4": 1, "missed": 0})
    assert [set(given) for given in epilogues(program)] == [wanted]


def reasons(program: ExportedProgram, rule: Any, target: Any, *before: Any) -> list[tuple[str, str]]:
    """The reasons of ``rule`` at the one call of ``target``, with the linears packed and ``before`` applied."""
    packed, _ = ecp.rewrite(program, "cuda", [ecp.LinearInt4(), *before])
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
def test_same_shape_and_dtype_rejects_operand_that_differs(use: Any, wanted: str, found: str) -> None:
    (reason,) = reasons(exported(use), FuseAdd(), aten.add.Tensor)
    assert reason[0] == wanted
    assert found in reason[1]
    assert epilogues(fused(use)) == [{}]


@pytest.mark.parametrize("function", [F.silu, lambda y: X + y])
def test_linear_with_another_reader_is_not_fused(function: Callable[[Tensor], Tensor]) -> None:
    def use(net: Any, x: Tensor) -> Tensor:
        y = net.a(x)
        return torch.cat([function(y), y])

    program = fused(use)
    assert epilogues(program) == [{}]
    target = aten.silu.default if function is F.silu else aten.add.Tensor
    rule = FuseActivation() if function is F.silu else FuseAdd()
    assert any("this one user" in wanted for wanted, _ in reasons(exported(use), rule, target))


def test_nothing_fused_yet_rejects_activation_after_a_sum() -> None:
    """The kernel computes the activation first, and relu(a + b) computes the sum first."""
    use = lambda net, x: F.relu(net.a(x) + x)  # noqa: E731
    program = fused(use)
    assert names(program) == [NAME, "aten.relu"]
    assert reasons(exported(use), FuseActivation(), aten.relu.default, FuseAdd()) == [
        ("a linear without a fused epilogue", "a linear with a fused addend")
    ]


def test_operand_is_free_rejects_product_after_a_sum() -> None:
    use = lambda net, x: (net.a(x) + x) * torch.tanh(x)  # noqa: E731
    program = fused(use)
    assert names(program).count("aten.mul") == 1
    assert epilogues(program) == [{"addend": "x"}]
    assert reasons(exported(use), FuseMultiply(), aten.mul.Tensor, FuseAdd()) == [
        ("a linear without a fused factor or addend", "a linear with a fused addend")
    ]


def test_same_shape_and_dtype_rejects_the_linear_itself() -> None:
    def use(net: Any, x: Tensor) -> Tensor:
        y = net.a(x)
        return y + y

    assert reasons(exported(use), FuseAdd(), aten.add.Tensor) == [(ALIKE, "the linear itself")]


def test_operand_is_free_rejects_second_sum() -> None:
    program = exported(lambda net, x: torch.tanh(x) + (net.a(x) + x))
    packed, _ = ecp.rewrite(program, "cuda")
    assert names(packed) == ["aten.tanh", NAME, "aten.add"]
    after, report = apply(packed, [FuseAdd()], aten.add.Tensor)
    assert names(after) == names(packed)
    (reason,) = report.outcomes[0].reasons
    assert (reason.wanted, reason.found) == ("a linear without a fused addend", "a linear with a fused addend")


def test_kernel_without_an_epilogue_is_not_changed() -> None:
    before = exported(lambda net, x: x + F.silu(net.a(x)))
    passes = [ecp.LinearInt4(kernel="tinygemm"), FuseActivation(), FuseMultiply(), FuseAdd()]
    program, report = ecp.rewrite(before, "cuda", passes)
    assert names(program) == ["et_cuda_passes.int4_linear_tile_packed_to_4d", "aten.silu", "aten.add"]
    assert report.applied == {"linear_int4": 1}


def test_epilogue_is_not_fused_across_a_preserved_module() -> None:
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


def test_explanation_of_int4_linear_names_its_tilings() -> None:
    _, report = ecp.rewrite(exported(lambda net, x: net.b(net.a(x))), "cuda")
    assert [outcome.explanation.partition(": ")[0] for outcome in report.outcomes] == [
        "tilings on sm_90 for 64 x 64, group size 32"
    ] * 2
    assert all(outcome.explanation.partition(": ")[2].startswith("M = 3: ") for outcome in report.outcomes)
    assert report.to_dict()["outcomes"][0]["explanation"] == report.outcomes[0].explanation
    assert "tilings" not in str(report)
    rows = Dim("rows", min=2, max=64)
    program = torch.export.export(Net(lambda net, x: net.a(x)), (X,), dynamic_shapes=({0: rows},))
    (outcome,) = ecp.rewrite(program, "cuda")[1].outcomes
    assert ": M <= " in outcome.explanation
    _, report = ecp.rewrite(program, "cuda", [ecp.LinearInt4(kernel="tinygemm")])
    assert report.outcomes[0].explanation == ""


def test_explanation_of_fused_linears_names_tilings_for_all_rows() -> None:
    program, report = ecp.rewrite(exported(lambda net, x: torch.cat([net.a(x), net.b(x)])), "cuda")
    assert names(program).count(NAME) == 1
    assert {outcome.explanation.partition(": ")[0] for outcome in report.outcomes} == {
        "tilings on sm_90 for 128 x 64, group size 32"
    }


# FuseGate -------------------------------------------------------------------------------------------------------------


def without_bias(x: Tensor, weight: Tensor, _: Tensor) -> Tensor:
    return F.linear(x, weight)


class Gated(nn.Module):
    """``use(self, x)`` of the quantized linears [48, 64] that ``use`` names: a and b with biases, c and d without."""

    def __init__(self, use: Callable[[Any, Tensor], Any], n: int = 48, zero_points: str | None = "zero") -> None:
        super().__init__()
        for seed, name in enumerate(name for name in "abcd" if name in use.__code__.co_names):
            form = F.linear if name in "ab" else without_bias
            setattr(self, name, Quantized(n, 64, seed=seed, zero_points=zero_points, form=form))
        self.use = use

    def forward(self, x: Tensor) -> Any:
        return self.use(self, x)


def exported_gate(use: Callable[[Any, Tensor], Any], dynamic: Any = None, **options: Any) -> ExportedProgram:
    return torch.export.export(Gated(use, **options), (X,), dynamic_shapes=dynamic)


def linears(program: ExportedProgram) -> list[dict[str, Any]]:
    return [arguments(node) for node in program.graph.nodes if op_of(node) is OP]


def gated(program: ExportedProgram, x: Tensor = X) -> ExportedProgram:
    """The rewritten program, after a comparison of its results with those of the packed linears alone."""
    after, _ = ecp.rewrite(program, "cuda", PASSES, {"missed": 0})
    plain, _ = ecp.rewrite(program, "cuda", [ecp.LinearInt4()])
    got, wanted = after.module()(x).double(), plain.module()(x).double()
    assert (got - wanted).norm() <= 2**-6 * wanted.norm()
    again, _ = ecp.rewrite(after, "cuda", PASSES)
    assert str(again.graph) == str(after.graph)
    return after


@pytest.mark.parametrize(
    ("use", "activation"),
    [
        (lambda net, x: F.silu(net.c(x)) * net.d(x), "silu"),
        (lambda net, x: net.b(x) * F.gelu(net.a(x)), "gelu"),
        (lambda net, x: F.gelu(net.a(x), approximate="tanh") * net.b(x), "gelu_tanh"),
        (lambda net, x: net.c(x) * net.d(x), ""),
        (lambda net, x: F.relu(net.d(x)) * net.c(x), "relu"),
    ],
)
@pytest.mark.parametrize("zero_points", ["zero", "random"])
def test_gated_layer_is_one_linear(use: Callable[[Any, Tensor], Any], activation: str, zero_points: str) -> None:
    program = gated(exported_gate(use, zero_points=zero_points))
    (linear,) = linears(program)
    assert (linear["activation"], linear["gated"], linear["out_features"]) == (activation, True, 48)
    assert (linear["factor"], linear["addend"]) == (None, None)
    read = [linear[name] for name in ("packed", "scale_and_zero", "bias") if linear[name] is not None]
    assert all(node.target.endswith("_gated") and node.meta["val"].shape.count(96) == 1 for node in read)
    # The constants that they were built from are gone; the biases of c and d have no reader.
    others = [node.target for node in program.graph.find_nodes(op="placeholder") if node not in read]
    assert others == [*(f"p_{name}_bias" for name in "cd" if name in use.__code__.co_names), "x"]


def test_gated_layer_of_dynamic_length_is_one_linear() -> None:
    length = ({0: Dim("length", min=2, max=512)},)
    program = exported_gate(lambda net, x: F.silu(net.c(x)) * net.d(x), length)
    for rows in (2, 9):
        after, report = assert_rewrites(program, "cuda", PASSES, {"missed": 0}, (X[:1].repeat(rows, 1),), 2**-6)
        assert [linear["gated"] for linear in linears(after)] == [True] and report.applied["fuse_gate"] == 1


ONE_ACTIVATION = "one fused activation at most, and no other epilogue"
PRIVATE = "constants that nothing else reads or mutates; two biases or none"


@pytest.mark.parametrize(
    "use",
    [
        lambda net, x: F.silu(net.c(x)) * net.d(x * 2),  # another input
        lambda net, x: torch.cat([(y := F.silu(net.c(x))) * net.d(x), y]),  # the gate has another reader
        lambda net, x: F.silu(net.c(x)).tanh() * net.d(x),
    ],
)
def test_layer_of_another_form_is_not_gated(use: Callable[[Any, Tensor], Any]) -> None:
    assert not any(linear["gated"] for linear in linears(gated(exported_gate(use))))


@pytest.mark.parametrize(
    ("use", "wanted", "found"),
    [
        (lambda net, x: F.silu(net.c(x)) * F.silu(net.d(x)), ONE_ACTIVATION, "activation"),
        (lambda net, x: F.silu(net.a(x)) * net.d(x), PRIVATE, "one bias"),
        (
            lambda net, x: F.silu(net.c(x)) * net.d(x) + net.c(x + 1),
            PRIVATE,
            "p_c_data_packed, p_c_data_scale_and_zero",
        ),
        (lambda net, x: (y := net.a(x)) * y, "two linears", "linear"),
    ],
)
def test_gate_with_requirement_that_fails_is_not_fused(
    use: Callable[[Any, Tensor], Any], wanted: str, found: str
) -> None:
    program = exported_gate(use)
    assert not any(linear["gated"] for linear in linears(gated(program)))
    assert reasons(program, ecp.FuseGate(), aten.mul.Tensor, FuseActivation()) == [(wanted, found)]


@pytest.mark.parametrize("preserved", ["c", "d"])
def test_gate_is_not_fused_across_a_preserved_module(preserved: str) -> None:
    model = Gated(lambda net, x: net.d(x) * F.silu(net.c(x)))
    after = gated(torch.export.export(model, (X,), preserve_module_call_signature=(preserved,)))
    assert [linear["gated"] for linear in linears(after)] == [False, False]
    assert torch.equal(torch.export.unflatten(after)(X), after.module()(X))


ONE = "int4 group 32 -> triton (mma_tiled), gated, 2 in one"


class InBranch(Gated):
    """``use`` in one branch, and something else in the other."""

    def forward(self, x: Tensor) -> Any:
        return torch.cond(x.sum() > 0, lambda x: self.use(self, x), lambda x: x + 1, (x,))


@pytest.mark.parametrize("model", [Gated, InBranch])
@pytest.mark.parametrize(("dynamic", "rows"), [(None, "= 3: "), (({0: Dim("length", min=2, max=512)},), "<= ")])
def test_report_names_the_gate_at_both_linears(model: type[Gated], dynamic: Any, rows: str) -> None:
    net = model(lambda net, x: net.a(F.silu(net.c(x)) * net.d(x)), n=64)
    program = torch.export.export(net, (X,), dynamic_shapes=dynamic, strict=True)
    _, report = ecp.rewrite(program, "cuda", expect={"linear_int4": 3, "fuse_gate": 1, "rewritten": 3})
    assert [outcome.detail for outcome in report.outcomes] == [ONE, ONE, ONE.partition(", ")[0]]
    gate, up, other = (outcome.explanation for outcome in report.outcomes)
    wanted = "gate and up in one product: tilings on sm_90 for 128 x 64, group size 32: M "
    assert gate == up and gate.startswith(wanted + rows)
    assert other.startswith(f"tilings on sm_90 for 64 x 64, group size 32: M {rows}")
    assert f"  rewritten     2 x linear_int4  {ONE}  (c.data, ...)\n" in str(report)
    assert "\n  then      1 x fuse_activation, 1 x fuse_gate" in str(report)


def test_weights_can_interleave_rejects_rows_that_8_does_not_divide() -> None:
    program = exported_gate(lambda net, x: net.c(x) * net.d(x), n=44)
    assert reasons(program, ecp.FuseGate(), aten.mul.Tensor) == [
        ("weights of one form, out_features a multiple of 8", "scale_and_zero [1, 44, 8] and [1, 44, 8]")
    ]
    program = gated(exported_gate(lambda net, x: F.silu(net.c(x)) * net.d(x), n=44))
    assert [linear["gated"] for linear in linears(program)] == [False, False]


def test_methods_share_constants_of_a_gated_layer() -> None:
    model, pool = Gated(lambda net, x: F.silu(net.c(x)) * net.d(x)), ConstantCache()
    programs = [torch.export.export(model, (x,)) for x in (X, X[:1])]
    after = [ecp.rewrite(program, "cuda", PASSES, pool=pool)[0] for program in programs]
    first, second = ({n: t for n, t in program.state_dict.items() if "gated" in n} for program in after)
    assert first.keys() == second.keys() and len(first) == 2
    assert all(first[name].data_ptr() == second[name].data_ptr() for name in first)


@pytest.mark.parametrize(
    ("use", "wanted"),
    [
        (lambda y, x: y + x, {"addend"}),
        (lambda y, x: y * x, {"factor"}),
        (lambda y, x: x + y * x.tanh(), {"factor", "addend"}),
    ],
)
def test_operands_after_a_gated_layer_are_fused(use: Callable[[Tensor, Tensor], Tensor], wanted: set[str]) -> None:
    program = gated(exported_gate(lambda net, x: use(F.silu(net.c(x)) * net.d(x), x[:, :48])))
    (linear,) = linears(program)
    assert linear["gated"] and {name for name in ("factor", "addend") if linear[name]} == wanted


def test_linears_differ_rejects_square_of_one_linear() -> None:
    program = gated(exported_gate(lambda net, x: (y := net.a(x)) * y))
    (linear,) = linears(program)
    assert not linear["gated"] and linear["factor"] is None


@pytest.mark.parametrize("use", [lambda y, x: x[..., :48] + y, lambda y, x: y * x[..., :48], lambda y, x: F.relu(y)])
def test_later_rewrite_keeps_the_gate(use: Callable[[Tensor, Tensor], Tensor]) -> None:
    before = exported_gate(lambda net, x: use(F.silu(net.c(x)) * net.d(x), x))
    once, _ = ecp.rewrite(before, "cuda", PASSES)
    twice, _ = ecp.rewrite(once, "cuda", PASSES)
    plain, _ = ecp.rewrite(before, "cuda", [ecp.LinearInt4()])
    wanted = plain.module()(X).double()
    for program in (once, twice):
        assert [linear["gated"] for linear in linears(program)] == [True]
        assert (program.module()(X).double() - wanted).norm() <= 2**-6 * wanted.norm()


class Biased(nn.Module):
    """A gated layer [48, 64] after which ``update`` mutates its biases, or the table of which they are rows."""

    def __init__(self, update: Callable[[Any, Tensor], Any] = lambda net, x: None, shared: bool = False) -> None:
        super().__init__()
        self.a, self.b = (Quantized(48, 64, seed=seed) for seed in (1, 2))
        self.register_buffer("table", torch.randn(2, 48, generator=torch.Generator().manual_seed(3)).bfloat16())
        for name, row in zip(("first", "second"), self.table, strict=True):
            self.register_buffer(name, row if shared else row.clone())
        self.update = update

    def forward(self, x: Tensor) -> Tensor:
        y = F.silu(F.linear(x, self.a.weight(), self.first)) * F.linear(x, self.b.weight(), self.second)
        self.update(self, x)
        return y


def assert_biases_are_read_in_every_run(program: ExportedProgram) -> None:
    after, report = ecp.rewrite(program, "cuda", PASSES, {"linear_int4": 2})
    assert "fuse_gate" not in report.applied
    runs = [copy.deepcopy(one.module()) for one in (after, program)]
    for _ in range(3):
        got, wanted = (run(X).double() for run in runs)
        assert (got - wanted).norm() <= 2**-6 * wanted.norm()


@pytest.mark.parametrize("decompose", [False, True])
@pytest.mark.parametrize("update", [lambda net, x: net.first.copy_(x[0, :48] * 3), lambda net, x: net.second.add_(1)])
def test_gated_layer_reads_mutated_bias_in_every_run(update: Callable[[Any, Tensor], Any], decompose: bool) -> None:
    program = torch.export.export(Biased(update), (X,))
    assert_biases_are_read_in_every_run(program.run_decompositions({}) if decompose else program)


def test_gated_layer_reads_views_of_mutated_buffer_in_every_run() -> None:
    assert_biases_are_read_in_every_run(
        torch.export.export(Biased(lambda net, x: net.table.mul_(2), shared=True), (X,))
    )


@pytest.mark.parametrize("bias", [lambda b: b[None], lambda b: b[:1], lambda b: b.repeat(3, 1)])
def test_gate_is_not_fused_across_a_bias_that_is_not_a_vector(bias: Callable[[Tensor], Tensor]) -> None:
    class Added(Biased):
        def forward(self, x: Tensor) -> Tensor:
            gate, up = (
                torch.addmm(bias(b), x, layer.weight().t())
                for layer, b in ((self.a, self.first), (self.b, self.second))
            )
            return F.silu(gate) * up

    program = gated(torch.export.export(Added(), (X,)))
    assert not any(linear["gated"] for linear in linears(program))


# RemoveLinearViews ----------------------------------------------------------------------------------------------------


STACKED = torch.randn(6, 1, 64, generator=torch.Generator().manual_seed(7)).bfloat16()


@pytest.mark.parametrize("target", ["cuda", "cpu", "metal"])
def test_views_around_a_linear_are_removed(target: str) -> None:
    model = Quantized(48, 64, form=lambda x, w, b: F.linear(x.view(6, 64), w, b).view(6, 1, 48))
    program, report = assert_rewrites(torch.export.export(model, (STACKED,)), target, expect={"linear_int4": 1})
    assert len(names(program)) == 1 and report.applied["remove_linear_views"] == 1


@pytest.mark.parametrize(
    "use",
    [
        lambda x, w, b: (F.linear(x.view(6, 64), w) + x.view(6, 64)[:, :48]).view(6, 1, 48),
        # This one has the inner shape, but not the outer one.
        lambda x, w, b: (F.linear(x.view(1, 6, 64), w) * x.view(1, 6, 64)[..., :48]).view(6, 1, 48),
        lambda x, w, b: F.silu(F.linear(x.view(6, 64), w, b)).view(6, 1, 48),
    ],
    ids=["sum", "product", "activation"],
)
def test_views_of_linear_with_an_epilogue_stay_in_a_later_rewrite(use: Use) -> None:
    """``assert_rewrites`` checks that a second rewrite changes nothing."""
    program, report = assert_rewrites(torch.export.export(Quantized(48, 64, form=use), (STACKED,)), "cuda")
    assert "remove_linear_views" not in report.applied and any("view" in name for name in names(program))
    twice, report = ecp.rewrite(program, "cuda")
    assert not report.applied and twice.module()(STACKED).shape == program.module()(STACKED).shape


@pytest.mark.parametrize(
    ("use", "left"),
    [
        (lambda x, w, b: F.linear(x.view(2, 3, 64).view(6, 64), w, b).view(2, 3, 48).view(6, 1, 48), 1),
        (lambda x, w, b: F.linear(x.view(2, 3, 64).view(6, 64), w, b).view(3, 2, 48).view(6, 1, 48), 1),
        (lambda x, w, b: F.linear(x.view(2, 3, 64).view(6, 64), w, b).view(6, 1, 48), 1),
        (lambda x, w, b: F.linear(x.view(6, 64), w, b).view(2, 3, 48).view(3, 2, 48).view(6, 1, 48), 1),
        # The source of the views has other rows, and the first view has the rows of the result.
        (lambda x, w, b: F.linear(x.view(2, 3, 64).view(6, 64), w, b).view(2, 3, 48), 2),
        (lambda x, w, b: F.linear(x.view(2, 3, 64).view(6, 64), w, b).view(2, 3, 48).sum(0), 3),
    ],
)
@pytest.mark.parametrize("decompose", [False, True])
def test_views_of_views_are_removed_in_one_rewrite(use: Use, left: int, decompose: bool) -> None:
    program = torch.export.export(Quantized(48, 64, form=use), (STACKED,))
    program = program.run_decompositions({}) if decompose else program
    rewritten, report = assert_rewrites(program, "cuda", expect={"linear_int4": 1})
    assert report.applied["remove_linear_views"] == 1 and len(names(rewritten)) == left


def test_views_keep_rows_rejects_result_with_other_rows() -> None:
    model = Quantized(48, 64, form=lambda x, w, b: F.linear(x.view(6, 64), w, b).view(3, 2, 48))
    packed, _ = ecp.rewrite(torch.export.export(model, (STACKED,)), "cuda", [ecp.LinearInt4()])
    after, report = apply(packed, [ecp.RemoveLinearViews()], aten.view.default)
    assert names(after) == names(packed)
    (reason,) = report.outcomes[-1].reasons
    assert (reason.wanted, reason.found) == ("views that only join and split the rows", "[6, 1, 64] -> [3, 2, 48]")
