"""bmm(x, dequantize(int4 weights of all experts)) -> int4_bmm(x, packed, scale_and_zero)

Each batch of x has an expert of its own, or all experts read the same rows. The weights [E, N, K] are packed once,
expert by expert, and dequantized inside the kernel.
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
from et_cuda_passes.quant.experts import num_experts
from et_cuda_passes.rules.packed_experts import LEFT, PackedExperts
from et_cuda_passes.rules.stack import operand

aten = torch.ops.aten


@dataclass(frozen=True)
class BmmInt4(PackedExperts):
    """bmm(x, dequantize(int4 weights of all experts)) -> int4_bmm(x, packed, scale_and_zero)"""

    def pattern(self, x: Capture) -> Pattern:
        """A product of batches, in any form; grouped mm without offsets is one too."""
        weight = operand(dequantized(..., name="weight", shared=True))
        return any_of(
            op(aten.bmm.default, aten.matmul.default, aten._grouped_mm.default)(x, weight),
            op(aten.bmm.default, aten.matmul.default)(weight, x, name=LEFT),
        )

    @staticmethod
    def form(m: Match) -> Kernel | None:
        """One for all experts."""
        found: Kernel | None = m.target.kernel("int4_experts")
        return found

    @requirement("rows [E, M, K], or [M, K] for all experts", hint="reshape x")
    def dimensions(self, m: Match) -> Answer:
        """Nothing else is broadcast."""
        x, experts = m.val(m.x), m.memoize(num_experts, "weight")
        of_all = x.dim() == 2 and LEFT not in m.match.bindings
        fits = x.dim() == 3 and any(statically_known_true(x.shape[0] == batches) for batches in (1, experts))
        return of_all or fits, f"x {list(x.shape)} for {experts} experts"

    def rewrite(self, b: Builder, m: Match) -> Node:
        """Pack the weights and call the operator."""
        y = self.product(b, m, INT4_EXPERTS[self.kernel(m).layout].bmm, self.rows(b, m), None)
        return self.result(b, m, y)
