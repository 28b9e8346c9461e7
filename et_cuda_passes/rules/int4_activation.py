"""activation(int4_linear(x)) -> int4_linear(x, activation)

For kernels that can compute the activation function on their sums, before they round and store them: one launch and
one pass over the output fewer.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch.fx import Node

from et_cuda_passes.graph.builder import Builder
from et_cuda_passes.graph.match import Match
from et_cuda_passes.graph.operators import op_of
from et_cuda_passes.graph.pattern import Capture, Pattern, any_of, op
from et_cuda_passes.graph.rule import Answer, Rule, requirement
from et_cuda_passes.ops import INT4_LINEARS

aten = torch.ops.aten
LINEAR = INT4_LINEARS["mma_tiled"].op
ACTIVATIONS: dict[Any, str] = {aten.silu.default: "silu", aten.relu.default: "relu", aten.gelu.default: "gelu"}
"""What can stand behind a linear, and what its kernel calls it."""


def epilogue_of(linear: Node) -> dict[str, Any]:
    """What the linear does after the product: activation, factor, addend and gated, as far as they are given."""
    names = [argument.name for argument in LINEAR._schema.arguments]
    given = {**dict(zip(names, linear.args, strict=False)), **linear.kwargs}
    return {name: given[name] for name in names[6:] if given.get(name) not in (None, "")}


@dataclass(frozen=True)
class Int4Activation(Rule):
    """activation(int4_linear(x)) -> int4_linear(x, activation)"""

    after: ClassVar[tuple[str, ...]] = ("linear_int4", "linear_views")

    def pattern(self, x: Capture) -> Pattern:
        """An activation function of an int4 linear that nothing else reads."""
        linear = op(LINEAR)(x, ..., name="linear")
        return any_of(op(aten.silu.default, aten.relu.default)(linear), op(aten.gelu.default)(linear, ...))

    @requirement("a linear with nothing after its product")
    def bare(self, m: Match) -> Answer:
        """The activation comes first of all."""
        given = epilogue_of(m.linear)
        return not given, ", ".join(given)

    def rewrite(self, b: Builder, m: Match) -> Node:
        """The linear again, with the activation."""
        name = ACTIVATIONS[op_of(m.root)]
        if m.root.kwargs.get("approximate", "none") == "tanh":
            name = "gelu_tanh"
        return b.call(LINEAR, *m.linear.args[:6], name)
