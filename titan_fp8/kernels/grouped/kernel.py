"""Float8 casts of grouped rows as Triton kernels: amax first, then codes in both layouts from one read.

    _amax_kernel     largest |x| of each row, and of each column of each group
    _scales_kernel   scales of columns from these
    _cast_kernel     codes of a tile, by rows and by columns

A program of the first belongs to one group, so that it has few maxima to hand over; programs of the last take tiles of
rows whatever group they are in, and look up the scale of each column for every four rows.

M rows, K columns, E groups. `ends` int32 [E]: the row behind each group, multiples of 16.
"""

# Triton's language is not Python's; pyright takes the kernels for ordinary functions.
# pyright: reportCallIssue=false, reportAssignmentType=false, reportOperatorIssue=false, reportAttributeAccessIssue=false
# pyright: reportGeneralTypeIssues=false

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from titan_fp8.kernels.float8 import bits
from titan_fp8.kernels.float8.bits import (
    Tile,
    _abs_bits,
    _pack,
    _quads_of_tile,
    _scales,
    _store_rows_tile,
    _tile_of_program,
)
from titan_fp8.kernels.float8.kernel import _load_tile
from titan_fp8.kernels.launch import Plan, cdiv, next_power_of_2, planned
from titan_fp8.kernels.producers import tiles

# Static block sizes: a search at the first step could choose differently on different ranks.
AMAX_BLOCK_T, AMAX_BLOCK_K, AMAX_WARPS = 64, 128, 8
AMAX_ROWS, AMAX_SPLITS = 512, 8
"""A group of average size is divided among programs of so many rows each, but among so many programs at least: one
group may have all rows."""
SCALES_BLOCK = 1024
TILE = Tile(64, 128, 4, 4)


@triton.jit
def _bounds(ends_ptr, group):
    """First row of a group, and the one behind it."""
    return tl.load(ends_ptr + group - 1, mask=group > 0, other=0), tl.load(ends_ptr + group)


@triton.jit
def _groups_of(ends_ptr, rows, groups, GROUPS: tl.constexpr):
    """The group of each of `rows`; `groups` behind the last. GROUPS: a power of two, not less than their number."""
    e = tl.arange(0, GROUPS)
    ends = tl.load(ends_ptr + e, mask=e < groups, other=0x7FFFFFFF)
    return tl.sum((ends[None, :] <= rows[:, None]).to(tl.int32), axis=1)


@triton.jit(do_not_specialize=["splits"])
def _amax_kernel(
    x_ptr, ends_ptr, row_amax_ptr, amax_ptr, rows, features, stride_t, groups, splits,
    ROWS: tl.constexpr, EXACT_BITS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Integer maxima of |x| of each column in a group, and with ROWS of each row, into zeroed int32."""
    blocks_k = tl.cdiv(features, BLOCK_K)
    pid = tl.program_id(0)
    group = pid // (blocks_k * splits)
    split = (pid // blocks_k) % splits
    k = (pid % blocks_k).to(tl.int64) * BLOCK_K + tl.arange(0, BLOCK_K)
    begin, end = _bounds(ends_ptr, group)
    largest = tl.zeros([BLOCK_T, BLOCK_K], dtype=tl.int32)
    for start in range(begin + split * BLOCK_T, end, splits * BLOCK_T):
        t = (start + tl.arange(0, BLOCK_T)).to(tl.int64)
        x = _load_tile(x_ptr, x_ptr, t, k, end, features, stride_t, 1, False, False, EXACT_BITS)
        magnitudes = _abs_bits(x)
        largest = tl.maximum(largest, magnitudes)
        if ROWS:
            tl.atomic_max(row_amax_ptr + t, tl.max(magnitudes, axis=1), mask=t < end, sem="relaxed")
    if begin + split * BLOCK_T < end:
        place = amax_ptr + group.to(tl.int64) * features + k
        tl.atomic_max(place, tl.max(largest, axis=0), mask=k < features, sem="relaxed")


@triton.jit
def _scales_kernel(amax_ptr, inv_scale_ptr, scale_ptr, count, BLOCK: tl.constexpr):
    """Power-of-two scales, both ways, from amax bits."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inv_scale, scale = _scales(tl.load(amax_ptr + at, mask=at < count, other=0), False, True)
    tl.store(inv_scale_ptr + at, inv_scale, mask=at < count)
    tl.store(scale_ptr + at, scale, mask=at < count)


@triton.jit
def _store_group_columns(
    a, b, c, d, group, inv_scale_ptr, columns_ptr, quad, k, rows, features, groups, EXACT_BITS: tl.constexpr
):  # fmt: skip
    """Transposed codes of a tile (fp32, as the four rows of each quad), of which each quad is in one group; zero behind
    the last group."""
    mask_k = (k < features)[None, :]
    is_somewhere = (group < groups)[:, None]
    at = inv_scale_ptr + group.to(tl.int64)[:, None] * features + k[None, :]
    factor = tl.load(at, mask=is_somewhere & mask_k, other=0.0)
    a, b, c, d = (
        tl.where(is_somewhere, a * factor, 0.0), tl.where(is_somewhere, b * factor, 0.0),
        tl.where(is_somewhere, c * factor, 0.0), tl.where(is_somewhere, d * factor, 0.0),
    )  # fmt: skip
    word = _pack(a, b, c, d, False, EXACT_BITS)
    place = columns_ptr.to(tl.pointer_type(tl.int32)) + k[:, None] * (rows // 4) + quad[None, :]  # words of four codes
    tl.store(place, tl.trans(word), mask=(k < features)[:, None] & (4 * quad < rows)[None, :])


@triton.jit
def _cast_kernel(
    x_ptr, ends_ptr, row_amax_ptr, inv_scale_ptr, rows_ptr, row_scale_ptr, columns_ptr,
    rows, features, stride_t, groups, ROWS: tl.constexpr, EXACT_BITS: tl.constexpr, GROUPS: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, BAND: tl.constexpr,
):  # fmt: skip
    """Codes of one tile by columns, from known scales, and with ROWS by rows, from known amax."""
    pid_t, pid_k = _tile_of_program(tl.program_id(0), tl.cdiv(rows, BLOCK_T), tl.cdiv(features, BLOCK_K), BAND)
    quad, k = _quads_of_tile(pid_t, pid_k, BLOCK_T, BLOCK_K)
    t = 4 * quad
    # All loads come before any store: pointers may alias, so the compiler keeps their order.
    a = _load_tile(x_ptr, x_ptr, t, k, rows, features, stride_t, 1, False, False, EXACT_BITS)
    b = _load_tile(x_ptr, x_ptr, t + 1, k, rows, features, stride_t, 1, False, False, EXACT_BITS)
    c = _load_tile(x_ptr, x_ptr, t + 2, k, rows, features, stride_t, 1, False, False, EXACT_BITS)
    d = _load_tile(x_ptr, x_ptr, t + 3, k, rows, features, stride_t, 1, False, False, EXACT_BITS)
    group = _groups_of(ends_ptr, t, groups, GROUPS)
    if ROWS:
        _store_rows_tile(
            a, b, c, d, row_amax_ptr, row_scale_ptr, rows_ptr, quad, k, pid_k == 0, rows, features, False, EXACT_BITS
        )
    _store_group_columns(a, b, c, d, group, inv_scale_ptr, columns_ptr, quad, k, rows, features, groups, EXACT_BITS)


@planned(_amax_kernel)
def _launch_amax(
    device: int, shape: tuple[int, int], stride_t: int, groups: int, dtype: torch.dtype, of_rows: bool,
    blocks: tuple[int, int, int, int, int],
) -> Plan:  # fmt: skip
    """dtype: of x. blocks: `AMAX_BLOCK_T` and so on."""
    rows, features = shape
    block_t, block_k, warps, of_program, least = blocks
    splits = max(least, cdiv(rows, groups * of_program))
    constants: dict[str, Any] = {
        "ROWS": of_rows, "EXACT_BITS": bits.exact_bits(device), "BLOCK_T": block_t, "BLOCK_K": block_k,
        "num_warps": warps,
    }  # fmt: skip
    programs = groups * splits * cdiv(features, block_k)
    return Plan(programs, (rows, features, stride_t, groups, splits), constants)


@planned(_scales_kernel)
def _launch_scales(device: int, count: int, block: int) -> Plan:
    return Plan(cdiv(count, block), (count,), {"BLOCK": block, "num_warps": 4})


@planned(_cast_kernel)
def _launch_cast(
    device: int, shape: tuple[int, int], stride_t: int, groups: int, dtype: torch.dtype, of_rows: bool, tile: Tile
) -> Plan:  # fmt: skip
    """dtype: of x."""
    rows, features = shape
    constants: dict[str, Any] = {
        "ROWS": of_rows, "EXACT_BITS": bits.exact_bits(device), "GROUPS": next_power_of_2(groups),
        "BLOCK_T": tile.tokens, "BLOCK_K": tile.features, "BAND": tile.band,
        "num_warps": tile.warps, "maxnreg": tile.registers,
    }  # fmt: skip
    programs = cdiv(rows, tile.tokens) * cdiv(features, tile.features)
    return Plan(programs, (rows, features, stride_t, groups), constants)


def scales_of(amax: Tensor) -> tuple[Tensor, Tensor]:
    """`(inv_scale, scale)` fp32 in the shape of amax, int32."""
    inv_scale, scale = (torch.empty(amax.shape, dtype=torch.float32, device=amax.device) for _ in range(2))
    _launch_scales((amax, inv_scale, scale), amax.numel(), SCALES_BLOCK)
    return inv_scale, scale


def cast(x: Tensor, ends: Tensor, dtype: torch.dtype, *, rows: bool) -> tuple[Tensor, ...]:
    """`(codes, scale, codes_t, scale_t)` of x `[M, K]`, features contiguous; without `rows` the last two."""
    (tokens, features), groups, device = x.shape, ends.shape[0], x.device
    row_amax, amax = tiles.new_amaxes(tokens if rows else 0, groups * features, device=device)
    amax = amax[: groups * features].view(groups, features)
    codes_t = bits.new_codes(features, tokens, dtype=dtype, device=device)
    codes = bits.new_codes(tokens, features, dtype=dtype, device=device) if rows else codes_t
    scale = torch.empty(tokens, 1, dtype=torch.float32, device=device) if rows else None
    # A pointer that a variant of the kernels never follows still has to be one.
    row_amax = row_amax if rows else amax
    shape, stride_t, dtype = (tokens, features), x.stride(0), x.dtype
    blocks = AMAX_BLOCK_T, AMAX_BLOCK_K, AMAX_WARPS, AMAX_ROWS, AMAX_SPLITS
    _launch_amax((x, ends, row_amax, amax), shape, stride_t, groups, dtype, rows, blocks)
    inv_scale, scale_t = scales_of(amax)
    tensors = x, ends, row_amax, inv_scale, codes, inv_scale if scale is None else scale, codes_t
    _launch_cast(tensors, shape, stride_t, groups, dtype, rows, TILE)
    return (codes_t, scale_t) if scale is None else (codes, scale, codes_t, scale_t)
