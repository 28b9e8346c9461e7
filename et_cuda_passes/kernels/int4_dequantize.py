"""Triton functions that dequantize words of the ``mma_tiled`` layout to a tile of weights, in the tensor cores' order.

In this layout (:mod:`et_cuda_passes.layouts.mma_tiled`) the words that a thread loads contain exactly the elements that
``mma`` and ``wgmma`` read from this thread as their left operand. So the joins, the permute and the reshapes below
compile to no instruction.

A nibble is an integer q in 0..15, for q - 8, or with FLOAT4 a number in float4_e2m1fn. Each step of 16 along K has
scales of its own with a GROUP_SIZE of 16; with others the steps of half a word share them.
"""

import triton
import triton.language as tl

_SCALES = ("$6", "$6")
"""The operand that holds the scale of nibbles 0 and 1, and that of nibbles 2 and 3; as for zeros."""
_ZEROS = ("$7", "$7")
_SPLIT_SCALES = ("$6", "$7")
_SPLIT_ZEROS = ("$8", "$9")
_NONE = ("0x80008000", "0x80008000")


def _arithmetic(
    dtype: str, magic: str, minus: str, one: str, zeros: tuple[str, str], scales: tuple[str, str] = _SCALES
) -> str:
    """PTX that converts the nibbles of ``w``, the halves of two words, to four registers of two 16-bit floats.

    ``magic | q`` is a float of value 128 + q (bf16) or 1024 + q (fp16): subtracting 136 or 1032 leaves q - 8 with no
    conversion instruction and no rounding. Only fused multiply-adds are used, since bf16 has no other arithmetic
    before sm_90. The addend is negative zero, which changes nothing, if there are no zeros.
    """
    bits = [f"lop3.b32 t, w, 0x000f000f, {magic}, 0xea;", f"fma.rn.{dtype}x2 t, t, {one}, {minus};"]
    return _nibbles(dtype, bits, {"one": one, "minus": minus}, zeros, scales)


def _float4(dtype: str, shift: int, mask: str, factor: str, scales: tuple[str, str]) -> str:
    """As :func:`_arithmetic`, for nibbles that are numbers in float4_e2m1fn.

    The sign goes to the sign of a 16-bit float, the two bits of the exponent to the lowest bits of its exponent, and
    the bit of the mantissa to the highest of its mantissa. A factor, a power of two, makes up for the difference of the
    exponents' biases; the subnormal 0.5 is a subnormal before it.
    """
    bits = [
        f"shl.b32 s, w, 12; and.b32 s, s, 0x80008000; shl.b32 t, w, {shift};",
        f"lop3.b32 t, t, {mask}, s, 0xea; fma.rn.{dtype}x2 t, t, {factor}, 0x80008000;",
    ]
    return _nibbles(dtype, bits, {"one": factor}, _NONE, scales)


def _nibbles(
    dtype: str, bits: list[str], registers: dict[str, str], zeros: tuple[str, str], scales: tuple[str, str]
) -> str:
    """``bits`` and a product with the scale for each nibble; constants are held in registers."""
    lines = []
    for nibble in range(4):
        lines += ["shr.u32 w, w, 4;"] * (nibble > 0)
        lines += bits
        lines.append(f"fma.rn.{dtype}x2 ${nibble}, t, {scales[nibble // 2]}, {zeros[nibble // 2]};")
    # On one line: AOTInductor writes these texts into source code.
    text = " ".join(lines)
    for name, value in {**registers, "none": _NONE[0]}.items():
        text = f"mov.b32 {name}, {value}; " + text.replace(value, name)
    return text + " }"


_BF16 = ("bf16", "0x43004300", "0xc308c308", "0x3f803f80")
_F16 = ("f16", "0x64006400", "0xe408e408", "0x3c003c00")
_BF16_FLOAT4 = ("bf16", 6, "0x01c001c0", "0x7e807e80")
_F16_FLOAT4 = ("f16", 9, "0x0e000e00", "0x74007400")
_BF16_SCALED = tl.constexpr(_arithmetic(*_BF16, _NONE))
_BF16_AFFINE = tl.constexpr(_arithmetic(*_BF16, _ZEROS))
_F16_SCALED = tl.constexpr(_arithmetic(*_F16, _NONE))
_F16_AFFINE = tl.constexpr(_arithmetic(*_F16, _ZEROS))
_BF16_SPLIT_SCALED = tl.constexpr(_arithmetic(*_BF16, _NONE, _SPLIT_SCALES))
_BF16_SPLIT_AFFINE = tl.constexpr(_arithmetic(*_BF16, _SPLIT_ZEROS, _SPLIT_SCALES))
_F16_SPLIT_SCALED = tl.constexpr(_arithmetic(*_F16, _NONE, _SPLIT_SCALES))
_F16_SPLIT_AFFINE = tl.constexpr(_arithmetic(*_F16, _SPLIT_ZEROS, _SPLIT_SCALES))
_BF16_FLOAT4_SCALED = tl.constexpr(_float4(*_BF16_FLOAT4, _SCALES))
_BF16_FLOAT4_SPLIT = tl.constexpr(_float4(*_BF16_FLOAT4, _SPLIT_SCALES))
_F16_FLOAT4_SCALED = tl.constexpr(_float4(*_F16_FLOAT4, _SCALES))
_F16_FLOAT4_SPLIT = tl.constexpr(_float4(*_F16_FLOAT4, _SPLIT_SCALES))
_BEGIN = tl.constexpr("{ .reg .b32 w, t, one, minus, none; ")
_BEGIN_FLOAT4 = tl.constexpr("{ .reg .b32 w, s, t, one, none; ")
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
_SPLIT_OPERANDS = tl.constexpr("=r,=r,=r,=r,r,r,r,r,r,r")


@triton.jit
def _nibble(words, scale, zero, place: tl.constexpr, HAS_ZERO: tl.constexpr, FLOAT4: tl.constexpr):
    """The number of one nibble of every word, times scale plus zero, rounded once, without assembly."""
    q = (words >> (4 * place)) & 15
    if FLOAT4:
        exponent = (q >> 1) & 3
        # Twice the magnitude: the mantissa of a subnormal, else 2 or 3 shifted.
        twice = tl.where(exponent == 0, q & 1, (2 + (q & 1)) << tl.maximum(exponent - 1, 0))
        w = tl.where(q >= 8, -twice, twice).to(tl.float32) * 0.5 * scale.to(tl.float32)
    else:
        w = (q - 8).to(tl.float32) * scale.to(tl.float32)
    if HAS_ZERO:
        w += zero.to(tl.float32)
    return w.to(scale.dtype)


@triton.jit
def _half_words(
    words,
    scale,
    scale2,
    zero,
    zero2,
    HIGH: tl.constexpr,
    SPLIT: tl.constexpr,
    HAS_ZERO: tl.constexpr,
    FLOAT4: tl.constexpr,
    USE_ASM: tl.constexpr,
    WGMMA: tl.constexpr,
):
    """Four nibbles of every word, the low or the high ones: four tensors shaped like ``words``.

    With SPLIT the last two nibbles have ``scale2`` and ``zero2``.
    """
    if USE_ASM:
        HALF: tl.constexpr = scale.dtype == tl.float16
        WAIT: tl.constexpr = _WAIT if WGMMA else ""
        BEGIN: tl.constexpr = (_BEGIN_FLOAT4 if FLOAT4 else _BEGIN) + WAIT + (_HIGH if HIGH else _LOW)
        if SPLIT and HAS_ZERO:
            SPLIT_AFFINE: tl.constexpr = BEGIN + (_F16_SPLIT_AFFINE if HALF else _BF16_SPLIT_AFFINE)
            w0, w1, w2, w3 = tl.inline_asm_elementwise(
                SPLIT_AFFINE,
                _SPLIT_OPERANDS,
                [words, scale, scale2, zero, zero2],
                dtype=(scale.dtype,) * 4,
                is_pure=True,
                pack=2,
            )
        elif SPLIT:
            INTEGERS: tl.constexpr = _F16_SPLIT_SCALED if HALF else _BF16_SPLIT_SCALED
            FLOATS: tl.constexpr = _F16_FLOAT4_SPLIT if HALF else _BF16_FLOAT4_SPLIT
            SPLIT_SCALED: tl.constexpr = BEGIN + (FLOATS if FLOAT4 else INTEGERS)
            w0, w1, w2, w3 = tl.inline_asm_elementwise(
                SPLIT_SCALED,
                _AFFINE_OPERANDS,
                [words, scale, scale2],
                dtype=(scale.dtype,) * 4,
                is_pure=True,
                pack=2,
            )
        elif HAS_ZERO:
            AFFINE: tl.constexpr = BEGIN + (_F16_AFFINE if HALF else _BF16_AFFINE)
            w0, w1, w2, w3 = tl.inline_asm_elementwise(
                AFFINE, _AFFINE_OPERANDS, [words, scale, zero], dtype=(scale.dtype,) * 4, is_pure=True, pack=2
            )
        else:
            WHOLE: tl.constexpr = _F16_SCALED if HALF else _BF16_SCALED
            PARTS: tl.constexpr = _F16_FLOAT4_SCALED if HALF else _BF16_FLOAT4_SCALED
            SCALED: tl.constexpr = BEGIN + (PARTS if FLOAT4 else WHOLE)
            w0, w1, w2, w3 = tl.inline_asm_elementwise(
                SCALED, _SCALED_OPERANDS, [words, scale], dtype=(scale.dtype,) * 4, is_pure=True, pack=2
            )
    else:
        FIRST: tl.constexpr = 4 if HIGH else 0
        w0 = _nibble(words, scale, zero, FIRST, HAS_ZERO, FLOAT4)
        w1 = _nibble(words, scale, zero, FIRST + 1, HAS_ZERO, FLOAT4)
        w2 = _nibble(words, scale2, zero2, FIRST + 2, HAS_ZERO, FLOAT4)
        w3 = _nibble(words, scale2, zero2, FIRST + 3, HAS_ZERO, FLOAT4)
    return w0, w1, w2, w3


@triton.jit
def _per_step(qparams, ROWS: tl.constexpr, BLOCK_K: tl.constexpr):
    """Scales or zeros [ROWS, BLOCK_K / 16] -> those of the four steps of each 64 along K, [ROWS, BLOCK_K / 8] each."""
    BLOCKS: tl.constexpr = BLOCK_K // 64
    even, odd = tl.split(qparams.reshape(ROWS, BLOCKS, 2, 2))
    first, third = tl.split(even)
    second, fourth = tl.split(odd)
    return (
        _for_words(first, ROWS, BLOCKS),
        _for_words(second, ROWS, BLOCKS),
        _for_words(third, ROWS, BLOCKS),
        _for_words(fourth, ROWS, BLOCKS),
    )


@triton.jit
def _for_words(qparams, ROWS: tl.constexpr, BLOCKS: tl.constexpr):
    """[ROWS, BLOCKS] -> [ROWS, 8 BLOCKS]."""
    return qparams.reshape(ROWS, BLOCKS, 1).broadcast_to(ROWS, BLOCKS, 8).reshape(ROWS, 8 * BLOCKS)


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
def row_lengths(K_UNITS, GROUP_SIZE: tl.constexpr, UNIT: tl.constexpr):
    """The lengths of a row of x, of words and of scales, for K = UNIT ``K_UNITS``.

    They are products with constants, so that the compiler knows their divisors and vectorizes every load.
    """
    words_row = tl.cdiv(K_UNITS, 64 // UNIT) * 8
    return K_UNITS * UNIT, words_row, tl.cdiv(words_row * 8 // GROUP_SIZE + 3, 8) * 8


@triton.jit
def dequantize_tile(
    words,
    scale,
    zero,
    ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    HAS_ZERO: tl.constexpr,
    FLOAT4: tl.constexpr,
    USE_ASM: tl.constexpr,
    WGMMA: tl.constexpr,
):
    """Words int32 [ROWS, BLOCK_K / 8], scale and zero [ROWS, groups of the step] -> weights [ROWS, BLOCK_K]."""
    SPLIT: tl.constexpr = GROUP_SIZE == 16
    if SPLIT:
        s0, s1, s2, s3 = _per_step(scale, ROWS, BLOCK_K)
        z0, z1, z2, z3 = s0, s1, s2, s3  # without zeros the scales are placeholders
        if HAS_ZERO:
            z0, z1, z2, z3 = _per_step(zero, ROWS, BLOCK_K)
    else:
        s0, s2 = _per_word(scale, ROWS, BLOCK_K, GROUP_SIZE)
        z0, z2 = s0, s2
        if HAS_ZERO:
            z0, z2 = _per_word(zero, ROWS, BLOCK_K, GROUP_SIZE)
        s1, s3, z1, z3 = s0, s2, z0, z2
    w0, w1, w2, w3 = _half_words(words, s0, s1, z0, z1, False, SPLIT, HAS_ZERO, FLOAT4, USE_ASM, WGMMA)
    w4, w5, w6, w7 = _half_words(words, s2, s3, z2, z3, True, SPLIT, HAS_ZERO, FLOAT4, USE_ASM, WGMMA)
    # The position of a nibble is (step of 16 along K, 2 bits; half of the step): the last index is joined last.
    w = tl.join(tl.join(tl.join(w0, w4), tl.join(w2, w6)), tl.join(tl.join(w1, w5), tl.join(w3, w7)))
    # (row, block, lane, parity, step / 2, step % 2, half of the step) -> natural order of K.
    w = w.reshape(ROWS, BLOCK_K // 64, 4, 2, 2, 2, 2)
    return w.permute(0, 1, 4, 5, 6, 2, 3).reshape(ROWS, BLOCK_K)
