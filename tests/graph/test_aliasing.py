"""Programs that mutate: the rewritten program reads inputs of a match at the same place, and keeps every effect."""

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx import Node
from torchao.quantization import IntxWeightOnlyConfig, quantize_
from torchao.quantization.granularity import PerGroup

import et_cuda_passes as ecp
from et_cuda_passes.graph.aliasing import has_effect
from et_cuda_passes.graph.subgraphs import Subgraphs
from et_cuda_passes.testing import Quantized, Sketch, assert_rewrites


class Written(nn.Module):
    """A linear whose bias is mutated between the linear and the operator after it."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.q = Quantized(32, 64)
        self.form = form

    def forward(self, x: Tensor, bias: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
        bias = bias * 1
        if self.form == "a view":
            y = torch.addmm(bias, x.view(6, 64), self.q.weight().t())
            bias.add_(5)
            return y.view(2, 3, 32), bias
        y = F.linear(x, self.q.weight(), bias)
        bias.add_(5)
        return (torch.relu(y) if self.form == "an activation" else y + r), bias


@pytest.mark.parametrize("target", ["cuda", "cpu", "metal"])
@pytest.mark.parametrize("form", ["a view", "an activation", "a sum"])
def test_bias_that_is_mutated_after_its_linear_keeps_its_value(form: str, target: str) -> None:
    inputs = (torch.randn(2, 3, 64).bfloat16(), torch.randn(32).bfloat16(), torch.randn(2, 3, 32).bfloat16())
    program = torch.export.export(Written(form), inputs)
    assert_rewrites(program, target, expect={"linear_int4": 1, "missed": 0})


class Cache(nn.Module):
    """Attention over a cache that the program mutates afterwards."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("k", torch.randn(1, 2, 7, 32).bfloat16())
        self.register_buffer("v", torch.randn(1, 2, 7, 32).bfloat16())

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        y = F.scaled_dot_product_attention(q, self.k, self.v)
        self.k.copy_(k)
        self.v.copy_(v)
        return y.transpose(1, 2)


def test_cache_that_is_mutated_after_attention_keeps_its_value() -> None:
    inputs = tuple(torch.randn(1, 2, rows, 32).bfloat16() for rows in (5, 7, 7))
    program, _ = assert_rewrites(torch.export.export(Cache(), inputs), "cuda", expect={"unmasked_attention": 1})
    assert program is not None


class Dropped(nn.Module):
    """In eval mode, dropout returns its input, so a mutation of its result mutates x."""

    def __init__(self, operation: Any) -> None:
        super().__init__()
        self.a, self.b = Quantized(64, 64), Quantized(64, 64)
        self.operation = operation

    def forward(self, x: Tensor) -> Tensor:
        x = x * 2
        q = F.linear(x, self.a.weight())
        h = self.operation(x)
        h += 1
        return q @ F.linear(x, self.b.weight()).T


@pytest.mark.parametrize(
    "operation",
    [
        nn.Dropout(0.1),
        nn.AlphaDropout(0.1),
        lambda x: torch.einsum("ab->ba", x),
        lambda x: x.type_as(x),
        lambda x: x.sum_to_size(x.shape),
        torch.atleast_2d,
    ],
    ids=["dropout", "alpha dropout", "einsum", "type_as", "sum_to_size", "atleast_2d"],
)
def test_mutation_through_a_possible_alias_reaches_its_input(operation: Any) -> None:
    program = torch.export.export(Dropped(operation).eval(), (torch.randn(6, 64).bfloat16(),))
    assert_rewrites(program, "cuda", expect={"linear_int4": 2, "missed": 0})


class Growing(nn.Module):
    """A scale that is a parameter, and that the program doubles in every run."""

    def __init__(self) -> None:
        super().__init__()
        self.q = Quantized(32, 64)
        self.scale = nn.Parameter(self.q.scale.clone(), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        weight = torch.ops.torchao.dequantize_affine(
            self.q.data, (1, 32), self.scale, self.q.zero_point, torch.int8, -8, 7, output_dtype=torch.bfloat16
        )
        y = F.linear(x, weight)
        self.scale.mul_(2)
        return y


@pytest.mark.parametrize("decompose", [False, True])
@pytest.mark.parametrize("target", ["cuda", "cpu"])
def test_parameter_that_the_program_updates_is_not_packed(target: str, decompose: bool) -> None:
    program = torch.export.export(Growing(), (torch.randn(4, 64).bfloat16(),))
    program = program.run_decompositions({}) if decompose else program
    _, report = ecp.rewrite(program, target)
    assert report.counts()["missed"] == 1


# Effects without readers ---------------------------------------------------------------------------------------------


aten = torch.ops.aten
Body = Callable[["Model", Tensor, Tensor], Any]


class Model(nn.Module):
    """Two quantized linears and a cache [1, 1, 8, 64]; ``body`` uses them with ``x`` and ``out`` [3, 64]."""

    def __init__(self, body: Body) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.k, self.o = (nn.Linear(64, 64, bias=False, dtype=torch.bfloat16) for _ in range(2))
        quantize_(self, IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32)))
        self.register_buffer("cache", torch.randn(1, 1, 8, 64).bfloat16())
        self.body = body

    def forward(self, x: Tensor, out: Tensor) -> Any:
        return self.body(self, x, out)


def rows(*indices: int) -> Tensor:
    return torch.tensor(indices)


def prefill(m: Model, x: Tensor, out: Tensor) -> Tensor:
    m.cache.index_copy_(2, rows(2, 3, 4), m.k(x)[None, None])
    m.o(F.scaled_dot_product_attention(x[None, None], m.cache, m.cache)[0, 0])
    return x.sum()


def input_copied(m: Model, x: Tensor, out: Tensor) -> Tensor:
    out.copy_(x * 2)
    m.o(out)
    return x.sum()


def input_added_to_through_a_view(m: Model, x: Tensor, out: Tensor) -> Tensor:
    m.o(out.view(-1).add_(1).view(3, 64))
    return x.sum()


def input_multiplied_in_a_slice(m: Model, x: Tensor, out: Tensor) -> Tensor:
    out[:, 3:7].mul_(m.k(x)[:, :4])
    m.o(out)
    return x.sum()


def cache_put_at_indices(m: Model, x: Tensor, out: Tensor) -> Tensor:
    m.cache[0, 0, rows(1, 5, 7)] = m.k(x)
    m.o(m.cache[0, 0])
    return x.sum()


def cache_slice_copied(m: Model, x: Tensor, out: Tensor) -> Tensor:
    m.o(m.cache[0, 0, 2:5].copy_(m.k(x)))
    return x.sum()


def cache_read_between_writes(m: Model, x: Tensor, out: Tensor) -> tuple[Tensor, Tensor]:
    before = m.cache.sum()
    m.cache[0, 0, :3].add_(m.k(x))
    between = m.k(m.cache[0, 0])
    m.cache.mul_(0.5)
    m.o(m.cache[0, 0])
    return before, between


def cache_written_under_no_grad(m: Model, x: Tensor, out: Tensor) -> Tensor:
    with torch.no_grad():
        m.cache[0, 0, :3] = m.k(x)
        y = m.cache[0, 0] * 2
    m.o(y)
    return x.sum()


def input_written_under_autocast(m: Model, x: Tensor, out: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        out.copy_(m.k(x))
        y = out + 1
    m.o(y)
    return x.sum()


def linear_written_in_place_and_unused(m: Model, x: Tensor, out: Tensor) -> Tensor:
    y = m.k(x)
    y.add_(1)
    m.o(y)
    out += y
    return x.sum()


def result_partly_unused(m: Model, x: Tensor, out: Tensor) -> Tensor:
    first, second = m.k(x).split(32, -1)
    out[:, :32].copy_(first)
    m.o(torch.cat([second, second], -1))
    return out[0]


def written_through_a_broadcast(m: Model, x: Tensor, out: Tensor) -> Tensor:
    y = m.k(x)
    same, _ = torch.broadcast_tensors(out, y)
    before = m.o(out)
    same.add_(1)
    return before + m.o(out)


MUTATIONS: list[Body] = [
    prefill,
    input_copied,
    input_added_to_through_a_view,
    input_multiplied_in_a_slice,
    cache_put_at_indices,
    cache_slice_copied,
    cache_read_between_writes,
    cache_written_under_no_grad,
    input_written_under_autocast,
    linear_written_in_place_and_unused,
    result_partly_unused,
    written_through_a_broadcast,
]


@cache
def mutating(body: Body) -> ExportedProgram:
    return torch.export.export(Model(body), (torch.randn(3, 64).bfloat16(), torch.randn(3, 64).bfloat16()))


@pytest.mark.parametrize("target", ecp.targets())
@pytest.mark.parametrize("body", MUTATIONS, ids=lambda body: body.__name__)
def test_mutation_that_no_result_depends_on_is_kept(body: Body, target: str) -> None:
    _, report = assert_rewrites(mutating(body), target, expect={})
    assert len(report.outcomes) >= 1
    # These have no kernel for bf16, so that every weight is missed.
    misses = len(report.outcomes) if target in ("vulkan", "coreml", "openvino") else 0
    assert report.counts()["missed"] == misses


def test_running_statistics_that_no_result_depends_on_are_updated() -> None:
    class Normed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.norm = Quantized(32, 64, dtype=torch.float32), nn.BatchNorm1d(64)

        def forward(self, x: Tensor) -> Tensor:
            self.q(self.norm(x))
            return x.sum()

    program = torch.export.export(Normed().train(), (torch.randn(5, 64) + 3,))
    assert_rewrites(program, "cpu", expect={"linear_int4": 1})


def test_weight_whose_scale_is_mutated_under_another_name_is_no_constant() -> None:
    class Doubling(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(64, 64)
            quantize_(self, IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32)))
            self.register_buffer("scale", self.linear.weight.scale.view(-1))

        def forward(self, x: Tensor) -> Tensor:
            self.scale.mul_(2)
            return self.linear(x)

    program = torch.export.export(Doubling(), (torch.randn(5, 64),))
    _, report = ecp.rewrite(program, "cpu")
    assert report.counts()["missed"] == 1


def test_second_alias_of_a_custom_operator_is_seen() -> None:
    with torch.library._scoped_library("aliases", "DEF") as library:
        library.define("two(Tensor(a) x, Tensor(b) y) -> (Tensor(a), Tensor(b))")
        library.impl("two", lambda x, y: (x.view(-1), y.view(-1)), "CompositeExplicitAutograd")
        torch.library.register_fake("aliases::two", lambda x, y: (x.view(-1), y.view(-1)), lib=library)

        class Both(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.q = Quantized(64, 64)

            def forward(self, x: Tensor, o: Tensor) -> Tensor:
                h, g = x * 1, o * 1
                y = self.q(g)
                _, b = torch.ops.aliases.two(h, g)
                b.mul_(3)
                return y + h

        program = torch.export.export(Both(), (torch.randn(5, 64).bfloat16(), torch.randn(5, 64).bfloat16()))
        assert_rewrites(program, "cuda", expect={"linear_int4": 1, "fuse_add": 0})


def test_dead_linears_are_decided_before_they_are_removed() -> None:
    class Chain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = Quantized(64, 32, group=16, low=-128, high=127), Quantized(32, 64)

        def forward(self, x: Tensor) -> Tensor:
            self.second(self.first(x))
            return x + 1

    program = torch.export.export(Chain(), (torch.randn(3, 32).bfloat16(),))
    assert_rewrites(program, "cuda", expect={"linear_int4": 1, "linear_int8": 1, "missed": 0})


def test_random_draw_that_nothing_reads_is_kept() -> None:
    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q = Quantized(32, 64)

        def forward(self, x: Tensor) -> Tensor:
            self.q(x + torch.rand(3, 64).bfloat16())
            return torch.rand(3)

    program = torch.export.export(Noisy(), (torch.randn(3, 64).bfloat16(),))
    rewritten, _ = ecp.rewrite(program, "cuda", expect={"linear_int4": 1})
    results = []
    for each in (program, rewritten):
        torch.manual_seed(7)
        results.append(each.module()(torch.randn(3, 64).bfloat16()))
    assert torch.equal(*results)


def test_dead_view_and_arithmetic_are_removed_with_the_linear_that_read_them() -> None:
    class Dead(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q = Quantized(32, 64)

        def forward(self, x: Tensor) -> Tensor:
            self.q((x * 2).view(3, 64))
            return x.sum()

    program = torch.export.export(Dead(), (torch.randn(3, 64).bfloat16(),))
    rewritten, _ = ecp.rewrite(program, "cuda", expect={"linear_int4": 1})
    assert {node.target for node in rewritten.graph.nodes if node.op == "call_function"} == {aten.sum.default}


class Doubled(ecp.Rule):
    """mul_(x, 2) -> add(x, x), without the mutation"""

    def pattern(self, x: ecp.Capture) -> ecp.Pattern:
        return ecp.op(aten.mul_.Tensor)(x, 2)

    def rewrite(self, b: ecp.Builder, m: ecp.Match) -> Node:
        return b.call(aten.add.Tensor, m.x, m.x)


class DoubledInPlace(Doubled):
    """mul_(x, 2) -> add_(x, x)"""

    def rewrite(self, b: ecp.Builder, m: ecp.Match) -> Node:
        return b.call(aten.add_.Tensor, m.x, m.x)


class Writes(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        x.mul_(2)
        return x + 1


def test_rule_that_replaces_a_mutation_must_build_one() -> None:
    program = torch.export.export(Writes(), (torch.randn(3),))
    with pytest.raises(ecp.RuleError, match="replaced mul_, which mutates x, by nodes that do not"):
        ecp.rewrite(program, "cuda", [Doubled()])
    rewritten, _ = assert_rewrites(program, "cuda", [DoubledInPlace()], {"doubled_in_place": 1})
    assert not [node for node in rewritten.graph.nodes if node.target is aten.mul_.Tensor]


class RemoveClone(ecp.Rule):
    """clone(x) -> x"""

    def pattern(self, x: ecp.Capture) -> ecp.Pattern:
        return ecp.op(aten.clone.default)(x)

    def rewrite(self, b: ecp.Builder, m: ecp.Match) -> Node:
        return m.x


class CopyOfView(ecp.Rule):
    """view(x, sizes) -> view(clone(x), sizes)"""

    def pattern(self, x: ecp.Capture, sizes: ecp.Capture) -> ecp.Pattern:
        return ecp.op(aten.view.default)(x, sizes)

    def rewrite(self, b: ecp.Builder, m: ecp.Match) -> Node:
        return b.call(aten.view.default, b.call(aten.clone.default, m.x), m.sizes)


def cloned_before_a_mutation_of_its_source(x: Tensor) -> Tensor:
    y = x.clone()
    x.add_(1)
    return y * 2


def viewed_before_a_mutation_of_its_source(x: Tensor) -> Tensor:
    y = x.view(6)
    x.add_(1)
    return y * 2


def viewed_and_mutated(x: Tensor) -> Tensor:
    x.view(6).add_(1)
    return x * 2


@pytest.mark.parametrize("rule", [RemoveClone(), CopyOfView()], ids=lambda rule: rule.name)
@pytest.mark.parametrize(
    "body",
    [cloned_before_a_mutation_of_its_source, viewed_before_a_mutation_of_its_source, viewed_and_mutated],
    ids=lambda body: body.__name__,
)
def test_replacement_with_other_aliases_than_the_root_keeps_every_value(body: Any, rule: ecp.Rule) -> None:
    class Aliased(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return body(x)

    program = torch.export.export(Aliased(), (torch.randn(2, 3),))
    first, _ = ecp.rewrite(program, "cuda", [rule])
    given = torch.randn(2, 3)
    inputs = [given.clone(), given.clone()]
    results = [each.module()(one) for each, one in zip((program, first), inputs, strict=True)]
    assert torch.equal(*results)
    assert torch.equal(*inputs)


def effects(graph: torch.fx.Graph, module: nn.Module) -> dict[str, bool]:
    bodies = Subgraphs(module, graph).bodies
    return {str(node.target): has_effect(node, bodies) for node in graph.nodes if node.op == "call_function"}


def test_effects_of_each_kind_are_recognised() -> None:
    s = Sketch()
    x = s.input("x", 3)
    names = [aten.relu.default, aten.relu_.default, aten.bernoulli.default, aten.detach_.default, aten.view.default]
    for target in names:
        s.graph.call_function(target, (x, [3]) if target is aten.view.default else (x,))
    s.graph.call_function(aten._assert_async.msg, (x, "text"))
    s.graph.call_function(aten.sym_constrain_range_for_size.default, (3,))
    found = effects(s.graph, nn.Module())
    assert found == {
        "aten.relu.default": False,
        "aten.relu_.default": True,
        "aten.bernoulli.default": True,
        "aten.detach_.default": False,
        "aten.view.default": False,
        "aten._assert_async.msg": True,
        "aten.sym_constrain_range_for_size.default": True,
    }


@pytest.mark.parametrize("writes", [False, True])
def test_control_flow_has_the_effects_of_its_bodies(writes: bool) -> None:
    class Inner(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                y = x * 2
                if writes:
                    x.add_(1)
            return y + 1

    program = torch.export.export(Inner(), (torch.randn(3),))
    found = effects(program.graph, program.graph_module)
    assert found["wrap_with_set_grad_enabled"] is writes
