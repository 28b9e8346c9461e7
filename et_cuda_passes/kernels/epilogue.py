"""The epilogue of a matrix product in fp32: bias, activation, a factor and an addend.

To add an activation function, add a branch to ``activate`` and an entry to ``ACTIVATIONS``.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import triton
import triton.language as tl


@dataclass(frozen=True)
class Activation:
    """An activation function in a graph: an operator of one tensor, and its keyword arguments."""

    operator: torch._ops.OpOverload
    options: Mapping[str, Any] = field(default_factory=dict)

    def __call__(self, y: torch.Tensor) -> torch.Tensor:
        """Apply the function."""
        result: torch.Tensor = self.operator(y, **self.options)
        return result


_aten = torch.ops.aten
ACTIVATIONS: Mapping[str, Activation] = {
    "silu": Activation(_aten.silu.default),
    "gelu": Activation(_aten.gelu.default, {"approximate": "none"}),
    "gelu_tanh": Activation(_aten.gelu.default, {"approximate": "tanh"}),
    "relu": Activation(_aten.relu.default),
}
"""The activation functions by their names in ``activate``."""

_LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _power_of_two(x, USE_ASM: tl.constexpr):
    """2 ** x, to 2 units in the last place; subnormal results are 0."""
    if USE_ASM:
        y = tl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)
    else:
        y = tl.exp2(x)
    return y


@triton.jit
def _inverse(x, USE_ASM: tl.constexpr):
    """1 / x, to 1 unit in the last place; subnormal results are 0."""
    if USE_ASM:
        y = tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)
    else:
        y = 1.0 / x
    return y


@triton.jit
def _times_sigmoid(y, z, USE_ASM: tl.constexpr):
    """y * sigmoid(a), where z is -a * log2(e)."""
    return y * _inverse(1.0 + _power_of_two(z, USE_ASM), USE_ASM)


@triton.jit
def activate(y, ACTIVATION: tl.constexpr, USE_ASM: tl.constexpr):
    """Apply the activation function, with an error of at most 3e-7 + 2e-6 of the result; gelu below -5: 2e-3 of it.

    A thread computes more than a hundred of these at the end of a large tile, when it has no other work. Exact division
    and the exact error function took two to three times as many instructions.
    """
    if ACTIVATION == "silu":
        y = _times_sigmoid(y, y * -_LOG2_E, USE_ASM)
    if ACTIVATION == "relu":
        y = tl.maximum(y, 0.0, propagate_nan=tl.PropagateNan.ALL)
    if ACTIVATION == "gelu":
        # max(y, 0) - |y| erfc(|y| / sqrt(2)) / 2, which keeps its digits for negative y, with 7.1.26 of Abramowitz and
        # Stegun, Handbook of Mathematical Functions: erfc(x) = (a1 t + ... + a5 t^5) exp(-x^2), t = 1 / (1 + p x).
        size = tl.abs(y)
        t = _inverse(1.0 + 0.23164190 * size, USE_ASM)
        series = t * (0.127414796 + t * (-0.142248368 + t * (0.710706871 + t * (-0.726576014 + t * 0.530702714))))
        tail = series * _power_of_two(y * y * (-0.5 * _LOG2_E), USE_ASM)
        # For an infinite y the tail is 0, and so is the product.
        y = tl.maximum(y, 0.0) - tl.minimum(size, 64.0) * tail
    if ACTIVATION == "gelu_tanh":
        # 0.5 (1 + tanh(z)) = sigmoid(2 z), with z = sqrt(2 / pi) (y + 0.044715 y^3).
        y = _times_sigmoid(y, y * (y * y * (-0.0713548162726 * _LOG2_E) - 1.5957691216057308 * _LOG2_E), USE_ASM)
    return y


@triton.jit
def finish(
    sums,
    bias,
    factor_ptr,
    addend_ptr,
    at,
    inside,
    HAS_BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    HAS_FACTOR: tl.constexpr,
    HAS_ADDEND: tl.constexpr,
    USE_ASM: tl.constexpr,
):
    """activation(sums + bias) * factor + addend, fp32; factor and addend are read at ``at`` where ``inside``."""
    y = sums
    if HAS_BIAS:
        y += bias.to(tl.float32)
    y = activate(y, ACTIVATION, USE_ASM)
    if HAS_FACTOR:
        y *= tl.load(factor_ptr + at, mask=inside, other=0.0).to(tl.float32)
    if HAS_ADDEND:
        y += tl.load(addend_ptr + at, mask=inside, other=0.0).to(tl.float32)
    return y
