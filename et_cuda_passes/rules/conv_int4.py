"""conv(x, dequantize(int4 weight [N, K, 1, 1]), bias) -> permute(int4_linear(permute(x), packed, scale_and_zero, bias))

A convolution of kernel size 1 multiplies each position by the same matrix: a linear of the positions as rows.
"""

from dataclasses import dataclass

from et_cuda_passes.rules.linear_int4 import LinearInt4
from et_cuda_passes.rules.pointwise_conv import PointwiseConv


@dataclass(frozen=True)
class ConvInt4(PointwiseConv, LinearInt4):
    """conv(x, dequantize(int4 weight [N, K, 1, 1]), bias) -> permute(int4_linear(permute(x), packed, ...))"""
