"""The int8 linear of a rewritten program, for every group size, symmetric or not.

``int8_linear(x, packed, scale, zero, bias, group_size)`` is ``linear(x, packed * scale + zero, bias)`` with

- ``x`` [..., K], floating;
- ``packed`` int8 [N, K], row-major;
- ``scale`` [N, K / group_size], floating;
- ``zero`` [N, K / group_size], float32, or None for a symmetric weight. bf16 would be off by half a step for a zero
  point of 200;
- ``bias`` [N] of x's dtype, or None.

On CUDA it is our Triton kernel. On another device it is the kernel of the device's library if that supports these
arguments and is fast, and plain operators on the same constants if not.

The keyword ``gpu`` is explained at :data:`~et_cuda_passes.ops.registry.TRITON_OPERATORS`.
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true

from et_cuda_passes.kernels import linear_launch
from et_cuda_passes.layouts.plain_products import multiply_in_pieces, stored
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


def _dense(packed: Tensor, scale: Tensor, zero: Tensor | None, group_size: int) -> Tensor:
    """The weight ``packed * scale + zero``, fp32 [N, K]."""
    grouped = packed.float().view(packed.shape[0], -1, group_size) * scale.float().unsqueeze(-1)
    if zero is not None:
        grouped = grouped + zero.float().unsqueeze(-1)
    return grouped.view(packed.shape)


def reference(x: Tensor, packed: Tensor, scale: Tensor, zero: Tensor | None, group_size: int) -> Tensor:
    """The product in plain operators: the weight in fp32, rounded once to x's dtype."""
    return F.linear(x, _dense(packed, scale, zero, group_size).to(x.dtype))


def _on_cpu(x: Tensor, packed: Tensor, scale: Tensor, zero: Tensor | None, group_size: int) -> Tensor:
    """torch's kernel where it applies, and plain operators elsewhere.

    It applies to a weight with one scale per row in bf16, without a zero, if K is a multiple of 16: with AVX-512 it
    writes past its result for another K (torch 2.13), without a check. In fp32 and fp16 it is scalar code. For a weight
    of one row AOTInductor makes a number of the scale, and does not compile the kernel with it.
    """
    per_row = zero is None and scale.shape[1] == 1 and scale.dtype is x.dtype
    if per_row and len(packed) > 1 and x.dtype is torch.bfloat16 and x.shape[1] % 16 == 0:
        y: Tensor = torch.ops.aten._weight_int8pack_mm.default(x, packed, scale.view(-1))
        return y
    if len(packed) > 1 and statically_known_true(x.shape[0] == 1):
        return torch.mv(_dense(packed, scale, zero, group_size), stored(x[0].float())).to(x.dtype).unsqueeze(0)
    return multiply_in_pieces(x, [packed, scale, zero], partial(_dense, group_size=group_size))


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
    matmul = _on_cpu if x.device.type == "cpu" else reference
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
