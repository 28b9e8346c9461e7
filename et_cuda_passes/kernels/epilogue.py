"""What is done to a sum before it is stored: bias, activation, a product and a sum with other tensors, all in fp32."""

import triton
import triton.language as tl

ACTIVATIONS = ("", "silu", "gelu", "gelu_tanh", "relu")
"""Names of the activation functions; the empty one does nothing."""


@triton.jit
def _activate(y, ACTIVATION: tl.constexpr):
    if ACTIVATION == "silu":
        y = y * tl.sigmoid(y)
    if ACTIVATION == "relu":
        y = tl.maximum(y, 0.0)
    if ACTIVATION == "gelu":
        y = 0.5 * y * (1.0 + tl.erf(y * 0.7071067811865476))
    if ACTIVATION == "gelu_tanh":
        # 0.5 (1 + tanh(z)) = sigmoid(2 z), with z = sqrt(2 / pi) (y + 0.044715 y^3).
        y = y * tl.sigmoid(1.5957691216057308 * (y + 0.044715 * y * y * y))
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
):
    """activation(sums + bias) * factor + addend, fp32; factor and addend are read at ``at`` where ``inside``."""
    y = sums
    if HAS_BIAS:
        y += bias.to(tl.float32)
    y = _activate(y, ACTIVATION)
    if HAS_FACTOR:
        y *= tl.load(factor_ptr + at, mask=inside, other=0.0).to(tl.float32)
    if HAS_ADDEND:
        y += tl.load(addend_ptr + at, mask=inside, other=0.0).to(tl.float32)
    return y
