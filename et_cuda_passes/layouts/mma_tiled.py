"""mma_tiled: words in the order in which the tensor cores' left operand lies in registers, for our Triton kernel.

One int32 holds eight weights of one row, 64 along K from first to last. With block = k // 64, step = k % 64 // 16,
half = k % 16 // 8, lane = k % 8 // 2 and parity = k % 2, weight q[n][k] is in word [n, 8 block + 2 lane + parity] at
bits 4 (2 step + half) and up. A thread of ``mma.m16n8k16`` or ``wgmma.m64nNk16`` holds, of each of its rows, the
columns 2 lane + parity + 8 half of every step of 16 (PTX ISA, "Matrix Fragments for mma.m16n8k16", operand A; the
same for wgmma's): two neighbouring words are then a thread's share of a row for four steps, and nothing moves between
threads. K is padded to a multiple of 64 with the weight 0.

Scales and zeros are one tensor [1 or 2, N, S]: the scales, and the zeros unless all of them are 0. Each row holds one
for each group, those of the padding 0, in S = the padded K / group + 3 rounded up to a multiple of 8: rows start at
16 bytes, and a load of four never leaves the tensor.
"""

import torch

from ._checks import CHUNK_BYTES, require_dtype, require_four_bits, require_tensor, require_weight, rows_per_chunk
from .scale_and_zero import require_finite, require_pair

BLOCK = 64
"""K is padded to a multiple of this."""


def padded(k: int) -> int:
    """K with its padding."""
    return -(-k // BLOCK) * BLOCK


def scale_row(k: int, group_size: int) -> int:
    """Elements of a row of scales, for K and a group size in 32, 64 and 128."""
    return -(-(padded(k) // group_size + 3) // 8) * 8


def pack(
    q: torch.Tensor, offset: int = 0, *, out_rows: int | None = None, chunk_bytes: int = CHUNK_BYTES
) -> torch.Tensor:
    """Packs q [N, K] into int32 [N, padded K / 8], on q's device.

    q: uint8 or int8, any strides; q + offset must lie in 0..15 (offset=8 takes int8 weights in -8..7 as they are).
    K must be a multiple of 32.
    out_rows: rows of the result; those beyond N hold the weight 0. By default N.
    chunk_bytes: how many weights are worked on at a time; as much memory is used above q and the result.

    Raises TypeError for a q of another dtype; ValueError for a bad shape or offset, a weight outside the range, or a
    meta or fake q.
    """
    q, n, k = require_weight(q, offset, 1, 32, "mma_tiled", out_rows)
    blocks = padded(k) // BLOCK
    packed = torch.empty(n, blocks, 8, 4, dtype=torch.uint8, device=q.device)
    packed[q.shape[0] :] = offset * 17
    rows = rows_per_chunk(k, chunk_bytes, 1)
    for start in range(0, q.shape[0], rows):
        chunk = q[start : start + rows]
        require_four_bits(chunk, offset)
        whole = chunk.new_full((len(chunk), blocks * BLOCK), 8 - offset)
        whole[:, :k] = chunk
        # Eight bytes, lane and parity, at a time: [row, block, step, half].
        halves = (whole + offset).view(torch.int64).view(len(chunk), blocks, 4, 2)
        steps = halves[..., 0] | (halves[..., 1] << 4)
        packed[start : start + len(chunk)] = steps.view(torch.uint8).view(len(chunk), blocks, 4, 8).transpose(2, 3)
    return packed.view(torch.int32).view(n, blocks * 8)


def unpack(packed: torch.Tensor) -> torch.Tensor:
    """The weights of `pack` as uint8 [N, padded K] in 0..15, on packed's device.

    Raises TypeError when packed is not int32, ValueError when it is not [N, padded K / 8], or is meta or fake.
    """
    packed = require_tensor(packed, "packed")
    require_dtype(packed, "packed", (torch.int32,), "give what pack returned")
    if packed.dim() != 2 or packed.numel() == 0 or packed.shape[1] % 8:
        raise ValueError(f"packed must have shape [N, padded K / 8], got {tuple(packed.shape)}")
    n, words = packed.shape
    # [row, block, lane and parity, step] bytes, each the two halves of a step.
    steps = packed.contiguous().view(torch.uint8).view(n, words // 8, 8, 4).transpose(2, 3)
    return torch.stack((steps & 15, steps >> 4), dim=3).view(n, words * 8)


def scale_and_zero(scale: torch.Tensor, zero: torch.Tensor, dtype: torch.dtype, in_features: int) -> torch.Tensor:
    """The kernel's `dtype` [1 or 2, N, S], from scale and zero [N, K/group] of (q - 8) * scale + zero.

    Raises TypeError for a dtype that is not bf16, fp16 or fp32 or a scale or zero that is not floating; ValueError for
    shapes that differ or that do not divide in_features, K, and for values that are NaN or infinite, or become so in
    `dtype`.
    """
    scale, zero = require_pair(scale, zero, dtype)
    n, groups = scale.shape
    if groups == 0 or in_features % groups:
        raise ValueError(f"scale [N, K/group] has {groups} groups, which do not divide K = {in_features}")
    has_zero = bool((zero != 0).any())
    rows = torch.zeros(1 + has_zero, n, scale_row(in_features, in_features // groups), dtype=dtype, device=scale.device)
    rows[0, :, :groups] = scale
    if has_zero:
        rows[1, :, :groups] = zero
    return require_finite(rows, "scale or zero")
