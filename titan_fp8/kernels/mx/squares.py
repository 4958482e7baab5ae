"""How a tile lies in the threads of the MXFP8 casts, and how its transposed codes leave.

A tile is cut into *squares* of 32 rows and PIECE features, which is what the threads of a warp load at a time: 16 bytes
each, of four rows that follow each other, a quad. Where a tile has a warp for each square, blocks of both layouts lie
within warps, and amax takes exchanges within a warp alone. Quads are ordered such that this is how Triton spreads them:

    index of a quad     [own, squares, threads]     a thread has `own` quads of a square, its neighbours have the others
    squares             [pieces along K, blocks along T]
    its four rows       32 * block + 4 * (own * THREADS + thread) and the three below

A piece is WORDS words of 32 bits, each of two numbers in bf16, of one in fp32; fp16 is treated as fp32.

Within a tile positions are 32-bit numbers and are compared with how much is left; only what lies in front of the tile,
and products with the size of a row, take 64 bits.
"""

# Triton's language is not Python's; pyright takes the kernels for ordinary functions.
# pyright: reportCallIssue=false, reportAssignmentType=false, reportOperatorIssue=false, reportAttributeAccessIssue=false
# pyright: reportGeneralTypeIssues=false, reportArgumentType=false

import triton
import triton.language as tl

from titan_fp8.kernels.mx.reference import BLOCK

_BLOCK = tl.constexpr(BLOCK)
_QUADS = tl.constexpr(BLOCK // 4)


@triton.jit
def _left(end, start, SIZE: tl.constexpr):
    """How much of a tile of this SIZE from `start` on lies before `end`: int32."""
    return tl.maximum(tl.minimum(end - start, SIZE), 0).to(tl.int32)


@triton.jit
def _quads(BLOCK_T: tl.constexpr, PIECES: tl.constexpr, THREADS: tl.constexpr):
    """`(first row, piece)` of the quads of a tile in the order of the module's docstring: int32
    `[PIECES * BLOCK_T / 4]`."""
    blocks: tl.constexpr = BLOCK_T // _BLOCK
    index = tl.arange(0, PIECES * BLOCK_T // 4)
    own, square, thread = index // (PIECES * blocks * THREADS), index // THREADS % (PIECES * blocks), index % THREADS
    return 4 * (square % blocks * _QUADS + own * THREADS + thread), square // blocks


@triton.jit
def _by_square(word, BLOCK_T: tl.constexpr, PIECES: tl.constexpr, THREADS: tl.constexpr, WIDTH: tl.constexpr):
    """A tile `[quads, WIDTH]` as `[own, squares, THREADS, WIDTH]`."""
    return tl.reshape(word, [_QUADS // THREADS, PIECES * BLOCK_T // _BLOCK, THREADS, WIDTH])


@triton.jit
def _of_squares(word, BLOCK_T: tl.constexpr, PIECES: tl.constexpr, THREADS: tl.constexpr, WIDTH: tl.constexpr):
    """A number for each column of each square, `[squares, WIDTH]`, at each of its quads: `[quads, WIDTH]`."""
    squares: tl.constexpr = PIECES * BLOCK_T // _BLOCK
    wide = tl.broadcast_to(word[None, :, None, :], [_QUADS // THREADS, squares, THREADS, WIDTH])
    return tl.reshape(wide, [PIECES * BLOCK_T // 4, WIDTH])


@triton.jit
def _bytes_of_rows(ab, cd, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, PIECES: tl.constexpr, THREADS: tl.constexpr):
    """Scales along K `[BLOCK_T, BLOCK_K / 32]` of pairs of bytes, each of two rows of each quad: `[quads, columns of a
    piece]`."""
    blocks: tl.constexpr = BLOCK_T // _BLOCK
    columns: tl.constexpr = BLOCK_K // _BLOCK
    by_row = tl.join(tl.join(ab & 255, ab >> 16), tl.join(cd & 255, cd >> 16))
    # Of the last two dimensions the first tells rows of a pair apart, the second the pairs.
    by_row = tl.reshape(by_row, [_QUADS // THREADS, PIECES, blocks, THREADS, columns // PIECES, 2, 2])
    return tl.reshape(tl.permute(by_row, [2, 0, 3, 6, 5, 1, 4]), [BLOCK_T, columns])


@triton.jit
def _bytes_of_columns(byte, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, PIECES: tl.constexpr):
    """Scales along T `[BLOCK_K, BLOCK_T / 32]` of `[squares, features of a piece]`."""
    blocks: tl.constexpr = BLOCK_T // _BLOCK
    by_piece = tl.reshape(byte, [PIECES, blocks, BLOCK_K // PIECES])
    return tl.reshape(tl.permute(by_piece, [0, 2, 1]), [BLOCK_K, blocks])


@triton.jit
def _transposed(word, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, PIECES: tl.constexpr, THREADS: tl.constexpr):
    """Words of codes `[quads, features of a piece]` in the order of memory: `[BLOCK_K, BLOCK_T / 4]`."""
    blocks: tl.constexpr = BLOCK_T // _BLOCK
    by_piece = tl.reshape(word, [_QUADS // THREADS, PIECES, blocks, THREADS, BLOCK_K // PIECES])
    return tl.reshape(tl.permute(by_piece, [1, 4, 2, 0, 3]), [BLOCK_K, BLOCK_T // 4])


@triton.jit
def _store_transposed(
    ordered, target, left_rows, left_quads, left_features, row_words, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr
):
    """Store what `_transposed` gives at the tile's place `target` in transposed rows of so many words."""
    quad, k = tl.arange(0, BLOCK_T // 4), tl.arange(0, BLOCK_K)
    if left_rows < BLOCK_T:
        # Codes of padding are zero, also in a block whose scale is NaN.
        left = tl.minimum(tl.maximum(left_rows - 4 * quad, 0), 4)
        present = tl.where(left == 4, -1, (1 << (8 * left)) - 1)
        ordered = ordered & present[None, :]
    at = target + k.to(tl.int64)[:, None] * row_words + quad[None, :]
    tl.store(at, ordered, mask=(k < left_features)[:, None] & (quad < left_quads)[None, :])


@triton.jit
def _store_transposed_experts(
    ordered, first_t, first_k, tokens, features, span, columns_ptr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr
):
    """`_store_transposed` of a tile that may hold rows of several experts; all of them are whole blocks."""
    quad, k = first_t // 4 + tl.arange(0, BLOCK_T // 4), first_k + tl.arange(0, BLOCK_K)
    # Spans are whole blocks of 8 quads, which the compiler cannot know and which makes stores wide.
    place = quad + 4 * quad // span * ((features - 1) * (span // 4))
    place = tl.max_contiguous(tl.multiple_of(place, 8), 8)
    at = columns_ptr.to(tl.pointer_type(tl.int32)) + k[:, None] * (span // 4) + place[None, :]
    tl.store(at, ordered, mask=(k < features)[:, None] & (quad < tl.cdiv(tokens, _BLOCK) * _QUADS)[None, :])


@triton.jit
def _store_column_codes(
    word, first_t, first_k, present, tokens, features, span, columns_ptr,
    KIND: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, PIECES: tl.constexpr, THREADS: tl.constexpr,
):  # fmt: skip
    """Transposed codes of a tile, given as words `[quads, features of a piece]`; a transposed row has `span` tokens.
    `first_t` and `first_k` are int64."""
    ordered = _transposed(word, BLOCK_T, BLOCK_K, PIECES, THREADS)
    left_features = _left(features, first_k, BLOCK_K)
    target = columns_ptr.to(tl.pointer_type(tl.int32)) + first_k * (span // 4)
    if KIND == "experts":
        if span % BLOCK_T == 0:  # the tile is of one expert
            expert = (first_t // BLOCK_T).to(tl.int32) // (span // BLOCK_T)
            target += expert.to(tl.int64) * (features - 1) * (span // 4) + first_t // 4
            _store_transposed(ordered, target, BLOCK_T, BLOCK_T // 4, left_features, span // 4, BLOCK_T, BLOCK_K)
        else:
            _store_transposed_experts(ordered, first_t, first_k, tokens, features, span, columns_ptr, BLOCK_T, BLOCK_K)
    else:
        left_quads = _left(tl.cdiv(tokens, _BLOCK) * _QUADS, first_t // 4, BLOCK_T // 4)
        left_rows = _left(present, first_t, BLOCK_T)
        target += first_t // 4
        _store_transposed(ordered, target, left_rows, left_quads, left_features, span // 4, BLOCK_T, BLOCK_K)
