"""Triton functions that convert 8-bit weights to a tile of 16-bit floats, in the registers that the tensor cores read.

The weight stays row-major in memory. A thread of ``mma`` and ``wgmma`` provides pairs of neighbours along K as the left
operand, and a load from shared memory gives it a pair of bytes. The conversion below is elementwise: from that pair to
the register of two floats, without a move between threads.
"""

import triton
import triton.language as tl

# bf16 has 7 bits after the leading one: 0x4300 | (q & 127) is 128 + (q & 127), and 0x4300 | (q & 128), whose last bit
# is the lowest of the exponent, is 128 or 256. Their difference is q. One permute puts both bytes under 0x43, two masks
# give the two floats, and one fused multiply-add, the only arithmetic of bf16 before sm_90, subtracts them.
_BF16_EXACT = (
    "prmt.b32 p, w, $2, 0x4140; and.b32 s, p, 0xff80ff80; and.b32 t, p, 0xff7fff7f; "
    "mov.b32 minus, 0xbf80bf80; fma.rn.bf16x2 t, s, minus, t; "
)
# fp16 has 10: 0x6400 | (q + 128) is 1152 + q.
_F16_EXACT = "xor.b32 w, w, 0x8080; prmt.b32 p, w, $2, 0x4140; mov.b32 minus, 0xe480e480; add.rn.f16x2 t, p, minus; "
# In fp32 0x4b000000 | (q + 128) is 2^23 + 128 + q.
_AFFINE = (
    "xor.b32 w, w, 0x8080; prmt.b32 p, w, $2, 0x7540; prmt.b32 t, w, $2, 0x7541; mov.b32 minus, 0xcb000080; "
    "add.rn.f32 p, p, minus; add.rn.f32 t, t, minus; fma.rn.f32 p, p, $4, $6; fma.rn.f32 t, t, $5, $7; "
)
_BEGIN = "{ .reg .b32 w, p, s, t, minus; cvt.u32.u16 w, $1; "
# On one line each: AOTInductor writes these texts into source code.
_EXACT = tl.constexpr(_BEGIN + _BF16_EXACT + "mov.b32 $0, t; }")
_SCALED = tl.constexpr(_BEGIN + _BF16_EXACT + "mov.b32 p, 0x80008000; fma.rn.bf16x2 $0, t, $4, p; }")
_AFFINE_BF16 = tl.constexpr(_BEGIN + _AFFINE + "cvt.rn.bf16x2.f32 $0, t, p; }")
_EXACT_F16 = tl.constexpr(_BEGIN + _F16_EXACT + "mov.b32 $0, t; }")
_SCALED_F16 = tl.constexpr(_BEGIN + _F16_EXACT + "mul.rn.f16x2 $0, t, $4; }")
_AFFINE_F16 = tl.constexpr(_BEGIN + _AFFINE + "cvt.rn.f16x2.f32 $0, t, p; }")
# A float of 8 bits: its sign goes to the sign, and the other bits to the lowest bits of the exponent and the highest of
# the mantissa. ``magic`` is the power of two that makes up for the difference of the exponents' biases. A subnormal
# number is a subnormal before that, and 0 stays 0. Only integer operations and fused multiply-adds are used, since GPUs
# before sm_89 have no conversion of these floats.


def _float8(dtype: str, shift: int, mask: str, scaled: bool) -> str:
    last = f"fma.rn.{dtype}x2 t, t, $2, p; fma.rn.{dtype}x2 $0, t, $4, p; }}" if scaled else ""
    return (
        "{ .reg .b32 w, p, s, t; cvt.u32.u16 w, $1; prmt.b32 p, w, 0, 0x1404; and.b32 s, p, 0x80008000; "
        f"shr.b32 t, p, {shift}; and.b32 t, t, {mask}; or.b32 t, t, s; mov.b32 p, 0x80008000; "
        + (last or f"fma.rn.{dtype}x2 $0, t, $2, p; }}")
    )


_E4M3 = tl.constexpr(_float8("bf16", 4, "0x07f007f0", False))
_E4M3_SCALED = tl.constexpr(_float8("bf16", 4, "0x07f007f0", True))
_E4M3_F16 = tl.constexpr(_float8("f16", 1, "0x3f803f80", False))
_E4M3_F16_SCALED = tl.constexpr(_float8("f16", 1, "0x3f803f80", True))
_E5M2 = tl.constexpr(_float8("bf16", 3, "0x0fe00fe0", False))
_E5M2_SCALED = tl.constexpr(_float8("bf16", 3, "0x0fe00fe0", True))
_E5M2_F16 = tl.constexpr(_float8("f16", 0, "0x7f007f00", False))
_E5M2_F16_SCALED = tl.constexpr(_float8("f16", 0, "0x7f007f00", True))
_EXACT_OPERANDS = tl.constexpr("=r,h,r,r")
_SCALED_OPERANDS = tl.constexpr("=r,h,r,r,r")
_AFFINE_OPERANDS = tl.constexpr("=r,h,r,r,r,r,r,r")
# The bytes above the weights, computed again in each step. wgmma reads its left operand from registers while later
# instructions run. Triton up to 3.6 lets the wgmma of one step run while the next step writes the same registers
# (triton-lang/triton#9433). The conversions of a step read these bytes, and so run after this wait. The assembly is
# pure, since torch assumes that a kernel with impure assembly mutates all of its arguments. The wait has a certain
# place: it has an operand that this step loads, so it comes after the barrier that ends the previous step.
_WAIT = "wgmma.wait_group.sync.aligned 0; mov.b32 $0, "
_BF16 = tl.constexpr(0x43434343)
_F16 = tl.constexpr(0x64646464)
_F32 = tl.constexpr(0x4B000000)
# 2**120, 2**8, 2**112 and 1, twice each.
_E4M3_FACTOR = tl.constexpr(0x7B807B80)
_E4M3_F16_FACTOR = tl.constexpr(0x5C005C00)
_E5M2_FACTOR = tl.constexpr(0x77807780)
_E5M2_F16_FACTOR = tl.constexpr(0x3C003C00)
_WAIT_E4M3 = tl.constexpr(_WAIT + "0x7b807b80;")
_WAIT_E4M3_F16 = tl.constexpr(_WAIT + "0x5c005c00;")
_WAIT_E5M2 = tl.constexpr(_WAIT + "0x77807780;")
_WAIT_E5M2_F16 = tl.constexpr(_WAIT + "0x3c003c00;")
_WAIT_BF16 = tl.constexpr(_WAIT + "0x43434343;")
_WAIT_F16 = tl.constexpr(_WAIT + "0x64646464;")
_WAIT_F32 = tl.constexpr(_WAIT + "0x4b000000;")


@triton.jit
def magic_bytes(guard_at, HALF: tl.constexpr, HAS_ZERO: tl.constexpr, FLOAT8: tl.constexpr, WGMMA: tl.constexpr):
    """``magic`` of :func:`dequantize_bytes` for a step, [1, 1]; guard_at [1, 1]: an address that each step changes."""
    if WGMMA:
        INTEGERS: tl.constexpr = _WAIT_F32 if HAS_ZERO else (_WAIT_F16 if HALF else _WAIT_BF16)
        E4M3: tl.constexpr = _WAIT_E4M3_F16 if HALF else _WAIT_E4M3
        E5M2: tl.constexpr = _WAIT_E5M2_F16 if HALF else _WAIT_E5M2
        WAIT: tl.constexpr = INTEGERS if FLOAT8 == 0 else (E4M3 if FLOAT8 == 4 else E5M2)
        magic = tl.inline_asm_elementwise(WAIT, "=r,r", [tl.load(guard_at)], dtype=tl.int32, is_pure=True, pack=1)
    elif FLOAT8 == 0:
        magic = tl.full((1, 1), _F32 if HAS_ZERO else (_F16 if HALF else _BF16), tl.int32)
    elif FLOAT8 == 4:
        magic = tl.full((1, 1), _E4M3_F16_FACTOR if HALF else _E4M3_FACTOR, tl.int32)
    else:
        magic = tl.full((1, 1), _E5M2_F16_FACTOR if HALF else _E5M2_FACTOR, tl.int32)
    return magic


@triton.jit
def _float8_numbers(q, FLOAT8: tl.constexpr):
    """The bytes of floats with FLOAT8 bits of exponent as fp32, without assembly."""
    MANTISSA: tl.constexpr = 7 - FLOAT8
    BIAS: tl.constexpr = (1 << (FLOAT8 - 1)) - 1
    bits = q.to(tl.int32) & 127
    exponent = bits >> MANTISSA
    fraction = bits & ((1 << MANTISSA) - 1)
    # A subnormal has the exponent of the smallest normal number, without the leading one.
    whole = tl.where(exponent == 0, fraction, fraction + (1 << MANTISSA)).to(tl.float32)
    size = whole * tl.exp2((tl.maximum(exponent, 1) - BIAS - MANTISSA).to(tl.float32))
    return tl.where(q < 0, -size, size)


@triton.jit
def dequantize_bytes(
    q,
    scale,
    zero,
    magic,
    x,
    SCALED: tl.constexpr,
    HAS_ZERO: tl.constexpr,
    FLOAT8: tl.constexpr,
    USE_ASM: tl.constexpr,
):
    """q [ROWS, BLOCK_K] int8 -> q, q * scale if SCALED, or q * scale + zero if HAS_ZERO, rounded once to x's dtype.

    scale and zero have q's shape. With a zero both are fp32, otherwise scale has x's dtype. FLOAT8: the bits of the
    exponent of q's bytes as floats, 4 or 5, or 0 for integers; floats have no zero.
    """
    HALF: tl.constexpr = x.dtype == tl.float16
    if not USE_ASM:
        w = q.to(tl.float32) if FLOAT8 == 0 else _float8_numbers(q, FLOAT8)
        if SCALED:
            w *= scale.to(tl.float32)
        if HAS_ZERO:
            w += zero
        w = w.to(x.dtype)
    elif HAS_ZERO:
        AFFINE: tl.constexpr = _AFFINE_F16 if HALF else _AFFINE_BF16
        w = tl.inline_asm_elementwise(AFFINE, _AFFINE_OPERANDS, [q, magic, scale, zero], x.dtype, is_pure=True, pack=2)
    elif SCALED:
        INTEGERS: tl.constexpr = _SCALED_F16 if HALF else _SCALED
        E4M3: tl.constexpr = _E4M3_F16_SCALED if HALF else _E4M3_SCALED
        E5M2: tl.constexpr = _E5M2_F16_SCALED if HALF else _E5M2_SCALED
        PRODUCT: tl.constexpr = INTEGERS if FLOAT8 == 0 else (E4M3 if FLOAT8 == 4 else E5M2)
        w = tl.inline_asm_elementwise(PRODUCT, _SCALED_OPERANDS, [q, magic, scale], x.dtype, is_pure=True, pack=2)
    else:
        BYTES: tl.constexpr = _EXACT_F16 if HALF else _EXACT
        WIDE: tl.constexpr = _E4M3_F16 if HALF else _E4M3
        WIDER: tl.constexpr = _E5M2_F16 if HALF else _E5M2
        EXACT: tl.constexpr = BYTES if FLOAT8 == 0 else (WIDE if FLOAT8 == 4 else WIDER)
        w = tl.inline_asm_elementwise(EXACT, _EXACT_OPERANDS, [q, magic], x.dtype, is_pure=True, pack=2)
    return w


@triton.jit
def per_weight(qparams, ROWS: tl.constexpr, BLOCK_K: tl.constexpr):
    """[ROWS, groups of a step] -> [ROWS, BLOCK_K]."""
    GROUPS: tl.constexpr = qparams.shape[1]
    wide = qparams.reshape(ROWS, GROUPS, 1).broadcast_to(ROWS, GROUPS, BLOCK_K // GROUPS)
    return wide.reshape(ROWS, BLOCK_K)


@triton.jit
def both_of_pair(pairs, x, ROWS: tl.constexpr, GROUPS: tl.constexpr):
    """int32 [ROWS, GROUPS / 2], each with two floats of x's dtype -> [ROWS, GROUPS]."""
    low = (pairs & 0xFFFF).to(tl.int16).to(x.dtype, bitcast=True)
    high = (pairs >> 16).to(tl.int16).to(x.dtype, bitcast=True)
    return tl.join(low, high).reshape(ROWS, GROUPS)


@triton.jit
def one_of_pair(even, odd, x):
    """Two int32 pairs, one of them zero -> the low float of ``even`` or the high float of ``odd``."""
    return ((even & 0xFFFF) | (odd >> 16)).to(tl.int16).to(x.dtype, bitcast=True)
