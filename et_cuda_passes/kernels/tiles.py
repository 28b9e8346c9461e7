"""Shared by the matrix products: the tile of a program, its part along K, and the sum of parts."""

import triton
import triton.language as tl

from et_cuda_passes.kernels.epilogue import activate, finish

MASKED = tl.constexpr(64)
"""Tiles of at most so many rows of x mask the rows beyond M; see ``load_columns``."""


@triton.jit
def tile_place(tile, tiles_m, N, BLOCK_N: tl.constexpr, BAND: tl.constexpr = 8):
    """Indices (of rows N, of rows M) of a tile, in grouped program order.

    BAND tiles of rows N run through all of M before the next ones, so that their weights stay in the L2 cache.
    """
    in_band = BAND * tiles_m
    band = tile // in_band * BAND
    height = tl.minimum(tl.cdiv(N, BLOCK_N) - band, BAND)
    return band + tile % in_band % height, tile % in_band // height


@triton.jit
def tile_part(pid, tiles, steps, SLOTS: tl.constexpr):
    """The tile of a program, its steps along K as [first, last), and whether it is one part of a split tile (stream-K).

    The tiles that do not fill the last wave of SLOTS programs are split among the idle programs. Rounding up can leave
    the last parts of a tile empty: their ``first`` is not below ``steps``.
    """
    tile = pid
    first = 0
    last = steps
    cut = False
    if SLOTS > 0:
        whole = tiles // SLOTS * SLOTS
        ways = tl.minimum(SLOTS // tl.maximum(tiles - whole, 1), steps)
        each = tl.cdiv(steps, ways)
        if (ways > 1) & (pid >= whole):
            cut = True
            tile = whole + (pid - whole) // ways
            first = (pid - whole) % ways * each
            last = tl.minimum(first + each, steps)
    return tile, first, last, cut


@triton.jit
def first_row(own_m, M, TILE_M: tl.constexpr, BULK: tl.constexpr):
    """The first row of x that a tile of TILE_M rows reads whose own rows begin at ``own_m``.

    A bulk copy needs several nanoseconds for every row beyond M, in sequence: a product of 333 rows in tiles of 256
    took twice as long. So the last tile of bulk copies begins early enough to end at row M. It does not store the rows
    of the previous tile.
    """
    return tl.minimum(own_m, tl.maximum(M - TILE_M, 0)) if BULK else own_m


@triton.jit
def weight_rows(tile_n, first, length, N, BLOCK_N: tl.constexpr, SEGMENTS: tl.constexpr):
    """The rows of the weight that a tile reads, and the step along K at which each begins: both [SEGMENTS BLOCK_N].

    Each segment reads the same BLOCK_N rows, ``length`` steps further along K. Rows beyond N are replaced by rows of
    the previous tile.
    """
    rows = tl.arange(0, SEGMENTS * BLOCK_N)
    n = tile_n * BLOCK_N + rows % BLOCK_N
    # Rows of the previous tile, if any: a remainder would need a division.
    return tl.where(n < N, n, tl.maximum(n - BLOCK_N, 0)), first + rows // BLOCK_N * length


@triton.jit
def x_rows(from_m, first, length, M, BLOCK_M: tl.constexpr, SEGMENTS: tl.constexpr):
    """The rows of x that a tile reads, whether each is below M, and the step along K at which each begins.

    Each segment reads the same BLOCK_M rows from ``from_m`` on, ``length`` steps further along K.

    Rows beyond M are replaced by other rows, each a different one. If all were replaced by one row, every program
    would wait for the few cache lines that hold it: a tile of 256 rows with 132 valid ones took twice as long.
    """
    columns = tl.arange(0, SEGMENTS * BLOCK_M)
    m = from_m + columns % BLOCK_M
    in_m = m < M
    return m % M if BLOCK_M > MASKED else tl.where(in_m, m, 0), in_m, first + columns // BLOCK_M * length


@triton.jit
def load_columns(at, in_m, BLOCK_M: tl.constexpr):
    """A tile of x [K, columns], with no mask if tiles have many rows: results of rows beyond M are not stored.

    With few rows a mask saves bytes: a tile of eight rows reads as many bytes of x as of its weights.
    """
    return tl.load(at, mask=in_m[None, :], other=0.0) if BLOCK_M <= MASKED else tl.load(at)


@triton.jit
def load_ragged(at, in_m, rest, BLOCK_K: tl.constexpr, UNIT: tl.constexpr):
    """A tile of x [BLOCK_K, columns] whose columns have ``rest`` values left along K, in units of UNIT."""
    unit = tl.arange(0, BLOCK_K) // UNIT
    return tl.load(at, mask=in_m[None, :] & (unit[:, None] < rest[None, :]), other=0.0)


@triton.jit
def load_block(x, m, k, RANK: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr):
    """A tile of x [K, columns] from row ``m`` and column ``k`` on, by its tensor descriptor of RANK 2 or 3 dimensions.

    One instruction of one thread copies all of it (TMA). Copies of 16 bytes by every thread would occupy the shared
    memory, which the tensor cores need; they slowed a product of 1500 rows by a tenth or more. Rows beyond M are zeros.
    """
    return (x.load([m, k]) if RANK == 2 else x.load([0, m, k]).reshape(BLOCK_M, BLOCK_K)).T


@triton.jit
def multiply(w, x, sums, USE_ASM: tl.constexpr):
    """``sums`` [rows, columns] + ``w`` [rows, K] @ ``x`` [K, columns]."""
    if not USE_ASM:  # Triton's interpreter computes a dot of bf16 operands on their integer bits
        w, x = w.to(tl.float32), x.to(tl.float32)
    return tl.dot(w, x, sums, input_precision="ieee" if w.dtype == tl.float32 else None)


@triton.jit
def add_segments(sums, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SEGMENTS: tl.constexpr):
    """[SEGMENTS BLOCK_N, SEGMENTS BLOCK_M] -> [BLOCK_N, BLOCK_M]: the sum of the products of equal segments."""
    if SEGMENTS > 1:
        rows = tl.arange(0, SEGMENTS * BLOCK_N)
        columns = tl.arange(0, SEGMENTS * BLOCK_M)
        own = (rows // BLOCK_N)[:, None] == (columns // BLOCK_M)[None, :]
        sums = tl.sum(tl.where(own, sums, 0.0).reshape(SEGMENTS * BLOCK_N, SEGMENTS, BLOCK_M), 1)
        sums = tl.sum(sums.reshape(SEGMENTS, BLOCK_N, BLOCK_M), 0)
    return sums


@triton.jit
def store_part(part_ptr, sums, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Store sums [BLOCK_N, BLOCK_M] as BLOCK_M rows of a part of a split tile, [BLOCK_M, BLOCK_N]."""
    place = tl.arange(0, BLOCK_M)[None, :] * BLOCK_N + tl.arange(0, BLOCK_N)[:, None]
    tl.store(part_ptr + place, sums)


@triton.jit
def store_tile(
    y_ptr,
    sums,
    bias_ptr,
    factor_ptr,
    addend_ptr,
    first_m,
    own_m,
    tile_n,
    M,
    N,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    HAS_FACTOR: tl.constexpr,
    HAS_ADDEND: tl.constexpr,
    GATED: tl.constexpr,
    USE_ASM: tl.constexpr,
):
    """Apply the epilogue to sums [BLOCK_N, BLOCK_M], and store them as BLOCK_M rows of y from ``first_m`` on.

    Rows before ``own_m`` belong to another tile and are not stored; None if there are no such rows.

    GATED: blocks of 16 rows of the weight are eight rows of the gate and the eight rows that it multiplies. In the
    tensor cores' order a thread holds the sums of a row and of the row eight further side by side, so that no data
    moves.
    """
    n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    m = first_m + tl.arange(0, BLOCK_M)
    in_m = m < M if own_m is None else (m < M) & (m >= own_m)
    bias = tl.load(bias_ptr + n, mask=n < N, other=0.0)[:, None] if HAS_BIAS else 0.0
    if GATED:
        if HAS_BIAS:
            sums += bias  # in fp32, as sums are
        gate, other = tl.split(sums.reshape(BLOCK_N // 16, 2, 8, BLOCK_M).permute(0, 2, 3, 1))
        sums = (activate(gate, ACTIVATION, USE_ASM) * other).reshape(BLOCK_N // 2, BLOCK_M)
        n = tile_n * (BLOCK_N // 2) + tl.arange(0, BLOCK_N // 2)
        N = N // 2
    at = m.to(tl.int64)[None, :] * N + n[:, None]
    inside = in_m[None, :] & (n < N)[:, None]
    BIAS: tl.constexpr = HAS_BIAS and not GATED
    FUNCTION: tl.constexpr = "" if GATED else ACTIVATION
    y = finish(sums, bias, factor_ptr, addend_ptr, at, inside, BIAS, FUNCTION, HAS_FACTOR, HAS_ADDEND, USE_ASM)
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def add_parts(
    parts_ptr,  # fp32 [SLOTS, TILE_M, BLOCK_N]
    bias_ptr,  # [N], not read unless HAS_BIAS
    factor_ptr,  # as y, not read unless HAS_FACTOR
    addend_ptr,  # as y, not read unless HAS_ADDEND
    y_ptr,  # [M, N], or [M, N / 2] if GATED
    M,
    N,
    K32,  # K / 32, rounded up
    TILE_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SLOTS: tl.constexpr,
    BULK: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    HAS_FACTOR: tl.constexpr,
    HAS_ADDEND: tl.constexpr,
    GATED: tl.constexpr,
    USE_ASM: tl.constexpr,
    HEIGHT: tl.constexpr,
    SALT: tl.constexpr,
):
    """Sum the parts of HEIGHT rows of one split tile of TILE_M rows, first to last.

    GATED and SALT are as in the product of the parts.
    """
    if -SALT == M:
        return
    tiles_m = tl.cdiv(M, TILE_M)
    tiles = tiles_m * tl.cdiv(N, BLOCK_N)
    whole = tiles // SLOTS * SLOTS
    steps = tl.cdiv(tl.cdiv(K32, 2) * 64, BLOCK_K)
    ways = tl.minimum(SLOTS // tl.maximum(tiles - whole, 1), steps)
    tile = whole + tl.program_id(0)
    if (ways <= 1) | (tile >= tiles):
        return
    used = tl.cdiv(steps, tl.cdiv(steps, ways))
    tile_n, tile_m = tile_place(tile, tiles_m, N, BLOCK_N)
    row = tl.program_id(1) * HEIGHT + tl.arange(0, HEIGHT)
    column = tl.arange(0, BLOCK_N)
    first_m = first_row(tile_m * TILE_M, M, TILE_M, BULK)
    in_m = first_m + row < M
    if BULK:
        in_m = in_m & (first_m + row >= tile_m * TILE_M)
    inside = (tile_n * BLOCK_N + column < N)[:, None] & in_m[None, :]
    part = parts_ptr + tl.program_id(0) * ways * (TILE_M * BLOCK_N)
    part += row[None, :] * BLOCK_N + column[:, None]
    sums = tl.zeros((BLOCK_N, HEIGHT), tl.float32)
    for _ in range(used):
        sums += tl.load(part, mask=inside, other=0.0)
        part += TILE_M * BLOCK_N
    store_tile(
        y_ptr,
        sums,
        bias_ptr,
        factor_ptr,
        addend_ptr,
        first_m + tl.program_id(1) * HEIGHT,
        tile_m * TILE_M if BULK else None,
        tile_n,
        M,
        N,
        HEIGHT,
        BLOCK_N,
        HAS_BIAS,
        ACTIVATION,
        HAS_FACTOR,
        HAS_ADDEND,
        GATED,
        USE_ASM,
    )
