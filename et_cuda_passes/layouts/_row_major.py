"""Two weights to a byte, row by row: what the mps and metal layouts share."""

import torch

from ._checks import require_four_bits, rows_per_chunk


def pack_rows(q: torch.Tensor, offset: int, chunk_bytes: int, out_rows: int) -> torch.Tensor:
    """Weights [N, K], K even as checked by the caller, as uint8 [out_rows, K/2]: the even k in the low nibble."""
    n, k = q.shape
    rows = min(n, rows_per_chunk(k, chunk_bytes, 1))
    out = torch.empty(out_rows, k // 2, dtype=torch.uint8, device=q.device)
    out[n:] = offset * 17
    # The sums are meant to wrap, and do so alike in int8 and uint8.
    same_bytes = out.view(q.dtype)
    weights_all = torch.empty(rows, k, dtype=q.dtype, device=q.device)
    for start in range(0, n, rows):
        chunk = q[start : start + rows]
        require_four_bits(chunk, offset)
        weights = weights_all[: chunk.shape[0]]
        torch.add(chunk, offset, out=weights)
        torch.add(weights[:, 0::2], weights[:, 1::2], alpha=16, out=same_bytes[start : start + chunk.shape[0]])
    return out


def unpack_rows(packed: torch.Tensor) -> torch.Tensor:
    """The inverse of `pack_rows`: uint8 [N, K] from uint8 [N, K/2]."""
    n, half = packed.shape
    q = torch.empty(n, half, 2, dtype=torch.uint8, device=packed.device)
    torch.bitwise_and(packed, 15, out=q[..., 0])
    torch.bitwise_right_shift(packed, 4, out=q[..., 1])
    return q.view(n, half * 2)
