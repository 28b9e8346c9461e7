"""embedding_table: the layout of ExecuTorch's quantized embeddings, `quantized_decomposed::embedding_{2bit,4bit,byte}`.

4 bits: two weights per byte, the even k in the high nibble. 2 bits: four per byte, k % 4 = 0 in the lowest bits. Both
are uint8 [N, K * bits / 8] and unsigned. 8 bits: int8 [N, K].

A kernel computes (u - 2**(bits - 1) - zero_point) * scale.

Source, also run: executorch 1.5.1, kernels/quantized/cpu/embeddingxb.cpp and op_embedding.cpp, and
exir/passes/_quant_patterns_and_replacements.py.
"""

import torch

from ._checks import CHUNK_BYTES, require_dtype, require_tensor, rows_per_chunk
from .threads import for_chunks

# The position of each weight in a byte, from the first weight on.
_SHIFTS = {2: (0, 2, 4, 6), 4: (4, 0), 8: (0,)}
BITS = tuple(_SHIFTS)


def weights_per_byte(bits: int) -> int:
    """The number of weights in a byte, which K must be a multiple of. Raises ValueError for bits other than 2, 4, 8."""
    if bits not in _SHIFTS:
        raise ValueError(f"bits must be 2, 4 or 8, got {bits!r}")
    return len(_SHIFTS[bits])


def pack(q: torch.Tensor, bits: int, offset: int = 0, *, chunk_bytes: int = CHUNK_BYTES) -> torch.Tensor:
    """Pack q [N, K] into uint8 [N, K * bits / 8], for 8 bits int8 [N, K], on q's device.

    q: of any integer dtype, any strides; u = q + offset must lie in 0..2**bits - 1.
    bits: 2, 4 or 8.
    chunk_bytes: weights that a thread packs at a time; it uses eight times as many bytes in addition to q and the
    result.

    Raises TypeError for a q that holds no integers; ValueError for other bits, a bad shape, a weight outside the
    range, or a meta or fake q.
    """
    per_byte = weights_per_byte(bits)
    q = require_tensor(q, "q")
    if q.dtype.is_floating_point or q.dtype.is_complex or q.dtype is torch.bool:
        raise TypeError(f"q must hold integers, one per element, got {q.dtype}")
    if q.dim() != 2 or q.numel() == 0:
        raise ValueError(f"q must be 2-D [N, K] and not empty, got shape {tuple(q.shape)}")
    n, k = q.shape
    if k % per_byte:
        raise ValueError(f"a table of {bits} bits needs K to be a multiple of {per_byte}, got K = {k}")
    out = torch.empty(n, k // per_byte, dtype=torch.uint8, device=q.device)
    rows = rows_per_chunk(k, chunk_bytes, 1)

    def pack_rows(start: int, stop: int) -> None:
        # In int32 no sum overflows, for any dtype and offset.
        u = q[start:stop].to(torch.int32) + offset
        low, high = (int(end) for end in torch.aminmax(u))
        if low < 0 or high >= 1 << bits:
            raise ValueError(
                f"weights must lie in {-offset}..{(1 << bits) - 1 - offset} (offset {offset}), "
                f"found {low - offset}..{high - offset}; check the offset, or that the table has {bits} bits"
            )
        packed = torch.zeros_like(u[:, ::per_byte])
        for place, shift in enumerate(_SHIFTS[bits]):
            packed |= u[:, place::per_byte] << shift
        # The kernel for 8 bits reads int8, u - 128, which is u with its top bit flipped.
        out[start:stop] = packed ^ 128 if bits == 8 else packed

    for_chunks(n, rows, lambda: pack_rows, q.device)
    return out.view(torch.int8) if bits == 8 else out


def unpack(packed: torch.Tensor, bits: int) -> torch.Tensor:
    """The weights of `pack` as uint8 [N, K] in 0..2**bits - 1, on packed's device.

    Raises TypeError when packed has another dtype than the result of pack; ValueError for other bits, and when packed
    is not 2-D, is empty, meta or fake.
    """
    weights_per_byte(bits)
    packed = require_tensor(packed, "packed")
    require_dtype(packed, "packed", (torch.int8 if bits == 8 else torch.uint8,), "give the result of pack")
    if packed.dim() != 2 or packed.numel() == 0:
        raise ValueError(f"packed must be 2-D and not empty, got shape {tuple(packed.shape)}")
    if bits == 8:
        return packed.view(torch.uint8) ^ 128
    parts = [packed >> shift & (1 << bits) - 1 for shift in _SHIFTS[bits]]
    return torch.stack(parts, dim=-1).flatten(1)
