"""Two bf16 numbers in a 32-bit word: amax, scales and codes of pairs, for the MXFP8 casts in Triton.

Casts of bf16 are limited by the instructions for each value. As a scale is a power of two, most of them can work on two
values at once and still give the bits of `reference.py`:

* `max.NaN.xorsign.abs` takes the larger magnitude, NaN above all. Its sign means nothing.
* amax has 7 bits of mantissa, so that what a mode adds to it (`CARRY`) is 16 bits: the lower 16 would never carry.
* `t * 2^-exponent` in bf16 is exact but for results below 2^-126, as in fp32. Their code is zero with either rounding.
* amax times zero is NaN where amax is not finite: added to the reciprocal of a scale it makes that NaN, and all codes.

With EXACT_BITS, for Triton's interpreter and GPUs without these instructions, the same is done one by one.
"""

# Triton's language is not Python's; pyright takes the kernels for ordinary functions.
# pyright: reportCallIssue=false, reportAssignmentType=false, reportOperatorIssue=false, reportAttributeAccessIssue=false
# pyright: reportGeneralTypeIssues=false, reportArgumentType=false

import triton
import triton.language as tl

from titan_fp8.kernels.float8.bits import _pack, _to_codes

_ABS_MASKS = tl.constexpr(0x7FFF7FFF)
_MINUS_ZEROS = tl.constexpr(-0x7FFF8000)


@triton.jit
def _low(word):
    """The first number of each word, fp32."""
    return (word << 16).to(tl.float32, bitcast=True)


@triton.jit
def _high(word):
    """The second number of each word, fp32."""
    return (word & -0x10000).to(tl.float32, bitcast=True)


@triton.jit
def _larger(a, b):
    """The larger magnitudes of two words, with any sign."""
    return tl.inline_asm_elementwise(
        "max.NaN.xorsign.abs.bf16x2 $0, $1, $2;", "=r,r,r", [a, b], dtype=tl.int32, is_pure=True, pack=1
    )


@triton.jit
def _larger_by_integers(a, b):
    """`_larger` of words without signs."""
    return tl.maximum(a & 0x7FFF, b & 0x7FFF) | tl.maximum(a & 0x7FFF0000, b & 0x7FFF0000)


@triton.jit
def _larger_of_four(a, b, c, d, EXACT_BITS: tl.constexpr):
    if EXACT_BITS:
        largest = _larger_by_integers(_larger_by_integers(a, b), _larger_by_integers(c, d))
    else:
        largest = _larger(_larger(a, b), _larger(c, d))
    return largest


@triton.jit
def _amax(word, AXIS: tl.constexpr, EXACT_BITS: tl.constexpr):
    """The largest magnitudes along a dimension, a pair of bf16 numbers without signs."""
    if EXACT_BITS:
        largest = tl.max(word & 0x7FFF, axis=AXIS) | tl.max(word & 0x7FFF0000, axis=AXIS)
    else:
        largest = tl.reduce(word, AXIS, _larger)
    return largest & _ABS_MASKS


@triton.jit
def _amax_of_two(a, b, EXACT_BITS: tl.constexpr):
    """The larger magnitude of each word a, and that of each word b: pairs."""
    firsts, seconds = (a & 0xFFFF) | (b << 16), ((a >> 16) & 0xFFFF) | (b & -0x10000)
    return _larger_by_integers(firsts, seconds) if EXACT_BITS else _larger(firsts, seconds)


@triton.jit
def _twice_first(word):
    return (word & 0xFFFF) | (word << 16)


@triton.jit
def _twice_second(word):
    return ((word >> 16) & 0xFFFF) | (word & -0x10000)


@triton.jit
def _scales(amax, CARRY: tl.constexpr, EXACT_BITS: tl.constexpr):
    """`(bytes, inverse)` for pairs of amax: bytes of scales in bits 0-7 and 16-23, reciprocals as bf16."""
    carry: tl.constexpr = (CARRY >> 16) * 0x10001
    smallest: tl.constexpr = 0x04000400 - carry  # what has byte 0, as all below
    floored = _larger_of_four(amax, smallest, smallest, smallest, True) if EXACT_BITS else _larger(amax, smallest)
    exponent = (floored + carry) & -0x7F0080  # 0xFF80 twice, 8 more than bytes; a sum of 16 bits is below 2^16
    byte = (exponent - 0x04000400) >> 7
    inverse = -0x7CFF7D00 - exponent  # 262 twice
    if EXACT_BITS:
        is_bad = ((amax + 0x00800080) >> 15) & 0x00010001
        byte = byte | (is_bad * 255)
        inverse = tl.where((is_bad & 1) != 0, (inverse & -0x10000) | 0x7FC0, inverse)
        inverse = tl.where((is_bad & 0x10000) != 0, (inverse & 0xFFFF) | 0x7FC00000, inverse)
    else:
        # A byte of copies of the sign that Inf and NaN have one exponent further up.
        byte, inverse = tl.inline_asm_elementwise(
            "{ .reg .b32 bad; add.u32 bad, $2, 0x00800080; prmt.b32 bad, bad, 0, 0x4b49; or.b32 $0, $3, bad;"
            " fma.rn.bf16x2 $1, $2, $5, $4; }",
            "=&r,=r,r,r,r,r", [amax, byte, inverse, 0], dtype=(tl.int32, tl.int32), is_pure=True, pack=1,
        )  # fmt: skip
    return byte, inverse


@triton.jit
def _column_codes(a, b, c, d, inverse, EXACT_BITS: tl.constexpr):
    """Codes of the words of four rows: words with the four codes of the first number, and of the second."""
    if EXACT_BITS:
        x, y = _low(inverse), _high(inverse)
        first = _pack(_low(a) * x, _low(b) * x, _low(c) * x, _low(d) * x, False, True)
        second = _pack(_high(a) * y, _high(b) * y, _high(c) * y, _high(d) * y, False, True)
    else:
        first, second = tl.inline_asm_elementwise(
            "{ .reg .b32 a, b, c, d, p, q; .reg .b16 low, high;"
            " fma.rn.bf16x2 a, $2, $6, $7; fma.rn.bf16x2 b, $3, $6, $7;"
            " fma.rn.bf16x2 c, $4, $6, $7; fma.rn.bf16x2 d, $5, $6, $7;"
            " shl.b32 p, a, 16; shl.b32 q, b, 16; cvt.rn.satfinite.e4m3x2.f32 low, q, p;"
            " shl.b32 p, c, 16; shl.b32 q, d, 16; cvt.rn.satfinite.e4m3x2.f32 high, q, p; mov.b32 $0, {low, high};"
            " and.b32 p, a, 0xffff0000; and.b32 q, b, 0xffff0000; cvt.rn.satfinite.e4m3x2.f32 low, q, p;"
            " and.b32 p, c, 0xffff0000; and.b32 q, d, 0xffff0000; cvt.rn.satfinite.e4m3x2.f32 high, q, p;"
            " mov.b32 $1, {low, high}; }",
            "=&r,=&r,r,r,r,r,r,r", [a, b, c, d, inverse, _MINUS_ZEROS], dtype=(tl.int32, tl.int32),
            is_pure=True, pack=1,
        )  # fmt: skip
    return first, second


@triton.jit
def _row_codes(word, inverse, EXACT_BITS: tl.constexpr):
    """Codes of each word: int16 with those of both numbers."""
    if EXACT_BITS:
        first = _to_codes(_low(word) * _low(inverse), False, True).to(tl.int32)
        second = _to_codes(_high(word) * _high(inverse), False, True).to(tl.int32)
        codes = (first | (second << 8)).to(tl.int16)
    else:
        codes = tl.inline_asm_elementwise(
            "{ .reg .b32 a, b, p, q; .reg .b16 low, high;"
            " fma.rn.bf16x2 a, $1, $3, $5; fma.rn.bf16x2 b, $2, $4, $5;"
            " shl.b32 p, a, 16; and.b32 q, a, 0xffff0000; cvt.rn.satfinite.e4m3x2.f32 low, q, p;"
            " shl.b32 p, b, 16; and.b32 q, b, 0xffff0000; cvt.rn.satfinite.e4m3x2.f32 high, q, p;"
            " mov.b32 $0, {low, high}; }",
            "=&r,r,r,r,r,r,r", [word, inverse, _MINUS_ZEROS], dtype=tl.int16, is_pure=True, pack=2,
        )  # fmt: skip
    return codes
