"""Linears and pointwise convolutions of the tests of rules."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchao.quantization import IntxWeightOnlyConfig, quantize_
from torchao.quantization.granularity import PerAxis, PerGroup

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


class EightBitActivations(nn.Module):
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


def no_bias(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.linear(x, weight)


def exact_weight(model: Quantized) -> np.ndarray:
    """The weight in fp64."""
    spread = lambda t: t.double().numpy().repeat(model.block[1], axis=1)  # noqa: E731
    points = 0.0 if model.zero_point is None else spread(model.zero_point)
    return (model.data.double().numpy() - points) * spread(model.scale)


class Mixed(nn.Module):
    """Five layers, one for each of :data:`SCHEMES`."""

    def __init__(self) -> None:
        super().__init__()
        self.four, self.eight = nn.Linear(64, 64), nn.Linear(64, 64)
        self.two, self.six = nn.Linear(64, 64, bias=False), nn.Linear(64, 64)
        self.point = nn.Conv2d(64, 32, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.eight(torch.relu(self.four(x))))
        x = torch.relu(self.six(torch.relu(self.two(x))))
        result: Tensor = self.point(x.movedim(-1, 1))
        return result


SCHEMES = {
    "four": (IntxWeightOnlyConfig(torch.int4, PerGroup(32)), "linear_int4", "int4 group 32"),
    "eight": (IntxWeightOnlyConfig(torch.int8, PerAxis(0)), "linear_int8", "int8 per-axis"),
    "two": (IntxWeightOnlyConfig(torch.int2, PerGroup(64)), "linear_int4", "int2 per-axis"),
    "six": (IntxWeightOnlyConfig(torch.int6, PerAxis(0)), "linear_int8", "int6 per-axis"),
    "point": (IntxWeightOnlyConfig(torch.int4, PerGroup(32)), "conv_int4", "int4 group 32"),
}


def five_schemes() -> nn.Module:
    """Five layers over [..., 64], each quantized with a scheme of its own."""
    torch.manual_seed(0)
    model = Mixed().bfloat16().eval()
    for name, (config, _, _) in SCHEMES.items():
        quantize_(model, config, filter_fn=lambda _, fqn, name=name: fqn == name)
    return model
