"""mps: the layout of `aten._weight_int4pack_mm` on MPS.

Row-major bytes: weight q[n][k] is in byte n K/2 + k // 2, the even k in the low nibble, the odd k in the high one. The
tensor has the nominal shape of tile_packed_to_4d, int32 [N/8, K/(16 I), 32, I/2] with I = inner_k_tiles, because the
operator has one shape rule for all devices. I changes the shape and no byte.

Source: pytorch, aten/src/ATen/native/mps/operations/Quantized.mm (`_convert_weight_to_int4pack_mps` takes the
nominal shape "fake" and swaps the nibbles of its uint8 [N, K/2] input, whose even k is the high one) and
aten/src/ATen/native/mps/kernels/Quantized.metal (`int4pack_mm` reads rows of K/2 bytes, low nibble first, and
computes (q - 8) * scale + zero from scale_and_zero [K/group, N, 2] of the activation's dtype).

The kernel has fp32, fp16 and bf16, and group sizes 32, 64, 128 and 256. It rounds zero - 8 * scale to the dtype.
"""

import torch

from . import metal
from ._checks import require_inner_k_tiles, require_weight
from .layout import Layout
from .metal import rows_of_bytes, unpack_bytes
from .rows import CHUNK_BYTES, RowPacker, pack_rows
from .scale_and_zero import check_pairs, pack_pairs, pairs_of_rows, unpack_pairs
from .tile_packed_to_4d import int4pack_mm, largest_inner_k_tiles, packed_shape, require_packed


def pack(
    q: torch.Tensor,
    inner_k_tiles: int,
    offset: int = 0,
    *,
    out_rows: int | None = None,
    chunk_bytes: int = CHUNK_BYTES,
) -> torch.Tensor:
    """Pack q [N, K] into int32 [N/8, K/(16 I), 32, I/2], on q's device.

    q: uint8 or int8, any strides; q + offset must lie in 0..15 (offset=8 takes int8 weights in -8..7 as they are).
    inner_k_tiles: I, one of 2, 4, 8. N must be a multiple of 8, K of 16 I.
    out_rows: rows of the result, a multiple of 8; those beyond N hold the weight 0. By default N.
    chunk_bytes: bytes of weights that a thread packs at a time; it uses twice as much in addition to q and the result.

    Raises TypeError for a q of another dtype; ValueError for a bad shape, I or offset, a weight outside the range,
    or a meta or fake q.
    """
    inner = require_inner_k_tiles(inner_k_tiles)
    q, n, k = require_weight(q, offset, 8, 16 * inner, f"mps with inner_k_tiles = {inner}", out_rows)
    packed = torch.empty(packed_shape(n, k, inner), dtype=torch.int32, device=q.device)
    pack_rows(q, packed, n, lambda rows: packer(k, offset, rows, q), chunk_bytes, multiple=8)
    return packed


def packer(k: int, offset: int, rows: int, like: torch.Tensor) -> RowPacker:
    """A function that packs at most ``rows`` rows, a multiple of 8, of K weights of like's dtype and device."""
    pack_bytes = metal.packer(k, offset, rows, like)
    return lambda q, packed: pack_bytes(q, packed.view(q.shape[0], k // 8).view(torch.uint8))


def unpack(packed: torch.Tensor) -> torch.Tensor:
    """The weights of `pack` as uint8 [N, K] in 0..15, on packed's device; N and K are read from packed's shape.

    Raises TypeError when packed is not int32, ValueError when it is not [N/8, K/(16 I), 32, I/2], or is meta or fake.
    """
    packed = require_packed(packed)
    n8, k_tiles, _, words = packed.shape
    k = k_tiles * words * 32
    return unpack_bytes(packed.contiguous().view(n8 * 8, k // 8).view(torch.uint8))


def _rows(ids: torch.Tensor, packed: torch.Tensor) -> torch.Tensor:
    return rows_of_bytes(ids, packed.view(torch.uint8).reshape(packed.shape[0] * 8, -1))


LAYOUT = Layout(
    "mps",
    pack=lambda q, shift, rows: pack(q, largest_inner_k_tiles(q.shape[1]), shift, out_rows=rows),
    packed_form=lambda n, k: (packed_shape(n, k, largest_inner_k_tiles(k)), torch.int32),
    packer=packer,
    block_rows=lambda: 8,
    unpack=unpack,
    pack_scales=pack_pairs,
    unpack_scales=unpack_pairs,
    row_multiple=8,
    column_multiple=32,
    check=check_pairs,
    kernels={"mps": int4pack_mm},
    rows=_rows,
    row_scales=pairs_of_rows,
)
