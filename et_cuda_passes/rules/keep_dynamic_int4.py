"""linear(dequantize(quantize(x)), dequantize(int4 weight), bias) -> itself, for XNNPACK's own kernel"""

from dataclasses import dataclass

import torch

from et_cuda_passes.graph.match import Match
from et_cuda_passes.graph.rule import Answer, requirement
from et_cuda_passes.quant.affine import QuantizedWeight, weight_of
from et_cuda_passes.rules.keep_dynamic import KeepDynamic


@dataclass(frozen=True)
class KeepDynamicInt4(KeepDynamic):
    """linear(dequantize(quantize(x)), dequantize(int4 weight), bias) -> itself, for XNNPACK's own kernel

    Attributes:
        bf16: the partitioner was given ``enable_bf16=True``; without it it leaves bf16 linears alone.
    """

    bf16: bool = False

    @requirement("activations in float32 or float16", hint="export in float32, or lower with enable_bf16=True")
    def dtype(self, m: Match) -> Answer:
        """The partitioner takes no bf16 unless it is told to."""
        good, found, *_ = super().dtype(m)
        return good or (self.bf16 and m.val(m.x).dtype is torch.bfloat16), found

    @requirement("a 4-bit weight", hint="quantize with weight_dtype=torch.int4")
    def four_bits(self, m: Match) -> Answer:
        """The range of the delegate's 4-bit kernel."""
        weight = weight_of(m)
        return (weight.quant_min, weight.quant_max) == (-8, 7), f"{weight.quant_min}..{weight.quant_max}"

    def scale_problem(self, weight: QuantizedWeight) -> str:
        """Groups in multiples of 32; the delegate rounds the scales to bf16 itself."""
        return "" if weight.group_size % 32 == 0 else f"group size {weight.group_size}, no multiple of 32"
