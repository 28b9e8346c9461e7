"""Linears and pointwise convolutions of the tests of rules."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from et_cuda_passes.testing import Quantized


def quantized_to_8_bits(x: Tensor, like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """x, quantized along its last axis with the scales of ``like``, and dequantized to ``dtype``."""
    block, torchao = [1] * (x.dim() - 1) + [x.shape[-1]], torch.ops.torchao
    scale, zero = torchao.choose_qparams_affine(
        like, "ASYMMETRIC", block, torch.int8, -128, 127, None, x.dtype, torch.int8
    )
    q = torchao.quantize_affine(x, block, scale, zero, torch.int8, -128, 127)
    result: Tensor = torchao.dequantize_affine(q, block, scale, zero, torch.int8, -128, 127, dtype or x.dtype)
    return result


class EightBitActivations(torch.nn.Module):
    """An int4 linear with dynamically quantized activations, and a view between them if ``view`` is set."""

    def __init__(
        self, view: bool = False, other_scale: bool = False, dtype: torch.dtype | None = None, **options: Any
    ) -> None:
        super().__init__()
        self.inner, self.view, self.other_scale, self.dtype = Quantized(48, 64, **options), view, other_scale, dtype

    def forward(self, x: Tensor) -> Tensor:
        x = quantized_to_8_bits(x, x + 1 if self.other_scale else x, self.dtype)
        return F.linear(x.view(-1, 64) if self.view else x, self.inner.weight(), self.inner.bias)


class Convolution(Quantized):
    """A convolution of K channels to N with a quantized weight [N, K, kernel].

    Args:
        n, k: out_features and in_features.
        kernel: its size, which a block of scales does not divide.
        stride: of the convolution.
        before: what is computed of x before the convolution.
        **options: as for :class:`Quantized`.
    """

    def __init__(
        self,
        n: int = 16,
        k: int = 64,
        kernel: int = 1,
        stride: int = 1,
        before: Callable[[Tensor], Tensor] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(n, k, **options)
        self.data = self.data.unsqueeze(-1).repeat(1, 1, kernel)
        self.block = [*self.block, kernel]
        self.scale = self.scale.unsqueeze(-1)
        if self.zero_point is not None:
            self.zero_point = self.zero_point.unsqueeze(-1)
        self.stride, self.before = stride, before

    def forward(self, x: Tensor) -> Tensor:
        x = x if self.before is None else self.before(x)
        return F.conv1d(x, self.weight(), self.bias, self.stride)
