"""Int4Gate: a gated layer as one product: what is taken and what is not, the numbers, and the constants."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

import et_cuda_passes as ecp
from et_cuda_passes.graph.operators import arguments, op_of
from et_cuda_passes.ops import INT4_LINEARS
from et_cuda_passes.testing import assert_rewrites
from tests.quantized import Quantized

OP = INT4_LINEARS["mma_tiled"].op
PASSES = ecp.default_passes("cuda")
X = torch.randn(3, 64, generator=torch.Generator().manual_seed(7)).bfloat16()


def without_bias(x: Tensor, weight: Tensor, _: Tensor) -> Tensor:
    return F.linear(x, weight)


class Gated(nn.Module):
    """``use(self, x)`` of the quantized linears [48, 64] that it names: a and b with biases, c and d with none."""

    def __init__(self, use: Callable[[Any, Tensor], Any], n: int = 48, zero_points: str | None = "zero") -> None:
        super().__init__()
        for seed, name in enumerate(name for name in "abcd" if name in use.__code__.co_names):
            form = F.linear if name in "ab" else without_bias
            setattr(self, name, Quantized(n, 64, seed=seed, zero_points=zero_points, form=form))
        self.use = use

    def forward(self, x: Tensor) -> Any:
        return self.use(self, x)


def exported(use: Callable[[Any, Tensor], Any], dynamic: Any = None, **options: Any) -> ExportedProgram:
    return torch.export.export(Gated(use, **options), (X,), dynamic_shapes=dynamic)


def linears(program: ExportedProgram) -> list[dict[str, Any]]:
    return [arguments(node) for node in program.graph.nodes if op_of(node) is OP]


def gated(program: ExportedProgram, x: Tensor = X) -> ExportedProgram:
    """Rewritten, and found to compute what each operator by itself does."""
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
def test_a_gated_layer_is_one_product(use: Callable[[Any, Tensor], Any], activation: str, zero_points: str) -> None:
    program = gated(exported(use, zero_points=zero_points))
    (linear,) = linears(program)
    assert (linear["activation"], linear["gated"], linear["out_features"]) == (activation, True, 48)
    assert (linear["factor"], linear["addend"]) == (None, None)
    read = [linear[name] for name in ("packed", "scale_and_zero", "bias") if linear[name] is not None]
    assert all(node.target.endswith("_gated") and node.meta["val"].shape.count(96) == 1 for node in read)
    # Of what they are made of nothing is left.
    others = [node.target for node in program.graph.find_nodes(op="placeholder") if node not in read]
    assert others == ["x"] or others == ["p_c_bias", "p_d_bias", "x"]  # biases that no linear reads


def test_of_any_length() -> None:
    length = ({0: Dim("length", min=2, max=512)},)
    program = exported(lambda net, x: F.silu(net.c(x)) * net.d(x), length)
    for rows in (2, 9):
        after, report = assert_rewrites(program, "cuda", PASSES, {"missed": 0}, (X[:1].repeat(rows, 1),), 2**-6)
        assert [linear["gated"] for linear in linears(after)] == [True] and report.applied["int4_gate"] == 1


@pytest.mark.parametrize(
    "use",
    [
        lambda net, x: F.silu(net.c(x)) * net.d(x * 2),  # another input
        lambda net, x: torch.cat([(y := F.silu(net.c(x))) * net.d(x), y]),  # the gate is read again
        lambda net, x: F.silu(net.c(x)) * F.silu(net.d(x)),  # two activations
        lambda net, x: F.silu(net.a(x)) * net.d(x),  # one bias
        lambda net, x: F.silu(net.c(x)) * net.d(x) + net.c(x + 1),  # a weight that is read again
        lambda net, x: F.silu(net.c(x)).tanh() * net.d(x),
    ],
)
def test_what_is_not_such_a_layer_is_left_as_it_was(use: Callable[[Any, Tensor], Any]) -> None:
    assert not any(linear["gated"] for linear in linears(gated(exported(use))))


@pytest.mark.parametrize("preserved", ["c", "d"])
def test_a_linear_whose_module_is_preserved_stays_one(preserved: str) -> None:
    model = Gated(lambda net, x: net.d(x) * F.silu(net.c(x)))
    after = gated(torch.export.export(model, (X,), preserve_module_call_signature=(preserved,)))
    assert [linear["gated"] for linear in linears(after)] == [False, False]
    assert torch.equal(torch.export.unflatten(after)(X), after.module()(X))


ONE = "int4 group 32 -> triton (mma_tiled), gated, 2 in one"


class Chosen(Gated):
    """What ``use`` says, or another thing."""

    def forward(self, x: Tensor) -> Any:
        return torch.cond(x.sum() > 0, lambda x: self.use(self, x), lambda x: x + 1, (x,))


@pytest.mark.parametrize("model", [Gated, Chosen])
@pytest.mark.parametrize(("dynamic", "rows"), [(None, "= 3: "), (({0: Dim("length", min=2, max=512)},), "<= ")])
def test_the_report_tells_it_of_both_linears(model: type[Gated], dynamic: Any, rows: str) -> None:
    net = model(lambda net, x: net.a(F.silu(net.c(x)) * net.d(x)), n=64)
    program = torch.export.export(net, (X,), dynamic_shapes=dynamic, strict=True)
    _, report = ecp.rewrite(program, "cuda", expect={"linear_int4": 3, "int4_gate": 1, "rewritten": 3})
    assert [outcome.detail for outcome in report.outcomes] == [ONE, ONE, ONE.partition(", ")[0]]
    gate, up, other = (outcome.explanation for outcome in report.outcomes)
    wanted = "gate and up in one product: tilings on sm_90 for 128 x 64, group size 32: M "
    assert gate == up and gate.startswith(wanted + rows) and gate.endswith("(calibrated on NVIDIA H200)")
    assert other.startswith(f"tilings on sm_90 for 64 x 64, group size 32: M {rows}")
    assert f"  rewritten     2 x linear_int4  {ONE}  (c.data, ...)\n" in str(report)
    assert "\n  then      1 x int4_activation, 1 x int4_gate" in str(report)


def test_rows_that_are_no_multiple_of_eight() -> None:
    program = gated(exported(lambda net, x: F.silu(net.c(x)) * net.d(x), n=44))
    assert [linear["gated"] for linear in linears(program)] == [False, False]


def test_two_methods_share_what_is_put_together() -> None:
    from et_cuda_passes.graph.constants import ConstantCache
    from et_cuda_passes.targets.rewrite import rewrite

    model, pool = Gated(lambda net, x: F.silu(net.c(x)) * net.d(x)), ConstantCache()
    programs = [torch.export.export(model, (x,)) for x in (X, X[:1])]
    after = [rewrite(program, "cuda", PASSES, pool=pool)[0] for program in programs]
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
def test_what_follows_a_gated_layer_is_computed_with_it(
    use: Callable[[Tensor, Tensor], Tensor], wanted: set[str]
) -> None:
    program = gated(exported(lambda net, x: use(F.silu(net.c(x)) * net.d(x), x[:, :48])))
    (linear,) = linears(program)
    assert linear["gated"] and {name for name in ("factor", "addend") if linear[name]} == wanted


def test_the_square_of_a_linear_is_computed_once() -> None:
    program = gated(exported(lambda net, x: (y := net.a(x)) * y))
    (linear,) = linears(program)
    assert not linear["gated"] and linear["factor"] is None


@pytest.mark.parametrize("use", [lambda y, x: x[..., :48] + y, lambda y, x: y * x[..., :48], lambda y, x: F.relu(y)])
def test_what_follows_a_gated_layer_in_a_later_rewrite_keeps_the_gate(use: Callable[[Tensor, Tensor], Tensor]) -> None:
    before = exported(lambda net, x: use(F.silu(net.c(x)) * net.d(x), x))
    once, _ = ecp.rewrite(before, "cuda", PASSES)
    twice, _ = ecp.rewrite(once, "cuda", PASSES)
    plain, _ = ecp.rewrite(before, "cuda", [ecp.LinearInt4()])
    wanted = plain.module()(X).double()
    for program in (once, twice):
        assert [linear["gated"] for linear in linears(program)] == [True]
        assert (program.module()(X).double() - wanted).norm() <= 2**-6 * wanted.norm()


class Biased(nn.Module):
    """A gated layer [48, 64] behind which ``update`` writes its biases, or the table whose rows they are."""

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


def assert_not_baked_in(program: ExportedProgram) -> None:
    after, report = ecp.rewrite(program, "cuda", PASSES, {"linear_int4": 2})
    assert "int4_gate" not in report.applied
    runs = [copy.deepcopy(one.module()) for one in (after, program)]
    for _ in range(3):
        got, wanted = (run(X).double() for run in runs)
        assert (got - wanted).norm() <= 2**-6 * wanted.norm()


@pytest.mark.parametrize("decompose", [False, True])
@pytest.mark.parametrize("update", [lambda net, x: net.first.copy_(x[0, :48] * 3), lambda net, x: net.second.add_(1)])
def test_a_bias_that_changes_is_read_in_every_run(update: Callable[[Any, Tensor], Any], decompose: bool) -> None:
    program = torch.export.export(Biased(update), (X,))
    assert_not_baked_in(program.run_decompositions({}) if decompose else program)


def test_biases_that_are_views_of_what_changes_are_read_in_every_run() -> None:
    assert_not_baked_in(torch.export.export(Biased(lambda net, x: net.table.mul_(2), shared=True), (X,)))


@pytest.mark.parametrize("bias", [lambda b: b[None], lambda b: b[:1], lambda b: b.repeat(3, 1)])
def test_biases_that_are_no_vectors_stand_between(bias: Callable[[Tensor], Tensor]) -> None:
    class Added(Biased):
        def forward(self, x: Tensor) -> Tensor:
            gate, up = (
                torch.addmm(bias(b), x, layer.weight().t())
                for layer, b in ((self.a, self.first), (self.b, self.second))
            )
            return F.silu(gate) * up

    program = gated(torch.export.export(Added(), (X,)))
    assert not any(linear["gated"] for linear in linears(program))
