"""The Triton kernel of attention without a mask, with an online softmax.

``y[m] = sum over n of softmax(scale * q[m] . k[n]) v[n]``, over blocks of keys. Exponentials are relative to a row's
running maximum; if a block raises it, the earlier sums are rescaled (Milakov and Gimelshein, "Online normalizer
calculation for softmax", 2018; Dao et al., "FlashAttention", 2022). Scores are never stored in memory.

The last block, which may be partial, is computed first, so that the loop over the other blocks needs no mask. The scale
includes log2 e, since the GPU's instruction computes powers of two.
"""

import triton
import triton.language as tl

from et_cuda_passes.kernels.tiles import multiply


@triton.jit
def sequence(ptr, batch, head, length, HEADS: tl.constexpr, ROW: tl.constexpr, D: tl.constexpr):
    """Pointer to one head of one batch in [B, HEADS, length, D] if ROW is D, else in [B, length, HEADS, D].

    ROW is the row stride.
    """
    at = (batch * HEADS + head).to(tl.int64) * length * D if ROW == D else batch.to(tl.int64) * length * ROW + head * D
    return ptr + at


@triton.jit
def keys_block(q, k, v, most, total, sums, left, SCALE: tl.constexpr, MASKED: tl.constexpr, USE_ASM: tl.constexpr):
    """Update the softmax with a block of keys k and values v [BLOCK_N, D]; if MASKED, only the first ``left`` count.

    Returns:
        The updated ``most`` and ``total`` [BLOCK_M], the greatest score and the sum of powers of each row, and ``sums``
        [BLOCK_M, D].
    """
    scores = multiply(q, tl.trans(k), tl.zeros((q.shape[0], k.shape[0]), tl.float32), USE_ASM)
    if MASKED:
        scores = tl.where((tl.arange(0, k.shape[0]) < left)[None, :], scores * SCALE, float("-inf"))
        higher = tl.maximum(most, tl.max(scores, 1))
        powers = tl.exp2(scores - higher[:, None])
    else:  # scaled twice, so that the scaling fuses with the subtraction
        higher = tl.maximum(most, tl.max(scores, 1) * SCALE)
        powers = tl.exp2(scores * SCALE - higher[:, None])
    change = tl.exp2(most - higher)
    total = total * change + tl.sum(powers, 1)
    sums = multiply(powers.to(v.dtype), v, sums * change[:, None], USE_ASM)
    return higher, total, sums


@triton.jit
def attention(
    q_ptr,  # [B, HEADS, M, D], or [B, M, HEADS, D] with row stride Q_ROW
    k_ptr,  # [B, KV_HEADS, L, D] or [B, L, KV_HEADS, D]
    v_ptr,  # as k
    y_ptr,  # as q
    M,
    L,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    D: tl.constexpr,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    Q_ROW: tl.constexpr,
    K_ROW: tl.constexpr,
    V_ROW: tl.constexpr,
    Y_ROW: tl.constexpr,
    SCALE: tl.constexpr,  # absolute value of the scale, times log2 e
    NEGATED: tl.constexpr,  # whether the scale is negative
    USE_ASM: tl.constexpr,
    SALT: tl.constexpr,
):
    """BLOCK_M rows of one head of one batch.

    Q_ROW to Y_ROW are row strides: D if the heads come first, else HEADS * D, or more for columns of a wider tensor.

    SALT is any positive number; see :func:`et_cuda_passes.kernels.triton_launch.launch`.
    """
    if -SALT == M:
        return
    tiles = tl.cdiv(M, BLOCK_M)
    pid = tl.program_id(0)
    head = pid // tiles % HEADS
    batch = pid // tiles // HEADS
    kv_head = head // (HEADS // KV_HEADS)
    d = tl.arange(0, D)[None, :]
    n = tl.arange(0, BLOCK_N)[:, None]
    m = pid % tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    row = tl.where(m < M, m, 0)[:, None].to(tl.int64)  # unmasked: rows beyond M are not stored
    q = tl.load(sequence(q_ptr, batch, head, M, HEADS, Q_ROW, D) + row * Q_ROW + d)
    if NEGATED:
        q = (-q.to(tl.float32)).to(q.dtype)
    k_at = sequence(k_ptr, batch, kv_head, L, KV_HEADS, K_ROW, D) + n * K_ROW + d
    v_at = sequence(v_ptr, batch, kv_head, L, KV_HEADS, V_ROW, D) + n * V_ROW + d

    most = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    sums = tl.zeros((BLOCK_M, D), tl.float32)
    whole = tl.maximum(tl.cdiv(L, BLOCK_N), 1) - 1
    first = whole * BLOCK_N
    k = tl.load(k_at + first.to(tl.int64) * K_ROW, mask=n < L - first, other=0.0)
    v = tl.load(v_at + first.to(tl.int64) * V_ROW, mask=n < L - first, other=0.0)
    most, total, sums = keys_block(q, k, v, most, total, sums, L - first, SCALE, True, USE_ASM)
    if whole > 0:
        # With at least one iteration for certain, the compiler does not guard the loop. A guard would serialise the
        # tensor cores' instructions.
        for _ in range(tl.maximum(whole, 1)):
            k = tl.load(k_at)
            v = tl.load(v_at)
            most, total, sums = keys_block(q, k, v, most, total, sums, 0, SCALE, False, USE_ASM)
            k_at += BLOCK_N * K_ROW
            v_at += BLOCK_N * V_ROW

    # Without keys the result is 0, the empty sum.
    y = tl.where(L > 0, sums / total[:, None], 0.0)
    y_at = sequence(y_ptr, batch, head, M, HEADS, Y_ROW, D) + m[:, None].to(tl.int64) * Y_ROW + d
    tl.store(y_at, y.to(y_ptr.dtype.element_ty), mask=(m < M)[:, None])
