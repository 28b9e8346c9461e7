"""The int8 linear that stands in a rewritten program, for every group size, symmetric or not.

``int8_linear(x, packed, scale, zero, bias, group_size)`` is ``linear(x, packed * scale + zero, bias)`` with

- ``x`` [..., K], floating;
- ``packed`` int8 [N, K], row-major;
- ``scale`` [N, K / group_size], floating;
- ``zero`` [N, K / group_size], float32, or None for a symmetric weight: a zero point of 200 steps, rounded to bf16,
  would be off by half a step;
- ``bias`` [N] or None.

It is an operator of ours for the same reason as the int4 linears: an edge program may hold it, and Inductor decomposes
it into the kernel that the device has. On a device without that kernel it computes from the same constants.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._inductor.decomposition import register_decomposition

from et_cuda_passes.ops.int4_linear import NAMESPACE

Matmul = Callable[[Tensor, Tensor, Tensor, Tensor | None, int], Tensor]
"""``(x [M, K], packed, scale, zero, group_size) -> [M, N]``."""

_NAME = "int8_linear"
_SCHEMA = "(Tensor x, Tensor packed, Tensor scale, Tensor? zero, Tensor? bias, int group_size) -> Tensor"

# Kept for the life of the process: a Library takes its operators with it when it is collected.
_LIBRARY = torch.library.Library(NAMESPACE, "FRAGMENT")


def _check(x: Tensor, packed: Tensor, scale: Tensor, zero: Tensor | None, group_size: int) -> None:
    """The constants must fit each other: a kernel that reads past too few scales gives no error.

    Raises:
        ValueError: naming what does not fit.
    """
    tables = [tuple(table.shape) for table in (scale, zero) if table is not None]
    rows, k = packed.shape if packed.dim() == 2 else (-1, -1)
    whole = group_size > 0 and k % group_size == 0
    if packed.dtype is not torch.int8 or not whole or any(table != (rows, k // group_size) for table in tables):
        raise ValueError(
            f"{_NAME}: packed {packed.dtype} {tuple(packed.shape)}, scale and zero {tables} and group_size "
            f"{group_size} do not fit each other; wanted int8 [N, K] and [N, K / group_size]"
        )
    if x.dim() == 0 or x.shape[-1] != k:
        raise ValueError(f"{_NAME}: x {tuple(x.shape)} for a weight of K = {k}")


def reference(x: Tensor, packed: Tensor, scale: Tensor, zero: Tensor | None, group_size: int) -> Tensor:
    """The same from plain tensor operations: ``packed * scale + zero`` in fp32, rounded once to x's dtype."""
    grouped = packed.float().view(packed.shape[0], -1, group_size) * scale.float().unsqueeze(-1)
    if zero is not None:
        grouped = grouped + zero.float().unsqueeze(-1)
    return F.linear(x, grouped.view(packed.shape).to(x.dtype))


def _int8pack(x: Tensor, packed: Tensor, scale: Tensor, zero: Tensor | None, group_size: int) -> Tensor:
    """torch's kernel where it computes this: one scale a row, of x's dtype, no zero, and K a multiple of 16.

    With AVX-512 and bf16 it writes past its result for any other K (torch 2.13), and does not check.
    """
    if zero is not None or scale.shape[1] != 1 or scale.dtype is not x.dtype or x.shape[1] % 16:
        return reference(x, packed, scale, zero, group_size)
    y: Tensor = torch.ops.aten._weight_int8pack_mm.default(x, packed, scale.view(-1))
    return y


KERNELS: Mapping[str, Matmul] = {"cpu": _int8pack}
"""Device type -> the kernel that the device's libraries have."""


def _compute(
    x: Tensor, packed: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None, group_size: int
) -> Tensor:
    _check(x, packed, scale, zero, group_size)
    matmul = KERNELS.get(x.device.type, reference)
    y = matmul(x.reshape(-1, x.shape[-1]).contiguous(), packed, scale, zero, group_size)
    y = y.reshape(*x.shape[:-1], packed.shape[0])
    return y if bias is None else y + bias


def _fake(
    x: Tensor, packed: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None, group_size: int
) -> Tensor:
    _check(x, packed, scale, zero, group_size)
    return x.new_empty((*x.shape[:-1], packed.shape[0]))


_LIBRARY.define(_NAME + _SCHEMA, tags=(torch.Tag.pt2_compliant_tag,))
_LIBRARY.impl(_NAME, _compute, "CompositeExplicitAutograd")
torch.library.register_fake(f"{NAMESPACE}::{_NAME}", _fake, lib=_LIBRARY)

INT8_LINEAR: torch._ops.OpOverload = torch.ops.et_cuda_passes.int8_linear.default
"""The registered overload."""


def _decompose(x: Tensor, *args: Any) -> Any:
    # A device without the kernel keeps the operator, which then computes from the constants.
    return _compute(x, *args) if x.device.type in KERNELS else NotImplemented


register_decomposition(INT8_LINEAR)(_decompose)
