"""linear(dequantize(quantize(x)), dequantize(int8 per-axis weight), bias) -> itself, one row of x, for XNNPACK

It is what executorch's XNNPACKQuantizer makes with ``is_dynamic=True``. The graph chooses one scale for the tensor, and
the delegate one for each row: with one row they are the same.
"""

from dataclasses import dataclass
from math import prod

import torch

from et_cuda_passes.graph.match import MatchContext
from et_cuda_passes.graph.pattern import Capture, Pattern, op
from et_cuda_passes.graph.rule import Answer, require
from et_cuda_passes.quant.affine import affine, dequantize
from et_cuda_passes.quant.static import dynamically_quantized_per_tensor
from et_cuda_passes.rules.keep_decomposed import KeepDecomposed


@dataclass(frozen=True)
class KeepDynamicPerTensor(KeepDecomposed):
    """linear(dequantize(quantize(x)), dequantize(int8 per-axis weight), bias) -> itself, one row of x, for XNNPACK

    Attributes:
        per_row: accept that the delegate chooses a scale for each row, where the graph chooses one for all rows. The
            result is another one than the graph's, and closer to the unquantized model's.
    """

    per_row: bool = False

    def pattern(self, x: Capture, bias: Capture | None = None) -> Pattern:
        """A linear, both its inputs dequantized."""
        weight = dequantize(..., name="weight", shared=True)
        return op(torch.ops.aten.linear.default)(dynamically_quantized_per_tensor(x, name="activation"), weight, bias)

    @require(
        "activations of one row",
        hint="the delegate quantizes each row by itself; KeepDynamicPerTensor(per_row=True) accepts that, and "
        "Int8DynamicActivationIntxWeightConfig says it in the graph",
    )
    def one_row(self, m: MatchContext) -> Answer:
        """Where the delegate's scale is the graph's."""
        rows = m.val(m.x).shape[:-1]
        one = all(isinstance(size, int) for size in rows) and prod(rows) == 1
        return self.per_row or one, f"rows {' x '.join(map(str, rows))}"

    @require("one scale for each output", hint="quantize with is_per_channel=True")
    def per_axis(self, m: MatchContext) -> Answer:
        """With one for the whole weight the delegate leaves the linear alone."""
        weight = affine(m)
        return weight.block_size == (1, *weight.shape[1:]) and weight.scale is not None, weight.scheme

    def detail(self, m: MatchContext) -> str:
        """The scheme."""
        return f"8-bit dynamic activation per tensor, {affine(m).scheme}"
