"""The MXFP8 cast of a tile of bf16, two numbers in a word (see `pairs.py`). `squares.py` says how it lies in threads;
a thread loads 8 features of each of four rows."""

# Triton's language is not Python's; pyright takes the kernels for ordinary functions.
# pyright: reportCallIssue=false, reportAssignmentType=false, reportOperatorIssue=false, reportAttributeAccessIssue=false
# pyright: reportGeneralTypeIssues=false, reportArgumentType=false

import triton
import triton.language as tl

from titan_fp8.kernels.mx import pairs
from titan_fp8.kernels.mx.places import _store_column_scales, _store_row_scales
from titan_fp8.kernels.mx.reference import BLOCK
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
_WARP_WORDS = tl.constexpr(4 * 32)
"""Of a load."""


@triton.jit
def _row_amax(a, b, EXACT_BITS: tl.constexpr, ROWS: tl.constexpr, WORDS: tl.constexpr):
    """Largest magnitudes along K of blocks of two rows of each quad `[ROWS, WORDS]`: a pair for each block."""
    # The words of a thread first; then two rows are one word, which halves the exchange between threads.
    of_a = pairs._amax(tl.reshape(a, [ROWS, 2 * WORDS // _BLOCK, 4, 4]), 3, EXACT_BITS)
    of_b = pairs._amax(tl.reshape(b, [ROWS, 2 * WORDS // _BLOCK, 4, 4]), 3, EXACT_BITS)
    return pairs._amax(pairs._amax_of_two(of_a, of_b, EXACT_BITS), 2, EXACT_BITS)


@triton.jit
def _two_rows(a, b, CARRY: tl.constexpr, EXACT_BITS: tl.constexpr, ROWS: tl.constexpr, WORDS: tl.constexpr):
    """Of two rows of each quad `[ROWS, WORDS]`: the bytes of their scales along K, as a pair for each block, and their
    codes."""
    amax = _row_amax(a, b, EXACT_BITS, ROWS, WORDS)
    byte, inverse = pairs._scales(amax, CARRY, EXACT_BITS)
    of_a, of_b = pairs._twice_first(inverse), pairs._twice_second(inverse)
    a = pairs._row_codes(a, _of_row_pairs(of_a, ROWS, WORDS), EXACT_BITS)
    b = pairs._row_codes(b, _of_row_pairs(of_b, ROWS, WORDS), EXACT_BITS)
    return byte, a, b


@triton.jit
def _of_row_pairs(word, ROWS: tl.constexpr, WORDS: tl.constexpr):
    """A word for each block along K, at each of the block's words."""
    wide = tl.broadcast_to(word[:, :, None], [ROWS, 2 * WORDS // _BLOCK, _BLOCK // 2])
    return tl.reshape(wide, [ROWS, WORDS])


@triton.jit
def _column_amax(
    a, b, c, d, EXACT_BITS: tl.constexpr, BLOCK_T: tl.constexpr, PIECES: tl.constexpr, WORDS: tl.constexpr
):
    """Largest magnitudes along T, pairs `[squares, WORDS]`."""
    largest = _by_square(pairs._larger_of_four(a, b, c, d, EXACT_BITS), BLOCK_T, PIECES, _WARP_WORDS // WORDS, WORDS)
    return pairs._amax(pairs._amax(largest, 0, EXACT_BITS), 1, EXACT_BITS)


@triton.jit
def _load_pairs(
    x_ptr, first_t, first_k, present, features, stride_t,
    BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, PIECES: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    """`(a, b, c, d, row, pair, is_pair)`: words `[quads, WORDS]` of the four rows of each quad, the first of these
    rows, and which pair of the tile's features a word is and whether it is there."""
    row, piece = _quads(BLOCK_T, PIECES, _WARP_WORDS // WORDS)
    pair = (piece * WORDS)[:, None] + tl.arange(0, WORDS)[None, :]
    row_words = stride_t // 2
    left, left_pairs = _left(present, first_t, BLOCK_T), _left(features, first_k, BLOCK_K) // 2
    at = x_ptr.to(tl.pointer_type(tl.int32)) + (first_t * row_words + first_k // 2)
    at = at + row.to(tl.int64)[:, None] * row_words + pair
    is_pair = pair < left_pairs
    # All loads come before any store: pointers may alias, so the compiler keeps their order.
    a = tl.load(at, mask=(row < left)[:, None] & is_pair, other=0)
    b = tl.load(at + row_words, mask=(row + 1 < left)[:, None] & is_pair, other=0)
    c = tl.load(at + 2 * row_words, mask=(row + 2 < left)[:, None] & is_pair, other=0)
    d = tl.load(at + 3 * row_words, mask=(row + 3 < left)[:, None] & is_pair, other=0)
    return a, b, c, d, row, pair, is_pair


@triton.jit
def _store_four(
    a, b, c, d, row, pair, is_pair, first_t, first_k, tokens, features, to_ptr,
    BLOCK_T: tl.constexpr, NARROW: tl.constexpr,
):  # fmt: skip
    """Store what the words of `_load_pairs` became, in rows without gaps. NARROW: in no more bytes at a time than the
    codes of what a thread loads; wider stores would move them between threads."""
    half, there = features // 2, _left(tokens, first_t, BLOCK_T)
    to = to_ptr + (first_t * half + first_k // 2) + row.to(tl.int64)[:, None] * half + pair
    if NARROW:
        to = tl.max_contiguous(to, [1, 4])
    tl.store(to, a, mask=(row < there)[:, None] & is_pair)
    tl.store(to + half, b, mask=(row + 1 < there)[:, None] & is_pair)
    tl.store(to + 2 * half, c, mask=(row + 2 < there)[:, None] & is_pair)
    tl.store(to + 3 * half, d, mask=(row + 3 < there)[:, None] & is_pair)


@triton.jit
def _cast_pairs(
    x_ptr, rows_ptr, row_scale_ptr, columns_ptr, column_scale_ptr,
    first_t, pid_k, scale_t, base, size, present, written, tokens, features, span, stride_t,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, SWIZZLED: tl.constexpr, KIND: tl.constexpr, CARRY: tl.constexpr,
    EXACT_BITS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """What `_cast_tiles_kernel` does, of x in bf16 whose rows are whole words. `first_t`, `pid_k` and `scale_t` are
    int64."""
    # Only codes that stay in their rows are worth loading more than a line of each.
    WORDS: tl.constexpr = min(BLOCK_K // 2, 32 if COLUMNS else 128)
    PIECES: tl.constexpr = BLOCK_K // 2 // WORDS
    THREADS: tl.constexpr = _WARP_WORDS // WORDS
    QUADS: tl.constexpr = PIECES * BLOCK_T // 4
    first_k = pid_k * BLOCK_K
    a, b, c, d, row, pair, is_pair = _load_pairs(
        x_ptr, first_t, first_k, present, features, stride_t, BLOCK_T, BLOCK_K, PIECES, WORDS
    )
    if ROWS:
        ab, a_codes, b_codes = _two_rows(a, b, CARRY, EXACT_BITS, QUADS, WORDS)
        cd, c_codes, d_codes = _two_rows(c, d, CARRY, EXACT_BITS, QUADS, WORDS)
        to_ptr = rows_ptr.to(tl.pointer_type(tl.int16))
        _store_four(
            a_codes, b_codes, c_codes, d_codes, row, pair, is_pair, first_t, first_k, tokens, features, to_ptr,
            BLOCK_T, COLUMNS,
        )  # fmt: skip
    if COLUMNS:
        amax = _column_amax(a, b, c, d, EXACT_BITS, BLOCK_T, PIECES, WORDS)
        byte, inverse = pairs._scales(amax, CARRY, EXACT_BITS)
        byte = tl.reshape(tl.join(byte & 255, byte >> 16), [PIECES * BLOCK_T // _BLOCK, 2 * WORDS])
        inverse = _of_squares(inverse, BLOCK_T, PIECES, _WARP_WORDS // WORDS, WORDS)
        first, second = pairs._column_codes(a, b, c, d, inverse, EXACT_BITS)
        word = tl.reshape(tl.join(first, second), [QUADS, 2 * WORDS])
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
