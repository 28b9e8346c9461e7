"""cpu: the layout of `aten._weight_int4pack_mm_for_cpu`, uint8 [N, K/2].

The layout depends on the instruction set of the host that packs: rows come in blocks (64 with AVX-512, 32 with AVX2),
and the order of the nibbles inside a block differs. A packed weight is valid only on hosts with the same
`torch.backends.cpu.get_cpu_capability()`. This module therefore has no formula of the layout: it packs and unpacks by
calling `aten._convert_weight_to_int4pack_for_cpu`, or faster in the order of rows that this operator shows at the
first call (`block_rows`, `_row_order`).

Source: pytorch, aten/src/ATen/native/cpu/int4mm_kernel.cpp, and measurements. N % 16 == 0, K % 2 == 0, the kernel takes
group sizes 32, 64, 128 and 256 that divide K, and bf16, fp16 or fp32 activations with scale_and_zero of the same dtype.
The operator's inner_k_tiles argument has no effect.
"""

import functools

import torch

from ._checks import (
    require_dtype,
    require_four_bits,
    require_tensor,
    require_weight,
)
from .layout import Layout
from .rows import CHUNK_BYTES, RowPacker, pack_rows, pad_rows, rows_per_chunk
from .scale_and_zero import check_pairs, pack_pairs, unpack_pairs


def pack(
    q: torch.Tensor, offset: int = 0, *, out_rows: int | None = None, chunk_bytes: int = CHUNK_BYTES
) -> torch.Tensor:
    """Pack q [N, K] into uint8 [N, K/2] for this host's instruction set.

    q: uint8 or int8 on the CPU, any strides; q + offset must lie in 0..15 (offset=8 takes -8..7 as they are).
    N must be a multiple of 16, K of 2.
    out_rows: rows of the result, a multiple of 16; those beyond N hold the weight 0. By default N.
    chunk_bytes: bytes of weights that a thread packs at a time; it uses four times as much in addition to q and the
    result.

    Raises TypeError for a q of another dtype; ValueError for a bad shape or offset, a weight outside the range, a q
    that is not on the CPU, or a meta or fake q.
    """
    q, n, k = require_weight(q, offset, 16, 2, "cpu", out_rows)
    _require_cpu(q, "q")
    block = block_rows()
    packed = torch.empty(n, k // 2, dtype=torch.uint8)
    if block is None:
        packer(k, offset, n, q)(pad_rows(q, n), packed)
    else:
        pack_rows(q, packed, n, lambda rows: packer(k, offset, rows, q), chunk_bytes, multiple=block)
    return packed


def packer(k: int, offset: int, rows: int, like: torch.Tensor) -> RowPacker:
    """A function that packs at most ``rows`` rows of K weights: whole blocks, and then a shorter one at the end."""
    block = block_rows()
    transpose = _BlockPacker(k, rows, like.dtype)

    def pack(q: torch.Tensor, packed: torch.Tensor) -> None:
        require_four_bits(q, offset)
        if block is None:
            packed.copy_(_convert(q.to(torch.int32).add_(offset)))
            return
        end = q.shape[0] // block * block
        for first, last, height in ((0, end, block), (end, q.shape[0], q.shape[0] - end)):
            if first == last:
                continue
            if (order := _row_order(height)) is None:
                packed[first:last].copy_(_convert(q[first:last].to(torch.int32).add_(offset)))
            else:
                transpose(q[first:last], offset, height, order, packed[first:last])

    return pack


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
    block = block_rows()
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


class _BlockPacker:
    """Packs blocks of rows: it joins two rows to bytes, and transposes the bytes of a block.

    Bytes become wider integers that hold two, four and eight of a column, because only wide elements are transposed
    fast.
    """

    def __init__(self, k: int, rows: int, dtype: torch.dtype) -> None:
        # Allocated once: fresh memory for every chunk costs more than the arithmetic.
        self._weights = torch.empty(rows, k, dtype=dtype)
        self._joined, self._sums = torch.empty(2, rows // 2 * k, dtype=torch.uint8)
        self._wide = torch.empty(rows * k, dtype=torch.uint8)

    def __call__(self, q: torch.Tensor, offset: int, height: int, order: "_Order", packed: torch.Tensor) -> None:
        """Pack q [rows, K], ``rows`` a multiple of ``height``, into packed [rows, K/2]."""
        blocks, k = q.shape[0] // height, q.shape[1]
        columns = packed.view(blocks, k * height // 2).view(torch.int64).view(blocks, k, height // 16)
        weights = torch.add(q, offset, out=self._weights[: q.shape[0]]).view(blocks, height, k)
        parts = self._joined[: q.numel() // 2].view(blocks, height // 2, k)
        low, high = (weights[:, rows] for rows in order)
        torch.add(low, high, alpha=16, out=parts.view(q.dtype))
        wide, sums = self._wide[: q.numel()], self._sums[: q.numel() // 2]
        # Each dtype is read as unsigned, so that the high bit of the lower part does not reach the upper one.
        for narrow, dtype in ((torch.uint8, torch.int16), (torch.uint16, torch.int32), (torch.uint32, torch.int64)):
            rows = parts.shape[1] // 2
            widened = wide.view(dtype).view(blocks, rows, 2, k)
            widened.copy_(parts.view(narrow).view(blocks, rows, 2, k))
            total = sums.view(dtype).view(blocks, rows, k)
            parts = torch.add(widened[:, :, 0], widened[:, :, 1], alpha=1 << 8 * narrow.itemsize, out=total)
        # One copy per column is faster: a single copy of the swapped axes runs over rows of a few elements.
        for column in range(height // 16):
            columns[..., column].copy_(parts[:, column])


_Order = tuple[slice | torch.Tensor, slice | torch.Tensor]
"""The rows in the low nibbles of a column of a block, in memory order, and those in the high nibbles."""


@functools.cache
def _row_order(height: int) -> _Order | None:
    """The order of the rows in a block of ``height`` rows, or None if this host's layout has no such order.

    The operator itself shows it: it packs the digits of every row's number. The order is then checked: packing with it
    must give the operator's bytes.
    """
    numbers = torch.arange(height, dtype=torch.int32).view(height, 1).expand(height, 2)
    digits = [_nibbles(_convert((numbers >> shift & 15).contiguous())[: height // 2].flatten()) for shift in (0, 4)]
    rows = (digits[0].to(torch.int64) | digits[1].to(torch.int64) << 4)[:height]
    if height > 256 or height % 16 or not torch.equal(rows.sort().values, torch.arange(height)):
        return None
    order = (_as_slice(rows[0::2]), _as_slice(rows[1::2]))
    sample, packed = _sample(2 * height, 70), torch.empty(2 * height, 35, dtype=torch.uint8)
    _BlockPacker(70, 2 * height, torch.uint8)(sample, 0, height, order, packed)
    expected = [_convert(half.to(torch.int32)) for half in sample.split(height)]
    return order if torch.equal(packed, torch.cat(expected)) else None


def _as_slice(rows: torch.Tensor) -> slice | torch.Tensor:
    """``rows`` as a slice if they are evenly spaced and ascend: a slice is a view, and an index copies."""
    first, step = int(rows[0]), int(rows[1] - rows[0])
    even = step > 0 and torch.equal(rows, first + step * torch.arange(len(rows)))
    return slice(first, int(rows[-1]) + 1, step) if even else rows


def _sample(n: int, k: int) -> torch.Tensor:
    """Weights 0..15 without a short period: multiplying by a large odd number scatters the low bits."""
    index = torch.arange(n * k, dtype=torch.int64).view(n, k)
    return ((index * 0x9E3779B1) >> 20 & 15).to(torch.uint8)


@functools.cache
def block_rows() -> int | None:
    """The number of rows that the operator packs together on this host, or None if its layout has no such blocks.

    A block is [K, rows / 2] bytes, so a weight that is 0 in column 0 and 15 in column 1 shows the length of the first
    column of a block. The guess is then checked: packing in blocks must give the bytes of packing at once.
    """
    column = torch.zeros(512, 2, dtype=torch.int32)
    column[:, 1] = 15
    nonzero = _convert(column).view(-1).nonzero()
    block = 2 * int(nonzero[0])
    if block < 16 or 512 % block:
        return None
    sample = _sample(2 * block + 16, 70).to(torch.int32)
    return block if torch.equal(torch.cat([_convert(rows) for rows in sample.split(block)]), _convert(sample)) else None


def _int4pack_mm(x: torch.Tensor, packed: torch.Tensor, qparams: torch.Tensor, group_size: int) -> torch.Tensor:
    y: torch.Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu.default(x, packed, group_size, qparams)
    return y


LAYOUT = Layout(
    "cpu",
    pack=lambda q, shift, rows: pack(q, shift, out_rows=rows),
    packed_form=lambda n, k: ((n, k // 2), torch.uint8),
    packer=packer,
    unpack=unpack,
    pack_scales=pack_pairs,
    unpack_scales=unpack_pairs,
    row_multiple=16,
    column_multiple=2,
    check=check_pairs,
    block_rows=block_rows,
    kernels={"cpu": _int4pack_mm},
    # No rows: the order of rows inside a block depends on the instruction set.
    experts_axis=0,
    host_specific=True,
)
