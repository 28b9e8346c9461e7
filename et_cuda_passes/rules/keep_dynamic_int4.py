"""linear(dequantize(quantize(x)), dequantize(int4 weight)) -> itself: XNNPACK's own 8-bit activation, 4-bit weight kernel

The delegate wants the pattern exactly as torchao exports it, so it is kept byte for byte.
"""

from dataclasses import dataclass

import torch

from et_cuda_passes.graph.context import MatchContext
from et_cuda_passes.graph.pattern import Capture, Pattern, op
from et_cuda_passes.graph.rule import Answer, Keep, require
from et_cuda_passes.quant.affine import affine, dequantize, has_data

_torchao = torch.ops.torchao
_aten = torch.ops.aten


@dataclass(frozen=True)
class KeepDynamicInt4(Keep):
    """linear(dequantize(quantize(x)), dequantize(int4 weight)) -> itself: XNNPACK's own kernel"""

    def pattern(self, x: Capture, bias: Capture | None = None) -> Pattern:
        """The linear of Int8DynamicActivationIntxWeightConfig."""
        quantized = op(_torchao.quantize_affine.default)(x, ..., shared=True)
        activation = dequantize(quantized, ..., name="activation", shared=True)
        return op(_aten.linear.default)(activation, dequantize(..., name="weight", shared=True), bias)

    @require("a 4-bit weight", hint="quantize with weight_dtype=torch.int4")
    def four_bits(self, m: MatchContext) -> Answer:
        """-8..7 is the range of the delegate's 4-bit kernel."""
        weight = affine(m)
        return (weight.quant_min, weight.quant_max) == (-8, 7), f"{weight.quant_min}..{weight.quant_max}"

    @require("a weight that holds data")
    def data(self, m: MatchContext) -> Answer:
        """The delegate serializes values."""
        return has_data(m.program, affine(m)), "meta or fake tensors"

    def note(self, m: MatchContext) -> str:
        """Why it is kept."""
        return "XNNPACK runs 8-bit dynamic activations with 4-bit weights itself"

    def detail(self, m: MatchContext) -> str:
        """The scheme."""
        return f"8-bit dynamic activation, {affine(m).scheme}"
