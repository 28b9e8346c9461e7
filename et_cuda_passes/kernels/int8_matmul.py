"""The Triton kernel of the linears with 8-bit weights: one source, with a :class:`Tiling` for any number of rows.

``y[m, n] = sum over k of x[m, k] * (q[n, k] * scale + zero)``, as in :mod:`et_cuda_passes.kernels.int4_matmul`. The
weight, row-major in memory as an embedding reads it, is the left operand of the tensor cores and is converted to floats
in registers. A byte is an integer, or a float8_e4m3fn or float8_e5m2. SEGMENTS and SLOTS fill a GPU that has few tiles,
with equal bits for equal inputs.

With one scale a row and no zeros, the product reads the exact integers, and the sums are multiplied by the scale. With
groups, the weight is multiplied before the product. Zeros are added there in fp32: a zero of 200 steps, rounded to
bf16, would have an error of half a step.
"""

import triton
import triton.language as tl

from et_cuda_passes.kernels.int8_dequantize import (
    both_of_pair,
    dequantize_bytes,
    magic_bytes,
    one_of_pair,
    per_weight,
)
from et_cuda_passes.kernels.tiles import (
    add_segments,
    load_columns,
    multiply,
    store_part,
    store_tile,
    tile_part,
    tile_place,
    weight_rows,
    x_rows,
)


@triton.jit
def int8_matmul(
    x_ptr,  # [M, K]
    packed_ptr,  # int8 [N, K]
    scale_ptr,  # [N, K / GROUP_SIZE], or [N, 1] if GROUP_SIZE is 0
    zero_ptr,  # fp32, like the scale; not read unless HAS_ZERO
    bias_ptr,  # [N], not read unless HAS_BIAS
    y_ptr,  # [M, N]
    parts_ptr,  # fp32 [SLOTS, BLOCK_M, BLOCK_N], written only if SLOTS
    M,
    N,
    K_UNITS,  # K / UNIT
    UNIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SEGMENTS: tl.constexpr,
    SLOTS: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    EVEN_K: tl.constexpr,
    PAIRS: tl.constexpr,
    HAS_ZERO: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    FLOAT8: tl.constexpr,
    USE_ASM: tl.constexpr,
    WGMMA: tl.constexpr,
    SALT: tl.constexpr,
):
    """One tile [BLOCK_M, BLOCK_N] of y, or one part of it along K.

    UNIT is a power of two that divides K, a multiple of 16 and of GROUP_SIZE; GROUP_SIZE divides BLOCK_K or is a
    multiple of it. PAIRS: whether a row has an even number of groups. FLOAT8 as for ``dequantize_bytes``. SALT as for
    ``int4_matmul``.
    """
    if -SALT == M:
        return
    # A product with a constant, so that the compiler knows its divisors and vectorizes every load.
    K = K_UNITS * UNIT
    pid = tl.program_id(0)
    tiles_m = tl.cdiv(M, BLOCK_M)
    tiles = tiles_m * tl.cdiv(N, BLOCK_N)
    # K in steps of a block. A part of a tile is a range of steps, [0, steps) unless the tile is split.
    steps = tl.cdiv(K, BLOCK_K)
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
    n, row_step = weight_rows(tile_n, first, length, N, BLOCK_N, SEGMENTS)
    m, in_m, column_step = x_rows(tile_m * BLOCK_M, first, length, M, BLOCK_M, SEGMENTS)
    k = tl.arange(0, BLOCK_K)
    q_at = packed_ptr + n.to(tl.int64)[:, None] * K + (row_step * BLOCK_K)[:, None] + k[None, :]
    x_at = x_ptr + m.to(tl.int64)[None, :] * K + (column_step * BLOCK_K)[None, :] + k[:, None]
    # Groups of a step. If a group has several steps, all of them load the same scale.
    GROUPED: tl.constexpr = GROUP_SIZE > 0
    GROUPS: tl.constexpr = BLOCK_K // GROUP_SIZE if GROUPED and GROUP_SIZE < BLOCK_K else 1
    STEPS: tl.constexpr = GROUP_SIZE // BLOCK_K if GROUP_SIZE > BLOCK_K else 1
    COPIES: tl.constexpr = GROUPS // 2 if PAIRS and GROUPS > 1 else GROUPS
    group = tl.arange(0, GROUPS)
    row_groups = K_UNITS * (UNIT // GROUP_SIZE) if GROUPED else 1
    in_row = n[:, None] * row_groups
    copy = tl.arange(0, COPIES)
    pairs_ptr = scale_ptr.to(tl.pointer_type(tl.int32))
    guard_at = packed_ptr.to(tl.pointer_type(tl.int32)) + (first * (BLOCK_K // 4) + tl.zeros((1, 1), tl.int32))

    sums = tl.zeros((ROWS, COLUMNS), tl.float32)
    for step in range(length):
        if EVEN_K:
            q = tl.load(q_at)
            x = load_columns(x_at, in_m, BLOCK_M)
        else:
            # In units of 16, so that a mask never splits the vector of a load. Products beyond K are 0 times 0.
            in_rows = tl.minimum(K // 16, last * (BLOCK_K // 16)) - (row_step + step) * (BLOCK_K // 16)
            in_columns = tl.minimum(K // 16, last * (BLOCK_K // 16)) - (column_step + step) * (BLOCK_K // 16)
            q = tl.load(q_at, mask=(k // 16)[None, :] < in_rows[:, None], other=0)
            x = tl.load(x_at, mask=in_m[None, :] & ((k // 16)[:, None] < in_columns[None, :]), other=0.0)
        scale = q
        zero = q
        if HAS_ZERO and not GROUPED:
            scale = per_weight(tl.load(scale_ptr + n)[:, None].to(tl.float32), ROWS, BLOCK_K)
            zero = per_weight(tl.load(zero_ptr + n)[:, None], ROWS, BLOCK_K)
        if GROUPED:
            at = (row_step + step) // STEPS * GROUPS
            here = at[:, None] + group[None, :] < row_groups
            if PAIRS:
                # An asynchronous copy has at least four bytes a thread: two scales. If a step needs only one of them,
                # the masks of two copies exclude its neighbour.
                pair_at = pairs_ptr + (in_row + at[:, None]) // 2 + copy[None, :]
                pair_here = at[:, None] // 2 + copy[None, :] < row_groups // 2
                odd = (at % 2 == 1)[:, None]
                if GROUPS == 1:
                    even = tl.load(pair_at, mask=pair_here & (odd == 0), other=0)
                    s = one_of_pair(even, tl.load(pair_at, mask=pair_here & odd, other=0), x)
                else:
                    pairs = tl.load(pair_at) if EVEN_K else tl.load(pair_at, mask=pair_here, other=0)
                    s = both_of_pair(pairs, x, ROWS, GROUPS)
            else:
                scale_at = scale_ptr + in_row + at[:, None] + group[None, :]
                s = tl.load(scale_at) if EVEN_K else tl.load(scale_at, mask=here, other=0.0)
            if HAS_ZERO:
                zero_at = zero_ptr + in_row + at[:, None] + group[None, :]
                z = tl.load(zero_at) if EVEN_K else tl.load(zero_at, mask=here, other=0.0)
                zero = per_weight(z, ROWS, BLOCK_K)
                s = s.to(tl.float32)
            scale = per_weight(s, ROWS, BLOCK_K)
        magic = magic_bytes(guard_at, x.dtype == tl.float16, HAS_ZERO, FLOAT8, WGMMA)
        w = dequantize_bytes(q, scale, zero, magic, x, GROUPED or HAS_ZERO, HAS_ZERO, FLOAT8, USE_ASM)
        sums = multiply(w, x, sums, USE_ASM)
        q_at += BLOCK_K
        x_at += BLOCK_K
        guard_at += BLOCK_K // 4
    sums = add_segments(sums, BLOCK_M, BLOCK_N, SEGMENTS)
    if not GROUPED and not HAS_ZERO:
        n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
        sums *= tl.load(scale_ptr + n, mask=n < N, other=0.0).to(tl.float32)[:, None]

    if SLOTS > 0:  # noqa: SIM102 (the outer condition is resolved at compile time, so that torch sees no mutation)
        if cut:
            part = pid - tiles // SLOTS * SLOTS
            store_part(parts_ptr + part * (BLOCK_M * BLOCK_N), sums, BLOCK_M, BLOCK_N)
            return
    store_tile(
        y_ptr,
        sums,
        bias_ptr,
        bias_ptr,
        bias_ptr,
        tile_m * BLOCK_M,
        None,
        tile_n,
        M,
        N,
        BLOCK_M,
        BLOCK_N,
        HAS_BIAS,
        "",
        False,
        False,
        False,
        USE_ASM,
    )
