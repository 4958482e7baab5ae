"""What MXFP8 codes stand for, in bf16 and as x lies, in Triton: quantizing and dequantizing in one read.

    _quantize_dequantize_kernel         any x
    _quantize_dequantize_pairs_kernel   bf16 whose rows are whole words, two numbers at once (see `pairs.py`)

A program that holds a tile of whole 32x32 squares holds every block of both layouts that crosses it. `present` rows are
there and count, the others are zero.

Of pairs, no code is ever made. The scaled value s is exact in bf16, and an e4m3 number has 4 bits where bf16 has 8.
With P the power of two that |s| is at least, or 2^-6 if that is larger (e4m3 is subnormal below, multiples of 2^-9),

    (18 P + s) - 18 P

rounds s to e4m3. The sum lies between 16 P and 20 P, where bf16 numbers are P / 8 apart, as those of e4m3 are around s;
18 P is 144 of these steps, an even number, so ties go the same way; and the difference is exact.
"""

# Triton's language is not Python's; pyright takes the kernels for ordinary functions.
# pyright: reportCallIssue=false, reportAssignmentType=false, reportOperatorIssue=false, reportAttributeAccessIssue=false
# pyright: reportGeneralTypeIssues=false, reportArgumentType=false

import triton
import triton.language as tl

from titan_fp8.kernels.float8.bits import _NAN_BITS, _from_codes, _tile_of_program, _to_codes
from titan_fp8.kernels.mx import pairs
from titan_fp8.kernels.mx.places import _present
from titan_fp8.kernels.mx.reference import BLOCK, CARRY
from titan_fp8.kernels.mx.squares import _left, _of_squares
from titan_fp8.kernels.mx.tiles_of_numbers import (
    _NAN_BYTE,
    _column_bytes,
    _inverse,
    _load_numbers,
    _of_row_blocks,
    _row_bytes,
)
from titan_fp8.kernels.mx.tiles_of_pairs import (
    _WARP_WORDS,
    _column_amax,
    _load_pairs,
    _of_row_pairs,
    _row_amax,
    _store_four,
)

_BLOCK = tl.constexpr(BLOCK)
_CARRY_OF_RCEIL = tl.constexpr(CARRY["rceil"])
_LARGEST = tl.constexpr(0x43E043E0)
"""448 twice, in bf16."""
_SMALLEST_NORMAL = tl.constexpr(0x3C803C80)
"""2^-6."""
_EIGHTEEN, _MINUS_EIGHTEEN = tl.constexpr(0x41904190), tl.constexpr(0x41904190 - 0x7FFF8000)


@triton.jit
def _value(byte):
    """Scales, fp32, that bytes stand for."""
    finite = tl.where(byte == 0, 1 << 22, byte << 23)  # 2^-127 is subnormal
    return tl.where(byte == _NAN_BYTE, _NAN_BITS, finite).to(tl.float32, bitcast=True)


@triton.jit
def _dequantized(x, inverse, scale, EXACT_BITS: tl.constexpr):
    """The bits, int16, of what x (fp32) is in e4m3 with this scale, in bf16; one NaN."""
    value = _from_codes(_to_codes(x * inverse, False, EXACT_BITS), False, EXACT_BITS) * scale
    if EXACT_BITS:  # the interpreter truncates to bf16; of all scales, only the smallest need rounding
        bits = value.to(tl.int32, bitcast=True)
        rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).to(tl.int16)
    else:
        rounded = value.to(tl.bfloat16).to(tl.int16, bitcast=True)
    return tl.where(value == value, rounded, 0x7FC0)


@triton.jit
def _store_dequantized_rows(
    x, to, mask, CARRY: tl.constexpr, EXACT_BITS: tl.constexpr, QUADS: tl.constexpr, WIDTH: tl.constexpr
):
    """Store `_dequantized` of rows with their scales along K."""
    byte = _row_bytes(x, CARRY, QUADS, WIDTH)
    inverse, scale = _of_row_blocks(_inverse(byte), QUADS, WIDTH), _of_row_blocks(_value(byte), QUADS, WIDTH)
    tl.store(to, _dequantized(x, inverse, scale, EXACT_BITS), mask=mask)


@triton.jit(do_not_specialize=["tokens"])
def _quantize_dequantize_kernel(
    x_ptr, ends_ptr, rows_ptr, columns_ptr, tokens, features, stride_t, stride_k, groups,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, KIND: tl.constexpr, CARRY: tl.constexpr, EXACT_BITS: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, BAND: tl.constexpr,
):  # fmt: skip
    """What the codes of a tile stand for, along K and along T, as the bits of bf16 numbers."""
    WIDTH: tl.constexpr = min(BLOCK_K, 128)
    PIECES: tl.constexpr = BLOCK_K // WIDTH
    QUADS: tl.constexpr = PIECES * BLOCK_T // 4
    pid = tl.program_id(0)
    pid_t, pid_k = _tile_of_program(pid, tl.cdiv(tokens, BLOCK_T), tl.cdiv(features, BLOCK_K), BAND)
    first_t, first_k = pid_t.to(tl.int64) * BLOCK_T, pid_k.to(tl.int64) * BLOCK_K
    present = _present(ends_ptr, tokens, groups, KIND)
    a, b, c, d, row, k, is_k = _load_numbers(
        x_ptr, first_t, first_k, present, features, stride_t, stride_k, BLOCK_T, BLOCK_K, PIECES, 1, WIDTH
    )
    there = _left(tokens, first_t, BLOCK_T)
    place = (first_t * features + first_k) + row.to(tl.int64)[:, None] * features + k
    in_a, in_b = (row < there)[:, None] & is_k, (row + 1 < there)[:, None] & is_k
    in_c, in_d = (row + 2 < there)[:, None] & is_k, (row + 3 < there)[:, None] & is_k
    if ROWS:
        to = rows_ptr + place
        _store_dequantized_rows(a, to, in_a, CARRY, EXACT_BITS, QUADS, WIDTH)
        _store_dequantized_rows(b, to + features, in_b, CARRY, EXACT_BITS, QUADS, WIDTH)
        _store_dequantized_rows(c, to + 2 * features, in_c, CARRY, EXACT_BITS, QUADS, WIDTH)
        _store_dequantized_rows(d, to + 3 * features, in_d, CARRY, EXACT_BITS, QUADS, WIDTH)
    if COLUMNS:
        byte, to = _column_bytes(a, b, c, d, CARRY, BLOCK_T, PIECES, 1, WIDTH), columns_ptr + place
        inverse = _of_squares(_inverse(byte), BLOCK_T, PIECES, 1, WIDTH)
        scale = _of_squares(_value(byte), BLOCK_T, PIECES, 1, WIDTH)
        tl.store(to, _dequantized(a, inverse, scale, EXACT_BITS), mask=in_a)
        tl.store(to + features, _dequantized(b, inverse, scale, EXACT_BITS), mask=in_b)
        tl.store(to + 2 * features, _dequantized(c, inverse, scale, EXACT_BITS), mask=in_c)
        tl.store(to + 3 * features, _dequantized(d, inverse, scale, EXACT_BITS), mask=in_d)


@triton.jit
def _factors(amax, CARRY: tl.constexpr, EXACT_BITS: tl.constexpr):
    """`(inverse, scale, kept)` for pairs of amax: reciprocals and scales as bf16, and which bits of a magnitude are
    kept, for NaN but those of the one that results have."""
    byte, inverse = pairs._scales(amax, CARRY, EXACT_BITS)
    is_nan = ((byte + 0x00010001) >> 8) & 0x00010001
    # 2^-127 is subnormal.
    scale = pairs._larger_by_integers(byte << 7, 0x00400040) if EXACT_BITS else pairs._larger(byte << 7, 0x00400040)
    return inverse, scale, 0x7FFF7FFF - is_nan * 0x3F


@triton.jit
def _dequantized_pairs(word, inverse, scale, kept, CARRY: tl.constexpr, EXACT_BITS: tl.constexpr):
    """What words are in e4m3 with these scales, in words of bf16."""
    if EXACT_BITS:
        low = _dequantized(pairs._low(word), pairs._low(inverse), pairs._low(scale), True)
        high = _dequantized(pairs._high(word), pairs._high(inverse), pairs._high(scale), True)
        result = (low.to(tl.int32) & 0xFFFF) | (high.to(tl.int32) << 16)
    elif CARRY >= _CARRY_OF_RCEIL:  # nothing is above 448
        result = tl.inline_asm_elementwise(
            "{ .reg .b32 s, p, t; fma.rn.bf16x2 s, $1, $2, $5; max.xorsign.abs.bf16x2 p, s, $6;"
            " and.b32 p, p, 0x7f807f80; fma.rn.bf16x2 t, p, $7, s; fma.rn.bf16x2 t, p, $8, t;"
            " fma.rn.bf16x2 t, t, $3, $5; and.b32 t, t, $4; and.b32 s, s, $5; or.b32 $0, s, t; }",
            "=r,r,r,r,r,r,r,r,r",
            [word, inverse, scale, kept, pairs._MINUS_ZEROS, _SMALLEST_NORMAL, _EIGHTEEN, _MINUS_EIGHTEEN],
            dtype=tl.int32, is_pure=True, pack=1,
        )  # fmt: skip
    else:
        result = tl.inline_asm_elementwise(
            "{ .reg .b32 s, p, t; fma.rn.bf16x2 s, $1, $2, $5; min.NaN.xorsign.abs.bf16x2 s, s, $9;"
            " max.xorsign.abs.bf16x2 p, s, $6;"
            " and.b32 p, p, 0x7f807f80; fma.rn.bf16x2 t, p, $7, s; fma.rn.bf16x2 t, p, $8, t;"
            " fma.rn.bf16x2 t, t, $3, $5; and.b32 t, t, $4; and.b32 s, s, $5; or.b32 $0, s, t; }",
            "=r,r,r,r,r,r,r,r,r,r",
            [word, inverse, scale, kept, pairs._MINUS_ZEROS, _SMALLEST_NORMAL, _EIGHTEEN, _MINUS_EIGHTEEN, _LARGEST],
            dtype=tl.int32, is_pure=True, pack=1,
        )  # fmt: skip
    return result


@triton.jit
def _two_dequantized_rows(
    a, b, CARRY: tl.constexpr, EXACT_BITS: tl.constexpr, QUADS: tl.constexpr, WORDS: tl.constexpr
):
    """What two rows of each quad `[quads, WORDS]` are with their scales along K."""
    inverse, scale, kept = _factors(_row_amax(a, b, EXACT_BITS, QUADS, WORDS), CARRY, EXACT_BITS)
    first_inverse, second_inverse = pairs._twice_first(inverse), pairs._twice_second(inverse)
    first_scale, second_scale = pairs._twice_first(scale), pairs._twice_second(scale)
    first_kept, second_kept = pairs._twice_first(kept), pairs._twice_second(kept)
    a = _dequantized_pairs(
        a, _of_row_pairs(first_inverse, QUADS, WORDS), _of_row_pairs(first_scale, QUADS, WORDS),
        _of_row_pairs(first_kept, QUADS, WORDS), CARRY, EXACT_BITS,
    )  # fmt: skip
    b = _dequantized_pairs(
        b, _of_row_pairs(second_inverse, QUADS, WORDS), _of_row_pairs(second_scale, QUADS, WORDS),
        _of_row_pairs(second_kept, QUADS, WORDS), CARRY, EXACT_BITS,
    )  # fmt: skip
    return a, b


@triton.jit(do_not_specialize=["tokens"])
def _quantize_dequantize_pairs_kernel(
    x_ptr, ends_ptr, rows_ptr, columns_ptr, tokens, features, stride_t, stride_k, groups,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, KIND: tl.constexpr, CARRY: tl.constexpr, EXACT_BITS: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, BAND: tl.constexpr,
):  # fmt: skip
    """What `_quantize_dequantize_kernel` does, of x in bf16 whose rows are whole words, in such words."""
    WORDS: tl.constexpr = min(BLOCK_K // 2, 32 if COLUMNS else 128)
    PIECES: tl.constexpr = BLOCK_K // 2 // WORDS
    QUADS: tl.constexpr = PIECES * BLOCK_T // 4
    pid = tl.program_id(0)
    pid_t, pid_k = _tile_of_program(pid, tl.cdiv(tokens, BLOCK_T), tl.cdiv(features, BLOCK_K), BAND)
    first_t, first_k = pid_t.to(tl.int64) * BLOCK_T, pid_k.to(tl.int64) * BLOCK_K
    present = _present(ends_ptr, tokens, groups, KIND)
    a, b, c, d, row, pair, is_pair = _load_pairs(
        x_ptr, first_t, first_k, present, features, stride_t, BLOCK_T, BLOCK_K, PIECES, WORDS
    )
    if ROWS:
        e, f = _two_dequantized_rows(a, b, CARRY, EXACT_BITS, QUADS, WORDS)
        g, h = _two_dequantized_rows(c, d, CARRY, EXACT_BITS, QUADS, WORDS)
        _store_four(e, f, g, h, row, pair, is_pair, first_t, first_k, tokens, features, rows_ptr, BLOCK_T, False)
    if COLUMNS:
        amax = _column_amax(a, b, c, d, EXACT_BITS, BLOCK_T, PIECES, WORDS)
        inverse, scale, kept = _factors(amax, CARRY, EXACT_BITS)
        inverse = _of_squares(inverse, BLOCK_T, PIECES, _WARP_WORDS // WORDS, WORDS)
        scale = _of_squares(scale, BLOCK_T, PIECES, _WARP_WORDS // WORDS, WORDS)
        kept = _of_squares(kept, BLOCK_T, PIECES, _WARP_WORDS // WORDS, WORDS)
        a = _dequantized_pairs(a, inverse, scale, kept, CARRY, EXACT_BITS)
        b = _dequantized_pairs(b, inverse, scale, kept, CARRY, EXACT_BITS)
        c = _dequantized_pairs(c, inverse, scale, kept, CARRY, EXACT_BITS)
        d = _dequantized_pairs(d, inverse, scale, kept, CARRY, EXACT_BITS)
        _store_four(a, b, c, d, row, pair, is_pair, first_t, first_k, tokens, features, columns_ptr, BLOCK_T, False)
