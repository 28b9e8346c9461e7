"""Triton functions that dequantize words of the ``mma_tiled`` layout to a tile of weights, in the tensor cores' order.

In this layout (:mod:`et_cuda_passes.layouts.mma_tiled`) the words that a thread loads contain exactly the elements that
``mma`` and ``wgmma`` read from this thread as their left operand. So the joins, the permute and the reshapes below
compile to no instruction.
"""

import triton
import triton.language as tl


def _arithmetic(dtype: str, magic: str, minus: str, one: str, zero: str) -> str:
    """PTX that converts the nibbles of ``w``, the halves of two words, to four registers of two 16-bit floats.

    ``magic | q`` is a float of value 128 + q (bf16) or 1024 + q (fp16): subtracting 136 or 1032 leaves q - 8 with no
    conversion instruction and no rounding. Only fused multiply-adds are used, since bf16 has no other arithmetic
    before sm_90. Operand 6 is the scale. The addend is operand 7, or negative zero, which changes nothing.
    """
    lines = []
    for nibble in range(4):
        lines += ["shr.u32 w, w, 4;"] * (nibble > 0)
        lines += [f"lop3.b32 t, w, 0x000f000f, {magic}, 0xea;", f"fma.rn.{dtype}x2 t, t, {one}, {minus};"]
        lines.append(f"fma.rn.{dtype}x2 ${nibble}, t, $6, {zero};")
    registers = {"one": one, "minus": minus, "none": "0x80008000"}
    # On one line: AOTInductor writes these texts into source code.
    text = " ".join(lines)
    for name, value in registers.items():
        text = f"mov.b32 {name}, {value}; " + text.replace(value, name)
    return text + " }"


_BF16 = ("bf16", "0x43004300", "0xc308c308", "0x3f803f80")
_F16 = ("f16", "0x64006400", "0xe408e408", "0x3c003c00")
_BF16_SCALED = tl.constexpr(_arithmetic(*_BF16, "0x80008000"))
_BF16_AFFINE = tl.constexpr(_arithmetic(*_BF16, "$7"))
_F16_SCALED = tl.constexpr(_arithmetic(*_F16, "0x80008000"))
_F16_AFFINE = tl.constexpr(_arithmetic(*_F16, "$7"))
_BEGIN = tl.constexpr("{ .reg .b32 w, t, one, minus, none; ")
# Nibbles 0..3 or 4..7 of two neighbouring words, operands 4 and 5.
_LOW = tl.constexpr("prmt.b32 w, $4, $5, 0x5410; ")
_HIGH = tl.constexpr("prmt.b32 w, $4, $5, 0x7632; ")
# wgmma reads its left operand from registers while later instructions run. Triton up to 3.6 lets the wgmma of one step
# run while the next step writes the same registers (triton-lang/triton#9433). So the instructions that write them wait
# here. The wait has a certain place: after the loads of its words, hence after the barrier that ends the previous step,
# and before the products that read its results. A separate assembly text would have to be impure, and torch assumes
# that a kernel with impure assembly mutates all of its arguments.
_WAIT = tl.constexpr("wgmma.wait_group.sync.aligned 0; ")
_SCALED_OPERANDS = tl.constexpr("=r,=r,=r,=r,r,r,r")
_AFFINE_OPERANDS = tl.constexpr("=r,=r,=r,=r,r,r,r,r")


@triton.jit
def _nibble(words, scale, zero, place: tl.constexpr, HAS_ZERO: tl.constexpr):
    """(q - 8) * scale + zero of one nibble of every word, rounded once, without assembly."""
    w = (((words >> (4 * place)) & 15) - 8).to(tl.float32) * scale.to(tl.float32)
    if HAS_ZERO:
        w += zero.to(tl.float32)
    return w.to(scale.dtype)


@triton.jit
def _half_words(
    words, scale, zero, HIGH: tl.constexpr, HAS_ZERO: tl.constexpr, USE_ASM: tl.constexpr, WGMMA: tl.constexpr
):
    """Four nibbles of every word, the low or the high ones: four tensors shaped like ``words``."""
    if USE_ASM:
        HALF: tl.constexpr = scale.dtype == tl.float16
        WAIT: tl.constexpr = _WAIT if WGMMA else ""
        BEGIN: tl.constexpr = _BEGIN + WAIT + (_HIGH if HIGH else _LOW)
        SCALED: tl.constexpr = BEGIN + (_F16_SCALED if HALF else _BF16_SCALED)
        AFFINE: tl.constexpr = BEGIN + (_F16_AFFINE if HALF else _BF16_AFFINE)
        if HAS_ZERO:
            w0, w1, w2, w3 = tl.inline_asm_elementwise(
                AFFINE, _AFFINE_OPERANDS, [words, scale, zero], dtype=(scale.dtype,) * 4, is_pure=True, pack=2
            )
        else:
            w0, w1, w2, w3 = tl.inline_asm_elementwise(
                SCALED, _SCALED_OPERANDS, [words, scale], dtype=(scale.dtype,) * 4, is_pure=True, pack=2
            )
    else:
        FIRST: tl.constexpr = 4 if HIGH else 0
        w0 = _nibble(words, scale, zero, FIRST, HAS_ZERO)
        w1 = _nibble(words, scale, zero, FIRST + 1, HAS_ZERO)
        w2 = _nibble(words, scale, zero, FIRST + 2, HAS_ZERO)
        w3 = _nibble(words, scale, zero, FIRST + 3, HAS_ZERO)
    return w0, w1, w2, w3


@triton.jit
def _per_word(qparams, ROWS: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_SIZE: tl.constexpr):
    """Scales or zeros [ROWS, groups of a step or more] -> those of nibbles 0..3 and of 4..7, [ROWS, BLOCK_K / 8].

    The eight words of 64 values of K are (lane of four, parity); each has nibbles from all over the 64 values.
    """
    GROUPS: tl.constexpr = BLOCK_K // GROUP_SIZE if BLOCK_K > GROUP_SIZE else 1
    if qparams.shape[1] > GROUPS:
        # Four groups were loaded, so that a thread's share is wide enough for an asynchronous copy.
        qparams, _ = tl.split(qparams.reshape(ROWS, 2, 2).permute(0, 2, 1))
        if GROUPS == 1:
            qparams, _ = tl.split(qparams)
    if GROUP_SIZE == 32:
        low, high = tl.split(qparams.reshape(ROWS, GROUPS // 2, 2))
    else:
        low = qparams
        high = low
    REACH: tl.constexpr = (GROUP_SIZE if GROUP_SIZE < BLOCK_K else BLOCK_K) // 8 if GROUP_SIZE > 32 else 8
    low = low.reshape(ROWS, BLOCK_K // 8 // REACH, 1)
    high = high.reshape(ROWS, BLOCK_K // 8 // REACH, 1)
    low = low.broadcast_to(ROWS, BLOCK_K // 8 // REACH, REACH).reshape(ROWS, BLOCK_K // 8)
    high = high.broadcast_to(ROWS, BLOCK_K // 8 // REACH, REACH).reshape(ROWS, BLOCK_K // 8)
    return low, high


@triton.jit
def load_one(qparams_at, number, there, dtype: tl.constexpr):
    """Scale ``number`` of each row, [ROWS, 1], if ``there``, else 0. Rows begin at ``qparams_at``, a pointer to int32.

    This serves a step that lies in one group. One scale has too few bytes for an asynchronous copy, so that a step
    would wait for it. A pair has enough. The masks of two loads select one of the pair: the compiler does not propagate
    another selection back to the loads of the words, and would then move the weights between threads.
    """
    pair = qparams_at + number // 2
    first = tl.load(pair, mask=there & (number % 2 == 0), other=0)
    second = tl.load(pair, mask=there & (number % 2 == 1), other=0)
    return (first | (second >> 16)).to(tl.int16).to(dtype, bitcast=True)


@triton.jit
def row_lengths(K32, GROUP_SIZE: tl.constexpr):
    """The lengths of a row of x, of words and of scales, for K = 32 ``K32``.

    They are products with constants, so that the compiler knows their divisors and vectorizes every load.
    """
    words_row = tl.cdiv(K32, 2) * 8
    return K32 * 32, words_row, tl.cdiv(words_row * 8 // GROUP_SIZE + 3, 8) * 8


@triton.jit
def dequantize_tile(
    words,
    scale,
    zero,
    ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    HAS_ZERO: tl.constexpr,
    USE_ASM: tl.constexpr,
    WGMMA: tl.constexpr,
):
    """Words int32 [ROWS, BLOCK_K / 8], scale and zero [ROWS, groups of the step] -> weights [ROWS, BLOCK_K]."""
    s0, s1 = _per_word(scale, ROWS, BLOCK_K, GROUP_SIZE)
    z0, z1 = s0, s1  # without zeros the scales are placeholders
    if HAS_ZERO:
        z0, z1 = _per_word(zero, ROWS, BLOCK_K, GROUP_SIZE)
    w0, w1, w2, w3 = _half_words(words, s0, z0, False, HAS_ZERO, USE_ASM, WGMMA)
    w4, w5, w6, w7 = _half_words(words, s1, z1, True, HAS_ZERO, USE_ASM, WGMMA)
    # The position of a nibble is (step of 16 along K, 2 bits; half of the step): the last index is joined last.
    w = tl.join(tl.join(tl.join(w0, w4), tl.join(w2, w6)), tl.join(tl.join(w1, w5), tl.join(w3, w7)))
    # (row, block, lane, parity, step / 2, step % 2, half of the step) -> natural order of K.
    w = w.reshape(ROWS, BLOCK_K // 64, 4, 2, 2, 2, 2)
    return w.permute(0, 1, 4, 5, 6, 2, 3).reshape(ROWS, BLOCK_K)
