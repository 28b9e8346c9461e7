"""The Triton kernel of the int4 linear: one source, with a :class:`Tiling` for one row or for thousands.

``y[m, n] = sum over k of x[m, k] * ((q[n, k] - 8) * scale + zero)``, or with the numbers of float4_e2m1fn in place of
q - 8 (nvfp4, mxfp4). The weight is the left operand of the tensor
cores: it is dequantized from packed words in registers and never stored. x is the right operand, so that few rows M
need few columns of the instruction (8 or 16), not 64 padded rows.

Two methods fill a GPU that has few tiles. Both sum in a fixed order, so that equal inputs give equal bits:

- ``SEGMENTS``: a tile contains BLOCK_N rows of the weight at SEGMENTS places along K, side by side. The products of
  different segments are dropped (the tensor cores have spare time when M is small); the others are added in shared
  memory at the end. More bytes are in flight, without intermediate writes.
- ``SLOTS``: the tiles that do not fill the last wave of SLOTS programs are split along K among the idle programs
  (stream-K). Their fp32 parts are stored in ``parts``, and ``add_parts`` sums them. So a GEMM with 1.1 waves takes the
  time of 1.1 waves, not of 2.

A tensor in Triton has a power of two of rows. For a number of rows between two powers, a tile has two pieces: BLOCK_M
rows of x and EXTRA_M further ones. The weights of a step are dequantized once and multiplied with both.
"""

import triton
import triton.language as tl

from et_cuda_passes.kernels.int4_dequantize import dequantize_tile, load_one, row_lengths
from et_cuda_passes.kernels.tiles import (
    add_segments,
    first_row,
    load_block,
    load_columns,
    load_ragged,
    multiply,
    store_part,
    store_tile,
    tile_part,
    tile_place,
    weight_rows,
    x_rows,
)


@triton.jit
def int4_matmul(
    x_ptr,  # [M, K]; if BULK, its tensor descriptor of BULK dimensions, [M, K] or [1, M, K]
    extra_ptr,  # the same x; if BULK and EXTRA_M, its tensor descriptor with blocks of EXTRA_M rows
    words_ptr,  # int32 [N, padded K / 8]
    qparams_ptr,  # [1 or 2, N, row of scales]: the scales, and the zeros if HAS_ZERO
    bias_ptr,  # [N], not read unless HAS_BIAS
    factor_ptr,  # as y, not read unless HAS_FACTOR
    addend_ptr,  # as y, not read unless HAS_ADDEND
    y_ptr,  # [M, N], or [M, N / 2] if GATED: see ``store_tile``
    parts_ptr,  # fp32 [SLOTS, BLOCK_M + EXTRA_M, BLOCK_N], written only if SLOTS
    M,
    N,
    K_UNITS,  # K / 32, or with a GROUP_SIZE of 16 K / 16
    BLOCK_M: tl.constexpr,
    EXTRA_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SEGMENTS: tl.constexpr,
    SLOTS: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    EVEN_K: tl.constexpr,
    BULK: tl.constexpr,
    HAS_ZERO: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    HAS_FACTOR: tl.constexpr,
    HAS_ADDEND: tl.constexpr,
    GATED: tl.constexpr,
    FLOAT4: tl.constexpr,
    USE_ASM: tl.constexpr,
    WGMMA: tl.constexpr,
    SALT: tl.constexpr,
):
    """One tile [BLOCK_M + EXTRA_M, BLOCK_N] of y, or one part of it along K.

    FLOAT4: whether a nibble is a number in float4_e2m1fn; then HAS_ZERO is false. SALT is any positive number; see
    :func:`et_cuda_passes.kernels.triton_launch.launch`.
    """
    if -SALT == M:
        return
    UNIT: tl.constexpr = 16 if GROUP_SIZE == 16 else 32
    K, words_row, scale_row = row_lengths(K_UNITS, GROUP_SIZE, UNIT)
    pid = tl.program_id(0)
    TILE_M: tl.constexpr = BLOCK_M + EXTRA_M
    tiles_m = tl.cdiv(M, TILE_M)
    tiles = tiles_m * tl.cdiv(N, BLOCK_N)
    # K in steps of a block. A part of a tile is a range of steps, [0, steps) unless the tile is split.
    steps = tl.cdiv(words_row * 8, BLOCK_K)
    tile, first, last, cut = tile_part(pid, tiles, steps, SLOTS)
    if SLOTS > 0:  # noqa: SIM102 (the outer condition is resolved at compile time)
        if cut & (first >= steps):
            return
    tile_n, tile_m = tile_place(tile, tiles_m, N, BLOCK_N)

    ROWS: tl.constexpr = SEGMENTS * BLOCK_N
    COLUMNS: tl.constexpr = SEGMENTS * BLOCK_M
    # Steps of one segment. With at least one for certain, the compiler does not guard the loop. A guard would serialise
    # the tensor cores' instructions.
    length = tl.maximum(tl.cdiv(last - first, SEGMENTS), 1)
    first_m = first_row(tile_m * TILE_M, M, TILE_M, BULK)
    extra_m = first_m + BLOCK_M
    n, row_step = weight_rows(tile_n, first, length, N, BLOCK_N, SEGMENTS)
    m, in_m, column_step = x_rows(first_m, first, length, M, BLOCK_M, SEGMENTS)
    k = tl.arange(0, BLOCK_K)
    word = tl.arange(0, BLOCK_K // 8)
    ONE_GROUP: tl.constexpr = BLOCK_K <= GROUP_SIZE
    GROUPS: tl.constexpr = BLOCK_K // GROUP_SIZE
    group = tl.arange(0, GROUPS if GROUPS > 4 else 4)
    words_at = words_ptr + n[:, None] * words_row + (row_step * (BLOCK_K // 8))[:, None] + word[None, :]
    if ONE_GROUP:
        DTYPE: tl.constexpr = qparams_ptr.dtype.element_ty
        pairs_ptr = qparams_ptr.to(tl.pointer_type(tl.int32))
        scale_at = pairs_ptr + n[:, None] * (scale_row // 2)  # a row's scales are a multiple of eight
        zero_at = pairs_ptr + (N + n)[:, None] * (scale_row // 2)
    else:
        scale_offset = n[:, None] * scale_row + (row_step * GROUPS)[:, None] + group[None, :]
        scale_at = qparams_ptr + scale_offset
        zero_at = qparams_ptr + N * scale_row + scale_offset
    if not BULK:
        x_at = x_ptr + m.to(tl.int64)[None, :] * K + (column_step * BLOCK_K)[None, :] + k[:, None]
        if EXTRA_M > 0:
            more, in_extra, extra_step = x_rows(extra_m, first, length, M, EXTRA_M, SEGMENTS)
            extra_at = x_ptr + more.to(tl.int64)[None, :] * K + (extra_step * BLOCK_K)[None, :] + k[:, None]

    sums = tl.zeros((ROWS, COLUMNS), tl.float32)
    if EXTRA_M > 0:
        extra_sums = tl.zeros((ROWS, EXTRA_M), tl.float32)
    for step in range(length):
        # In units of 64, so that a mask never splits the vector of a load.
        blocks = tl.minimum(words_row // 8, last * (BLOCK_K // 64)) - (row_step + step) * (BLOCK_K // 64)
        if ONE_GROUP:
            begin = row_step[:, None] if SEGMENTS > 1 else tl.full((1, 1), first, tl.int32)
            number = (begin + step) * BLOCK_K // GROUP_SIZE
            there = number >= 0 if EVEN_K else blocks[:, None] > 0
            scale = load_one(scale_at, number, there, DTYPE)
            zero = load_one(zero_at, number, there, DTYPE) if HAS_ZERO else scale
        elif EVEN_K:
            scale = tl.load(scale_at)
            zero = tl.load(zero_at) if HAS_ZERO else scale
        else:
            # A scale of 0 gives a weight of 0.
            in_scale = (group * GROUP_SIZE // 64)[None, :] < blocks[:, None]
            scale = tl.load(scale_at, mask=in_scale, other=0.0)
            zero = tl.load(zero_at, mask=in_scale, other=0.0) if HAS_ZERO else scale
        if EVEN_K:
            words = tl.load(words_at)
            if BULK:
                x = load_block(x_ptr, first_m, (first + step) * BLOCK_K, BULK, BLOCK_M, BLOCK_K)
                if EXTRA_M > 0:
                    extra = load_block(extra_ptr, extra_m, (first + step) * BLOCK_K, BULK, EXTRA_M, BLOCK_K)
            else:
                x = load_columns(x_at, in_m, BLOCK_M)
                if EXTRA_M > 0:
                    extra = load_columns(extra_at, in_extra, EXTRA_M)
        else:
            words = tl.load(words_at, mask=(word // 8)[None, :] < blocks[:, None], other=0)
            end = tl.minimum(K // UNIT, last * (BLOCK_K // UNIT)) - step * (BLOCK_K // UNIT)
            x = load_ragged(x_at, in_m, end - column_step * (BLOCK_K // UNIT), BLOCK_K, UNIT)
            if EXTRA_M > 0:
                extra = load_ragged(extra_at, in_extra, end - extra_step * (BLOCK_K // UNIT), BLOCK_K, UNIT)
        w = dequantize_tile(words, scale, zero, ROWS, BLOCK_K, GROUP_SIZE, HAS_ZERO, FLOAT4, USE_ASM, WGMMA)
        if EXTRA_M > 0:
            # The smaller product is issued first: while the larger one runs, the next step can begin.
            extra_sums = multiply(w, extra, extra_sums, USE_ASM)
        sums = multiply(w, x, sums, USE_ASM)
        words_at += BLOCK_K // 8
        if not ONE_GROUP:
            scale_at += GROUPS
            zero_at += GROUPS
        if not BULK:
            x_at += BLOCK_K
            if EXTRA_M > 0:
                extra_at += BLOCK_K
    sums = add_segments(sums, BLOCK_M, BLOCK_N, SEGMENTS)

    if SLOTS > 0:  # noqa: SIM102 (the outer condition is resolved at compile time, so that torch sees no mutation)
        if cut:
            part_ptr = parts_ptr + (pid - tiles // SLOTS * SLOTS) * (TILE_M * BLOCK_N)
            store_part(part_ptr, sums, BLOCK_M, BLOCK_N)
            if EXTRA_M > 0:
                store_part(part_ptr + BLOCK_M * BLOCK_N, extra_sums, EXTRA_M, BLOCK_N)
            return
    if EXTRA_M > 0:  # first, to free the registers of its sums for the larger piece
        store_tile(
            y_ptr,
            extra_sums,
            bias_ptr,
            factor_ptr,
            addend_ptr,
            extra_m,
            tile_m * TILE_M if BULK else None,
            tile_n,
            M,
            N,
            EXTRA_M,
            BLOCK_N,
            HAS_BIAS,
            ACTIVATION,
            HAS_FACTOR,
            HAS_ADDEND,
            GATED,
            USE_ASM,
        )
    store_tile(
        y_ptr,
        sums,
        bias_ptr,
        factor_ptr,
        addend_ptr,
        first_m,
        tile_m * TILE_M if BULK else None,
        tile_n,
        M,
        N,
        BLOCK_M,
        BLOCK_N,
        HAS_BIAS,
        ACTIVATION,
        HAS_FACTOR,
        HAS_ADDEND,
        GATED,
        USE_ASM,
    )
