"""bmm(x, dequantize(int4 weights of experts)[ids]) -> int4_bmm(x, packed, scale_and_zero, ids)

The experts of a token, as its router's top_k chose them. As exported, the weights of all experts are dequantized, and
those of the chosen ones copied; the kernel reads these alone, where they lie.
"""

from dataclasses import dataclass

import torch
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from et_cuda_passes.graph.builder import Builder
from et_cuda_passes.graph.match import Match
from et_cuda_passes.graph.pattern import Capture, Pattern, any_of, op
from et_cuda_passes.graph.rule import Answer, requirement
from et_cuda_passes.kernels.kernel import Kernel
from et_cuda_passes.ops import INT4_EXPERTS
from et_cuda_passes.quant.affine import dequantized
from et_cuda_passes.rules.packed_experts import LEFT, PackedExperts
from et_cuda_passes.rules.stack import chosen, operand, turned

aten = torch.ops.aten


@dataclass(frozen=True)
class ChosenExpertsInt4(PackedExperts):
    """bmm(x, dequantize(int4 weights of experts)[ids]) -> int4_bmm(x, packed, scale_and_zero, ids)"""

    def pattern(self, x: Capture, ids: Capture) -> Pattern:
        """A product with the experts that a tensor chooses, turned before or after."""
        stack = dequantized(..., name="weight", shared=True)
        weight = any_of(operand(chosen(stack, ids)), chosen(turned(stack), ids))
        return any_of(
            op(aten.bmm.default, aten.matmul.default)(x, weight),
            op(aten.bmm.default, aten.matmul.default)(weight, x, name=LEFT),
        )

    @staticmethod
    def form(m: Match) -> Kernel | None:
        """One that can be read expert by expert."""
        found: Kernel | None = m.target.kernel("int4_indexed_experts")
        return found

    @requirement("a list of experts' numbers", hint="flatten the ids: weight[ids.reshape(-1)]")
    def numbers(self, m: Match) -> Answer:
        """Neither a mask nor a table."""
        ids = m.val(m.ids)
        return ids.dim() == 1 and ids.dtype in (torch.int32, torch.int64), f"ids {ids.dtype} {list(ids.shape)}"

    @requirement(
        "a batch of rows for each of them, or one for all",
        hint="give x as many batches as there are ids, [S, M, K]; repeat the id where all read one expert",
    )
    def dimensions(self, m: Match) -> Answer:
        """Nothing is broadcast but one batch to all."""
        x, ids = m.val(m.x), m.val(m.ids)
        fits = x.dim() == 3 and any(statically_known_true(x.shape[0] == count) for count in (1, *ids.shape[:1]))
        return fits, f"x {list(x.shape)} for ids {list(ids.shape)}"

    def rewrite(self, b: Builder, m: Match) -> Node:
        """Pack the weights and call the operator."""
        y = self.product(b, m, INT4_EXPERTS[self.kernel(m).layout].bmm, self.rows(b, m), m.ids)
        return self.result(b, m, y)
