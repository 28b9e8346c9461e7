"""The linear of a rewritten program whose weight is in float8_e4m3fn or float8_e5m2.

``float8_linear(x, packed, scale, bias, group_size, exponent_bits)`` is ``linear(x, numbers * scale, bias)`` with

- ``x`` [..., K], floating;
- ``packed`` int8 [N, K], row-major: the bytes of the numbers, finite, with ``exponent_bits`` 4 for float8_e4m3fn and 5
  for float8_e5m2;
- ``scale`` [N, K / group_size], floating;
- ``bias`` [N] of x's dtype, or None.

On CUDA it is our Triton kernel, and on other devices plain operators. The keyword ``gpu`` is explained at
:data:`~et_cuda_passes.ops.registry.TRITON_OPERATORS`.
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from et_cuda_passes.kernels import linear_launch
from et_cuda_passes.ops.int4_linear import check_bias, contiguous
from et_cuda_passes.ops.registry import define_triton

_NAME = "float8_linear"
FLOAT8_DTYPES: Mapping[int, torch.dtype] = {4: torch.float8_e4m3fn, 5: torch.float8_e5m2}
"""The dtypes by the bits of their exponents."""


def _check(x: Tensor, packed: Tensor, scale: Tensor, bias: Tensor | None, group_size: int, bits: int) -> None:
    """Check that the constants fit each other and x: a kernel that reads past its scales reports no error.

    Raises:
        ValueError: the message names the arguments that do not fit.
    """
    rows, k = packed.shape if packed.dim() == 2 else (-1, -1)
    fits = packed.dtype is torch.int8 and group_size > 0 and k % group_size == 0
    if not fits or tuple(scale.shape) != (rows, k // group_size) or bits not in FLOAT8_DTYPES:
        raise ValueError(
            f"{_NAME}: packed {packed.dtype} {tuple(packed.shape)}, scale {tuple(scale.shape)}, group_size "
            f"{group_size} and exponent_bits {bits} do not fit each other; wanted int8 [N, K], [N, K / group_size] "
            "and 4 or 5"
        )
    if x.dim() == 0 or x.shape[-1] != k:
        raise ValueError(f"{_NAME}: x {tuple(x.shape)} for a weight of K = {k}")
    check_bias(_NAME, x, bias, rows)


def _float8_linear(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    group_size: int,
    exponent_bits: int,
    *,
    gpu: str = "",
) -> Tensor:
    _check(x, packed, scale, bias, group_size, exponent_bits)
    if x.device.type == "cuda" and linear_launch.has_int8(x, scale, group_size):
        bias = None if bias is None else contiguous(bias)
        x = contiguous(x)
        return linear_launch.int8_linear(x, packed, scale, None, bias, group_size, gpu, exponent_bits)
    numbers = packed.view(FLOAT8_DTYPES[exponent_bits]).float().view(packed.shape[0], -1, group_size)
    weight = (numbers * scale.float().unsqueeze(-1)).view(packed.shape)
    return F.linear(x, weight.to(x.dtype), bias)


def _fake(x: Tensor, packed: Tensor, scale: Tensor, bias: Tensor | None, group_size: int, exponent_bits: int) -> Tensor:
    _check(x, packed, scale, bias, group_size, exponent_bits)
    return x.new_empty((*x.shape[:-1], packed.shape[0]))


FLOAT8_LINEAR = define_triton(_NAME, _float8_linear, _fake)
"""The registered overload."""
