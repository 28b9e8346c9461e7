"""grouped_mm(x, dequantize(int4 weights of experts), offs) -> int4_grouped_mm(x, packed, scale_and_zero, offs)

Rows sorted by their expert, as a mixture of experts computes many tokens. Where the rows of an expert end is data: the
kernel reads it, and the experts that have rows.
"""

from dataclasses import dataclass

import torch
from torch.fx import Node

from et_cuda_passes.graph.builder import Builder
from et_cuda_passes.graph.match import Match
from et_cuda_passes.graph.pattern import Capture, Pattern, op
from et_cuda_passes.graph.rule import Answer, requirement
from et_cuda_passes.kernels.kernel import Kernel
from et_cuda_passes.ops import INT4_EXPERTS
from et_cuda_passes.quant.affine import dequantized
from et_cuda_passes.rules.packed_experts import PackedExperts
from et_cuda_passes.rules.stack import operand


def _grouped_mms() -> list[torch._ops.OpOverload]:
    """torch's operator, and what transformers exports where the dtype is not bf16, if it was imported."""
    fallback = getattr(torch.ops.transformers, "grouped_mm_fallback", None)
    return [torch.ops.aten._grouped_mm.default, *([] if fallback is None else [fallback.default])]


@dataclass(frozen=True)
class GroupedMmInt4(PackedExperts):
    """grouped_mm(x, dequantize(int4 weights of experts), offs) -> int4_grouped_mm(x, packed, scale_and_zero, offs)"""

    def pattern(self, x: Capture, offs: Capture) -> Pattern:
        """With offsets, and no bias."""
        return op(*_grouped_mms())(x, operand(dequantized(..., name="weight", shared=True)), offs)

    @staticmethod
    def form(m: Match) -> Kernel | None:
        """One for all experts."""
        found: Kernel | None = m.target.kernel("int4_experts")
        return found

    @requirement("rows [M, K] and the ends of the experts' rows [E]", hint="sort the rows by expert and flatten them")
    def dimensions(self, m: Match) -> Answer:
        """Integers that are one to an expert."""
        x, offs = m.val(m.x), m.val(m.offs)
        good = x.dim() == 2 and offs.dim() == 1 and offs.dtype in (torch.int32, torch.int64)
        return good, f"x {list(x.shape)}, offs {offs.dtype} {list(offs.shape)}"

    def rewrite(self, b: Builder, m: Match) -> Node:
        """Pack the weights and call the operator."""
        return self.product(b, m, INT4_EXPERTS[self.kernel(m).layout].grouped_mm, m.x, m.offs)
