"""From a decoded weight to a kernel's constants: the integers packed, scales and zeros in the kernel's form."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import Node

from et_cuda_passes.graph.builder import Builder
from et_cuda_passes.kernels.int4 import Int4Kernel
from et_cuda_passes.layouts import cpu, metal, mma_tiled, mps, scale_and_zero, tile_packed_to_4d
from et_cuda_passes.quant.affine import AffineValues, AffineWeight, values

MIDDLE = 8
"""The kernels compute ``(q - 8) * scale + zero`` with q in 0..15."""


def inner_k_tiles(in_features: int) -> int:
    """The largest inner_k_tiles of 8, 4 and 2 that ``in_features``, a multiple of 32, can have."""
    return next(tiles for tiles in (8, 4, 2) if in_features % (16 * tiles) == 0)


def native_group_size(group_size: int, kernel: Int4Kernel) -> int | None:
    """The largest of the kernel's group sizes that divides ``group_size``; scales are repeated for the rest."""
    return max((size for size in kernel.group_sizes if group_size % size == 0), default=None)


def offset(weight: AffineWeight) -> int | None:
    """What is added to the weight's integers so that they lie in 0..15, or None where nothing in 0..15 does it.

    8 where the range is within -8..7, so that a zero point of 0 stays a zero of 0.
    """
    for candidate in (MIDDLE, 0, -weight.quant_min):
        if 0 <= candidate <= 15 and weight.quant_min + candidate >= 0 and weight.quant_max + candidate <= 15:
            return candidate
    return None


def scale_and_zero_of(parts: AffineValues, shift: int) -> tuple[Tensor, Tensor]:
    """``scale`` and ``zero`` of ``(q - 8) * scale + zero``, fp32 [N, K / group_size].

    With ``q = data + shift`` the weight ``(data - zero_point) * scale - minimum`` is that with
    ``zero = (8 - shift - zero_point) * scale - minimum``.
    """
    scale = parts.scale.float()
    steps = torch.full_like(scale, MIDDLE - shift)
    if parts.zero_point is not None:
        steps = steps - parts.zero_point.float()
    zero = steps * scale
    return scale, zero if parts.minimum is None else zero - parts.minimum.float()


_PACKERS: dict[str, Callable[[Tensor, int, int], Tensor]] = {
    "mma_tiled": lambda q, shift, rows: mma_tiled.pack(q, shift, out_rows=rows),
    "tile_packed_to_4d": lambda q, shift, rows: tile_packed_to_4d.pack(
        q, inner_k_tiles(q.shape[1]), shift, out_rows=rows
    ),
    "mps": lambda q, shift, rows: mps.pack(q, inner_k_tiles(q.shape[1]), shift, out_rows=rows),
    "metal": lambda q, shift, rows: metal.pack(q, shift, out_rows=rows),
    "cpu": lambda q, shift, rows: cpu.pack(q, shift, out_rows=rows),
}


def _pack_scales(scale: Tensor, zero: Tensor, layout: str, dtype: torch.dtype, in_features: int) -> Tensor:
    if layout == "mma_tiled":
        return mma_tiled.scale_and_zero(scale, zero, dtype, in_features)
    if layout == "metal":
        return torch.stack(metal.scale_and_zero(scale, zero, dtype))
    return scale_and_zero.pack(scale, zero, dtype)


def pack(b: Builder, weight: AffineWeight, kernel: Int4Kernel, dtype: torch.dtype) -> tuple[Node, Node]:
    """The constants ``<fqn>.packed`` and ``<fqn>.scale_and_zero`` of ``weight`` for ``kernel``.

    Rows are padded to the kernel's ``out_multiple`` with zeros of scale 0; K is padded by no layout but mma_tiled.

    Args:
        b: builder of the rewrite.
        weight: 4-bit, with blocks along K whose size a native group size divides.
        kernel: the kernel that will read them.
        dtype: of scale_and_zero.
    """
    native, shift = native_group_size(weight.group_size, kernel), offset(weight)
    assert native is not None and shift is not None
    repeats = weight.group_size // native
    rows = weight.shape[0]
    padding = -rows % kernel.out_multiple

    def packed() -> Tensor:
        q = values(b.program, weight).data
        if q.dtype not in (torch.int8, torch.uint8):
            q = q.to(torch.int8 if weight.quant_min < 0 else torch.uint8)
        return _PACKERS[kernel.layout](q, shift, rows + padding)

    def scales() -> Tensor:
        parts = values(b.program, weight)
        pair = scale_and_zero_of(parts, shift)
        scale, zero = (F.pad(part.repeat_interleave(repeats, dim=1), (0, 0, 0, padding)) for part in pair)
        return _pack_scales(scale, zero, kernel.layout, dtype, weight.in_features)

    form = (kernel.layout, kernel.out_multiple)
    integers = (weight.data,)
    return (
        b.constant(f"{weight.fqn}.packed", integers, (*form, shift), packed),
        b.constant(
            f"{weight.fqn}.scale_and_zero",
            weight.sources,
            (*form, native, dtype, shift, weight.block_size, weight.literal),
            scales,
        ),
    )
