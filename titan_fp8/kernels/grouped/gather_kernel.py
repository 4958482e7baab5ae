"""Tokens brought to the rows of groups and cast on the way, as Triton kernels: rows in high precision exist nowhere.

    _gather_amax_kernel    largest |x| of each row, and of each column of each group
    _gather_cast_kernel    codes of a tile, by rows and by columns

As in `kernel.py`, but that a row is looked up: row m holds the token `source[m] // k`, times the score of that choice
rounded once, or zero. Each value is read twice from where it lies; as k rows share a token, often from the cache.

T tokens, k choices of each, M rows, K columns, E groups. `ends` int32 [E]: the row behind each group, multiples of 16.
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
from titan_fp8.kernels.float8.bits import Tile, _abs_bits, _quads_of_tile, _store_rows_tile, _tile_of_program
from titan_fp8.kernels.grouped.kernel import _bounds, _groups_of, _store_group_columns, scales_of
from titan_fp8.kernels.launch import Plan, cdiv, next_power_of_2, planned
from titan_fp8.kernels.producers import tiles
from titan_fp8.kernels.producers.tiles import _rounded

# Static block sizes: a search at the first step could choose differently on different ranks.
AMAX_BLOCK_T, AMAX_BLOCK_K, AMAX_WARPS = 32, 128, 8
AMAX_ROWS, AMAX_SPLITS = 512, 8
"""As in `kernel.py`."""
TILE = Tile(64, 128, 4, 4)


@triton.jit
def _load_rows(
    x_ptr, source_ptr, scores_ptr, t, k, rows, features, stride, top_k, SCALED: tl.constexpr, EXACT_BITS: tl.constexpr
):  # fmt: skip
    """Rows t `[BT]` of the groups at columns k `[BK]`, fp32; zero where nothing is."""
    choice = tl.load(source_ptr + t, mask=t < rows, other=-1)
    held = choice >= 0
    safe = tl.maximum(choice, 0).to(tl.int64)
    mask = held[:, None] & (k < features)[None, :]
    x = tl.load(x_ptr + (safe // top_k)[:, None] * stride + k[None, :], mask=mask, other=0)
    value = x.to(tl.float32)
    if SCALED:
        score = tl.load(scores_ptr + safe, mask=held, other=0.0)
        # Where nothing is there stays a zero, whatever the score.
        value = tl.where(mask, _rounded(value * score[:, None], x_ptr.dtype.element_ty, EXACT_BITS), 0.0)
    return value


@triton.jit(do_not_specialize=["splits", "top_k"])
def _gather_amax_kernel(
    x_ptr, source_ptr, scores_ptr, ends_ptr, row_amax_ptr, amax_ptr, rows, features, stride, top_k, splits,
    SCALED: tl.constexpr, EXACT_BITS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Integer maxima of |x| of each row and of each column in a group, into zeroed int32."""
    blocks_k = tl.cdiv(features, BLOCK_K)
    pid = tl.program_id(0)
    group = pid // (blocks_k * splits)
    split = (pid // blocks_k) % splits
    k = (pid % blocks_k).to(tl.int64) * BLOCK_K + tl.arange(0, BLOCK_K)
    begin, end = _bounds(ends_ptr, group)
    largest = tl.zeros([BLOCK_T, BLOCK_K], dtype=tl.int32)
    for start in range(begin + split * BLOCK_T, end, splits * BLOCK_T):
        t = (start + tl.arange(0, BLOCK_T)).to(tl.int64)
        x = _load_rows(x_ptr, source_ptr, scores_ptr, t, k, end, features, stride, top_k, SCALED, EXACT_BITS)
        magnitudes = _abs_bits(x)
        largest = tl.maximum(largest, magnitudes)
        tl.atomic_max(row_amax_ptr + t, tl.max(magnitudes, axis=1), mask=t < end, sem="relaxed")
    if begin + split * BLOCK_T < end:
        place = amax_ptr + group.to(tl.int64) * features + k
        tl.atomic_max(place, tl.max(largest, axis=0), mask=k < features, sem="relaxed")


@triton.jit(do_not_specialize=["top_k"])
def _gather_cast_kernel(
    x_ptr, source_ptr, scores_ptr, ends_ptr, row_amax_ptr, inv_scale_ptr, rows_ptr, row_scale_ptr, columns_ptr,
    rows, features, stride, groups, top_k,
    SCALED: tl.constexpr, EXACT_BITS: tl.constexpr, GROUPS: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, BAND: tl.constexpr,
):  # fmt: skip
    """Codes of one tile, by rows from known amax and by columns from known scales."""
    pid_t, pid_k = _tile_of_program(tl.program_id(0), tl.cdiv(rows, BLOCK_T), tl.cdiv(features, BLOCK_K), BAND)
    quad, k = _quads_of_tile(pid_t, pid_k, BLOCK_T, BLOCK_K)
    t = 4 * quad
    # All loads come before any store: pointers may alias, so the compiler keeps their order.
    a = _load_rows(x_ptr, source_ptr, scores_ptr, t, k, rows, features, stride, top_k, SCALED, EXACT_BITS)
    b = _load_rows(x_ptr, source_ptr, scores_ptr, t + 1, k, rows, features, stride, top_k, SCALED, EXACT_BITS)
    c = _load_rows(x_ptr, source_ptr, scores_ptr, t + 2, k, rows, features, stride, top_k, SCALED, EXACT_BITS)
    d = _load_rows(x_ptr, source_ptr, scores_ptr, t + 3, k, rows, features, stride, top_k, SCALED, EXACT_BITS)
    group = _groups_of(ends_ptr, t, groups, GROUPS)
    _store_rows_tile(
        a, b, c, d, row_amax_ptr, row_scale_ptr, rows_ptr, quad, k, pid_k == 0, rows, features, False, EXACT_BITS
    )
    _store_group_columns(a, b, c, d, group, inv_scale_ptr, columns_ptr, quad, k, rows, features, groups, EXACT_BITS)


@planned(_gather_amax_kernel)
def _launch_amax(
    device: int, shape: tuple[int, int], stride: int, groups: int, top_k: int, dtype: torch.dtype, scaled: bool,
    blocks: tuple[int, int, int, int, int],
) -> Plan:  # fmt: skip
    """blocks: `AMAX_BLOCK_T` and so on."""
    rows, features = shape
    block_t, block_k, warps, of_program, least = blocks
    splits = max(least, cdiv(rows, groups * of_program))
    constants: dict[str, Any] = {
        "SCALED": scaled, "EXACT_BITS": bits.exact_bits(device), "BLOCK_T": block_t, "BLOCK_K": block_k,
        "num_warps": warps,
    }  # fmt: skip
    programs = groups * splits * cdiv(features, block_k)
    return Plan(programs, (rows, features, stride, top_k, splits), constants | tiles.LAUNCH)


@planned(_gather_cast_kernel)
def _launch_cast(
    device: int, shape: tuple[int, int], stride: int, groups: int, top_k: int, dtype: torch.dtype, scaled: bool,
    tile: Tile,
) -> Plan:  # fmt: skip
    rows, features = shape
    constants: dict[str, Any] = {
        "SCALED": scaled, "EXACT_BITS": bits.exact_bits(device), "GROUPS": next_power_of_2(groups),
        "BLOCK_T": tile.tokens, "BLOCK_K": tile.features, "BAND": tile.band,
        "num_warps": tile.warps, "maxnreg": tile.registers,
    }  # fmt: skip
    programs = cdiv(rows, tile.tokens) * cdiv(features, tile.features)
    return Plan(programs, (rows, features, stride, groups, top_k), constants | tiles.LAUNCH)


def gather(
    x: Tensor, source: Tensor, scores: Tensor | None, top_k: int, ends: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `titan_fp8.kernels.grouped.gather`; features are contiguous."""
    (rows,), features, groups, device = source.shape, x.shape[1], ends.shape[0], x.device
    row_amax, amax = tiles.new_amaxes(rows, groups * features, device=device)
    amax = amax[: groups * features].view(groups, features)
    shape, scaled = (rows, features), scores is not None
    # A pointer that a variant of the kernel never follows still has to be one.
    inputs = x, source, source if scores is None else scores
    blocks = AMAX_BLOCK_T, AMAX_BLOCK_K, AMAX_WARPS, AMAX_ROWS, AMAX_SPLITS
    _launch_amax((*inputs, ends, row_amax, amax), shape, x.stride(0), groups, top_k, x.dtype, scaled, blocks)
    inv_scale, scale_t = scales_of(amax)
    codes = bits.new_codes(rows, features, dtype=dtype, device=device)
    codes_t = bits.new_codes(features, rows, dtype=dtype, device=device)
    scale = torch.empty(rows, 1, dtype=torch.float32, device=device)
    tensors = *inputs, ends, row_amax, inv_scale, codes, scale, codes_t
    _launch_cast(tensors, shape, x.stride(0), groups, top_k, x.dtype, scaled, TILE)
    return codes, scale, codes_t, scale_t
