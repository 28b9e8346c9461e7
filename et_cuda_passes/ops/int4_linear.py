"""The int4 linears of a rewritten program: one operator per layout, each the same function of its weight.

``int4_linear_<layout>(x, packed, scale_and_zero, bias, group_size, out_features)`` is
``linear(x, (q - 8) * scale + zero, bias)``, with ``q`` the integers 0..15 that ``packed`` holds and a bias [N] or None.

Inductor decomposes the operator into the layout's kernel for the device. On a device without that kernel the operator
computes from the packed weight, so that a program packed for a GPU runs, and can be checked, on any machine.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from et_cuda_passes.layouts import Layout
from et_cuda_passes.layouts.layout import Matmul
from et_cuda_passes.ops.registry import define
from et_cuda_passes.quant.float_forms import float4_numbers

_SCHEMA = "(Tensor x, Tensor packed, Tensor scale_and_zero, Tensor? bias, int group_size, int out_features) -> Tensor"


@dataclass(frozen=True)
class Int4Linear:
    """The int4 linear of a layout.

    Attributes:
        layout: the layout of ``packed`` and ``scale_and_zero``.
        op: the registered overload.
    """

    layout: Layout
    op: torch._ops.OpOverload

    def reference(self, x: Tensor, packed: Tensor, scale_and_zero: Tensor, group_size: int) -> Tensor:
        """The product of ``x`` [M, K] and the weight in plain operators, [M, rows], padding included."""
        return reference_matmul(self.layout, x, packed, scale_and_zero, group_size)


def packed_count(packed: Tensor) -> int:
    """The number of 4-bit weights in a packed tensor, padding included."""
    return packed.numel() * packed.element_size() * 2


def check_constants(layout: Layout, x: Tensor, packed: Tensor, qparams: Tensor, group_size: int, n: int) -> None:
    """Check that the constants fit each other and x: a kernel that reads past its scales returns NaN, not an error.

    Raises:
        ValueError: the message names the arguments that do not fit.
    """
    count, given = packed_count(packed), x.shape[-1] if x.dim() else 0
    k = layout.check(count, tuple(qparams.shape), group_size, given)
    if k is None or not 0 < n <= qparams.shape[1]:
        raise ValueError(
            f"int4_linear_{layout.name}: {count} packed weights, scale_and_zero {tuple(qparams.shape)}, group_size "
            f"{group_size} and out_features {n} do not fit each other"
        )
    if given != k:
        raise ValueError(f"int4_linear_{layout.name}: x {tuple(x.shape)} for a weight of K = {k}")


def check_bias(name: str, x: Tensor, bias: Tensor | None, n: int) -> None:
    """Check that the bias is [n] in x's dtype: a kernel reads n numbers, whatever the shape of the bias.

    Raises:
        ValueError: the bias has another shape or dtype; it can be added after the linear.
    """
    if bias is not None and (tuple(bias.shape) != (n,) or bias.dtype is not x.dtype):
        raise ValueError(
            f"{name}: bias {bias.dtype} {tuple(bias.shape)}; wanted {x.dtype} [{n}]: add another bias after the linear"
        )


def contiguous(tensor: Tensor) -> Tensor:
    """The tensor itself or a contiguous copy, for a Triton kernel."""
    return tensor if tensor.is_contiguous() else tensor.clone(memory_format=torch.contiguous_format)


def scale_and_shift(q: Tensor, scale: Tensor, zero: Tensor, group_size: int) -> Tensor:
    """``q * scale + zero`` in fp32 from q fp32 [N, K], scale and zero [N, K / group_size]."""
    grouped = q.view(q.shape[0], q.shape[1] // group_size, group_size)
    return (grouped * scale.float().unsqueeze(-1) + zero.float().unsqueeze(-1)).view(q.shape)


def reference_matmul(
    layout: Layout, x: Tensor, packed: Tensor, qparams: Tensor, group_size: int, float4: bool = False
) -> Tensor:
    """x [M, K] times the unpacked weight, rounded once to x's dtype as the fused multiply-add of the kernels does."""
    k = x.shape[-1]
    scale, zero = layout.unpack_scales(qparams, k // group_size)
    codes = layout.unpack(packed)[:, :k]
    q = float4_numbers(codes) if float4 else codes.float() - layout.zero_offset
    return F.linear(x, scale_and_shift(q, scale, zero, group_size).to(x.dtype))


def apply_matmul(
    matmul: Matmul, x: Tensor, packed: Tensor, qparams: Tensor, bias: Tensor | None, group_size: int, n: int
) -> Tensor:
    """Apply a kernel for matrices to ``x`` of any rank, remove the padded rows of the weight, and add the bias."""
    y = matmul(x.reshape(-1, x.shape[-1]).contiguous(), packed, qparams, group_size)
    if y.shape[-1] != n:
        # Contiguous like the fake: a consumer may be compiled for that.
        y = y[:, :n].contiguous()
    y = y.reshape(*x.shape[:-1], n)
    return y if bias is None else y + bias


def define_int4_linear(layout: Layout) -> Int4Linear:
    """Register the int4 linear of a layout whose kernels are operators of the devices' libraries."""
    name = f"int4_linear_{layout.name}"

    def reference(x: Tensor, packed: Tensor, qparams: Tensor, group_size: int) -> Tensor:
        return reference_matmul(layout, x, packed, qparams, group_size)

    def check(x: Tensor, packed: Tensor, qparams: Tensor, bias: Tensor | None, group_size: int, n: int) -> None:
        check_constants(layout, x, packed, qparams, group_size, n)
        check_bias(name, x, bias, n)

    def compute(x: Tensor, *rest: Any) -> Tensor:
        return apply_matmul(layout.kernels.get(x.device.type, reference), x, *rest)

    def fake(x: Tensor, *rest: Any) -> Tensor:
        return x.new_empty((*x.shape[:-1], rest[-1]))

    return Int4Linear(layout, define(name, _SCHEMA, check=check, compute=compute, fake=fake, devices=layout.kernels))
