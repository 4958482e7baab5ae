"""The MXFP8 cast of a tile of numbers that are not cast in pairs: fp32, fp16, and bf16 whose rows are not whole words.
`squares.py` says how it lies in threads; of fp32 a thread loads 4 features of each of four rows.

Amax, conversion and transposed words are the helpers of `titan_fp8.kernels.float8.bits`; what is said there holds here.
A block that holds NaN or Inf has the reciprocal NaN, chosen by a select, and with it NaN codes.
"""

# Triton's language is not Python's; pyright takes the kernels for ordinary functions.
# pyright: reportCallIssue=false, reportAssignmentType=false, reportOperatorIssue=false, reportAttributeAccessIssue=false
# pyright: reportGeneralTypeIssues=false, reportArgumentType=false

import triton
import triton.language as tl

from titan_fp8.kernels.float8.bits import _INF_BITS, _NAN_BITS, _abs_bits, _pack, _to_codes
from titan_fp8.kernels.mx.places import _store_column_scales, _store_row_scales
from titan_fp8.kernels.mx.reference import BLOCK, EMAX, NAN_BYTE
from titan_fp8.kernels.mx.squares import (
    _by_square,
    _bytes_of_columns,
    _bytes_of_rows,
    _left,
    _of_squares,
    _quads,
    _store_column_codes,
)

_BLOCK = tl.constexpr(BLOCK)
_EMAX = tl.constexpr(EMAX)
_NAN_BYTE = tl.constexpr(NAN_BYTE)


@triton.jit
def _scale_bytes(amax, CARRY: tl.constexpr):
    """Bytes, int32, of the scales that blocks with these amax bits have."""
    return tl.where(amax >= _INF_BITS, _NAN_BYTE, tl.maximum(((amax + CARRY) >> 23) - _EMAX, 0))


@triton.jit
def _inverse(byte):
    """Reciprocals, fp32, of the scales that bytes stand for."""
    return tl.where(byte == _NAN_BYTE, _NAN_BITS, (2 * 127 - byte) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _row_bytes(x, CARRY: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """Bytes of the scales along K of a tile `[ROWS, WIDTH]`: `[ROWS, WIDTH / 32]`."""
    split = tl.reshape(_abs_bits(x), [ROWS, WIDTH // _BLOCK, _BLOCK])
    return _scale_bytes(tl.max(split, axis=2), CARRY)


@triton.jit
def _of_row_blocks(factor, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """A number for each block along K, `[ROWS, WIDTH / 32]`, at each of the block's values."""
    return tl.reshape(tl.broadcast_to(factor[:, :, None], [ROWS, WIDTH // _BLOCK, _BLOCK]), [ROWS, WIDTH])


@triton.jit
def _column_bytes(
    a, b, c, d,
    CARRY: tl.constexpr, BLOCK_T: tl.constexpr, PIECES: tl.constexpr, THREADS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Bytes of the scales along T of a tile, given as the four rows of each quad: `[squares, WIDTH]`."""
    largest = tl.maximum(tl.maximum(_abs_bits(a), _abs_bits(b)), tl.maximum(_abs_bits(c), _abs_bits(d)))
    split = _by_square(largest, BLOCK_T, PIECES, THREADS, WIDTH)
    return _scale_bytes(tl.max(tl.max(split, axis=0), axis=1), CARRY)


@triton.jit
def _row_codes(x, CARRY: tl.constexpr, EXACT_BITS: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """`(bytes, codes)` of rows."""
    byte = _row_bytes(x, CARRY, ROWS, WIDTH)
    return byte, _to_codes(x * _of_row_blocks(_inverse(byte), ROWS, WIDTH), False, EXACT_BITS)


@triton.jit
def _load_numbers(
    x_ptr, first_t, first_k, present, features, stride_t, stride_k,
    BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, PIECES: tl.constexpr, THREADS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """`(a, b, c, d, row, k, is_k)`: numbers `[quads, WIDTH]` of the four rows of each quad, fp32, the first of these
    rows, and which of the tile's features each is and whether it is there."""
    row, piece = _quads(BLOCK_T, PIECES, THREADS)
    k = (piece * WIDTH)[:, None] + tl.arange(0, WIDTH)[None, :]
    left = _left(present, first_t, BLOCK_T)
    is_k = k < _left(features, first_k, BLOCK_K)
    at = x_ptr + (first_t * stride_t + first_k * stride_k) + row.to(tl.int64)[:, None] * stride_t
    at = at + k.to(tl.int64) * stride_k
    # All loads come before any store: pointers may alias, so the compiler keeps their order.
    a = tl.load(at, mask=(row < left)[:, None] & is_k, other=0)
    b = tl.load(at + stride_t, mask=(row + 1 < left)[:, None] & is_k, other=0)
    c = tl.load(at + 2 * stride_t, mask=(row + 2 < left)[:, None] & is_k, other=0)
    d = tl.load(at + 3 * stride_t, mask=(row + 3 < left)[:, None] & is_k, other=0)
    return a.to(tl.float32), b.to(tl.float32), c.to(tl.float32), d.to(tl.float32), row, k, is_k


@triton.jit
def _store_row(x, to, mask, CARRY: tl.constexpr, EXACT_BITS: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """Store the codes of rows; their bytes."""
    byte, codes = _row_codes(x, CARRY, EXACT_BITS, ROWS, WIDTH)
    tl.store(to, codes, mask=mask)
    return byte


@triton.jit
def _cast_numbers(
    x_ptr, rows_ptr, row_scale_ptr, columns_ptr, column_scale_ptr,
    first_t, pid_k, scale_t, base, size, present, written, tokens, features, span, stride_t, stride_k,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, SWIZZLED: tl.constexpr, KIND: tl.constexpr, CARRY: tl.constexpr,
    EXACT_BITS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """What `_cast_tiles_kernel` does, of any x. `first_t`, `pid_k` and `scale_t` are int64."""
    WIDTH: tl.constexpr = min(BLOCK_K, 64 if COLUMNS else 128)
    PIECES: tl.constexpr = BLOCK_K // WIDTH
    # With codes by rows, 16 features of a thread are wide stores, and all quads of a block are of its neighbours.
    THREADS: tl.constexpr = 8 if ROWS else 128 // WIDTH
    QUADS: tl.constexpr = PIECES * BLOCK_T // 4
    first_k = pid_k * BLOCK_K
    a, b, c, d, row, k, is_k = _load_numbers(
        x_ptr, first_t, first_k, present, features, stride_t, stride_k, BLOCK_T, BLOCK_K, PIECES, THREADS, WIDTH
    )
    if ROWS:
        there = _left(tokens, first_t, BLOCK_T)
        to = rows_ptr + (first_t * features + first_k) + row.to(tl.int64)[:, None] * features + k
        in_a, in_b = (row < there)[:, None] & is_k, (row + 1 < there)[:, None] & is_k
        in_c, in_d = (row + 2 < there)[:, None] & is_k, (row + 3 < there)[:, None] & is_k
        a_bytes = _store_row(a, to, in_a, CARRY, EXACT_BITS, QUADS, WIDTH)
        b_bytes = _store_row(b, to + features, in_b, CARRY, EXACT_BITS, QUADS, WIDTH)
        c_bytes = _store_row(c, to + 2 * features, in_c, CARRY, EXACT_BITS, QUADS, WIDTH)
        d_bytes = _store_row(d, to + 3 * features, in_d, CARRY, EXACT_BITS, QUADS, WIDTH)
        ab, cd = a_bytes | (b_bytes << 16), c_bytes | (d_bytes << 16)
    if COLUMNS:
        byte = _column_bytes(a, b, c, d, CARRY, BLOCK_T, PIECES, THREADS, WIDTH)
        factor = _of_squares(_inverse(byte), BLOCK_T, PIECES, THREADS, WIDTH)
        word = _pack(a * factor, b * factor, c * factor, d * factor, False, EXACT_BITS)
        _store_column_codes(
            word, first_t, first_k, present, tokens, features, span, columns_ptr,
            KIND, BLOCK_T, BLOCK_K, PIECES, THREADS,
        )  # fmt: skip
    # Scales last, when the tile is no longer in registers.
    if ROWS:
        row_bytes, limit = _bytes_of_rows(ab, cd, BLOCK_T, BLOCK_K, PIECES, THREADS), written if SWIZZLED else tokens
        _store_row_scales(
            row_bytes, scale_t, pid_k, features, span, limit, row_scale_ptr, SWIZZLED, KIND, BLOCK_T, BLOCK_K
        )
    if COLUMNS:
        _store_column_scales(
            _bytes_of_columns(byte, BLOCK_T, BLOCK_K, PIECES), scale_t, pid_k, base, size, features, span, written,
            column_scale_ptr, SWIZZLED, KIND, BLOCK_T, BLOCK_K,
        )  # fmt: skip
