"""activation(int4_linear(x, gate)) * int4_linear(x, up) -> int4_linear(x, gate and up, activation, gated)

The gated layer of a feed-forward network: one kernel reads x once and stores the product alone. The rows of the two
weights take turns, eight of one and eight of the other, in which order a thread of the tensor cores has the sums of a
row of each side by side.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import Tensor
from torch.fx import Node

from et_cuda_passes.graph.builder import Builder
from et_cuda_passes.graph.context import MatchContext
from et_cuda_passes.graph.ops import arguments, called
from et_cuda_passes.graph.pattern import Capture, Pattern, op
from et_cuda_passes.graph.program import Program
from et_cuda_passes.graph.rule import Answer, Rule, Unmet, require
from et_cuda_passes.rules.int4_activation import LINEAR
from et_cuda_passes.rules.tilings_told import tilings_told

_CONSTANTS = ("packed", "scale_and_zero", "bias")


def interleaved(gate: Tensor, up: Tensor, dim: int) -> Tensor:
    """Along ``dim``, a multiple of 8 in both: eight of ``gate``, eight of ``up``, and so on."""
    halves = [part.unflatten(dim, (-1, 8)) for part in (gate, up)]
    return torch.stack(halves, dim + 1).flatten(dim, dim + 2).contiguous()


@dataclass(frozen=True)
class Int4Gate(Rule):
    """activation(int4_linear(x, gate)) * int4_linear(x, up) -> int4_linear(x, gate and up, activation, gated)

    It matches what ``Int4Activation`` and ``Int4Combine`` make of such a layer.
    """

    after: ClassVar[tuple[str, ...]] = ("int4_combine",)

    def pattern(self, x: Capture) -> Pattern:
        """An int4 linear, whatever it does after its product."""
        return op(LINEAR)(x, ...)

    @require("a factor that is an int4 linear of the same input, which nothing else reads")
    def factor_of_x(self, m: MatchContext) -> Answer:
        """Anything else stays a factor."""
        root = arguments(m.root)
        other = root["factor"]
        if not isinstance(other, Node) or called(other) is not LINEAR:
            return False, getattr(other, "name", "none")
        return arguments(other)["x"] is m.x and len(other.users) == 1 and root["addend"] is not other, other.name

    @require("one activation at most, and nothing behind the product of the factor")
    def plain(self, m: MatchContext) -> Answer:
        """What the kernel computes is activation(gate) * up."""
        gate, up = _both(m)
        other = arguments(arguments(m.root)["factor"])
        found = [name for name in ("factor", "addend") if other[name]]
        found += ["gated"] * (gate["gated"] or up["gated"]) + [up["activation"]] * bool(up["activation"])
        return not found, ", ".join(found)

    @require("weights of one form, out_features a multiple of 8")
    def alike(self, m: MatchContext) -> Answer:
        """The rows of one weight stand between those of the other."""
        gate, up = _both(m)
        same = all(gate[name] == up[name] for name in ("group_size", "out_features"))
        same &= all(m.val(gate[name]).shape == m.val(up[name]).shape for name in ("packed", "scale_and_zero"))
        shapes = [list(m.val(one["scale_and_zero"]).shape) for one in (gate, up)]
        return same and up["out_features"] % 8 == 0, f"scale_and_zero {shapes[0]} and {shapes[1]}"

    @require("constants that nothing else reads or writes; two biases or none")
    def own_constants(self, m: MatchContext) -> Answer:
        """They are put together at compile time, and would be there twice."""
        both = _both(m)
        if (both[0]["bias"] is None) != (both[1]["bias"] is None):
            return False, "one bias"
        nodes = [one[name] for one in both for name in _CONSTANTS if one[name] is not None]
        others = [node.name for node in nodes if not self._is_own(m.program, node)]
        return not others, ", ".join(others)

    @staticmethod
    def _is_own(program: Program, node: Node) -> bool:
        return program.constant(node) is not None and len(node.users) == 1 and not program.is_written(node)

    def takes(self, m: MatchContext) -> Sequence[Node]:
        """The linear that is a factor."""
        return (arguments(m.root)["factor"],)

    def detail(self, m: MatchContext) -> str:
        """The same of every gate and of what it is multiplied by."""
        return "gated, 2 in one"

    def explain(self, *ms: MatchContext) -> str:
        """Which tilings the Triton kernel has for the rows of both weights together."""
        x, root = ms[0].val(ms[0].x), arguments(ms[0].root)
        told = tilings_told(x, 2 * root["out_features"], x.shape[-1], root["group_size"])
        return f"gate and up in one product: {told}"

    def emit(self, b: Builder, m: MatchContext) -> Node:
        """One linear of both weights."""
        gate, up = _both(m)
        made = [_constant(b, name, gate[name], up[name]) for name in _CONSTANTS]
        rest = (up["group_size"], up["out_features"], gate["activation"], None, arguments(m.root)["addend"], True)
        return b.call(LINEAR, m.x, *made, *rest)


def _both(m: MatchContext) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """The arguments of the gate, which is the one with an activation, and of the linear that it is multiplied by."""
    root = arguments(m.root)
    other = root["factor"]
    if not isinstance(other, Node) or called(other) is not LINEAR:
        raise Unmet("no linear")
    return (root, arguments(other)) if root["activation"] else (arguments(other), root)


def _constant(b: Builder, name: str, gate: Node | None, up: Node | None) -> Node | None:
    if gate is None or up is None:
        return None
    dim = 1 if name == "scale_and_zero" else 0

    def make() -> Tensor:
        first, second = (cast(Tensor, b.program.constant(node)).detach() for node in (gate, up))
        return interleaved(first, second, dim)

    fqn = f"{b.program.target(b.program.outermost(gate))}_gated"
    return b.constant(fqn, [gate, up], ("gated", name), make)
