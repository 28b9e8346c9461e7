"""Rewritten programs with and without preserved modules, after ``torch.export.unflatten``."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import ExportedProgram, unflatten

import et_cuda_passes as ecp
from et_cuda_passes.testing import Quantized

aten = torch.ops.aten


class Layer(nn.Module):
    """A linear in its own module, with operators before or after it."""

    def __init__(self, before: Callable[[Tensor], Tensor], behind: Callable[[Tensor], Tensor], seed: int) -> None:
        super().__init__()
        self.linear = Quantized(32, 64, seed=seed)
        self.before, self.behind = before, behind

    def forward(self, x: Tensor) -> Tensor:
        more = self.before(x)
        return self.behind(self.linear(x)) + more


class Two(nn.Module):
    """Two layers with the same input, which another operator reads after them."""

    def __init__(self, before: Callable[[Tensor], Any], behind: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.q, self.k = Layer(before, behind, 1), Layer(before, behind, 2)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.q(x), self.k(x), x * 2


def same_as_modules(model: nn.Module, program: ExportedProgram, inputs: tuple[Tensor, ...]) -> None:
    """Assert that the unflattened program computes the same as the model, and does not mutate its inputs."""
    given = tuple(x.clone() for x in inputs)
    for got, wanted in zip(unflatten(program)(*given), model(*inputs), strict=True):
        assert got.shape == wanted.shape
        assert (got - wanted).norm() <= 2**-6 * wanted.norm()
    assert all(map(torch.equal, given, inputs))


@pytest.mark.parametrize("preserved", [(), ("q",), ("k",), ("q", "k")], ids=str)
@pytest.mark.parametrize("behind", [torch.cos, lambda y: y.unflatten(-1, (2, 16)).flatten(-2), lambda y: y])
@pytest.mark.parametrize("before", [lambda x: 0, lambda x: torch.sin(x[..., :1])], ids=["nothing", "a sine"])
def test_fused_linears_leave_modules_whole(before: Any, behind: Any, preserved: tuple[str, ...]) -> None:
    model, x = Two(before, behind), torch.randn(2, 5, 64).bfloat16()
    program = torch.export.export(model, (x,), preserve_module_call_signature=preserved)
    rewritten, report = ecp.rewrite(program, "cuda", expect={"missed": 0})
    assert report.applied.get("fused_linear_int4", 0) == (0 if preserved else 2)
    same_as_modules(model, rewritten, (x,))


class Attention(nn.Module):
    """Attention whose inputs have separate heads; with ``more`` it also returns k."""

    def __init__(self, more: bool, inside: bool) -> None:
        super().__init__()
        self.more, self.inside = more, inside

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        if self.inside:
            q, k, v = (part.transpose(1, 2) for part in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v)
        return (y, k) if self.more else (y,)


class Heads(nn.Module):
    def __init__(self, more: bool, inside: bool) -> None:
        super().__init__()
        self.attention = Attention(more, inside)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        q = q * 2
        if not self.attention.inside:
            q, k, v = (part.transpose(1, 2) for part in (q, k, v))
        return (self.attention(q, k, v)[0] + 1,)


@pytest.mark.parametrize("more", [False, True], ids=["y", "y and k"])
@pytest.mark.parametrize("inside", [False, True], ids=["given heads", "makes heads"])
def test_inputs_and_outputs_of_a_preserved_attention_stay(more: bool, inside: bool) -> None:
    model, inputs = Heads(more, inside), tuple(torch.randn(2, 7, 4, 32).bfloat16() for _ in range(3))
    program = torch.export.export(model, inputs, preserve_module_call_signature=("attention",))
    rewritten, _ = ecp.rewrite(program, "cuda", expect={"unmasked_attention": 1})
    same_as_modules(model, rewritten, inputs)


class Viewed(nn.Module):
    """A linear of a view; with ``more`` it also returns the view, which nothing reads."""

    def __init__(self, more: bool) -> None:
        super().__init__()
        self.linear, self.more = Quantized(32, 64), more

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        rows = x.view(-1, 64)
        y = self.linear(rows).view(2, 5, 32)
        return (y, rows) if self.more else (y,)


class Outer(nn.Module):
    def __init__(self, more: bool) -> None:
        super().__init__()
        self.inner = Viewed(more)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return (self.inner(x * 2)[0] + 1,)


@pytest.mark.parametrize("more", [False, True])
@pytest.mark.parametrize("target", ["cuda", "metal", "cpu"])
def test_view_that_a_preserved_module_returns_stays(target: str, more: bool) -> None:
    model, x = Outer(more), torch.randn(2, 5, 64).bfloat16()
    program = torch.export.export(model, (x,), preserve_module_call_signature=("inner",))
    rewritten, _ = ecp.rewrite(program, target, expect={"linear_int4": 1})
    same_as_modules(model, rewritten, (x,))


class Steps(nn.Module):
    """Five operators in a row; the result of each is a result of the module."""

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        steps = [x.abs()]
        for step in (torch.neg, torch.sin, torch.cos, torch.exp):
            steps.append(step(steps[-1]))
        return tuple(steps)


class AfterSteps(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.steps = Steps()

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.steps(x)[-1])


class Chain(ecp.Rule):
    """relu(exp(cos(sin(neg(abs(x)))))) -> x"""

    def pattern(self, x: Any) -> Any:
        for step in (aten.abs, aten.neg, aten.sin, aten.cos, aten.exp, aten.relu):
            x = ecp.op(step.default)(x)
        return x

    def rewrite(self, b: Any, m: Any) -> Any:
        return m.x


def test_match_across_a_module_boundary_reports_every_node_on_it_in_graph_order() -> None:
    program = torch.export.export(AfterSteps(), (torch.randn(4),), preserve_module_call_signature=("steps",))
    _, report = ecp.rewrite(program, "cpu", [Chain()])
    wanted = "chain wanted nodes on one side of a preserved module's boundary, found"
    fix = "leave the module out of preserve_module_call_signature"
    assert report.rejected["chain"] == [
        f"relu: {wanted} {name}; {fix}" for name in ("abs_1", "neg", "sin", "cos", "exp")
    ]


def test_pass_that_adds_a_tensor_is_refused_by_name() -> None:
    def adds(module: torch.fx.GraphModule) -> None:
        module.register_buffer("mine", torch.ones(1))
        first = next(node for node in module.graph.nodes if node.op == "call_function")
        with module.graph.inserting_before(first):
            module.graph.get_attr("mine")

    program = torch.export.export(Outer(False), (torch.randn(2, 5, 64).bfloat16(),))
    with pytest.raises(ValueError, match="pass adds added the tensor mine; a pass that adds constants"):
        ecp.rewrite(program, "cpu", [adds])
