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
def _of_both(begin, base, size, other_begin, other_base, other_size):
    return tl.maximum(begin, other_begin), base + other_base, size + other_size


@triton.jit
def _group_of(ends_ptr, t, groups, GROUPS: tl.constexpr):
    """Of the group that each of the rows t is in: its first row, and with each group padded to 128 rows its first row
    and its size, which is 0 behind the last group. GROUPS: a power of two, not less than their number."""
    e = tl.arange(0, GROUPS)
    is_group = e < groups
    ends = tl.load(ends_ptr + e, mask=is_group, other=0x7FFFFFFF)
    begins = tl.load(ends_ptr + e - 1, mask=is_group & (e > 0), other=0)
    padded = tl.where(is_group, tl.cdiv(tl.where(is_group, ends - begins, 0), _TILE_ROWS) * _TILE_ROWS, 0)
    is_before = ends[None, :] <= t[:, None]
    is_own = (begins[None, :] <= t[:, None]) & (t[:, None] < ends[None, :])
    # One reduction: each takes an exchange between all warps.
    begins_before, padded_before = tl.where(is_before, ends[None, :], 0), tl.where(is_before, padded[None, :], 0)
    own = tl.where(is_own, padded[None, :], 0)
    begin, base, size = tl.reduce((begins_before, padded_before, own), 1, _of_both)
    return begin.to(tl.int64), base.to(tl.int64), size.to(tl.int64)


@triton.jit
def _swizzled(row, column, column_tiles):
    """Where the byte of a row and a column is, in a matrix with so many tiles side by side."""
    tile = row // _TILE_ROWS * column_tiles + column // _TILE_COLUMNS
    return tile * _TILE_BYTES + row % 32 * 16 + row // 32 % 4 * 4 + column % _TILE_COLUMNS


@triton.jit
def _groups_of_blocks(ends_ptr, block_t, groups, SWIZZLED: tl.constexpr, KIND: tl.constexpr, GROUPS: tl.constexpr):
    """`_group_of` of blocks of 32 rows, which are of one group each; zeros where no place depends on groups."""
    if SWIZZLED and KIND == "groups":
        begin, base, size = _group_of(ends_ptr, block_t * _BLOCK, groups, GROUPS)
    else:
        begin, base, size = tl.zeros_like(block_t), tl.zeros_like(block_t), tl.zeros_like(block_t)
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
def _store_row_scales(byte, t, shift, block_k, features, written, scale_ptr, SWIZZLED: tl.constexpr):
    """Bytes `[rows, blocks along K]` of the rows t and the blocks block_k."""
    row, column = (t + shift)[:, None], block_k[None, :]
    if SWIZZLED:
        column_tiles = tl.cdiv(features, _TILE_TOKENS)
        place, columns = _swizzled(row, column, column_tiles), column_tiles * _TILE_COLUMNS
    else:
        columns = features // _BLOCK
        place = row * columns + column
    tl.store(scale_ptr + place, byte.to(tl.uint8), mask=(t < written)[:, None] & (column < columns))


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
