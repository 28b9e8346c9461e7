"""linear(dequantize(quantize(x)), dequantize(int8 per-axis weight), bias) -> itself, for XNNPACK's own kernel"""

from dataclasses import dataclass

import torch

from et_cuda_passes.graph.match import Match
from et_cuda_passes.graph.rule import Answer, requirement
from et_cuda_passes.quant.affine import QuantizedWeight, weight_of
from et_cuda_passes.rules.keep_dynamic import KeepDynamic


@dataclass(frozen=True)
class KeepDynamicInt8(KeepDynamic):
    """linear(dequantize(quantize(x)), dequantize(int8 per-axis weight), bias) -> itself, for XNNPACK's own kernel"""

    @requirement("a weight in int8, not 4-bit", hint="4 bits are kept by keep_dynamic_int4")
    def eight_bits(self, m: Match) -> Answer:
        """Any range but that of the 4-bit kernel is computed as int8."""
        weight = weight_of(m)
        return (weight.quant_min, weight.quant_max) != (-8, 7), f"{weight.quant_min}..{weight.quant_max}"

    def scale_problem(self, weight: QuantizedWeight) -> str:
        """One scale an output; the delegate reads their bytes as float32."""
        if weight.group_size != weight.shape[1]:
            return f"group size {weight.group_size}, where int8 is per-axis only: quantize with PerAxis(0)"
        if weight.scale_dtype is not torch.float32:
            dtype = str(weight.scale_dtype).removeprefix("torch.")
            return f"{dtype} scales, read as float32: quantize with weight_scale_dtype=torch.float32"
        return ""
