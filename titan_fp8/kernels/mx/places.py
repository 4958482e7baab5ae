"""Where kernels put MX scales: the layouts of `layout.py` in Triton.

KIND says what the rows are:

    dense     tokens
    experts   those of weights [E, N, K], `span` = N for each expert
    groups    sorted into groups, which `ends` int32 [E] divides

`written` rows have scales to write. Plain, those are all; swizzled, padding too, except between experts, where the
tiles of a kernel do not reach and memory is zero before. `scale_t` is the first row of a tile among these rows.

Swizzled scales of groups are of groups padded to 128 rows. There tiles are of padded rows, so that each is of one group
and begins a multiple of its rows behind the group's first; what it reads begins at any multiple of 32 rows.
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
_NO_END = tl.constexpr(0x7FFFFF80)


@triton.jit
def _present(ends_ptr, tokens, groups, KIND: tl.constexpr):
    """How many rows are there and count."""
    if KIND == "groups":
        tokens = tl.load(ends_ptr + groups - 1)
    return tokens


@triton.jit
def _first_and_end(begin, base, end, other_begin, other_base, other_end):
    return tl.maximum(begin, other_begin), tl.maximum(base, other_base), tl.minimum(end, other_end)


@triton.jit
def _uniform(number, MULTIPLE: tl.constexpr, EXACT_BITS: tl.constexpr):
    """A scalar of which the compiler can see that it is a multiple of a number, and the assembler that all threads of
    a warp have the same."""
    if not EXACT_BITS:
        number = tl.inline_asm_elementwise(
            "shfl.sync.idx.b32 $0, $1, 0, 31, -1;", "=r,r", [number], dtype=tl.int32, is_pure=False, pack=1
        )
        number = tl.multiple_of(number, MULTIPLE)
    return number


@triton.jit
def _group_of_tile(ends_ptr, row, present, groups, GROUPS: tl.constexpr, EXACT_BITS: tl.constexpr):
    """Of the group that is at `row` once each is padded to 128 rows: its first row, its first row among padded ones,
    and its end; behind the last group these of what is behind, with no end. All are int32, GROUPS a power of two that
    is not less than their number."""
    e = tl.arange(0, GROUPS)
    ends = tl.load(ends_ptr + e, mask=e < groups, other=present)
    begins = tl.load(ends_ptr + e - 1, mask=(e > 0) & (e < groups), other=0)
    padded_ends = tl.cumsum(tl.where(e < groups, (ends - begins + (_TILE_ROWS - 1)) & -_TILE_ROWS, 0), 0)
    is_before = padded_ends <= row
    # One reduction: each takes an exchange between warps.
    begin, base, end = tl.reduce(
        (tl.where(is_before, ends, 0), tl.where(is_before, padded_ends, 0), tl.where(is_before, _NO_END, ends)),
        0,
        _first_and_end,
    )
    base = _uniform(base, _TILE_ROWS, EXACT_BITS)
    return _uniform(begin, _BLOCK, EXACT_BITS), base, _uniform(end, _BLOCK, EXACT_BITS)


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
    byte, scale_t, pid_k, features, span, written, scale_ptr,
    SWIZZLED: tl.constexpr, KIND: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Bytes along K `[BLOCK_T, BLOCK_K / 32]` of a tile. `scale_t` and `pid_k` are int64."""
    COLUMNS: tl.constexpr = BLOCK_K // _BLOCK
    first_column, byte = pid_k * COLUMNS, byte.to(tl.uint8)
    row, column = tl.arange(0, BLOCK_T), tl.arange(0, COLUMNS)
    if SWIZZLED:
        block, column = scale_t // _BLOCK + tl.arange(0, BLOCK_T // _BLOCK), first_column + column
        column_tiles = tl.cdiv(features, _TILE_TOKENS)
        inside = (block * _BLOCK < written)[:, None] & (column < column_tiles * _TILE_COLUMNS)[None, :]
        if KIND == "experts":  # each padded
            block += block * _BLOCK // span * ((tl.cdiv(span, _TILE_ROWS) * _TILE_ROWS - span) // _BLOCK)
        _store_swizzled(byte, block, column, column_tiles, 0, inside, scale_ptr)
    else:
        is_row = row < tl.maximum(tl.minimum(written - scale_t, BLOCK_T), 0).to(tl.int32)
        if features % BLOCK_K == 0:  # which makes bytes of a row one word
            columns = features // BLOCK_K * COLUMNS
            at = scale_ptr + (scale_t * columns + first_column) + row[:, None] * columns + column[None, :]
            tl.store(at, byte, mask=is_row[:, None])
        else:
            columns = features // _BLOCK
            at = scale_ptr + (scale_t * columns + first_column) + row[:, None] * columns + column[None, :]
            tl.store(at, byte, mask=is_row[:, None] & (first_column + column < columns)[None, :])


@triton.jit
def _store_column_scales(
    byte, scale_t, pid_k, base, size, features, span, written, scale_ptr,
    SWIZZLED: tl.constexpr, KIND: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Bytes along T `[BLOCK_K, BLOCK_T / 32]` of a tile. `scale_t` and `pid_k` are int64; base, size: of its group."""
    BLOCKS: tl.constexpr = BLOCK_T // _BLOCK
    byte = byte.to(tl.uint8)
    if not SWIZZLED:
        _store_plain_columns(byte, scale_t, pid_k, features, written, scale_ptr, BLOCK_T, BLOCK_K)
    elif KIND == "experts":
        if span % BLOCK_T == 0:  # the tile is of one expert, and bytes of a feature are one word
            first_block, tiles = (scale_t // _BLOCK).to(tl.int32), span // BLOCK_T
            expert = first_block // BLOCKS // tiles
            matrix_bytes = tl.cdiv(features, _TILE_ROWS).to(tl.int64) * tl.cdiv(span, _TILE_TOKENS) * _TILE_BYTES
            first_block -= expert * (tiles * BLOCKS)
            _store_column_words(
                byte, first_block, tiles * BLOCKS, expert * matrix_bytes, pid_k, features, scale_ptr, BLOCK_T, BLOCK_K
            )
        else:
            block_t, k = scale_t // _BLOCK + tl.arange(0, BLOCKS), pid_k * BLOCK_K + tl.arange(0, BLOCK_K)
            place = _places_of_experts(block_t, k, features, span)
            is_feature = k < tl.cdiv(features, _TILE_ROWS) * _TILE_ROWS
            inside = (block_t * _BLOCK < written)[None, :] & is_feature[:, None]
            tl.store(scale_ptr + tl.trans(place), byte, mask=inside)
    elif KIND == "groups":
        first_block = (scale_t.to(tl.int32) - base) // _BLOCK
        offset = (tl.cdiv(features, _TILE_ROWS) * (_TILE_ROWS // _BLOCK)).to(tl.int64) * base
        _store_column_words(byte, first_block, size // _BLOCK, offset, pid_k, features, scale_ptr, BLOCK_T, BLOCK_K)
    else:
        first_block, blocks = (scale_t // _BLOCK).to(tl.int32), written // _TILE_TOKENS * _TILE_COLUMNS
        _store_column_words(byte, first_block, blocks, 0, pid_k, features, scale_ptr, BLOCK_T, BLOCK_K)


@triton.jit
def _store_no_scales(
    row_scale_ptr, column_scale_ptr, scale_t, pid_k, base, size, features, span, written,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Bytes of zero for a tile behind all rows of groups; swizzled."""
    if ROWS:
        byte = tl.zeros([BLOCK_T, BLOCK_K // _BLOCK], dtype=tl.uint8)
        _store_row_scales(
            byte, scale_t, pid_k, features, span, written, row_scale_ptr, True, "groups", BLOCK_T, BLOCK_K
        )
    if COLUMNS:
        byte = tl.zeros([BLOCK_K, BLOCK_T // _BLOCK], dtype=tl.uint8)
        _store_column_scales(
            byte, scale_t, pid_k, base, size, features, span, written, column_scale_ptr,
            True, "groups", BLOCK_T, BLOCK_K,
        )  # fmt: skip


@triton.jit
def _store_plain_columns(
    byte, scale_t, pid_k, features, written, scale_ptr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr
):
    """`_store_column_scales` in memory that lies as x does: whole lines of it."""
    block, k = tl.arange(0, BLOCK_T // _BLOCK), tl.arange(0, BLOCK_K)
    first_k = pid_k * BLOCK_K
    left_blocks = tl.maximum(tl.minimum(tl.cdiv(written - scale_t, _BLOCK), BLOCK_T // _BLOCK), 0).to(tl.int32)
    left_features = tl.minimum(features - first_k, BLOCK_K).to(tl.int32)
    at = scale_ptr + (scale_t // _BLOCK * features + first_k) + block.to(tl.int64)[:, None] * features + k[None, :]
    tl.store(at, tl.trans(byte), mask=(block < left_blocks)[:, None] & (k < left_features)[None, :])


@triton.jit
def _store_column_words(
    byte, first_block, blocks, offset, pid_k, features, scale_ptr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr
):
    """`_store_column_scales` of a tile of one matrix, which lies `offset` bytes behind `scale_ptr` and has so many
    blocks of 32 rows, the tile's from `first_block` on."""
    block = first_block + tl.arange(0, BLOCK_T // _BLOCK)
    row_block = pid_k * (BLOCK_K // _BLOCK) + tl.arange(0, BLOCK_K // _BLOCK)
    inside = (row_block < tl.cdiv(features, _TILE_ROWS) * 4)[:, None] & (block < blocks)[None, :]
    _store_swizzled(byte, row_block, block, tl.cdiv(blocks, _TILE_COLUMNS), offset, inside, scale_ptr)


@triton.jit
def _places_of_experts(block_t, k, features, span):
    """Where the scales of blocks of 32 rows and of the features k are, `[blocks, BK]`."""
    expert = block_t * _BLOCK // span
    row, column, column_tiles = k[None, :], (block_t - expert * (span // _BLOCK))[:, None], tl.cdiv(span, _TILE_TOKENS)
    tile = row // _TILE_ROWS * column_tiles + column // _TILE_COLUMNS
    tile += expert[:, None] * (tl.cdiv(features, _TILE_ROWS) * column_tiles)
    return tile * _TILE_BYTES + row % 32 * 16 + row // 32 % 4 * 4 + column % _TILE_COLUMNS
