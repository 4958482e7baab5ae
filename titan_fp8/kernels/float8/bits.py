"""What float8 kernels in Triton share: amax as integers, scales, codes, four codes in a word, the walk over tiles.

What the numerics rest on:

* amax is an integer maximum of `bits & 0x7FFFFFFF`: it sees NaN and Inf, and atomics give it in any order, bitwise
  repeatable.
* Division is `div_rn`, correctly rounded; `/` in Triton is not. A power of two needs none: see `_scales`.
* fp32 -> code is `_to_codes`, or `_pack` for four at a time. The hardware's conversion rounds to nearest even and
  saturates. Triton's interpreter casts wrongly, and GPUs before SM89 have no such conversion, so for them (EXACT_BITS)
  the same is done with integer arithmetic. There is no clamp: one that propagates NaN beside a transposed FP8 store is
  miscompiled (triton#11111).
* NaN has the code 0x7F, in the hardware's conversion and in the other; a group whose scale is NaN has it everywhere.

A transposed layout is written in words. Bytes would pass through shared memory one by one, so each thread takes the
same features of four rows that follow each other, and their codes are one 32-bit word of the transposed row: two
conversions of two numbers each, and a quarter of the moves.

T tokens (rows), K features (columns), `quads` groups of four tokens.
"""

# Triton's language is not Python's; pyright takes the kernels for ordinary functions.
# pyright: reportCallIssue=false, reportAssignmentType=false, reportOperatorIssue=false, reportAttributeAccessIssue=false
# pyright: reportGeneralTypeIssues=false, reportArgumentType=false

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from titan_fp8.kernels.launch import INTERPRETED


class Tile(NamedTuple):
    """Blocks of a tile kernel. Programs walk `band` tiles down the tokens before they go on along the features, so
    that pieces of one transposed row are written close in time. `registers` limits those of a thread, so that more
    programs fit a multiprocessor."""

    tokens: int
    features: int
    warps: int
    band: int
    registers: int | None = None


_ABS_MASK = tl.constexpr(0x7FFFFFFF)
_INF_BITS = tl.constexpr(0x7F800000)
_NAN_BITS = tl.constexpr(0x7FC00000)
_AMAX_FLOOR = tl.constexpr(1e-12)
_AMAX_FLOOR_BITS = tl.constexpr(0x2B8CBCCC)


@triton.jit
def _abs_bits(x):
    """|x| as the bits of an fp32 number, which order as the numbers do, NaN above Inf above the rest."""
    return x.to(tl.float32).to(tl.int32, bitcast=True) & _ABS_MASK


@triton.jit
def _scales(amax, E5M2: tl.constexpr, POWER_OF_TWO: tl.constexpr):
    """`(inv_scale, scale)` for amax bits; NaN where amax is not finite.

    POWER_OF_TWO: the formats' largest values are 1.75 * 2^8 and 1.75 * 2^15, and 1.75 * 2^e / (m * 2^f) lies in
    [2^(e-f), 2^(e-f+1)) if m <= 1.75 and in the octave below otherwise, before and after rounding: the quotient's
    exponent is known without a division.
    """
    bad = amax >= _INF_BITS
    if POWER_OF_TWO:
        largest_exponent: tl.constexpr = 15 if E5M2 else 8
        floored = tl.maximum(amax, _AMAX_FLOOR_BITS)
        above = ((floored & 0x7FFFFF) > 0x600000).to(tl.int32)
        inv_exponent = (2 * 127 + largest_exponent) - (floored >> 23) - above
        inv_bits = inv_exponent << 23
        scale_bits = (2 * 127 - inv_exponent) << 23
    else:
        fp8_max: tl.constexpr = 57344.0 if E5M2 else 448.0
        value = amax.to(tl.float32, bitcast=True)
        value = tl.where(value < _AMAX_FLOOR, _AMAX_FLOOR, value)
        inv_bits = tl.div_rn(fp8_max, value).to(tl.int32, bitcast=True)
        scale_bits = tl.div_rn(1.0, inv_bits.to(tl.float32, bitcast=True)).to(tl.int32, bitcast=True)
    inv_scale = tl.where(bad, _NAN_BITS, inv_bits).to(tl.float32, bitcast=True)
    return inv_scale, tl.where(bad, _NAN_BITS, scale_bits).to(tl.float32, bitcast=True)


@triton.jit
def _to_codes(scaled, E5M2: tl.constexpr, EXACT_BITS: tl.constexpr):
    """fp32 -> float8 codes as bytes: nearest even, saturated, 0x7F for NaN.

    EXACT_BITS: integer arithmetic in place of the hardware's conversion.
    """
    if EXACT_BITS:
        mantissa: tl.constexpr = 2 if E5M2 else 3
        bias: tl.constexpr = 15 if E5M2 else 7
        largest: tl.constexpr = 0x7B if E5M2 else 0x7E
        # Adding `magic` leaves the subnormal's units, 2^(1 - bias - mantissa), as the lowest bits of the sum.
        magic: tl.constexpr = 2.0 ** (24 - bias - mantissa)
        shift: tl.constexpr = 23 - mantissa
        bits = scaled.to(tl.int32, bitcast=True)
        magnitude = bits & _ABS_MASK
        rounded = magnitude + ((1 << (shift - 1)) - 1) + ((magnitude >> shift) & 1)
        normal = (rounded >> shift) - ((127 - bias) << mantissa)
        tiny = magnitude < ((128 - bias) << 23)
        # Large magnitudes are kept out of the sum, which serves the subnormals alone.
        small = tl.where(tiny, magnitude, 0).to(tl.float32, bitcast=True)
        subnormal = (small + magic).to(tl.int32, bitcast=True) & 0xFF
        code = tl.where(tiny, subnormal, tl.minimum(normal, largest)) | ((bits >> 24) & 0x80)
        # Rounding up may carry NaN's bits past the sign; it is replaced here.
        code = tl.where(magnitude > _INF_BITS, 0x7F, code).to(tl.uint8)
    elif E5M2:
        code = scaled.to(tl.float8e5).to(tl.uint8, bitcast=True)
    else:
        code = scaled.to(tl.float8e4nv).to(tl.uint8, bitcast=True)
    return code


@triton.jit
def _from_codes(code, E5M2: tl.constexpr, EXACT_BITS: tl.constexpr):
    """Float8 codes as bytes -> their exact fp32 values."""
    if EXACT_BITS:
        mantissa: tl.constexpr = 2 if E5M2 else 3
        bias: tl.constexpr = 15 if E5M2 else 7
        inf: tl.constexpr = 0x7C if E5M2 else 0x7F
        byte = code.to(tl.int32)
        magnitude = byte & 0x7F
        bits = (magnitude << (23 - mantissa)) + ((127 - bias) << 23)
        bits = tl.where(magnitude >= inf, _INF_BITS | (magnitude << (23 - mantissa)), bits)
        subnormal = (magnitude.to(tl.float32) * (2.0 ** (1 - bias - mantissa))).to(tl.int32, bitcast=True)
        bits = tl.where(magnitude < (1 << mantissa), subnormal, bits)
        value = (bits | ((byte & 0x80) << 24)).to(tl.float32, bitcast=True)
    elif E5M2:
        value = code.to(tl.float8e5, bitcast=True).to(tl.float32)
    else:
        value = code.to(tl.float8e4nv, bitcast=True).to(tl.float32)
    return value


@triton.jit
def _pack(a, b, c, d, E5M2: tl.constexpr, EXACT_BITS: tl.constexpr):
    """Codes of four fp32 tiles as one tile of 32-bit words, those of `a` in the lowest byte."""
    if EXACT_BITS:
        low = _to_codes(a, E5M2, True).to(tl.int32) | (_to_codes(b, E5M2, True).to(tl.int32) << 8)
        high = _to_codes(c, E5M2, True).to(tl.int32) | (_to_codes(d, E5M2, True).to(tl.int32) << 8)
        word = low | (high << 16)
    elif E5M2:
        word = tl.inline_asm_elementwise(
            "{ .reg .b16 low, high; cvt.rn.satfinite.e5m2x2.f32 low, $2, $1;"
            " cvt.rn.satfinite.e5m2x2.f32 high, $4, $3; mov.b32 $0, {low, high}; }",
            "=r,f,f,f,f", [a, b, c, d], dtype=tl.int32, is_pure=True, pack=1,
        )  # fmt: skip
    else:
        word = tl.inline_asm_elementwise(
            "{ .reg .b16 low, high; cvt.rn.satfinite.e4m3x2.f32 low, $2, $1;"
            " cvt.rn.satfinite.e4m3x2.f32 high, $4, $3; mov.b32 $0, {low, high}; }",
            "=r,f,f,f,f", [a, b, c, d], dtype=tl.int32, is_pure=True, pack=1,
        )  # fmt: skip
    return word


@triton.jit
def _pack_codes(a, b, c, d, EXACT_BITS: tl.constexpr):
    """Four tiles of codes as one tile of 32-bit words, those of `a` in the lowest byte."""
    if EXACT_BITS:
        word = a.to(tl.int32) | (b.to(tl.int32) << 8) | (c.to(tl.int32) << 16) | (d.to(tl.int32) << 24)
    else:
        # 4 x 4 bytes are transposed in registers: the pairs a, b and c, d interleaved, then pairs of pairs.
        word = tl.inline_asm_elementwise(
            "{ .reg .b32 ab, cd, AB, CD; prmt.b32 ab, $4, $5, 0x5140; prmt.b32 AB, $4, $5, 0x7362;"
            " prmt.b32 cd, $6, $7, 0x5140; prmt.b32 CD, $6, $7, 0x7362;"
            " prmt.b32 $0, ab, cd, 0x5410; prmt.b32 $1, ab, cd, 0x7632;"
            " prmt.b32 $2, AB, CD, 0x5410; prmt.b32 $3, AB, CD, 0x7632; }",
            "=r,=r,=r,=r,r,r,r,r", [a, b, c, d], dtype=tl.int32, is_pure=True, pack=4,
        )  # fmt: skip
    return word


@triton.jit
def _quads_of_tile(pid_t, pid_k, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr):
    """Indices `quad [BT / 4]` and `k [BK]` of a tile; its rows are 4 quad, 4 quad + 1, 4 quad + 2 and 4 quad + 3."""
    quad = pid_t.to(tl.int64) * (BLOCK_T // 4) + tl.arange(0, BLOCK_T // 4)
    return quad, pid_k.to(tl.int64) * BLOCK_K + tl.arange(0, BLOCK_K)


@triton.jit
def _store_columns(columns_ptr, word, quad, k, tokens, features, padded_tokens):
    """Store words `[quads, BK]` of codes in the transposed layout; codes of the padding are zero whatever the scale."""
    left = tl.minimum(tl.maximum(tokens - 4 * quad, 0), 4).to(tl.int32)  # of the four tokens, how many there are
    present = tl.where(left == 4, -1, (1 << (8 * left)) - 1)
    at = columns_ptr.to(tl.pointer_type(tl.int32)) + k[:, None] * (padded_tokens // 4) + quad[None, :]
    mask = (k < features)[:, None] & (quad < padded_tokens // 4)[None, :]
    tl.store(at, tl.trans(word & present[:, None]), mask=mask)


@triton.jit
def _store_tensor_tile(
    a, b, c, d, amax_ptr, scale_ptr, rows_ptr, columns_ptr, quad, k, tokens, features, padded_tokens,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, E5M2: tl.constexpr, EXACT_BITS: tl.constexpr,
):  # fmt: skip
    """Codes of a tile (fp32, as the four rows of each quad) with the one scale that amax gives, in the layouts asked
    for; the first program stores the scale."""
    inv_scale, scale = _scales(tl.load(amax_ptr), E5M2, False)
    if tl.program_id(0) == 0:
        tl.store(scale_ptr, scale)
    a, b, c, d = a * inv_scale, b * inv_scale, c * inv_scale, d * inv_scale
    if ROWS:
        t = 4 * quad
        at = rows_ptr + t[:, None] * features + k[None, :]
        mask_k = (k < features)[None, :]
        tl.store(at, _to_codes(a, E5M2, EXACT_BITS), mask=(t < tokens)[:, None] & mask_k)
        tl.store(at + features, _to_codes(b, E5M2, EXACT_BITS), mask=(t + 1 < tokens)[:, None] & mask_k)
        tl.store(at + 2 * features, _to_codes(c, E5M2, EXACT_BITS), mask=(t + 2 < tokens)[:, None] & mask_k)
        tl.store(at + 3 * features, _to_codes(d, E5M2, EXACT_BITS), mask=(t + 3 < tokens)[:, None] & mask_k)
    if COLUMNS:
        word = _pack(a, b, c, d, E5M2, EXACT_BITS)
        _store_columns(columns_ptr, word, quad, k, tokens, features, padded_tokens)


@triton.jit
def _store_row_codes(
    value, amax_ptr, scale_ptr, codes_ptr, t, k, is_first, tokens, features,
    E5M2: tl.constexpr, EXACT_BITS: tl.constexpr,
):  # fmt: skip
    """Codes by rows t with the power-of-two scales that the amax of rows gives; `is_first` stores the scales too."""
    mask_t = t < tokens
    inv_scale, scale = _scales(tl.load(amax_ptr + t, mask=mask_t, other=0), E5M2, True)
    tl.store(scale_ptr + t, scale, mask=mask_t & is_first)
    codes = _to_codes(value * inv_scale[:, None], E5M2, EXACT_BITS)
    tl.store(codes_ptr + t[:, None] * features + k[None, :], codes, mask=mask_t[:, None] & (k < features)[None, :])


@triton.jit
def _store_rows_tile(
    a, b, c, d, amax_ptr, scale_ptr, codes_ptr, quad, k, is_first, tokens, features,
    E5M2: tl.constexpr, EXACT_BITS: tl.constexpr,
):  # fmt: skip
    """Codes by rows of a tile (fp32, as the four rows of each quad); see `_store_row_codes`."""
    t = 4 * quad
    _store_row_codes(a, amax_ptr, scale_ptr, codes_ptr, t, k, is_first, tokens, features, E5M2, EXACT_BITS)
    _store_row_codes(b, amax_ptr, scale_ptr, codes_ptr, t + 1, k, is_first, tokens, features, E5M2, EXACT_BITS)
    _store_row_codes(c, amax_ptr, scale_ptr, codes_ptr, t + 2, k, is_first, tokens, features, E5M2, EXACT_BITS)
    _store_row_codes(d, amax_ptr, scale_ptr, codes_ptr, t + 3, k, is_first, tokens, features, E5M2, EXACT_BITS)


@triton.jit
def _store_columns_tile(
    a, b, c, d, amax_ptr, scale_ptr, columns_ptr, quad, k, is_first, tokens, features, padded_tokens,
    E5M2: tl.constexpr, EXACT_BITS: tl.constexpr,
):  # fmt: skip
    """Transposed codes of a tile (fp32, as the four rows of each quad) with the power-of-two scales that the amax of
    columns gives; `is_first` stores the scales too."""
    inv_scale, scale = _scales(tl.load(amax_ptr + k, mask=k < features, other=0), E5M2, True)
    tl.store(scale_ptr + k, scale, mask=(k < features) & is_first)
    factor = inv_scale[None, :]
    word = _pack(a * factor, b * factor, c * factor, d * factor, E5M2, EXACT_BITS)
    _store_columns(columns_ptr, word, quad, k, tokens, features, padded_tokens)


@triton.jit
def _store_tile(
    a, b, c, d, row_amax_ptr, column_amax_ptr, rows_ptr, row_scale_ptr, columns_ptr, column_scale_ptr,
    quad, k, pid_t, pid_k, tokens, features, padded_tokens,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, PER_TENSOR: tl.constexpr, E5M2: tl.constexpr, EXACT_BITS: tl.constexpr,
):  # fmt: skip
    """Codes of a tile (fp32, as the four rows of each quad) from known amax, in the layouts asked for.

    PER_TENSOR: one amax and one scale for all (at row_amax_ptr and row_scale_ptr); otherwise those of rows for the rows
    and those of columns for the columns, powers of two.
    """
    if PER_TENSOR:
        _store_tensor_tile(
            a, b, c, d, row_amax_ptr, row_scale_ptr, rows_ptr, columns_ptr, quad, k, tokens, features, padded_tokens,
            ROWS, COLUMNS, E5M2, EXACT_BITS,
        )  # fmt: skip
    else:
        if ROWS:
            _store_rows_tile(
                a, b, c, d, row_amax_ptr, row_scale_ptr, rows_ptr, quad, k, pid_k == 0, tokens, features,
                E5M2, EXACT_BITS,
            )  # fmt: skip
        if COLUMNS:
            _store_columns_tile(
                a, b, c, d, column_amax_ptr, column_scale_ptr, columns_ptr, quad, k, pid_t == 0,
                tokens, features, padded_tokens, E5M2, EXACT_BITS,
            )  # fmt: skip


@triton.jit
def _tile_of_program(pid, tiles_t, tiles_k, BAND: tl.constexpr):
    """`(row, column)` of a program's tile: BAND tiles down the tokens before the next ones along the features."""
    if BAND == 1:  # the same with one division, not three
        tile_t = pid // tiles_k
        tile_k = pid - tile_t * tiles_k
    else:
        first = pid // (BAND * tiles_k) * BAND
        height = tl.minimum(BAND, tiles_t - first)
        within = pid % (BAND * tiles_k)
        tile_t, tile_k = first + within % height, within // height
    return tile_t, tile_k


def new_codes(*shape: int, device: torch.device, dtype: torch.dtype = torch.uint8) -> Tensor:
    """Uninitialized codes, or the bytes of some."""
    return torch.empty(*shape, dtype=dtype, device=device)


@functools.cache
def exact_bits(device: torch.device | int) -> bool:
    """Whether codes are made with integers on this device."""
    # ROCm's compiler knows none of the instructions that are written out here.
    return INTERPRETED or torch.version.hip is not None or torch.cuda.get_device_capability(device) < (8, 9)
