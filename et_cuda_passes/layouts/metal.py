"""metal: the layout of `torchao::_linear_fp_act_4bit_weight`, the int4 linear of ExecuTorch's Metal backend.

The weight is uint8 [N, K/2], row-major, the even k in the low nibble. The mps layout has the same bytes in another
shape. Scale and zero are two planes [2, N, K/group], and the kernel computes q * S + Z with q in 0..15.

Source: executorch, backends/apple/metal/runtime/ops/op_linear_4bit.mm, and torchao,
experimental/ops/mps/linear_fp_act_xbit_weight_aten.mm. The kernel needs K % 8 == 0, a group size in 32, 64, 128, 256,
S and Z of the dtype of the activations, and N % 4 == 0 unless M is 1. ExecuTorch's kernel has fp32 and bf16; torchao's
also has fp16.
"""

import torch
import torch.nn.functional as F

from ._checks import require_dtype, require_four_bits, require_tensor, require_weight
from .layout import Layout, unsigned_shift
from .rows import CHUNK_BYTES, RowPacker, join_neighbours, pack_rows
from .scale_and_zero import planes_of_rows, require_finite, require_pair, unpack_planes


def pack(
    q: torch.Tensor, offset: int = 0, *, out_rows: int | None = None, chunk_bytes: int = CHUNK_BYTES
) -> torch.Tensor:
    """Pack q [N, K] into uint8 [N, K/2], on q's device.

    q: uint8 or int8, any strides; q + offset must lie in 0..15 (offset=8 takes int8 weights in -8..7 as they are).
    K must be a multiple of 8.
    out_rows: rows of the result; those beyond N hold the weight 0. By default N.
    chunk_bytes: bytes of weights that a thread packs at a time; it uses twice as much in addition to q and the result.

    Raises TypeError for a q of another dtype; ValueError for a bad shape or offset, a weight outside the range, or a
    meta or fake q.
    """
    return pack_pairs(q, offset, 8, "metal", out_rows, chunk_bytes)


def pack_pairs(
    q: torch.Tensor, offset: int, columns: int, layout: str, out_rows: int | None, chunk_bytes: int
) -> torch.Tensor:
    """As `pack`, with the even k in the low nibble, for any layout with these bytes; K is a multiple of `columns`."""
    q, n, k = require_weight(q, offset, 1, columns, layout, out_rows)
    packed = torch.empty(n, k // 2, dtype=torch.uint8, device=q.device)
    pack_rows(q, packed, n, lambda rows: packer(k, offset, rows, q), chunk_bytes)
    return packed


def unpack(packed: torch.Tensor) -> torch.Tensor:
    """The weights of `pack` as uint8 [N, K] in 0..15, on packed's device.

    Raises TypeError when packed is not uint8, ValueError when it is not [N, K/2], or is meta or fake.
    """
    packed = require_tensor(packed, "packed")
    require_dtype(packed, "packed", (torch.uint8,), "give the result of pack")
    if packed.dim() != 2 or packed.numel() == 0:
        raise ValueError(f"packed must have shape [N, K/2], got {tuple(packed.shape)}")
    return unpack_bytes(packed)


def scale_and_zero(
    scale: torch.Tensor, zero: torch.Tensor | None, dtype: torch.dtype = torch.bfloat16
) -> tuple[torch.Tensor, torch.Tensor]:
    """The kernel's (S, Z), each `dtype` [N, K/group], from scale and zero [N, K/group] of (q - 8) * scale + zero.

    zero: None for zeros that are all 0.

    S = round(scale) and Z = round(zero - 8 * S), in fp32 before the last rounding. Z is computed from the rounded S so
    that a zero of 0 stays exact: -8 * S has the mantissa of S.

    Raises TypeError for a dtype that is not bf16, fp16 or fp32 or a scale or zero that is not floating; ValueError for
    shapes that differ, and for values that are NaN or infinite, or become so in `dtype`.
    """
    scale, zero = require_pair(scale, zero, dtype)
    s = scale.to(dtype)
    z = ((0 if zero is None else zero.float()) - 8 * s.float()).to(dtype)
    return require_finite(s, "scale").contiguous(), require_finite(z, "zero - 8 * scale").contiguous()


def packer(k: int, offset: int, rows: int, like: torch.Tensor) -> RowPacker:
    """A function that packs at most ``rows`` rows of K weights, K even: two per byte, the even k in the low nibble."""
    # Allocated once: fresh memory for every chunk costs more than the arithmetic.
    all_weights, buffer = like.new_empty(rows, k), like.new_empty(rows, k // 2, dtype=torch.int16)

    def pack(q: torch.Tensor, packed: torch.Tensor) -> None:
        require_four_bits(q, offset)
        join_neighbours(torch.add(q, offset, out=all_weights[: q.shape[0]]), 4, buffer, packed)

    return pack


def unpack_bytes(packed: torch.Tensor) -> torch.Tensor:
    """The inverse of `pack_bytes`: uint8 [N, K] from uint8 [N, K/2]."""
    n, half = packed.shape
    q = torch.empty(n, half, 2, dtype=torch.uint8, device=packed.device)
    torch.bitwise_and(packed, 15, out=q[..., 0])
    torch.bitwise_right_shift(packed, 4, out=q[..., 1])
    return q.view(n, half * 2)


def rows_of_bytes(ids: torch.Tensor, packed: torch.Tensor) -> torch.Tensor:
    """Rows of `pack_bytes`'s result as uint8 [*ids.shape, K]."""
    row = F.embedding(ids, packed)
    return torch.stack((row & 15, row >> 4), dim=-1).flatten(-2)


def _pack_scales(scale: torch.Tensor, zero: torch.Tensor | None, dtype: torch.dtype, in_features: int) -> torch.Tensor:
    return torch.stack(scale_and_zero(scale, zero, dtype))


def _check(count: int, scale_shape: tuple[int, ...], group_size: int, in_features: int) -> int | None:
    if len(scale_shape) != 3 or scale_shape[0] != 2:
        return None
    _, rows, groups = scale_shape
    return groups * group_size if count == rows * groups * group_size else None


def _shift(low: int, high: int) -> int | None:
    """Prefer the smallest power of two that makes the integers unsigned.

    Z is -(shift + zero point) * scale. A small shift keeps Z small. A power of two makes Z, for a zero point of 0, the
    scale with another exponent, which is exact.
    """
    return unsigned_shift(low, high, preferred=1 << (-low - 1).bit_length() if low < 0 else 0)


def _torchao_linear(x: torch.Tensor, packed: torch.Tensor, qparams: torch.Tensor, group_size: int) -> torch.Tensor:
    # torchao registers this operator on macOS only, so look it up at the call.
    kernel = torch.ops.torchao._linear_fp_act_4bit_weight.default
    y: torch.Tensor = kernel(x, packed, group_size, qparams[0], qparams[1])
    return y


LAYOUT = Layout(
    "metal",
    pack=lambda q, shift, rows: pack(q, shift, out_rows=rows),
    packed_form=lambda n, k: ((n, k // 2), torch.uint8),
    packer=packer,
    unpack=unpack,
    pack_scales=_pack_scales,
    unpack_scales=unpack_planes,
    column_multiple=8,
    check=_check,
    zero_offset=0,
    shift=_shift,
    kernels={"mps": _torchao_linear},
    rows=rows_of_bytes,
    row_scales=planes_of_rows,
)
