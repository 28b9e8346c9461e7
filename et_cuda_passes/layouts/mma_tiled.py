"""mma_tiled: words in the order in which the tensor cores' left operand lies in registers, for our Triton kernel.

One int32 holds eight weights of one row, 64 along K from first to last. With block = k // 64, step = k % 64 // 16,
half = k % 16 // 8, lane = k % 8 // 2 and parity = k % 2, weight q[n][k] is in word [n, 8 block + 2 lane + parity] at
bits 4 (2 step + half) and up. A thread of ``mma.m16n8k16`` or ``wgmma.m64nNk16`` holds, of each of its rows, the
columns 2 lane + parity + 8 half of every step of 16 (PTX ISA, "Matrix Fragments for mma.m16n8k16", operand A; wgmma
has the same). Two neighbouring words are then a thread's share of a row for four steps, and no data moves between
threads. K, a multiple of 16, is padded to one of 64 with the weight 0.

Scales and zeros are one tensor [1 or 2, N, S]: the scales, and the zeros unless all of them are 0. A row holds one
number per group and then zeros. S is padded K / group + 3, rounded up to a multiple of 8, so that rows are aligned to
16 bytes and a load of four numbers never leaves the tensor.
"""

import torch
import torch.nn.functional as F

from ._checks import require_dtype, require_four_bits, require_tensor, require_weight
from .layout import ZERO_OFFSET, Layout
from .rows import CHUNK_BYTES, RowPacker, pack_rows
from .scale_and_zero import planes_of_rows, require_finite, require_pair, unpack_planes

BLOCK = 64
"""K is padded to a multiple of this."""


def padded(k: int) -> int:
    """K including its padding."""
    return -(-k // BLOCK) * BLOCK


def scale_row(k: int, group_size: int) -> int:
    """The length S of a row of scales, for K and a group size of 16, 32, 64 or 128."""
    return -(-(padded(k) // group_size + 3) // 8) * 8


def pack(
    q: torch.Tensor, offset: int = 0, *, out_rows: int | None = None, chunk_bytes: int = CHUNK_BYTES
) -> torch.Tensor:
    """Pack q [N, K] into int32 [N, padded K / 8], on q's device.

    q: uint8 or int8, any strides; q + offset must lie in 0..15 (offset=8 takes int8 weights in -8..7 as they are).
    K must be a multiple of 16.
    out_rows: rows of the result; those beyond N hold the weight 0. By default N.
    chunk_bytes: bytes of weights that a thread packs at a time; it uses six times as much in addition to q and the
    result.

    Raises TypeError for a q of another dtype; ValueError for a bad shape or offset, a weight outside the range, or a
    meta or fake q.
    """
    q, n, k = require_weight(q, offset, 1, 16, "mma_tiled", out_rows)
    words = torch.empty(n, padded(k) // 8, dtype=torch.int32, device=q.device)
    pack_rows(q, words, n, lambda rows: packer(k, offset, rows, q), chunk_bytes)
    return words


def packer(k: int, offset: int, rows: int, like: torch.Tensor) -> RowPacker:
    """A function that packs at most ``rows`` rows of K weights of like's dtype and device."""
    blocks = padded(k) // BLOCK
    # Allocated once: fresh memory for every chunk costs more than the arithmetic. The padding keeps its weight 0.
    all_weights = like.new_full((rows, blocks * BLOCK), ZERO_OFFSET)
    all_steps = like.new_empty(4, rows, blocks, 1, dtype=torch.int64)
    all_bytes = like.new_empty(4, rows, blocks, 8, dtype=torch.int32)

    def pack(q: torch.Tensor, words: torch.Tensor) -> None:
        count = q.shape[0]
        require_four_bits(q, offset)
        weights, steps, widened = all_weights[:count], all_steps[:, :count], all_bytes[:, :count]
        torch.add(q, offset, out=weights[:, :k])
        # One int64 holds the eight bytes of all lanes and parities: [step, half, row, block].
        eights = weights.view(torch.int64).view(count, blocks, 4, 2).permute(2, 3, 0, 1)
        torch.add(eights[:, 0], eights[:, 1], alpha=16, out=steps.squeeze(-1))
        widened.copy_(steps.view(torch.uint8))
        # Each step's byte is shifted to its place in the word. The last addition overflows into the sign.
        torch.add(widened[0], widened[1], alpha=1 << 8, out=widened[0])
        torch.add(widened[2], widened[3], alpha=1 << 8, out=widened[2])
        torch.add(widened[0], widened[2], alpha=1 << 16, out=words.view(count, blocks, 8))

    return pack


def unpack(packed: torch.Tensor) -> torch.Tensor:
    """The weights of `pack` as uint8 [N, padded K] in 0..15, on packed's device.

    Raises TypeError when packed is not int32, ValueError when it is not [N, padded K / 8], or is meta or fake.
    """
    packed = require_tensor(packed, "packed")
    require_dtype(packed, "packed", (torch.int32,), "give the result of pack")
    if packed.dim() != 2 or packed.numel() == 0 or packed.shape[1] % 8:
        raise ValueError(f"packed must have shape [N, padded K / 8], got {tuple(packed.shape)}")
    return unpack_words(packed).to(torch.uint8)


def unpack_words(words: torch.Tensor) -> torch.Tensor:
    """The weights 0..15 of int32 words [..., padded K / 8], as int32 [..., padded K]."""
    shifts = torch.arange(0, 32, 4, device=words.device, dtype=torch.int32)
    # Weight 8 p + w of a block of 64 is at bits 4 p and up of word w.
    q: torch.Tensor = ((words.unflatten(-1, (-1, 8, 1)) >> shifts) & 15).transpose(-1, -2).flatten(-3)
    return q


def scale_and_zero(
    scale: torch.Tensor, zero: torch.Tensor | None, dtype: torch.dtype, in_features: int
) -> torch.Tensor:
    """The kernel's `dtype` [1 or 2, N, S], from scale and zero [N, K/group] of (q - 8) * scale + zero.

    zero: None, or all 0, for a result without a plane of zeros.

    Raises TypeError for a dtype that is not bf16, fp16 or fp32, or a scale or zero that is not floating; ValueError for
    shapes that differ, a number of groups that does not divide in_features, and values that are NaN or infinite, or
    become so in `dtype`.
    """
    scale, zero = require_pair(scale, zero, dtype)
    return _planes(scale, zero if zero is not None and bool(zero.any()) else None, dtype, in_features)


def _planes(scale: torch.Tensor, zero: torch.Tensor | None, dtype: torch.dtype, in_features: int) -> torch.Tensor:
    """`scale_and_zero` with a plane of zeros unless zero is None: the rows of a weight must agree on it."""
    n, groups = scale.shape
    if groups == 0 or in_features % groups:
        raise ValueError(f"scale [N, K/group] has {groups} groups, which do not divide K = {in_features}")
    planes = [scale] if zero is None else [scale, zero]
    rows = scale.new_zeros(len(planes), n, scale_row(in_features, in_features // groups), dtype=dtype)
    for row, plane in zip(rows, planes, strict=True):
        row[:, :groups] = plane
    return require_finite(rows, "scale or zero")


def _check(count: int, scale_shape: tuple[int, ...], group_size: int, in_features: int) -> int | None:
    if len(scale_shape) != 3 or group_size < 1:
        return None
    _, rows, length = scale_shape
    k = count // rows if rows else 0
    if k == 0 or k % BLOCK or count != rows * k:
        return None
    # The constants hold K with its padding only.
    if padded(in_features) != k:
        return k
    return in_features if in_features % group_size == 0 and length == scale_row(in_features, group_size) else None


LAYOUT = Layout(
    "mma_tiled",
    pack=lambda q, shift, rows: pack(q, shift, out_rows=rows),
    packed_form=lambda n, k: ((n, padded(k) // 8), torch.int32),
    packer=packer,
    unpack=unpack,
    pack_scales=_planes,
    unpack_scales=unpack_planes,
    column_multiple=16,
    check=_check,
    rows=lambda ids, packed: unpack_words(F.embedding(ids, packed)),
    row_scales=planes_of_rows,
    experts_axis=1,
)
