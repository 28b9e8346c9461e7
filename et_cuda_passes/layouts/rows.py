"""Packing by rows: a layout packs some rows at a time, into their place in the result.

So the rows of several weights become one packed weight, and no tensor of a weight's size is needed beside the result.
"""

from collections.abc import Callable

import torch

from et_cuda_passes.threads import for_chunks, ranges

CHUNK_BYTES = 1 << 20
"""Default number of bytes of weights that are packed at a time. They stay in a cache, and calls cost little."""

RowPacker = Callable[[torch.Tensor, torch.Tensor], None]
"""``(q, out)``: packs rows q [rows, K] into ``out``, the same rows of the result. It keeps its buffers."""


def pack_rows(
    q: torch.Tensor,
    out: torch.Tensor,
    out_rows: int,
    packer: Callable[[int], RowPacker],
    chunk_bytes: int,
    multiple: int = 1,
    weight_bytes: int = 1,
) -> None:
    """Pack q [N, K], and then rows of zeros, into the ``out_rows`` rows of ``out``, in chunks and in threads.

    Args:
        q: integers, any strides.
        out: the result; its first axis holds the rows, one or several to an index.
        out_rows: number of rows.
        packer: the number of rows of a chunk -> the function that packs at most so many rows.
        chunk_bytes: size of a chunk.
        multiple: a chunk has a multiple of so many rows, except the last one.
        weight_bytes: bytes of a chunk for each weight.
    """
    rows = min(out_rows, rows_per_chunk(weight_bytes * q.shape[1], chunk_bytes, multiple))
    together = out_rows // out.shape[0]

    def worker() -> Callable[[tuple[int, int]], None]:
        pack = packer(rows)

        def work(piece: tuple[int, int]) -> None:
            start, stop = piece
            pack(pad_rows(q[start:stop], stop - start), out[start // together : stop // together])

        return work

    for_chunks(ranges(out_rows, rows), worker, q.device)


def join_neighbours(weights: torch.Tensor, bits: int, buffer: torch.Tensor, out: torch.Tensor) -> None:
    """``even + (odd << bits)`` of neighbouring bytes, each below 2**bits: uint8 [rows, 2 * n] -> [rows, n].

    An int16 holds two neighbours. Shifted by 8 - bits and added to itself, its low byte is the result.
    ``buffer`` is int16, at least [rows, n].
    """
    pairs = weights.view(torch.int16)
    shifted = torch.bitwise_right_shift(pairs, 8 - bits, out=buffer[: pairs.shape[0], : pairs.shape[1]])
    out.copy_(shifted.add_(pairs))


def rows_per_chunk(k: int, chunk_bytes: int, multiple: int) -> int:
    """The number of rows of `k` bytes that fit into `chunk_bytes`, rounded down to `multiple`, but at least that."""
    if chunk_bytes < 1:
        raise ValueError(f"chunk_bytes must be positive, got {chunk_bytes}")
    return max(multiple, chunk_bytes // k // multiple * multiple)


def pad_rows(chunk: torch.Tensor, rows: int) -> torch.Tensor:
    """Append rows of zeros to `chunk` until it has `rows` rows."""
    missing = rows - chunk.shape[0]
    return torch.nn.functional.pad(chunk, (0, 0, 0, missing)) if missing > 0 else chunk
