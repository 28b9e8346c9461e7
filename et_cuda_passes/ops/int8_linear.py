"""The int8 linear of a rewritten program, for every group size, symmetric or not.

``int8_linear(x, packed, scale, zero, bias, group_size)`` is ``linear(x, packed * scale + zero, bias)`` with

- ``x`` [..., K], floating;
- ``packed`` int8 [N, K], row-major;
- ``scale`` [N, K / group_size], floating;
- ``zero`` [N, K / group_size], float32, or None for a symmetric weight. bf16 would be off by half a step for a zero
  point of 200;
- ``bias`` [N] of x's dtype, or None.

On CUDA it is our Triton kernel. On another device it is the kernel of the device's library if that supports these
arguments, and plain operators on the same constants if not.

The keyword ``gpu`` is explained at :data:`~et_cuda_passes.ops.registry.TRITON_OPERATORS`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from et_cuda_passes.kernels import linear_launch
from et_cuda_passes.ops.int4_linear import check_bias, contiguous
from et_cuda_passes.ops.registry import define_triton

_NAME = "int8_linear"


def _check(x: Tensor, packed: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None, group_size: int) -> None:
    """Check that the constants fit each other and x: a kernel that reads past its scales reports no error.

    Raises:
        ValueError: the message names the arguments that do not fit.
    """
    tables = [tuple(table.shape) for table in (scale, zero) if table is not None]
    rows, k = packed.shape if packed.dim() == 2 else (-1, -1)
    divides = group_size > 0 and k % group_size == 0
    if packed.dtype is not torch.int8 or not divides or any(table != (rows, k // group_size) for table in tables):
        raise ValueError(
            f"{_NAME}: packed {packed.dtype} {tuple(packed.shape)}, scale and zero {tables} and group_size "
            f"{group_size} do not fit each other; wanted int8 [N, K] and [N, K / group_size]"
        )
    if x.dim() == 0 or x.shape[-1] != k:
        raise ValueError(f"{_NAME}: x {tuple(x.shape)} for a weight of K = {k}")
    check_bias(_NAME, x, bias, rows)


def reference(x: Tensor, packed: Tensor, scale: Tensor, zero: Tensor | None, group_size: int) -> Tensor:
    """The product in plain operators: the weight ``packed * scale + zero`` in fp32, rounded once to x's dtype."""
    grouped = packed.float().view(packed.shape[0], -1, group_size) * scale.float().unsqueeze(-1)
    if zero is not None:
        grouped = grouped + zero.float().unsqueeze(-1)
    return F.linear(x, grouped.view(packed.shape).to(x.dtype))


def _int8pack(x: Tensor, packed: Tensor, scale: Tensor, zero: Tensor | None, group_size: int) -> Tensor:
    """torch's kernel, if the weight has one scale per row in x's dtype, no zero, several rows, and K a multiple of 16.

    With AVX-512 and bf16 the kernel writes past its result for another K (torch 2.13), without a check. AOTInductor
    makes a number of the scale of a single row, and does not compile the kernel with it.
    """
    if zero is not None or scale.shape[1] != 1 or scale.dtype is not x.dtype or x.shape[1] % 16 or len(packed) == 1:
        return reference(x, packed, scale, zero, group_size)
    y: Tensor = torch.ops.aten._weight_int8pack_mm.default(x, packed, scale.view(-1))
    return y


def _int8_linear(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bias: Tensor | None,
    group_size: int,
    *,
    gpu: str = "",
) -> Tensor:
    _check(x, packed, scale, zero, bias, group_size)
    if x.device.type == "cuda" and linear_launch.has_int8(x, scale, group_size):
        bias = None if bias is None else contiguous(bias)
        return linear_launch.int8_linear(contiguous(x), packed, scale, zero, bias, group_size, gpu)
    matmul = _int8pack if x.device.type == "cpu" else reference
    y = matmul(x.reshape(-1, x.shape[-1]).contiguous(), packed, scale, zero, group_size)
    y = y.reshape(*x.shape[:-1], packed.shape[0])
    return y if bias is None else y + bias


def _fake(
    x: Tensor, packed: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None, group_size: int
) -> Tensor:
    _check(x, packed, scale, zero, bias, group_size)
    return x.new_empty((*x.shape[:-1], packed.shape[0]))


INT8_LINEAR = define_triton(_NAME, _int8_linear, _fake)
"""The registered overload."""
