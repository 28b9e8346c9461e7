"""conv(x, dequantize(weight [N, K, 1, 1]), bias) -> permute(int8_linear(permute(x), packed, scale, zero, bias))

A convolution of kernel size 1 multiplies each position by the same matrix: a linear of the positions as rows.
"""

from dataclasses import dataclass

from et_cuda_passes.rules.linear_int8 import LinearInt8
from et_cuda_passes.rules.pointwise_conv import PointwiseConv


@dataclass(frozen=True)
class ConvInt8(PointwiseConv, LinearInt8):
    """conv(x, dequantize(weight of at most 8 bits [N, K, 1, 1]), bias) -> permute(int8_linear(permute(x), ...))"""
