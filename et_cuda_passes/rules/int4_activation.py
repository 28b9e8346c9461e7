"""activation(int4_linear(x)) -> int4_linear(x, activation)

For kernels that can compute the activation function on their sums, before they round and store them: one launch and
one pass over the output fewer.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

from torch.fx import Node

from et_cuda_passes.graph.builder import Builder
from et_cuda_passes.graph.match import Match
from et_cuda_passes.graph.operators import arguments, op_of
from et_cuda_passes.graph.pattern import Capture, Pattern, any_of, op
from et_cuda_passes.graph.rule import Answer, Rule, requirement
from et_cuda_passes.kernels.epilogue import ACTIVATIONS
from et_cuda_passes.ops import MMA_TILED

LINEAR = MMA_TILED.op


def activation_of(node: Node) -> str | None:
    """The name of the activation function that ``node`` calls, or None if the kernel does not have it."""
    for name, activation in ACTIVATIONS.items():
        if op_of(node) is activation.operator and activation.options.items() <= arguments(node).items():
            return name
    return None


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
        return any_of(*(op(function.operator)(linear, **function.options) for function in ACTIVATIONS.values()))

    @requirement("a linear with nothing after its product")
    def bare(self, m: Match) -> Answer:
        """The activation comes first of all."""
        given = epilogue_of(m.linear)
        return not given, ", ".join(given)

    def rewrite(self, b: Builder, m: Match) -> Node:
        """The linear again, with the activation."""
        return b.call(LINEAR, *m.linear.args[:6], activation_of(m.root))
