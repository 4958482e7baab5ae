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
    begin = tl.max(tl.where(is_before, ends[None, :], 0), axis=1)
    base = tl.sum(tl.where(is_before, padded[None, :], 0), axis=1)
    size = tl.sum(tl.where(is_own, padded[None, :], 0), axis=1)
    return begin.to(tl.int64), base.to(tl.int64), size.to(tl.int64)


@triton.jit
def _swizzled(row, column, column_tiles):
    """Where the byte of a row and a column is, in a matrix with so many tiles side by side."""
    tile = row // _TILE_ROWS * column_tiles + column // _TILE_COLUMNS
    return tile * _TILE_BYTES + row % 32 * 16 + row // 32 % 4 * 4 + column % _TILE_COLUMNS


@triton.jit
def _row_shift(ends_ptr, t, span, groups, SWIZZLED: tl.constexpr, KIND: tl.constexpr, GROUPS: tl.constexpr):
    """How much further down than t the scales of the rows t are: int64."""
    if SWIZZLED and KIND == "experts":
        shift = t // span * (tl.cdiv(span, _TILE_ROWS) * _TILE_ROWS - span)
    elif SWIZZLED and KIND == "groups":
        begin, base, _ = _group_of(ends_ptr, t, groups, GROUPS)
        shift = base - begin
    else:
        shift = tl.zeros_like(t)
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
def _column_places(
    block_t, k, ends_ptr, features, span, groups, SWIZZLED: tl.constexpr, KIND: tl.constexpr, GROUPS: tl.constexpr
):
    """Where the scales of blocks of 32 rows and of the features k are, `[blocks, BK]`."""
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
            begin, base, size = _group_of(ends_ptr, t, groups, GROUPS)
            place = _swizzled(row, (block_t - begin // _BLOCK)[:, None], (size // _TILE_TOKENS)[:, None])
            place += (rows * (base // _BLOCK))[:, None]
        else:
            column_tiles = tl.cdiv(span, _TILE_TOKENS)
            place = _swizzled(row, column[:, None], column_tiles)
            place += (expert * rows * column_tiles * _TILE_COLUMNS)[:, None]
    else:
        place = (expert[:, None] * features + row) * (span // _BLOCK) + column[:, None]
    return place
