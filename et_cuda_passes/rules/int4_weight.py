"""From a decoded weight to a kernel's constants: the integers packed, scales and zeros in the kernel's form."""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import Node

from et_cuda_passes.graph.builder import Builder
from et_cuda_passes.kernels.int4 import Int4Kernel
from et_cuda_passes.layouts import cpu, metal, mma_tiled, mps, scale_and_zero, tile_packed_to_4d
from et_cuda_passes.quant.affine import QuantizedWeight, WeightValues, weight_values

MIDDLE = 8
"""The kernels compute ``(q - 8) * scale + zero`` with q in 0..15."""


def inner_k_tiles(in_features: int) -> int:
    """The largest inner_k_tiles of 8, 4 and 2 that ``in_features``, a multiple of 32, can have."""
    return next(tiles for tiles in (8, 4, 2) if in_features % (16 * tiles) == 0)


def native_group_size(group_size: int, kernel: Int4Kernel) -> int | None:
    """The largest of the kernel's group sizes that divides ``group_size``; scales are repeated for the rest."""
    return max((size for size in kernel.group_sizes if group_size % size == 0), default=None)


def offset(weight: QuantizedWeight, layout: str = "") -> int | None:
    """What is added to the weight's integers so that they lie in 0..15, or None where nothing in 0..15 does it.

    8 where the range is within -8..7, so that a zero point of 0 stays a zero of 0. The metal layout holds the zero of
    0..15 itself, -(offset + zero point) * scale: there it is the least power of two, or 0, so that the zero is small,
    and that of a zero point of 0 is a scale with another exponent.
    """
    low = weight.quant_min
    least = 1 << (-low - 1).bit_length() if low < 0 else 0
    for candidate in (*([least] if layout == "metal" else []), MIDDLE, 0, -low):
        if 0 <= candidate <= 15 and low + candidate >= 0 and weight.quant_max + candidate <= 15:
            return candidate
    return None


def scale_and_zero_of(parts: WeightValues, shift: int) -> tuple[Tensor, Tensor]:
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


def _in_bytes(q: Tensor, weight: QuantizedWeight) -> Tensor:
    return q if q.dtype in (torch.int8, torch.uint8) else q.to(torch.int8 if weight.quant_min < 0 else torch.uint8)


def pack(
    b: Builder, weights: Sequence[QuantizedWeight], kernel: Int4Kernel, dtype: torch.dtype, name: str = ""
) -> tuple[Node, Node]:
    """The constants ``<fqn>.packed`` and ``<fqn>.scale_and_zero`` of ``weights`` for ``kernel``.

    The rows of several weights follow each other, in one constant under the first one's FQN. They are padded at their
    end to the kernel's ``out_multiple``, with zeros of scale 0; K is padded by no layout but mma_tiled.

    Args:
        b: builder of the rewrite.
        weights: 4-bit, with blocks along K whose size a native group size divides; equal in all but N, sources and
            whether they have zero points.
        kernel: the kernel that will read them.
        dtype: of scale_and_zero.
        name: put before ``packed`` and ``scale_and_zero``.
    """
    first = weights[0]
    native, shift = native_group_size(first.group_size, kernel), offset(first, kernel.layout)
    assert native is not None and shift is not None
    repeats = first.group_size // native
    rows = sum(weight.shape[0] for weight in weights)
    padding = -rows % kernel.out_multiple

    def packed() -> Tensor:
        parts = [weight_values(b.program, weight).data for weight in weights]
        q = _in_bytes(parts[0] if len(parts) == 1 else torch.cat(parts), first)
        return _PACKERS[kernel.layout](q, shift, rows + padding)

    def scales() -> Tensor:
        pairs = [scale_and_zero_of(weight_values(b.program, weight), shift) for weight in weights]
        pair = (torch.cat(column) for column in zip(*pairs, strict=True))
        scale, zero = (F.pad(part.repeat_interleave(repeats, dim=1), (0, 0, 0, padding)) for part in pair)
        return _pack_scales(scale, zero, kernel.layout, dtype, first.in_features)

    form = (kernel.layout, kernel.out_multiple, shift)
    # Beside the stack's own name and not inside it, since the stack may stay for other readers.
    name += "" if first.expert is None else f"expert_{first.expert}_"
    integers, numbers = (tuple(part) for part in zip(*((w.integers_key, w.values_key) for w in weights), strict=True))
    return (
        b.constant(f"{first.fqn}.{name}packed", [weight.data for weight in weights], (*form, integers), packed),
        b.constant(
            f"{first.fqn}.{name}scale_and_zero",
            [part for weight in weights for part in weight.sources],
            (*form, native, dtype, numbers),
            scales,
        ),
    )


def pack_experts(
    b: Builder, weight: QuantizedWeight, count: int, kernel: Int4Kernel, dtype: torch.dtype
) -> tuple[Node, Node]:
    """The constants ``<fqn>.packed`` and ``<fqn>.scale_and_zero`` of a stack of experts, each packed as a linear's.

    Args:
        b: builder of the rewrite.
        weight: the rows of all experts as one matrix [E * N, K], as for :func:`pack`.
        count: E.
        kernel: the kernel that will read them.
        dtype: of scale_and_zero.
    """
    native, shift = native_group_size(weight.group_size, kernel), offset(weight, kernel.layout)
    assert native is not None and shift is not None
    repeats, n = weight.group_size // native, weight.shape[0] // count
    padding = -n % kernel.out_multiple

    def packed() -> Tensor:
        q = _in_bytes(weight_values(b.program, weight).data, weight)
        return torch.stack([_PACKERS[kernel.layout](rows, shift, n + padding) for rows in q.split(n)])

    def scales() -> Tensor:
        parts = scale_and_zero_of(weight_values(b.program, weight), shift)
        scale, zero = (part.repeat_interleave(repeats, dim=1) for part in parts)
        if kernel.layout == "mma_tiled":
            # The zeros lie behind all scales, for all experts or for none.
            pairs = mma_tiled.scale_and_zero(scale, zero, dtype, weight.in_features)
            return pairs.view(pairs.shape[0], count, n, -1)
        split = (F.pad(part.view(count, n, -1), (0, 0, 0, padding)) for part in (scale, zero))
        pairs_of = zip(*split, strict=True)
        return torch.stack([_pack_scales(s, z, kernel.layout, dtype, weight.in_features) for s, z in pairs_of])

    form = ("experts", kernel.layout, kernel.out_multiple, shift, count)
    return (
        b.constant(f"{weight.fqn}.packed", [weight.data], (*form, weight.integers_key), packed),
        b.constant(f"{weight.fqn}.scale_and_zero", weight.sources, (*form, native, dtype, weight.values_key), scales),
    )
