"""The int4 linears that stand in a rewritten program: one operator a layout, each the same function of its weight.

``int4_linear_<layout>(x, packed, scale_and_zero, bias, group_size, out_features)`` is
``linear(x, (q - 8) * scale + zero, bias)``, with ``q`` the integers 0..15 that ``packed`` holds and a bias [N] or None.

Why operators of our own: ExecuTorch's verifier refuses ``aten._weight_int4pack_mm`` in an edge program (it is not in
the core ATen operator set) and accepts an operator of another namespace. Inductor then decomposes ours into the kernel
that the device has. On a device without that kernel they compute from the packed layout itself, so that a program
packed for a GPU runs, and can be checked, on a machine that has none.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._inductor.decomposition import register_decomposition

from et_cuda_passes.layouts import cpu, metal, mma_tiled, mps, scale_and_zero, tile_packed_to_4d

NAMESPACE = "et_cuda_passes"
_SCHEMA = "(Tensor x, Tensor packed, Tensor scale_and_zero, Tensor? bias, int group_size, int out_features) -> Tensor"

# Kept for the life of the process: a Library takes its operators with it when it is collected.
_LIBRARY = torch.library.Library(NAMESPACE, "DEF")

Matmul = Callable[[Tensor, Tensor, Tensor, int], Tensor]
"""``(x [M, K], packed, scale_and_zero, group_size) -> [M, N]``; N is what is packed, padding included."""


@dataclass(frozen=True)
class Int4Linear:
    """One operator: the layout it reads, its kernel by device type, and what computes the same anywhere.

    Attributes:
        layout: name of the layout of ``packed``.
        kernels: device type -> the kernel that the device's libraries have.
        reference: the same from plain tensor operations, reading the packed layout.
        op: the registered overload.
    """

    layout: str
    kernels: Mapping[str, Matmul]
    reference: Matmul
    op: torch._ops.OpOverload


def check(layout: str, x: Tensor, packed: Tensor, qparams: Tensor, group_size: int, n: int) -> None:
    """The constants must fit each other: a kernel that reads past too short a scale_and_zero gives no error, but NaN.

    Raises:
        ValueError: naming what does not fit.
    """
    words, rows = packed.numel() * packed.element_size() * 2, qparams.shape[1]
    groups = qparams.shape[2] if layout == "metal" else qparams.shape[0]
    k = groups * group_size
    if layout == "mma_tiled":
        # Padded, so that K itself is nowhere in the constants: it is x's, if that has their padding.
        k, whole = words // rows, x.shape[-1] if x.dim() else 0
        if whole % group_size == 0 and mma_tiled.padded(whole) == k:
            k = whole if qparams.shape[2] == mma_tiled.scale_row(whole, group_size) else 0
    fits = words == rows * (mma_tiled.padded(k) if layout == "mma_tiled" else k)
    if not fits or not 0 < n <= rows:
        raise ValueError(
            f"int4_linear_{layout}: {words} packed weights, scale_and_zero {tuple(qparams.shape)}, group_size "
            f"{group_size} and out_features {n} do not fit each other"
        )
    if x.dim() == 0 or x.shape[-1] != k:
        raise ValueError(f"int4_linear_{layout}: x {tuple(x.shape)} for a weight of K = {k}")


def check_bias(name: str, x: Tensor, bias: Tensor | None, n: int) -> None:
    """A kernel reads n numbers, whatever the shape of the bias, and the result is of x's dtype.

    Raises:
        ValueError: the bias is another one; added behind the linear, it may be.
    """
    if bias is not None and (tuple(bias.shape) != (n,) or bias.dtype is not x.dtype):
        raise ValueError(
            f"{name}: bias {bias.dtype} {tuple(bias.shape)}; wanted {x.dtype} [{n}]: add any other behind the linear"
        )


def in_rows(tensor: Tensor) -> Tensor:
    """Itself or a contiguous copy, which is what a Triton kernel reads."""
    return tensor if tensor.is_contiguous() else tensor.clone(memory_format=torch.contiguous_format)


def dequantize(q: Tensor, scale: Tensor, zero: Tensor, group_size: int, dtype: torch.dtype) -> Tensor:
    """``(q - 8) * scale + zero``, rounded once to ``dtype`` as the kernels' fused multiply-add does; [N, K]."""
    return affine(q.float() - 8, scale, zero, group_size).to(dtype)


def affine(q: Tensor, scale: Tensor, zero: Tensor, group_size: int) -> Tensor:
    """``q * scale + zero`` in fp32 from q fp32 [N, K], scale and zero [N, K / group_size]."""
    grouped = q.view(q.shape[0], q.shape[1] // group_size, group_size)
    return (grouped * scale.float().unsqueeze(-1) + zero.float().unsqueeze(-1)).view(q.shape)


def _tile_packed_reference(x: Tensor, packed: Tensor, qparams: Tensor, group_size: int) -> Tensor:
    scale, zero = scale_and_zero.unpack(qparams)
    return F.linear(x, dequantize(tile_packed_to_4d.unpack(packed), scale, zero, group_size, x.dtype))


def _mps_reference(x: Tensor, packed: Tensor, qparams: Tensor, group_size: int) -> Tensor:
    scale, zero = scale_and_zero.unpack(qparams)
    return F.linear(x, dequantize(mps.unpack(packed), scale, zero, group_size, x.dtype))


def _metal_reference(x: Tensor, packed: Tensor, qparams: Tensor, group_size: int) -> Tensor:
    # Its second parameter is the zero of q * S + Z, with nothing subtracted from q.
    weight = affine(metal.unpack(packed).float(), qparams[0], qparams[1], group_size)
    return F.linear(x, weight.to(x.dtype))


def _cpu_reference(x: Tensor, packed: Tensor, qparams: Tensor, group_size: int) -> Tensor:
    scale, zero = scale_and_zero.unpack(qparams)
    return F.linear(x, dequantize(cpu.unpack(packed), scale, zero, group_size, x.dtype))


def _int4pack(x: Tensor, packed: Tensor, qparams: Tensor, group_size: int) -> Tensor:
    y: Tensor = torch.ops.aten._weight_int4pack_mm.default(x, packed, group_size, qparams)
    return y


def _int4pack_cpu(x: Tensor, packed: Tensor, qparams: Tensor, group_size: int) -> Tensor:
    y: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu.default(x, packed, group_size, qparams)
    return y


def _torchao_metal(x: Tensor, packed: Tensor, qparams: Tensor, group_size: int) -> Tensor:
    # torchao registers this operator on macOS alone, so it is looked up when an MPS tensor asks for it.
    kernel = torch.ops.torchao._linear_fp_act_4bit_weight.default
    y: Tensor = kernel(x, packed, group_size, qparams[0], qparams[1])
    return y


def linear(
    matmul: Matmul, x: Tensor, packed: Tensor, qparams: Tensor, bias: Tensor | None, group: int, n: int
) -> Tensor:
    """Any rank of ``x`` around a kernel on matrices; rows of padding in the packed weight are cut off."""
    y = matmul(x.reshape(-1, x.shape[-1]).contiguous(), packed, qparams, group)
    if y.shape[-1] != n:
        # Contiguous, as the fake says: a consumer may be compiled for that.
        y = y[:, :n].contiguous()
    y = y.reshape(*x.shape[:-1], n)
    return y if bias is None else y + bias


def _define(layout: str, kernels: Mapping[str, Matmul], reference: Matmul) -> Int4Linear:
    name = f"int4_linear_{layout}"
    _LIBRARY.define(name + _SCHEMA, tags=(torch.Tag.pt2_compliant_tag,))

    def compute(x: Tensor, packed: Tensor, qparams: Tensor, bias: Tensor | None, group_size: int, n: int) -> Tensor:
        check(layout, x, packed, qparams, group_size, n)
        check_bias(name, x, bias, n)
        matmul = kernels.get(x.device.type, reference)
        return linear(matmul, x, packed, qparams, bias, group_size, n)

    def fake(x: Tensor, packed: Tensor, qparams: Tensor, bias: Tensor | None, group_size: int, n: int) -> Tensor:
        check(layout, x, packed, qparams, group_size, n)
        check_bias(name, x, bias, n)
        return x.new_empty((*x.shape[:-1], n))

    _LIBRARY.impl(name, compute, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_LIBRARY)
    op: torch._ops.OpOverload = getattr(getattr(torch.ops, NAMESPACE), name).default

    def decompose(x: Tensor, *args: Any) -> Any:
        # A device without the kernel keeps the operator, which then computes from the layout.
        return compute(x, *args) if x.device.type in kernels else NotImplemented

    register_decomposition(op)(decompose)
    return Int4Linear(layout, kernels, reference, op)


TILE_PACKED_TO_4D = _define("tile_packed_to_4d", {"cuda": _int4pack}, _tile_packed_reference)
MPS = _define("mps", {"mps": _int4pack}, _mps_reference)
METAL = _define("metal", {"mps": _torchao_metal}, _metal_reference)
CPU = _define("cpu", {"cpu": _int4pack_cpu}, _cpu_reference)
