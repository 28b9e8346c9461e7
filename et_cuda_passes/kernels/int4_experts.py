"""The Triton kernel of experts' int4 weights: rows of x, each times the matrix of one expert.

``y[r, n] = sum over k of x[r, k] * ((q[e(r), n, k] - 8) * scale + zero)``. A program is a tile of rows that have one
expert, times a tile of that expert's matrix, which is dequantized in registers as in
:mod:`et_cuda_passes.kernels.int4_matmul` and never stored. Experts without rows are not read. No tile is split along K,
so that equal inputs give equal bits.
"""

import triton
import triton.language as tl

from et_cuda_passes.kernels.int4_dequantize import dequantize_tile, load_one, row_lengths
from et_cuda_passes.kernels.tiles import first_row, load_block, multiply, tile_place


@triton.jit
def _group_of(tile, before, end, M, E, BLOCK_M: tl.constexpr):
    """The group of row tile ``tile``, the tile's first row and the group's end; group E is the rows without an expert.

    ``before`` and ``end`` [a power of two above E] are the begins and ends of consecutive groups. Each group has its
    own tiles.
    """
    group = tl.arange(0, end.shape[0])
    # torch does not define offsets out of order or beyond x. The clamps keep every access inside of x.
    end = tl.minimum(tl.maximum(tl.where(group < E, end.to(tl.int32), M), 0), M)
    start = tl.minimum(tl.maximum(tl.where(group > E, M, before.to(tl.int32)), 0), M)
    tiles = tl.maximum(tl.cdiv(end - start, BLOCK_M), 0)
    until = tl.cumsum(tiles, 0)
    own = tl.sum((until <= tile).to(tl.int32), 0)
    first = tl.sum(tl.where(group == own, start - (until - tiles) * BLOCK_M, 0), 0)
    return own, first + tile * BLOCK_M, tl.sum(tl.where(group == own, end, 0), 0)


@triton.jit
def int4_experts(
    x_ptr,  # [rows, K]; if BULK, its tensor descriptor
    words_ptr,  # int32 [E, N, padded K / 8]
    qparams_ptr,  # [1 or 2, E, N, row of scales]: the scales, and the zeros if HAS_ZERO
    expert_ptr,  # GROUPED: the end of each expert's rows [E]; else the expert of each batch, read only if HAS_IDS
    y_ptr,  # [rows, N]
    M,  # GROUPED: rows; else rows of a batch
    SHARE,  # batches that read the same rows of x
    E,
    N,
    K32,  # K / 32
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    EVEN_K: tl.constexpr,
    BULK: tl.constexpr,
    HAS_ZERO: tl.constexpr,
    GROUPED: tl.constexpr,
    HAS_IDS: tl.constexpr,
    WIDTH: tl.constexpr,
    USE_ASM: tl.constexpr,
    WGMMA: tl.constexpr,
    SALT: tl.constexpr,
):
    """One tile [BLOCK_M, BLOCK_N] of y. SALT as for ``int4_matmul``, and BULK, which is 2 or 0, needs GROUPED.

    The grid is (tiles of rows times tiles of N) if GROUPED, else (tiles of rows, tiles of N). Rows of y without an
    expert are 0; rows whose expert is out of range are NaN. A negative expert counts from the last, as an index of
    torch does. WIDTH is a power of two above E.
    """
    if -SALT == M:
        return
    K, words_row, scale_row = row_lengths(K32, GROUP_SIZE, 32)
    columns = tl.arange(0, BLOCK_M)
    if GROUPED:
        # One tile of N for all rows of x, then the next, would read x from memory again for each.
        tiles_m = tl.num_programs(0) // tl.cdiv(N, BLOCK_N)
        tile_n, tile_m = tile_place(tl.program_id(0), tiles_m, N, BLOCK_N, BAND=16)
        # Loaded here, since torch assumes that a function mutates every pointer that is passed to it.
        each = tl.arange(0, WIDTH)
        ends = tl.load(expert_ptr + each, mask=each < E, other=0)
        before = tl.load(expert_ptr + each - 1, mask=(each > 0) & (each <= E), other=0)
        expert, row, end = _group_of(tile_m, before, ends, M, E, BLOCK_M)
        if expert > E:
            return
        from_m = first_row(row, M, BLOCK_M, BULK)
        m = from_m + columns
        in_m = (m >= row) & (m < end) if BULK else m < end
        x_row = m
        y_row = m.to(tl.int64)
    else:
        tile_m = tl.program_id(0)
        tile_n = tl.program_id(1)
        tiles_m = tl.cdiv(M, BLOCK_M)
        batch = tile_m // tiles_m
        m = tile_m % tiles_m * BLOCK_M + columns
        in_m = m < M
        x_row = batch // SHARE * M + m
        y_row = batch.to(tl.int64) * M + m
        expert = batch
        if HAS_IDS:
            expert = tl.load(expert_ptr + batch).to(tl.int32)
            expert = tl.where(expert < 0, expert + E, expert)
    n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    at = y_row[None, :] * N + n[:, None]
    inside = in_m[None, :] & (n < N)[:, None]
    if GROUPED or HAS_IDS:  # noqa: SIM102 (the outer condition is resolved at compile time)
        if (expert < 0) | (expert >= E):
            none = tl.full((BLOCK_N, BLOCK_M), 0.0 if GROUPED else float("nan"), tl.float32)
            tl.store(y_ptr + at, none.to(y_ptr.dtype.element_ty), mask=inside)
            return

    of_n = tl.where(n < N, n, tl.maximum(n - BLOCK_N, 0))  # different rows: see ``tiles.x_rows``
    x_row = tl.where(in_m, x_row, 0).to(tl.int64)
    k = tl.arange(0, BLOCK_K)
    word = tl.arange(0, BLOCK_K // 8)
    ONE_GROUP: tl.constexpr = BLOCK_K <= GROUP_SIZE
    GROUPS: tl.constexpr = BLOCK_K // GROUP_SIZE
    group = tl.arange(0, GROUPS if GROUPS > 4 else 4)
    # With at least one step for certain, the compiler does not guard the loop. A guard would serialise the tensor
    # cores' instructions.
    steps = tl.maximum(tl.cdiv(words_row * 8, BLOCK_K), 1)
    matrix = expert.to(tl.int64) * N
    words_at = words_ptr + matrix * words_row + of_n[:, None] * words_row + word[None, :]
    if ONE_GROUP:
        DTYPE: tl.constexpr = qparams_ptr.dtype.element_ty
        pairs_ptr = qparams_ptr.to(tl.pointer_type(tl.int32))
        scale_at = pairs_ptr + matrix * (scale_row // 2) + of_n[:, None] * (scale_row // 2)
        zero_at = pairs_ptr + (matrix + E * N) * (scale_row // 2) + of_n[:, None] * (scale_row // 2)
    else:
        scale_offset = of_n[:, None] * scale_row + group[None, :]
        scale_at = qparams_ptr + matrix * scale_row + scale_offset
        zero_at = qparams_ptr + (matrix + E * N) * scale_row + scale_offset
    if not BULK:
        x_at = x_ptr + x_row[None, :] * K + k[:, None]

    sums = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for step in range(steps):
        # In units of 64 and 32, so that a mask never splits the vector of a load. A scale of 0 gives a weight of 0.
        blocks = words_row // 8 - step * (BLOCK_K // 64)
        if ONE_GROUP:
            number = tl.full((1, 1), step * BLOCK_K // GROUP_SIZE, tl.int32)
            there = number >= 0 if EVEN_K else blocks > 0
            scale = load_one(scale_at, number, there, DTYPE)
            zero = load_one(zero_at, number, there, DTYPE) if HAS_ZERO else scale
        elif EVEN_K:
            scale = tl.load(scale_at)
            zero = tl.load(zero_at) if HAS_ZERO else scale
        else:
            in_scale = (group * GROUP_SIZE // 64)[None, :] < blocks
            scale = tl.load(scale_at, mask=in_scale, other=0.0)
            zero = tl.load(zero_at, mask=in_scale, other=0.0) if HAS_ZERO else scale
        words = tl.load(words_at) if EVEN_K else tl.load(words_at, mask=(word // 8)[None, :] < blocks, other=0)
        if BULK:
            x = load_block(x_ptr, from_m, step * BLOCK_K, BULK, BLOCK_M, BLOCK_K)
        elif EVEN_K:
            x = tl.load(x_at, mask=in_m[None, :], other=0.0)
        else:
            rest = K32 - step * (BLOCK_K // 32)
            x = tl.load(x_at, mask=in_m[None, :] & ((k // 32)[:, None] < rest), other=0.0)
        w = dequantize_tile(words, scale, zero, BLOCK_N, BLOCK_K, GROUP_SIZE, HAS_ZERO, False, USE_ASM, WGMMA)
        sums = multiply(w, x, sums, USE_ASM)
        words_at += BLOCK_K // 8
        if not ONE_GROUP:
            scale_at += GROUPS
            zero_at += GROUPS
        if not BULK:
            x_at += BLOCK_K

    tl.store(y_ptr + at, sums.to(y_ptr.dtype.element_ty), mask=inside)
