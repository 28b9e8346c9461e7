"""tile_packed_to_4d: the layout of `aten._weight_int4pack_mm` on CUDA.

With I = inner_k_tiles, weight q[n][k] goes to int32 word out[n // 8][k // (16 I)][t][j], bits 4p..4p+3, where

    s = k % 32,  j = (k % (16 I)) // 32,  t = 4 (n % 8) + (s % 8) // 2,  p = s // 8 + 4 (s % 2)

Source: arrays written by `aten._convert_weight_to_int4pack` on an H100 (tests/golden_arrays), reproduced bit for bit.

How packing works: write s = 8a + 2b + c with a, b in 0..3 and c in 0..1. Eight weights that share a are eight bytes
of one int64. Adding two of those int64, the odd a times 16, makes the nibble pairs of eight bytes at once. Then the
bytes of the two sums are interleaved, and b and j change places. Each chunk takes a few torch calls.
Bytes are reinterpreted as wider integers, low byte first, which is the order on every device that has these kernels.
"""

import torch

from ._checks import (
    INNER_K_TILES,
    require_dtype,
    require_four_bits,
    require_inner_k_tiles,
    require_tensor,
    require_weight,
)
from .layout import Layout
from .rows import CHUNK_BYTES, RowPacker, pack_rows, rows_per_chunk
from .scale_and_zero import check_pairs, pack_pairs, pairs_of_rows, unpack_pairs

_LOW_NIBBLES = 0x0F0F0F0F0F0F0F0F


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
    chunk_bytes: bytes of weights that a thread packs at a time; it uses 3.5 times as much in addition to q and the
    result.

    Raises TypeError for a q of another dtype; ValueError for a bad shape, I or offset, a weight outside the range,
    or a meta or fake q.
    """
    inner = require_inner_k_tiles(inner_k_tiles)
    q, n, k = require_weight(q, offset, 8, 16 * inner, f"tile_packed_to_4d with inner_k_tiles = {inner}", out_rows)
    packed = torch.empty(packed_shape(n, k, inner), dtype=torch.int32, device=q.device)
    pack_rows(q, packed, n, lambda rows: packer(k, inner, offset, rows, q), chunk_bytes, multiple=8)
    return packed


def packed_shape(n: int, k: int, inner_k_tiles: int) -> tuple[int, ...]:
    """[N/8, K/(16 I), 32, I/2]."""
    return n // 8, k // (16 * inner_k_tiles), 32, inner_k_tiles // 2


def packer(k: int, inner_k_tiles: int, offset: int, rows: int, like: torch.Tensor) -> RowPacker:
    """A function that packs at most ``rows`` rows, a multiple of 8, of K weights of like's dtype and device."""
    k_tiles, words = k // (16 * inner_k_tiles), inner_k_tiles // 2
    # Allocated once: fresh memory for every chunk costs more than the arithmetic.
    all_weights = like.new_empty(rows, k)
    all_pairs = like.new_empty(2, rows // 8, k_tiles, 8, words, 1, dtype=torch.int64)
    all_halves = like.new_empty(2, rows // 8, k_tiles, 8, words, 8, dtype=torch.int16)

    def pack(q: torch.Tensor, packed: torch.Tensor) -> None:
        require_four_bits(q, offset)
        count, blocks = q.shape[0], q.shape[0] // 8
        weights, pairs, halves = all_weights[:count], all_pairs[:, :blocks], all_halves[:, :blocks]
        torch.add(q, offset, out=weights)
        # [a // 2, block, k tile, n % 8, j, a % 2], one int64 holding the eight bytes (b, c)
        eights = weights.view(torch.int64).view(blocks, 8, k_tiles, words, 2, 2).permute(4, 0, 2, 1, 3, 5)
        torch.add(eights[..., 0], eights[..., 1], alpha=16, out=pairs.squeeze(-1))
        halves.copy_(pairs.view(torch.uint8))
        low, high = halves
        # The sum may overflow: the top bit of the high byte is the sign of the int16.
        torch.add(low, high, alpha=256, out=low)
        done, target = low.view(torch.int32), packed.view(blocks, k_tiles, 8, 4, words)
        # One copy per j is faster: a single copy of the swapped axes runs over rows of two or four words.
        for j in range(words):
            target[..., j].copy_(done[..., j, :])

    return pack


def unpack(packed: torch.Tensor, *, chunk_bytes: int = CHUNK_BYTES) -> torch.Tensor:
    """The weights of `pack` as uint8 [N, K] in 0..15, on packed's device; N, K and I are read from packed's shape.

    Raises TypeError when packed is not int32, ValueError when it is not [N/8, K/(16 I), 32, I/2], or is meta or fake.
    """
    packed = require_packed(packed)
    n8, k_tiles, _, words = packed.shape
    n, k = n8 * 8, k_tiles * words * 32
    blocks_a_chunk = min(n8, rows_per_chunk(k, chunk_bytes, 8) // 8)
    q = torch.empty(n, k, dtype=torch.uint8, device=packed.device)
    target = q.view(torch.int64).view(n8, 8, k_tiles, words, 2, 2).permute(4, 0, 2, 1, 3, 5)

    for start in range(0, n8, blocks_a_chunk):
        chunk = packed[start : start + blocks_a_chunk].reshape(-1, k_tiles, 8, 4, words).transpose(3, 4)
        halves = chunk.contiguous().view(torch.int16)
        blocks = halves.shape[0]
        pairs = torch.empty(2, *halves.shape, dtype=torch.uint8, device=packed.device)
        pairs[0].copy_(halves)
        pairs[1].copy_(halves >> 8)
        eights = pairs.view(torch.int64).squeeze(-1)
        here = target[:, start : start + blocks]
        torch.bitwise_and(eights, _LOW_NIBBLES, out=here[..., 0])
        torch.bitwise_and(eights >> 4, _LOW_NIBBLES, out=here[..., 1])
    return q


def require_packed(packed: object) -> torch.Tensor:
    """Return `packed` if it is int32 [N/8, K/(16 I), 32, I/2] with data; raise TypeError or ValueError otherwise."""
    t = require_tensor(packed, "packed")
    require_dtype(t, "packed", (torch.int32,), "give the result of pack")
    if t.dim() != 4 or t.shape[2] != 32 or t.shape[3] not in (1, 2, 4) or t.numel() == 0:
        raise ValueError(
            f"packed must have shape [N/8, K/(16 I), 32, I/2] with I = inner_k_tiles in 2, 4, 8, got {tuple(t.shape)}"
        )
    return t


def largest_inner_k_tiles(in_features: int) -> int:
    """The largest inner_k_tiles that K, a multiple of 32, can have."""
    return next(tiles for tiles in INNER_K_TILES if in_features % (16 * tiles) == 0)


def int4pack_mm(x: torch.Tensor, packed: torch.Tensor, qparams: torch.Tensor, group_size: int) -> torch.Tensor:
    """`aten._weight_int4pack_mm`, which CUDA and MPS have."""
    y: torch.Tensor = torch.ops.aten._weight_int4pack_mm.default(x, packed, group_size, qparams)
    return y


def _rows(ids: torch.Tensor, packed: torch.Tensor) -> torch.Tensor:
    """Row n is the words 4 (n % 8) to 4 (n % 8) + 3 of its tiles."""
    blocks, tiles, _, words = packed.shape
    row = packed.view(blocks, tiles, 8, 4, words)[ids // 8, :, ids % 8]
    shifts = torch.arange(0, 32, 4, device=packed.device, dtype=torch.int32)
    # [..., k tile, b, j, c, a], with p = a + 4 c and k % 32 = 8 a + 2 b + c.
    nibbles = ((row.unsqueeze(-1) >> shifts) & 15).unflatten(-1, (2, 4))
    q: torch.Tensor = nibbles.movedim((-3, -1, -4, -2), (-4, -3, -2, -1)).flatten(-5)
    return q


LAYOUT = Layout(
    "tile_packed_to_4d",
    pack=lambda q, shift, rows: pack(q, largest_inner_k_tiles(q.shape[1]), shift, out_rows=rows),
    packed_form=lambda n, k: (packed_shape(n, k, largest_inner_k_tiles(k)), torch.int32),
    packer=lambda k, shift, rows, like: packer(k, largest_inner_k_tiles(k), shift, rows, like),
    block_rows=lambda: 8,
    unpack=unpack,
    pack_scales=pack_pairs,
    unpack_scales=unpack_pairs,
    row_multiple=8,
    column_multiple=32,
    check=check_pairs,
    kernels={"cuda": int4pack_mm},
    rows=_rows,
    row_scales=pairs_of_rows,
)
