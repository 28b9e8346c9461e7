"""activation(int4_linear(x, gate)) * int4_linear(x, up) -> int4_linear(x, gate and up, activation, gated)

The gated layer of a feed-forward network: one kernel reads x once and stores the product alone. The rows of the two
weights take turns, eight of one and eight of the other, in which order a thread of the tensor cores has the sums of a
row of each side by side.
"""

from dataclasses import dataclass
from typing import ClassVar, cast

import torch
from torch import Tensor
from torch.fx import Node

from et_cuda_passes.graph.builder import Builder
from et_cuda_passes.graph.match import Match
from et_cuda_passes.graph.operators import arguments
from et_cuda_passes.graph.pattern import Capture, Pattern, op
from et_cuda_passes.graph.program import Program
from et_cuda_passes.graph.rule import Answer, Rule, requirement
from et_cuda_passes.rules.int4_activation import LINEAR, epilogue_of
from et_cuda_passes.rules.tilings_told import tilings_told

aten = torch.ops.aten
_CONSTANTS = ("packed", "scale_and_zero", "bias")


def interleaved(gate: Tensor, up: Tensor, dim: int) -> Tensor:
    """Along ``dim``, a multiple of 8 in both: eight of ``gate``, eight of ``up``, and so on."""
    halves = [part.unflatten(dim, (-1, 8)) for part in (gate, up)]
    return torch.stack(halves, dim + 1).flatten(dim, dim + 2).contiguous()


@dataclass(frozen=True)
class Int4Gate(Rule):
    """activation(int4_linear(x, gate)) * int4_linear(x, up) -> int4_linear(x, gate and up, activation, gated)

    It matches what ``Int4Activation`` leaves of such a layer.
    """

    after: ClassVar[tuple[str, ...]] = ("linear_int4", "linear_views", "int4_activation")

    def pattern(self, x: Capture) -> Pattern:
        """A product of two int4 linears of one input, which nothing else reads."""
        return op(aten.mul.Tensor)(op(LINEAR)(x, ..., name="first"), op(LINEAR)(x, ..., name="second"))

    @requirement("two linears")
    def two(self, m: Match) -> Answer:
        """The square of one would be computed twice."""
        return m.first is not m.second, m.first.name

    @requirement("one activation at most, and nothing else behind the two products")
    def plain(self, m: Match) -> Answer:
        """What the kernel computes is activation(gate) * up."""
        gate, up = (epilogue_of(node) for node in _both(m))
        found = [*(gate.keys() - {"activation"}), *up]
        return not found, ", ".join(sorted(found))

    @requirement("weights of one form, out_features a multiple of 8")
    def alike(self, m: Match) -> Answer:
        """The rows of one weight stand between those of the other."""
        gate, up = map(arguments, _both(m))
        same = all(gate[name] == up[name] for name in ("group_size", "out_features"))
        same &= all(m.val(gate[name]).shape == m.val(up[name]).shape for name in ("packed", "scale_and_zero"))
        shapes = [list(m.val(one["scale_and_zero"]).shape) for one in (gate, up)]
        return same and up["out_features"] % 8 == 0, f"scale_and_zero {shapes[0]} and {shapes[1]}"

    @requirement("constants that nothing else reads or writes; two biases or none")
    def own_constants(self, m: Match) -> Answer:
        """They are put together at compile time, and would be there twice."""
        both = [arguments(node) for node in _both(m)]
        if (both[0]["bias"] is None) != (both[1]["bias"] is None):
            return False, "one bias"
        nodes = [one[name] for one in both for name in _CONSTANTS if one[name] is not None]
        others = [node.name for node in nodes if not self._is_own(m.program, node)]
        return not others, ", ".join(others)

    @staticmethod
    def _is_own(program: Program, node: Node) -> bool:
        return program.constant(node) is not None and len(node.users) == 1 and not program.is_mutated(node)

    def summary(self, m: Match) -> str:
        """The same of every gate and of what it is multiplied by."""
        return "gated, 2 in one"

    def explain(self, *ms: Match) -> str:
        """Which tilings the Triton kernel has for the rows of both weights together."""
        x, gate = ms[0].val(ms[0].x), arguments(ms[0].first)
        told = tilings_told(x, 2 * gate["out_features"], x.shape[-1], gate["group_size"])
        return f"gate and up in one product: {told}"

    def rewrite(self, b: Builder, m: Match) -> Node:
        """One linear of both weights."""
        gate, up = map(arguments, _both(m))
        made = [_constant(b, name, gate[name], up[name]) for name in _CONSTANTS]
        rest = (up["group_size"], up["out_features"], gate["activation"], None, None, True)
        return b.call(LINEAR, m.x, *made, *rest)


def _both(m: Match) -> tuple[Node, Node]:
    """The gate, which is the one with an activation, and the linear that it is multiplied by."""
    first, second = m.first, m.second
    return (second, first) if "activation" in epilogue_of(second) else (first, second)


def _constant(b: Builder, name: str, gate: Node | None, up: Node | None) -> Node | None:
    if gate is None or up is None:
        return None
    dim = 1 if name == "scale_and_zero" else 0

    def make() -> Tensor:
        first, second = (cast(Tensor, b.program.constant(node)).detach() for node in (gate, up))
        return interleaved(first, second, dim)

    fqn = f"{b.program.fqn_key(b.program.resolve(gate))}_gated"
    return b.constant(fqn, [gate, up], ("gated", name), make)
