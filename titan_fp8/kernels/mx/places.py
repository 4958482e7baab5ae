"""Where kernels put MX scales: the layouts of `layout.py` in Triton.

KIND says what the rows are:

    dense     tokens
    experts   those of weights [E, N, K], `span` = N for each expert
    groups    sorted into groups, which `ends` int32 [E] divides

`written` rows have scales to write. Plain, those are all; swizzled, padding too, except behind groups and between
experts, where the tiles of a kernel do not reach and memory is zero before.
"""

# Triton's language is not Python's; pyright takes the kernels for ordinary functions.
# pyright: reportCallIssue=false, reportAssignmentType=false, reportOperatorIssue=false, reportAttributeAccessIssue=false
# pyright: reportGeneralTypeIssues=false, reportArgumentType=false

import triton
import triton.language as tl

from titan_fp8.kernels.mx.layout import TILE_BYTES, TILE_COLUMNS, TILE_ROWS
from titan_fp8.kernels.mx.reference import BLOCK

_BLOCK = tl.constexpr(BLOCK)
_TILE_BYTES = tl.constexpr(TILE_BYTES)
_TILE_COLUMNS = tl.constexpr(TILE_COLUMNS)
_TILE_ROWS = tl.constexpr(TILE_ROWS)
_TILE_TOKENS = tl.constexpr(TILE_COLUMNS * BLOCK)
"""Values along the summed dimension whose scales are a tile's columns. As many as it has rows."""


@triton.jit
def _present(ends_ptr, tokens, groups, KIND: tl.constexpr):
    """How many rows are there and count."""
    if KIND == "groups":
        tokens = tl.load(ends_ptr + groups - 1)
    return tokens


@triton.jit
def _sums(count, base, other_count, other_base):
    return count + other_count, base + other_base


@triton.jit
def _groups_of(ends_ptr, t, groups, GROUPS: tl.constexpr):
    """Of the group that each of the rows t is in: its first row, and with each group padded to 128 rows its first row
    and its size, which is 0 or less behind the last group. GROUPS: a power of two, not less than their number."""
    e = tl.arange(0, GROUPS)
    is_group = e < groups
    ends = tl.load(ends_ptr + e, mask=is_group, other=0x7FFFFFFF)
    begins = tl.load(ends_ptr + e - 1, mask=is_group & (e > 0), other=0)
    padded = (ends - begins + (_TILE_ROWS - 1)) & -_TILE_ROWS
    is_before = ends[None, :] <= t[:, None]
    # One reduction: each takes an exchange between all warps.
    before, base = tl.reduce((is_before.to(tl.int32), tl.where(is_before, padded[None, :], 0)), 1, _sums)
    begin = tl.load(ends_ptr + before - 1, mask=before > 0, other=0)
    end = tl.load(ends_ptr + before, mask=before < groups, other=0)
    size = (end - begin + (_TILE_ROWS - 1)) & -_TILE_ROWS
    return begin.to(tl.int64), base.to(tl.int64), size.to(tl.int64)


@triton.jit
def _swizzled(row, column, column_tiles):
    """Where the byte of a row and a column is, in a matrix with so many tiles side by side."""
    tile = row // _TILE_ROWS * column_tiles + column // _TILE_COLUMNS
    return tile * _TILE_BYTES + row % 32 * 16 + row // 32 % 4 * 4 + column % _TILE_COLUMNS


@triton.jit
def _groups_of_blocks(
    ends_ptr, pid_t, groups, SWIZZLED: tl.constexpr, KIND: tl.constexpr, GROUPS: tl.constexpr, BLOCK_T: tl.constexpr
):
    """`_groups_of` a tile; zeros where no place depends on groups."""
    if SWIZZLED and KIND == "groups":
        begin, base, size = _groups_of(
            ends_ptr, pid_t * BLOCK_T + tl.arange(0, BLOCK_T // _BLOCK) * _BLOCK, groups, GROUPS
        )
    else:
        begin = tl.zeros([BLOCK_T // _BLOCK], dtype=tl.int64)
        base, size = begin, begin
    return begin, base, size


@triton.jit
def _row_shift(block_t, begin, base, span, SWIZZLED: tl.constexpr, KIND: tl.constexpr):
    """How much further down than rows of these blocks of 32 their scales are: int64. begin, base: of their group."""
    if SWIZZLED and KIND == "experts":
        shift = block_t * _BLOCK // span * (tl.cdiv(span, _TILE_ROWS) * _TILE_ROWS - span)
    else:
        shift = base - begin
    return shift


@triton.jit
def _store_swizzled(byte, row_block, column, column_tiles, offset, inside, scale_ptr):
    """Store bytes `[rows, columns]` of blocks of 32 rows, with their numbers `row_block` (int64), in a matrix that lies
    so far behind `scale_ptr`. inside: which blocks and columns are in it, `[blocks, columns]`."""
    byte = tl.reshape(byte, [row_block.shape[0], _BLOCK, column.shape[0]])
    of_block = offset + row_block // 4 * (column_tiles * _TILE_BYTES) + row_block % 4 * _TILE_COLUMNS
    of_column = column // _TILE_COLUMNS * _TILE_BYTES + column % _TILE_COLUMNS
    at = scale_ptr + of_block[:, None, None] + (tl.arange(0, _BLOCK) * 16)[None, :, None] + of_column[None, None, :]
    tl.store(at, byte, mask=inside[:, None, :])


@triton.jit
def _store_row_scales(
    byte, pid_t, pid_k, shift, features, written, scale_ptr,
    SWIZZLED: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Bytes along K `[BLOCK_T, BLOCK_K / 32]` of a tile, with the shift of each block of 32 rows. `pid_t` and `pid_k`
    are int64."""
    COLUMNS: tl.constexpr = BLOCK_K // _BLOCK
    first_t, first_column, byte = pid_t * BLOCK_T, pid_k * COLUMNS, byte.to(tl.uint8)
    row, column = tl.arange(0, BLOCK_T), tl.arange(0, COLUMNS)
    if SWIZZLED:
        block, column = first_t // _BLOCK + tl.arange(0, BLOCK_T // _BLOCK), first_column + column
        column_tiles = tl.cdiv(features, _TILE_TOKENS)
        inside = (block * _BLOCK < written)[:, None] & (column < column_tiles * _TILE_COLUMNS)[None, :]
        _store_swizzled(byte, block + shift // _BLOCK, column, column_tiles, 0, inside, scale_ptr)
    else:
        is_row = row < tl.maximum(tl.minimum(written - first_t, BLOCK_T), 0).to(tl.int32)
        if features % BLOCK_K == 0:  # which makes bytes of a row one word
            columns = features // BLOCK_K * COLUMNS
            at = scale_ptr + (first_t * columns + first_column) + row[:, None] * columns + column[None, :]
            tl.store(at, byte, mask=is_row[:, None])
        else:
            columns = features // _BLOCK
            at = scale_ptr + (first_t * columns + first_column) + row[:, None] * columns + column[None, :]
            tl.store(at, byte, mask=is_row[:, None] & (first_column + column < columns)[None, :])


@triton.jit
def _store_column_scales(
    byte, pid_t, pid_k, begin, base, size, features, span, written, scale_ptr,
    SWIZZLED: tl.constexpr, KIND: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Bytes along T `[BLOCK_K, BLOCK_T / 32]` of a tile (`pid_t` and `pid_k` are int32). begin, base and size: of the
    group of each block of 32 rows; `written`: rows with scales."""
    BLOCKS: tl.constexpr = BLOCK_T // _BLOCK
    byte = byte.to(tl.uint8)
    if SWIZZLED and KIND == "groups":
        _store_column_bytes(
            byte, pid_t, pid_k, begin, base, size, features, span, written, scale_ptr, SWIZZLED, KIND, BLOCK_T, BLOCK_K
        )
    elif (written if KIND != "experts" else span) % BLOCK_T == 0:  # which makes bytes of a feature one word
        tiles = (written if KIND != "experts" else span) // BLOCK_T
        expert = pid_t // tiles if KIND == "experts" else 0
        first_block = (pid_t - expert * tiles) * BLOCKS
        _store_column_words(
            byte,
            first_block,
            pid_k.to(tl.int64),
            expert,
            tiles * BLOCKS,
            features,
            scale_ptr,
            SWIZZLED,
            BLOCK_T,
            BLOCK_K,
        )
    else:
        _store_column_bytes(
            byte, pid_t, pid_k, begin, base, size, features, span, written, scale_ptr, SWIZZLED, KIND, BLOCK_T, BLOCK_K
        )


@triton.jit
def _store_column_words(
    byte, first_block, pid_k, expert, blocks, features, scale_ptr,
    SWIZZLED: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """`_store_column_scales` of a tile whose rows are all written and of one matrix with so many blocks, in whole
    tiles, from its `first_block` on."""
    block, k = first_block + tl.arange(0, BLOCK_T // _BLOCK), tl.arange(0, BLOCK_K)
    matrix = tl.zeros_like(pid_k) + expert
    if SWIZZLED:
        row_block, row_blocks = (
            pid_k * (BLOCK_K // _BLOCK) + tl.arange(0, BLOCK_K // _BLOCK),
            tl.cdiv(features, _TILE_ROWS) * 4,
        )
        column_tiles = tl.cdiv(blocks, _TILE_COLUMNS)
        inside = (row_block < row_blocks)[:, None] & (block >= 0)[None, :]
        offset = matrix * row_blocks * (_BLOCK * _TILE_COLUMNS) * column_tiles
        _store_swizzled(byte, row_block, block, column_tiles, offset, inside, scale_ptr)
    else:
        first_k = pid_k * BLOCK_K
        at = scale_ptr + ((matrix * features + first_k) * blocks + first_block)
        at = at + k[:, None] * blocks + tl.arange(0, BLOCK_T // _BLOCK)[None, :]
        tl.store(at, byte, mask=(k < tl.minimum(features - first_k, BLOCK_K))[:, None])


@triton.jit
def _store_column_bytes(
    byte, pid_t, pid_k, begin, base, size, features, span, written, scale_ptr,
    SWIZZLED: tl.constexpr, KIND: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """`_store_column_scales` of any tile."""
    block_t = pid_t.to(tl.int64) * (BLOCK_T // _BLOCK) + tl.arange(0, BLOCK_T // _BLOCK)
    k = pid_k.to(tl.int64) * BLOCK_K + tl.arange(0, BLOCK_K)
    place = _column_places(block_t, k, begin, base, size, features, span, SWIZZLED, KIND)
    all_features = tl.cdiv(features, _TILE_ROWS) * _TILE_ROWS if SWIZZLED else features
    inside = (block_t * _BLOCK < written)[None, :] & (k < all_features)[:, None]
    tl.store(scale_ptr + tl.trans(place), byte, mask=inside)


@triton.jit
def _column_places(block_t, k, begin, base, size, features, span, SWIZZLED: tl.constexpr, KIND: tl.constexpr):
    """Where the scales of blocks of 32 rows and of the features k are, `[blocks, BK]`. begin, base and size: of each
    block's group."""
    row, t = k[None, :], block_t * _BLOCK
    if KIND == "experts":
        expert = t // span
        column = block_t - expert * (span // _BLOCK)
    else:
        expert = tl.zeros_like(t)
        column = block_t
    if SWIZZLED:
        rows = tl.cdiv(features, _TILE_ROWS) * _TILE_ROWS
        if KIND == "groups":
            place = _swizzled(row, (block_t - begin // _BLOCK)[:, None], (size // _TILE_TOKENS)[:, None])
            place += (rows * (base // _BLOCK))[:, None]
        else:
            column_tiles = tl.cdiv(span, _TILE_TOKENS)
            place = _swizzled(row, column[:, None], column_tiles)
            place += (expert * rows * column_tiles * _TILE_COLUMNS)[:, None]
    else:
        place = (expert[:, None] * features + row) * (span // _BLOCK) + column[:, None]
    return place
