"""linear(dequantize(quantize(x)), dequantize(int8 weight), bias) -> itself, where calibrated, for XNNPACK

So are convolutions. It is what executorch's XNNPACKQuantizer makes in a PT2E flow; the result lies within one step of
the scale that it is quantized to.
"""

from dataclasses import dataclass

import torch
from torch.fx import Node

from et_cuda_passes.graph.match import Match
from et_cuda_passes.graph.operators import op_of
from et_cuda_passes.graph.pattern import Capture, Pattern, op
from et_cuda_passes.graph.rule import Answer, requirement
from et_cuda_passes.quant.affine import dequantized, weight_of
from et_cuda_passes.quant.static import QUANTIZE_PER_TENSOR, statically_quantized
from et_cuda_passes.rules.keep_decomposed import KeepDecomposed

aten = torch.ops.aten

_operators = op(aten.linear.default, aten.conv1d.default, aten.conv2d.default, aten.conv_transpose2d.input)
# XNNPACK clamps with the operator itself.
_CLAMPS = frozenset({aten.relu.default, aten.relu_.default, aten.hardtanh.default, aten.hardtanh_.default})


@dataclass(frozen=True)
class KeepStaticInt8(KeepDecomposed):
    """linear(dequantize(quantize(x)), dequantize(int8 weight), bias) -> itself, where calibrated, for XNNPACK"""

    def pattern(self, x: Capture, bias: Capture | None = None) -> Pattern:
        """A linear or convolution, both its inputs dequantized."""
        weight = dequantized(..., name="weight", shared=True)
        return _operators(statically_quantized(x, name="activation"), weight, bias, ...)

    @requirement("a result that is quantized", hint="quantize the output too: XNNPACKQuantizer().set_global(...) does")
    def quantized_result(self, m: Match) -> Answer:
        """Without a scale for the result the delegate leaves the operator alone, and nothing else runs it."""
        users = list(m.root.users)
        if len(users) == 1 and op_of(users[0]) in _CLAMPS:
            users = list(users[0].users)
        others = [user.name for user in users if not self._quantizes(user)]
        return bool(users) and not others, f"{others[0] if others else 'nobody'}, which reads the result itself"

    @staticmethod
    def _quantizes(node: Node) -> bool:
        return op_of(node) is QUANTIZE_PER_TENSOR and node.args[3:] == (-128, 127, torch.int8)

    def summary(self, m: Match) -> str:
        """The scheme."""
        return f"8-bit calibrated activation, {weight_of(m).scheme}"
