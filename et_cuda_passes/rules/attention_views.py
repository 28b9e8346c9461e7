"""transpose(attention(q, k, v), 1, 2) -> attention(q, k, v), its result [B, rows, heads, D]

The operator writes its result either way. In the edge dialect each transposition is a copy; what follows attention in
nearly every model is one, and then a linear.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.fx import Node

from et_cuda_passes.graph.builder import Builder
from et_cuda_passes.graph.match import Match
from et_cuda_passes.graph.operators import arguments
from et_cuda_passes.graph.pattern import Capture, Pattern, any_of, op
from et_cuda_passes.graph.rule import Rule
from et_cuda_passes.ops import ATTENTION

aten = torch.ops.aten
_SWAPS = ((1, 2), (2, 1), (-3, -2), (-2, -3))


@dataclass(frozen=True)
class AttentionViews(Rule):
    """transpose(attention(q, k, v), 1, 2) -> attention(q, k, v), its result [B, rows, heads, D]"""

    after: ClassVar[tuple[str, ...]] = ("unmasked_attention",)

    def pattern(self, q: Capture) -> Pattern:
        """Up to three transpositions of heads and rows, each the only reader of the one before it."""
        once = _transposed(op(ATTENTION)(q, ..., name="attention"))
        twice = _transposed(once)
        # The longest chain first, or a second rewrite would find the rest of it.
        return any_of(_transposed(twice), twice, once)

    def rewrite(self, b: Builder, m: Match) -> Node:
        """The same attention, with the heads of its result on the other axis."""
        q, k, v, scale, head_axes = arguments(m.attention).values()
        axis = head_axes[3] if (len(m.match.owned) - 1) % 2 == 0 else 3 - head_axes[3]
        return b.call(ATTENTION, q, k, v, scale, [*head_axes[:3], axis])


def _transposed(attention: Pattern) -> Pattern:
    swapped = (op(aten.transpose.int)(attention, *swap) for swap in _SWAPS)
    return any_of(*swapped, op(aten.permute.default)(attention, [0, 2, 1, 3]))
