"""cpu: the layout of `aten._weight_int4pack_mm_for_cpu`, uint8 [N, K/2].

The layout depends on the instruction set of the host that packs: rows come in blocks (64 with AVX-512, 32 with AVX2),
and the order of the nibbles inside a block differs. A packed weight is valid only on hosts with the same
`torch.backends.cpu.get_cpu_capability()`. This module therefore has no formula of the layout: it packs and unpacks by
calling `aten._convert_weight_to_int4pack_for_cpu`. It measures the height of a block at the first call (`_block_rows`).

Source: pytorch, aten/src/ATen/native/cpu/int4mm_kernel.cpp, and measurements. N % 16 == 0, K % 2 == 0, the kernel takes
group sizes 32, 64, 128 and 256 that divide K, and bf16, fp16 or fp32 activations with scale_and_zero of the same dtype.
The operator's inner_k_tiles argument has no effect.
"""

import functools

import torch

from ._checks import (
    CHUNK_BYTES,
    pad_rows,
    require_dtype,
    require_four_bits,
    require_tensor,
    require_weight,
    rows_per_chunk,
)
from .layout import Layout
from .scale_and_zero import check_pairs, pack_pairs, unpack_pairs
from .threads import for_chunks

# The operator walks down the columns of an int32 tensor, so K is cut into strips that stay in a cache. Rows that are a
# power of two bytes apart evict each other from it, so a strip is not 512 wide. Strips of an 8192 x 4096 weight pack at
# 1400 MB/s, whole rows at 460 (AVX-512, one core).
_STRIP = 448


def pack(
    q: torch.Tensor, offset: int = 0, *, out_rows: int | None = None, chunk_bytes: int = CHUNK_BYTES
) -> torch.Tensor:
    """Pack q [N, K] into uint8 [N, K/2] for this host's instruction set.

    q: uint8 or int8 on the CPU, any strides; q + offset must lie in 0..15 (offset=8 takes -8..7 as they are).
    N must be a multiple of 16, K of 2.
    out_rows: rows of the result, a multiple of 16; those beyond N hold the weight 0. By default N.
    chunk_bytes: bytes of the operator's int32 input that a thread packs at a time; it uses 9/8 of it in addition to q
    and the result.

    Raises TypeError for a q of another dtype; ValueError for a bad shape or offset, a weight outside the range, a q
    that is not on the CPU, or a meta or fake q.
    """
    q, n, k = require_weight(q, offset, 16, 2, "cpu", out_rows)
    _require_cpu(q, "q")
    block = _block_rows()
    if block is None:
        require_four_bits(q, offset)
        return _convert(pad_rows(q.to(torch.int32), n).add_(offset))
    rows, height = rows_per_chunk(4 * min(k, _STRIP), chunk_bytes, block), block
    packed = torch.empty(n, k // 2, dtype=torch.uint8)

    def pack_rows(start: int, stop: int) -> None:
        chunk = pad_rows(q[start:stop], stop - start)
        require_four_bits(chunk, offset)
        _pack_blocks(chunk, offset, height, packed[start:stop])

    for_chunks(n, rows, lambda: pack_rows, q.device)
    return packed


def unpack(packed: torch.Tensor, *, chunk_bytes: int = CHUNK_BYTES) -> torch.Tensor:
    """The weights of `pack` as uint8 [N, K] in 0..15; packed must come from a host with the same instruction set.

    The operator itself shows the place of each weight: it packs the digits of every weight's index, and from the result
    the index of each nibble is read.

    Raises TypeError when packed is not uint8; ValueError when it is not [N, K/2] with N % 16 == 0, is not on the CPU,
    or is meta or fake.
    """
    packed = require_tensor(packed, "packed")
    require_dtype(packed, "packed", (torch.uint8,), "give the result of pack")
    _require_cpu(packed, "packed")
    if packed.dim() != 2 or packed.numel() == 0 or packed.shape[0] % 16:
        raise ValueError(f"packed must have shape [N, K/2] with N a multiple of 16, got {tuple(packed.shape)}")
    n, k = packed.shape[0], packed.shape[1] * 2
    block = _block_rows()
    # Indices are int64, so a chunk has an eighth of the rows that it has for one-byte weights.
    rows = n if block is None else min(n, rows_per_chunk(8 * k, chunk_bytes, block))
    q = torch.empty(n, k, dtype=torch.uint8)
    source = _source_of_nibbles(rows, k)
    for start in range(0, n, rows):
        chunk = packed[start : start + rows]
        if chunk.shape[0] != rows:
            source = _source_of_nibbles(chunk.shape[0], k)
        q[start : start + rows].view(-1)[source] = _nibbles(chunk)
    return q


def _require_cpu(t: torch.Tensor, name: str) -> None:
    if t.device.type != "cpu":
        raise ValueError(f"{name} is on {t.device}; the cpu layout is packed on the CPU: move it with .cpu()")


def _convert(weights: torch.Tensor) -> torch.Tensor:
    packed: torch.Tensor = torch.ops.aten._convert_weight_to_int4pack_for_cpu(weights, 8)
    return packed


def _nibbles(packed: torch.Tensor) -> torch.Tensor:
    """All nibbles of `packed` in memory order, low before high, as uint8 [2 * numel]."""
    return torch.stack((packed & 15, packed >> 4), dim=-1).view(-1)


def _source_of_nibbles(rows: int, k: int) -> torch.Tensor:
    """The flat index of the weight in each nibble of a packed [rows, k] weight: int64 [rows * k]."""
    index = torch.arange(rows * k, dtype=torch.int32).view(rows, k)
    source = torch.zeros(rows * k, dtype=torch.int64)
    for shift in range(0, (rows * k - 1).bit_length(), 4):
        digits = _nibbles(_convert((index >> shift) & 15))
        source |= digits.to(torch.int64) << shift
    return source


def _pack_blocks(chunk: torch.Tensor, offset: int, block: int, packed: torch.Tensor) -> None:
    """Pack chunk [rows, K] into packed [rows, K/2], strip by strip; rows after the whole blocks are one more block."""
    rows, k = chunk.shape
    end = rows // block * block
    for first, last, height in ((0, end, block), (end, rows, rows - end)):
        if first == last:
            continue
        target = packed[first:last].view(-1, k, height // 2)
        for begin in range(0, k, _STRIP):
            strip = chunk[first:last, begin : begin + _STRIP].to(torch.int32, memory_format=torch.contiguous_format)
            width = strip.shape[1]
            target[:, begin : begin + width].copy_(_convert(strip.add_(offset)).view(-1, width, height // 2))


@functools.cache
def _block_rows() -> int | None:
    """The number of rows that the operator packs together on this host, or None if its layout has no such blocks.

    A block is [K, rows / 2] bytes, so a weight that is 0 in column 0 and 15 in column 1 shows the length of the first
    column of a block. The guess is then checked: packing in strips must give the bytes of packing at once.
    """
    column = torch.zeros(512, 2, dtype=torch.int32)
    column[:, 1] = 15
    nonzero = _convert(column).view(-1).nonzero()
    block = 2 * int(nonzero[0])
    if block < 16 or 512 % block:
        return None
    n, k = 2 * block + 16, _STRIP + 34
    index = torch.arange(n * k, dtype=torch.int64).view(n, k)
    # Multiplying by a large odd number scatters the low bits, so that the sample has no short period.
    sample = ((index * 0x9E3779B1) >> 20 & 15).to(torch.uint8)
    packed = torch.empty(n, k // 2, dtype=torch.uint8)
    _pack_blocks(sample, 0, block, packed)
    return block if torch.equal(packed, _convert(sample.to(torch.int32))) else None


def _int4pack_mm(x: torch.Tensor, packed: torch.Tensor, qparams: torch.Tensor, group_size: int) -> torch.Tensor:
    y: torch.Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu.default(x, packed, group_size, qparams)
    return y


LAYOUT = Layout(
    "cpu",
    pack=lambda q, shift, rows: pack(q, shift, out_rows=rows),
    unpack=unpack,
    pack_scales=pack_pairs,
    unpack_scales=unpack_pairs,
    check=check_pairs,
    kernels={"cpu": _int4pack_mm},
    # No rows: the order of rows inside a block depends on the instruction set.
    experts_axis=0,
    host_specific=True,
)
