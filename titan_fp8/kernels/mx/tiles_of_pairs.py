"""The MXFP8 cast of a tile of bf16, two numbers in a word (see `pairs.py`): what `kernel.py` does of other inputs.

A thread loads 16 bytes, 8 features, of each of four rows that follow each other, a quad; so BLOCK_K / 8 threads of a
warp lie along K. Quads are ordered such that those of one block of 32 rows belong to one warp where the tile has a warp
for each block: then its amax takes exchanges within a warp alone. BLOCK_K / 32 quads of a block are of one thread, the
others of its neighbours:

    index of a quad     [BLOCK_K / 32 of a thread, blocks, 256 / BLOCK_K threads]
    its four rows       [blocks, BLOCK_K / 32, 256 / BLOCK_K]

Within a tile positions are 32-bit numbers and are compared with how much is left; only what lies in front of the tile,
and products with the size of a row, take 64 bits.
"""

# Triton's language is not Python's; pyright takes the kernels for ordinary functions.
# pyright: reportCallIssue=false, reportAssignmentType=false, reportOperatorIssue=false, reportAttributeAccessIssue=false
# pyright: reportGeneralTypeIssues=false, reportArgumentType=false

import triton
import triton.language as tl

from titan_fp8.kernels.mx import pairs
from titan_fp8.kernels.mx.places import _column_places, _groups_of_blocks, _row_shift, _store_row_scales
from titan_fp8.kernels.mx.reference import BLOCK

_BLOCK = tl.constexpr(BLOCK)


@triton.jit
def _left(end, start, SIZE: tl.constexpr):
    """How much of a tile of this SIZE from `start` on lies before `end`: int32."""
    return tl.maximum(tl.minimum(end - start, SIZE), 0).to(tl.int32)


@triton.jit
def _quads(BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr):
    """The quads of a tile in the order of the module's docstring: int32 `[BLOCK_T / 4]`."""
    threads: tl.constexpr = 8 * _BLOCK // BLOCK_K
    blocks: tl.constexpr = BLOCK_T // _BLOCK
    index = tl.arange(0, BLOCK_T // 4)
    own, block, thread = index // (blocks * threads), index // threads % blocks, index % threads
    return block * (_BLOCK // 4) + own * threads + thread


@triton.jit
def _two_rows(a, b, CARRY: tl.constexpr, EXACT_BITS: tl.constexpr, ROWS: tl.constexpr, BLOCK_K: tl.constexpr):
    """Of two rows of each quad `[ROWS, BLOCK_K / 2]`: the bytes of their scales along K, as a pair for each block, and
    their codes."""
    # The words of a thread first; then two rows are one word, which halves the exchange between threads.
    of_a = pairs._amax(tl.reshape(a, [ROWS, BLOCK_K // _BLOCK, 4, 4]), 3, EXACT_BITS)
    of_b = pairs._amax(tl.reshape(b, [ROWS, BLOCK_K // _BLOCK, 4, 4]), 3, EXACT_BITS)
    amax = pairs._amax(pairs._amax_of_two(of_a, of_b, EXACT_BITS), 2, EXACT_BITS)
    byte, inverse = pairs._scales(amax, CARRY, EXACT_BITS)
    of_a, of_b = pairs._twice_first(inverse), pairs._twice_second(inverse)
    a = pairs._row_codes(a, _of_row_pairs(of_a, ROWS, BLOCK_K), EXACT_BITS)
    b = pairs._row_codes(b, _of_row_pairs(of_b, ROWS, BLOCK_K), EXACT_BITS)
    return byte, a, b


@triton.jit
def _of_row_pairs(word, ROWS: tl.constexpr, BLOCK_K: tl.constexpr):
    """A word for each block along K, at each of the block's words."""
    wide = tl.broadcast_to(word[:, :, None], [ROWS, BLOCK_K // _BLOCK, _BLOCK // 2])
    return tl.reshape(wide, [ROWS, BLOCK_K // 2])


@triton.jit
def _store_scales_of_rows(
    ab, cd, first_t, shift, block_k, features, written, scale_ptr,
    SWIZZLED: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Bytes along K, pairs of two rows of each quad, with the shift of each block of 32 rows."""
    blocks: tl.constexpr = BLOCK_T // _BLOCK
    columns: tl.constexpr = BLOCK_K // _BLOCK
    by_row = tl.join(
        tl.join(ab & 255, ab >> 16), tl.join(cd & 255, cd >> 16)
    )  # [quads, columns, row of two, which two]
    by_row = tl.reshape(by_row, [columns, blocks, 8 // columns, columns, 2, 2])
    byte = tl.reshape(tl.permute(by_row, [1, 0, 2, 5, 4, 3]), [BLOCK_T, columns])
    shift = tl.reshape(tl.broadcast_to(shift[:, None], [blocks, _BLOCK]), [BLOCK_T])
    _store_row_scales(byte, first_t + tl.arange(0, BLOCK_T), shift, block_k, features, written, scale_ptr, SWIZZLED)


@triton.jit
def _by_block(word, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, WIDTH: tl.constexpr):
    """A tile `[quads, WIDTH]` as `[own, blocks, threads, WIDTH]`."""
    return tl.reshape(word, [BLOCK_K // _BLOCK, BLOCK_T // _BLOCK, 8 * _BLOCK // BLOCK_K, WIDTH])


@triton.jit
def _store_transposed(
    word, target, left_rows, left_quads, left_features, row_words,
    BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Words `[quads, BLOCK_K]` of codes at the tile's place `target` in transposed rows of so many words."""
    ordered = tl.permute(_by_block(word, BLOCK_T, BLOCK_K, BLOCK_K), [3, 1, 0, 2])
    quad, k = tl.arange(0, BLOCK_T // 4), tl.arange(0, BLOCK_K)
    left = tl.minimum(tl.maximum(left_rows - 4 * quad, 0), 4)
    # Codes of padding are zero, also in a block whose scale is NaN.
    present = tl.where(left == 4, -1, (1 << (8 * left)) - 1)
    at = target + k.to(tl.int64)[:, None] * row_words + quad[None, :]
    inside = (k < left_features)[:, None] & (quad < left_quads)[None, :]
    tl.store(at, tl.reshape(ordered, [BLOCK_K, BLOCK_T // 4]) & present[None, :], mask=inside)


@triton.jit
def _store_transposed_experts(
    word, quad, k, all_quads, features, span, columns_ptr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr
):
    """`_store_transposed` of a tile that may hold rows of several experts; all of them are whole blocks."""
    ordered = tl.permute(_by_block(word, BLOCK_T, BLOCK_K, BLOCK_K), [3, 1, 0, 2])
    # Spans are whole blocks of 8 quads, which the compiler cannot know and which makes stores wide.
    place = quad + 4 * quad // span * ((features - 1) * (span // 4))
    place = tl.max_contiguous(tl.multiple_of(place, 8), 8)
    at = columns_ptr.to(tl.pointer_type(tl.int32)) + k[:, None] * (span // 4) + place[None, :]
    inside = (k < features)[:, None] & (quad < all_quads)[None, :]
    tl.store(at, tl.reshape(ordered, [BLOCK_K, BLOCK_T // 4]), mask=inside)


@triton.jit
def _cast_pairs(
    x_ptr, ends_ptr, rows_ptr, row_scale_ptr, columns_ptr, column_scale_ptr,
    pid_t, pid_k, present, written, all_tokens, all_features, tokens, features, span, stride_t, groups,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, SWIZZLED: tl.constexpr, KIND: tl.constexpr, CARRY: tl.constexpr,
    EXACT_BITS: tl.constexpr, GROUPS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """What `_cast_tiles_kernel` does, of x in bf16 whose rows are whole words. `pid_t` and `pid_k` are int64."""
    first_t, first_k = pid_t * BLOCK_T, pid_k * BLOCK_K
    row, pair = 4 * _quads(BLOCK_T, BLOCK_K), tl.arange(0, BLOCK_K // 2)
    wide_row, row_words = row.to(tl.int64), stride_t // 2
    left, left_pairs = _left(present, first_t, BLOCK_T), _left(features, first_k, BLOCK_K) // 2
    at = x_ptr.to(tl.pointer_type(tl.int32)) + (first_t * row_words + first_k // 2)
    at = at + wide_row[:, None] * row_words + pair[None, :]
    is_pair = (pair < left_pairs)[None, :]
    # All loads come before any store: pointers may alias, so the compiler keeps their order.
    a = tl.load(at, mask=(row < left)[:, None] & is_pair, other=0)
    b = tl.load(at + row_words, mask=(row + 1 < left)[:, None] & is_pair, other=0)
    c = tl.load(at + 2 * row_words, mask=(row + 2 < left)[:, None] & is_pair, other=0)
    d = tl.load(at + 3 * row_words, mask=(row + 3 < left)[:, None] & is_pair, other=0)
    block_t = pid_t * (BLOCK_T // _BLOCK) + tl.arange(0, BLOCK_T // _BLOCK)
    begin, base, size = _groups_of_blocks(ends_ptr, block_t, groups, SWIZZLED, KIND, GROUPS)
    if ROWS:
        half = features // 2
        ab, a_codes, b_codes = _two_rows(a, b, CARRY, EXACT_BITS, BLOCK_T // 4, BLOCK_K)
        cd, c_codes, d_codes = _two_rows(c, d, CARRY, EXACT_BITS, BLOCK_T // 4, BLOCK_K)
        there = _left(tokens, first_t, BLOCK_T)
        to = rows_ptr.to(tl.pointer_type(tl.int16)) + (first_t * half + first_k // 2)
        to = to + wide_row[:, None] * half + pair[None, :]
        if COLUMNS:
            # 8 bytes, the codes of what a thread loads at a time: wider stores would move them between threads.
            to = tl.max_contiguous(to, [1, 4])
        tl.store(to, a_codes, mask=(row < there)[:, None] & is_pair)
        tl.store(to + half, b_codes, mask=(row + 1 < there)[:, None] & is_pair)
        tl.store(to + 2 * half, c_codes, mask=(row + 2 < there)[:, None] & is_pair)
        tl.store(to + 3 * half, d_codes, mask=(row + 3 < there)[:, None] & is_pair)
        shift = _row_shift(block_t, begin, base, span, SWIZZLED, KIND)
        block_k = pid_k * (BLOCK_K // _BLOCK) + tl.arange(0, BLOCK_K // _BLOCK)
        limit = written if SWIZZLED else tokens
        _store_scales_of_rows(
            ab, cd, first_t, shift, block_k, features, limit, row_scale_ptr, SWIZZLED, BLOCK_T, BLOCK_K
        )
    if COLUMNS:
        largest = _by_block(pairs._larger_of_four(a, b, c, d, EXACT_BITS), BLOCK_T, BLOCK_K, BLOCK_K // 2)
        amax = pairs._amax(pairs._amax(largest, 0, EXACT_BITS), 1, EXACT_BITS)
        bytes_of_pairs, inverse = pairs._scales(amax, CARRY, EXACT_BITS)
        byte = tl.reshape(tl.join(bytes_of_pairs & 255, bytes_of_pairs >> 16), [BLOCK_T // _BLOCK, BLOCK_K])
        k = first_k + tl.arange(0, BLOCK_K)
        place = _column_places(block_t, k, begin, base, size, features, span, SWIZZLED, KIND)
        inside = (block_t * _BLOCK < written)[:, None] & (k < all_features)[None, :]
        tl.store(column_scale_ptr + place, byte.to(tl.uint8), mask=inside)
        wide = tl.broadcast_to(
            inverse[None, :, None, :],
            [BLOCK_K // _BLOCK, BLOCK_T // _BLOCK, 8 * _BLOCK // BLOCK_K, BLOCK_K // 2],
        )
        first, second = pairs._column_codes(a, b, c, d, tl.reshape(wide, [BLOCK_T // 4, BLOCK_K // 2]), EXACT_BITS)
        word = tl.reshape(tl.join(first, second), [BLOCK_T // 4, BLOCK_K])
        all_quads = tl.cdiv(tokens, _BLOCK) * (_BLOCK // 4)
        if KIND == "experts":
            quad = first_t // 4 + tl.arange(0, BLOCK_T // 4)
            _store_transposed_experts(word, quad, k, all_quads, features, span, columns_ptr, BLOCK_T, BLOCK_K)
        else:
            target = columns_ptr.to(tl.pointer_type(tl.int32)) + (first_k * (span // 4) + first_t // 4)
            left_quads, left_features = _left(all_quads, first_t // 4, BLOCK_T // 4), _left(features, first_k, BLOCK_K)
            _store_transposed(word, target, left, left_quads, left_features, span // 4, BLOCK_T, BLOCK_K)
