"""What the two rules have in common that make a product or a sum with an int4 linear a part of it."""

from typing import Any, ClassVar

import torch
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from et_cuda_passes.graph.builder import Builder
from et_cuda_passes.graph.match import Match
from et_cuda_passes.graph.pattern import Capture, Pattern, any_of, op
from et_cuda_passes.graph.rule import Answer, Rule, requirement
from et_cuda_passes.rules.int4_activation import LINEAR, epilogue_of

COMBINED = (torch.ops.aten.add.Tensor, torch.ops.aten.mul.Tensor)


def combinable(other: Any, result: torch.Tensor) -> bool:
    """Whether ``other`` is a node of a tensor like ``result``, so that nothing is broadcast or promoted."""
    value = other.meta.get("val") if isinstance(other, Node) else None
    if not isinstance(value, torch.Tensor) or value.dtype is not result.dtype or value.dim() != result.dim():
        return False
    return all(statically_known_true(a == b) for a, b in zip(value.shape, result.shape, strict=True))


class Int4Combine(Rule):
    """operator(other, int4_linear(x)) -> int4_linear(x, argument=other)"""

    operator: ClassVar[Any]
    """What combines the two, in either order."""
    argument: ClassVar[str]
    """What the linear calls the other one."""

    def pattern(self, x: Capture, other: Capture) -> Pattern:
        """With an int4 linear that nothing else reads; a sum has alpha=1."""
        linear = op(LINEAR)(x, ..., name="linear")
        return any_of(op(self.operator)(other, linear), op(self.operator)(linear, other))

    @requirement("a tensor of the same shape and dtype")
    def alike(self, m: Match) -> Answer:
        """Nothing is broadcast or promoted."""
        result = m.val(m.linear)
        if m.other is m.linear:
            return False, "the linear itself"
        if combinable(m.other, result):
            return True, ""
        value = m.other.meta.get("val") if isinstance(m.other, Node) else m.other
        found = f"{value.dtype} {list(value.shape)}" if isinstance(value, torch.Tensor) else str(value)
        return False, f"{found} beside {result.dtype} {list(result.shape)}"

    @requirement("a linear that adds nothing yet, and multiplies nothing if this is a product")
    def free(self, m: Match) -> Answer:
        """The order is activation, product, sum."""
        given = epilogue_of(m.linear)
        return not {"addend", self.argument} & given.keys(), ", ".join(given)

    def rewrite(self, b: Builder, m: Match) -> Node:
        """The linear again, with the other tensor."""
        given = {**epilogue_of(m.linear), self.argument: m.other}
        tail = [given.get("activation", ""), given.get("factor"), given.get("addend")]
        if "gated" in given:
            tail.append(given["gated"])
        return b.call(LINEAR, *m.linear.args[:6], *tail)
