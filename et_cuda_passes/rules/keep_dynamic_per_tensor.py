"""linear(dequantize(quantize(x)), dequantize(int8 per-axis weight), bias) -> itself, one row of x, for XNNPACK

It is what executorch's XNNPACKQuantizer makes with ``is_dynamic=True``. The graph chooses one scale for the tensor, and
the delegate one for each row: with one row they are the same.
"""

from dataclasses import dataclass
from math import prod

import torch

from et_cuda_passes.graph.match import Match
from et_cuda_passes.graph.pattern import Capture, Pattern, op
from et_cuda_passes.graph.rule import Answer, requirement
from et_cuda_passes.quant.affine import dequantized, weight_of
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
        weight = dequantized(..., name="weight", shared=True)
        return op(torch.ops.aten.linear.default)(dynamically_quantized_per_tensor(x, name="activation"), weight, bias)

    @requirement(
        "activations of one row",
        hint="the delegate quantizes each row by itself; KeepDynamicPerTensor(per_row=True) accepts that, and "
        "Int8DynamicActivationIntxWeightConfig says it in the graph",
    )
    def one_row(self, m: Match) -> Answer:
        """Where the delegate's scale is the graph's."""
        rows = m.val(m.x).shape[:-1]
        one = all(isinstance(size, int) for size in rows) and prod(rows) == 1
        return self.per_row or one, f"rows {' x '.join(map(str, rows))}"

    @requirement("one scale for each output", hint="quantize with is_per_channel=True")
    def per_axis(self, m: Match) -> Answer:
        """With one for the whole weight the delegate leaves the linear alone."""
        weight = weight_of(m)
        return weight.block_size == (1, *weight.shape[1:]) and weight.scale is not None, weight.scheme

    def summary(self, m: Match) -> str:
        """The scheme."""
        return f"8-bit dynamic activation per tensor, {weight_of(m).scheme}"
