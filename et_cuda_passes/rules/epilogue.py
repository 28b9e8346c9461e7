"""Operators around a packed linear become a part of it: views of its rows, and for the Triton kernel an epilogue.

The int4 Triton kernel computes ``activation(linear(x)) * factor + addend`` in fp32 and rounds once, in this order. Each
fused operator is one launch and one pass over the output fewer.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from et_cuda_passes.graph.builder import Builder
from et_cuda_passes.graph.match import Match
from et_cuda_passes.graph.operators import arguments, op_of
from et_cuda_passes.graph.pattern import Capture, Pattern, any_of, op
from et_cuda_passes.graph.program import Program
from et_cuda_passes.graph.rule import Failure, Notes, Requirement, Rule, requirement
from et_cuda_passes.kernels.epilogue import ACTIVATIONS
from et_cuda_passes.ops import INT4_LINEARS, INT8_LINEAR, MMA_TILED
from et_cuda_passes.rules.linear import describe_tilings
from et_cuda_passes.rules.plans import interleaved, plan_of

aten = torch.ops.aten

_LINEAR = MMA_TILED.op
_CONSTANTS = ("packed", "scale_and_zero", "bias")
_EPILOGUE = ("activation", "factor", "addend", "gated")
ELEMENTWISE_OPS = (aten.add.Tensor, aten.mul.Tensor)
"""The operators of two tensors that the kernel can compute in its epilogue."""

_view = op(aten.view.default)


def activation_of(node: Node) -> str | None:
    """The name of the activation function that ``node`` calls, or None if the kernel does not have it."""
    for name, activation in ACTIVATIONS.items():
        if op_of(node) is activation.operator and activation.options.items() <= arguments(node).items():
            return name
    return None


def fused_epilogue(linear: Node) -> dict[str, Any]:
    """The arguments of the linear's epilogue that are present: activation, factor, addend and gated."""
    given = arguments(linear)
    return {name: given[name] for name in _EPILOGUE if given.get(name) not in (None, "", False)}


def can_fuse_elementwise(other: Any, result: Tensor) -> bool:
    """Whether ``other`` is a node with the shape and dtype of ``result``: nothing is broadcast or promoted."""
    value = other.meta.get("val") if isinstance(other, Node) else None
    if not isinstance(value, Tensor) or value.dtype is not result.dtype or value.dim() != result.dim():
        return False
    return all(statically_known_true(a == b) for a, b in zip(value.shape, result.shape, strict=True))


# Requirements ---------------------------------------------------------------------------------------------------------


@requirement("a linear without a fused epilogue")
def nothing_fused_yet(m: Match) -> Failure | None:
    """The activation comes first in the epilogue, and the tensors of an epilogue have the shape of the result."""
    given = fused_epilogue(m.linear)
    return Failure(f"a linear with a fused {', '.join(given)}") if given else None


def operand_is_free(*operands: str) -> Requirement:
    """The linear has none of ``operands`` in its epilogue, so the new operand comes after what it has."""

    @requirement(f"a linear without a fused {' or '.join(operands)}")
    def operand_is_free(m: Match) -> Failure | None:
        given = fused_epilogue(m.linear)
        return Failure(f"a linear with a fused {', '.join(given)}") if given.keys() & {*operands} else None

    return operand_is_free


@requirement("a tensor of the same shape and dtype")
def same_shape_and_dtype(m: Match) -> Failure | None:
    """The kernel neither broadcasts nor promotes."""
    result = m.val(m.linear)
    if m.other is m.linear:
        return Failure("the linear itself")
    if can_fuse_elementwise(m.other, result):
        return None
    value = m.other.meta.get("val") if isinstance(m.other, Node) else m.other
    found = f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else str(value)
    return Failure(f"{found} beside {result.dtype} {list(result.shape)}")


@requirement("two linears")
def linears_differ(m: Match) -> Failure | None:
    """The square of one linear would be computed twice."""
    return None if m.first is not m.second else Failure(m.first.name)


@requirement("one fused activation at most, and no other epilogue")
def only_activation_fused(m: Match) -> Failure | None:
    """The kernel computes activation(gate) * up."""
    gate, up = (fused_epilogue(node) for node in _gate_and_up(m))
    found = [*(gate.keys() - {"activation"}), *up]
    return Failure(", ".join(sorted(found))) if found else None


@requirement("weights of one form, out_features a multiple of 8")
def weights_can_interleave(m: Match) -> Failure | None:
    """The rows of one weight stand between those of the other."""
    gate, up = map(arguments, _gate_and_up(m))
    same = all(gate[name] == up[name] for name in ("group_size", "out_features", "float4"))
    same &= all(m.val(gate[name]).shape == m.val(up[name]).shape for name in ("packed", "scale_and_zero"))
    if same and up["out_features"] % 8 == 0:
        return None
    shapes = [list(m.val(one["scale_and_zero"]).shape) for one in (gate, up)]
    return Failure(f"scale_and_zero {shapes[0]} and {shapes[1]}")


@requirement("constants that nothing else reads or mutates; two biases or none")
def constants_are_private(m: Match) -> Failure | None:
    """The rewrite joins them into new constants. Other readers would keep the old ones, which are then stored twice."""
    both = [arguments(node) for node in _gate_and_up(m)]
    if (both[0]["bias"] is None) != (both[1]["bias"] is None):
        return Failure("one bias")
    nodes = [one[name] for one in both for name in _CONSTANTS if one[name] is not None]
    others = [node.name for node in nodes if not _is_private(m.program, node)]
    return Failure(", ".join(others)) if others else None


def _is_private(program: Program, node: Node) -> bool:
    return program.held(node) is not None and len(node.users) == 1 and not program.is_mutated(node)


@requirement("views that only join and split the rows")
def views_keep_rows(m: Match) -> Failure | None:
    """The result of the outer view has the shape of some source of the inner view, with N in place of K."""
    if _source_with_rows_of_result(m) is not None:
        return None
    return Failure(f"{list(m.val(m.x).shape)} -> {list(m.val(m.root).shape)}")


# Rules ----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RemoveLinearViews(Rule):
    """view(packed linear(view(x, [M, K])), [..., N]) -> packed linear(x)

    ``run_decompositions`` turns a linear of more than two dimensions into a matrix product between two views. The
    package's operators accept any number of dimensions and do not need them.
    """

    requirements = (nothing_fused_yet, views_keep_rows)

    def pattern(self, x: Capture) -> Pattern:
        """A packed linear between views, with one to three views in a row after it."""
        operators = op(*(form.op for form in INT4_LINEARS.values()), INT8_LINEAR)
        once = _view(operators(_view(x, ..., shared=True), ..., name="linear"), ...)
        twice = _view(once, ...)
        return any_of(_view(twice, ...), twice, once)

    def rewrite(self, b: Builder, m: Match) -> Node:
        """The same linear, of the source of the view before it."""
        return b.call(m.linear.target, _source_with_rows_of_result(m), *m.linear.args[1:], **m.linear.kwargs)


def _source_with_rows_of_result(m: Match) -> Node | None:
    """The source of the views before the linear, farthest from it, that has the rows of the match's result."""
    node, found = m.linear.args[0], None
    n, k = m.val(m.linear).shape[-1], m.val(node).shape[-1]
    rows = m.val(m.root).shape[:-1]
    while op_of(node) is aten.view.default and node not in m.program.boundary_nodes:
        node = node.args[0]
        wanted, shape = (*rows, k), m.val(node).shape
        alike = len(shape) == len(wanted) and statically_known_true(m.val(m.root).shape[-1] == n)
        if alike and all(statically_known_true(a == b) for a, b in zip(shape, wanted, strict=True)):
            found = node
    return found


@dataclass(frozen=True)
class FuseActivation(Rule):
    """activation(int4_linear(x)) -> int4_linear(x, activation)

    The kernel computes the activation function on its fp32 sums, before it rounds and stores them.
    """

    requirements = (nothing_fused_yet,)

    def pattern(self, x: Capture) -> Pattern:
        """An activation function of an int4 linear that has no other reader."""
        linear = op(_LINEAR)(x, ..., name="linear")
        return any_of(*(op(function.operator)(linear, **function.options) for function in ACTIVATIONS.values()))

    def rewrite(self, b: Builder, m: Match) -> Node:
        """The same linear, with the activation function."""
        return b.call(_LINEAR, *m.linear.args[:6], activation_of(m.root), **m.linear.kwargs)


@dataclass(frozen=True)
class FuseGate(Rule):
    """activation(int4_linear(x, gate)) * int4_linear(x, up) -> int4_linear(x, gate and up, activation, gated)

    The gated layer of a feed-forward network, after ``FuseActivation``: one kernel reads x once and stores only the
    product. The rows of the two weights alternate, eight of one and eight of the other. In this order a thread of the
    tensor cores holds the sums of a row of each side by side.
    """

    requirements = (linears_differ, only_activation_fused, weights_can_interleave, constants_are_private)

    def pattern(self, x: Capture) -> Pattern:
        """A product of two int4 linears of one input that have no other reader."""
        return op(aten.mul.Tensor)(op(_LINEAR)(x, ..., name="first"), op(_LINEAR)(x, ..., name="second"))

    def summary(self, m: Match) -> str:
        """The same for each gate and the linear that it multiplies."""
        return "gated, 2 in one"

    def notes(self, *ms: Match) -> Notes:
        """The tilings of the Triton kernel for the rows of both weights."""
        x, gate = ms[0].val(ms[0].x), arguments(ms[0].first)
        tilings = describe_tilings(ms[0], x, 2 * gate["out_features"], x.shape[-1], gate["group_size"])
        return Notes(explanation=f"gate and up in one product: {tilings}")

    def rewrite(self, b: Builder, m: Match) -> Node:
        """One linear of both weights."""
        gate, up = map(arguments, _gate_and_up(m))
        constants = [_interleaved(b, name, gate[name], up[name]) for name in _CONSTANTS]
        rest = (up["group_size"], up["out_features"], gate["activation"], None, None, True)
        return b.call(_LINEAR, m.x, *constants, *rest, **m.first.kwargs)


def _gate_and_up(m: Match) -> tuple[Node, Node]:
    """The gate, which is the linear with an activation, and the linear that it multiplies."""
    first, second = m.first, m.second
    return (second, first) if "activation" in fused_epilogue(second) else (first, second)


def _interleaved(b: Builder, name: str, gate: Node | None, up: Node | None) -> Node | None:
    """The constant ``name`` of the gated linear, from that of the gate and that of the other linear."""
    if gate is None or up is None:
        return None
    axis = 1 if name == "scale_and_zero" else 0

    first, second = (plan_of(b.program, node, axis) for node in (gate, up))
    fqn = f"{b.program.fqn_key(b.program.resolve(gate))}_gated"
    return b.constant(fqn, [gate, up], ("gated", name), interleaved(first, second, block=8, form=("gated", name)))


@dataclass(frozen=True)
class FuseMultiply(Rule):
    """other * int4_linear(x) -> int4_linear(x, factor=other)

    The kernel multiplies its fp32 sums before it rounds them: a gate that is no int4 linear itself, for example.
    """

    requirements = (same_shape_and_dtype, operand_is_free("factor", "addend"))

    def pattern(self, x: Capture, other: Capture) -> Pattern:
        """A product with an int4 linear that has no other reader."""
        return _elementwise(aten.mul.Tensor, x, other)

    def rewrite(self, b: Builder, m: Match) -> Node:
        """The same linear, with a factor."""
        return _with_operand(b, m, "factor")


@dataclass(frozen=True)
class FuseAdd(Rule):
    """other + int4_linear(x) -> int4_linear(x, addend=other)

    The kernel adds to its fp32 sums before it rounds them: a residual connection, for example.
    """

    requirements = (same_shape_and_dtype, operand_is_free("addend"))

    def pattern(self, x: Capture, other: Capture) -> Pattern:
        """A sum with an int4 linear that has no other reader, with alpha=1."""
        return _elementwise(aten.add.Tensor, x, other)

    def rewrite(self, b: Builder, m: Match) -> Node:
        """The same linear, with an addend."""
        return _with_operand(b, m, "addend")


def _elementwise(operator: Any, x: Capture, other: Capture) -> Pattern:
    """``operator`` of an int4 linear and another tensor, in either order."""
    linear = op(_LINEAR)(x, ..., name="linear")
    return any_of(op(operator)(other, linear), op(operator)(linear, other))


def _with_operand(b: Builder, m: Match, argument: str) -> Node:
    """The match's linear, with the other tensor as ``argument`` of its epilogue."""
    given = {**fused_epilogue(m.linear), argument: m.other}
    tail = [given.get("activation", ""), given.get("factor"), given.get("addend")]
    if "gated" in given:
        tail.append(given["gated"])
    return b.call(_LINEAR, *m.linear.args[:6], *tail, **m.linear.kwargs)
