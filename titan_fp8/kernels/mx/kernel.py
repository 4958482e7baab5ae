"""The MXFP8 casts as Triton kernels. `reference.py` and `layout.py` say what they compute; these give the same bits.

    _cast_tiles_kernel          codes and scales along K, along T (transposed), or both, in one read
    dequantize.py               what these codes stand for, in bf16 and as x lies, in one read

A program that holds a tile of whole 32x32 squares holds every block of both layouts that crosses it, so no pass for
amax comes first. The exponent of a scale is an addition and a shift (`CARRY`).

Amax, conversion and transposed words are the helpers of `titan_fp8.kernels.float8.bits`; what is said there holds here,
and what `titan_fp8.kernels.float8.kernel` says of 64-bit offsets, masks and tokens that are not specialized on. A block
that holds NaN or Inf has the reciprocal NaN, chosen by a select, and with it NaN codes.

T tokens (rows), K features (columns), E experts or groups. `present` rows are there and count, the others are zero:
behind them are padding, or rows behind the last group.
"""

# Triton's language is not Python's; pyright takes the kernels for ordinary functions.
# pyright: reportCallIssue=false, reportAssignmentType=false, reportOperatorIssue=false, reportAttributeAccessIssue=false
# pyright: reportGeneralTypeIssues=false, reportArgumentType=false

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from titan_fp8.kernels.float8 import bits
from titan_fp8.kernels.float8.bits import Tile, _tile_of_program
from titan_fp8.kernels.float8.reference import E4M3
from titan_fp8.kernels.launch import Plan, cdiv, next_power_of_2, planned
from titan_fp8.kernels.mx import layout
from titan_fp8.kernels.mx.dequantize import _quantize_dequantize_kernel, _quantize_dequantize_pairs_kernel
from titan_fp8.kernels.mx.places import (
    _BLOCK,
    _NO_END,
    _TILE_ROWS,
    _group_of_tile,
    _present,
    _store_no_scales,
)
from titan_fp8.kernels.mx.reference import BLOCK, CARRY, E8M0, padded
from titan_fp8.kernels.mx.tiles_of_numbers import _cast_numbers
from titan_fp8.kernels.mx.tiles_of_pairs import _cast_pairs

# Static: a first-step search could choose differently on different ranks. `scripts/bench_mx.py --sweep` times others.
ROWS_TILE, COLUMNS_TILE, BOTH_TILE = Tile(64, 128, 4, 1), Tile(128, 64, 4, 2), Tile(128, 64, 4, 1)
"""By the layouts that are written, in multiples of 32."""
BOTH_OF_EXPERTS_TILE = Tile(128, 128, 8, 1, 128)
ROWS_OF_PAIRS_TILE, COLUMNS_OF_PAIRS_TILE = Tile(64, 256, 8, 1), Tile(256, 64, 8, 1)
"""The same for bf16 in pairs; a warp for each square or two of them, see `squares.py`."""
BOTH_OF_PAIRS_TILE, BOTH_PLAIN_OF_PAIRS_TILE = Tile(256, 128, 8, 1, 128), Tile(128, 256, 8, 1, 128)
"""Of plain scales a row of a tile is so few bytes that wide tiles pay."""
COLUMNS_OF_GROUPS_TILE, BOTH_OF_GROUPS_TILE = Tile(128, 64, 4, 1), Tile(128, 64, 4, 1)
"""For bf16 in pairs of experts, and of groups with swizzled scales: no more than 128 rows, see `places.py`."""
QUANTIZE_DEQUANTIZE_TILE, QUANTIZE_DEQUANTIZE_PAIRS_TILE = Tile(32, 128, 4, 1), Tile(32, 128, 2, 1)
IN_PAIRS = True
"""Whether bf16 is cast in pairs where it can be."""

DENSE, EXPERTS, GROUPS = "dense", "experts", "groups"
"""What rows are; see `places.py`."""


@triton.jit(do_not_specialize=["tokens"])
def _cast_tiles_kernel(
    x_ptr, ends_ptr, rows_ptr, row_scale_ptr, columns_ptr, column_scale_ptr,
    tokens, features, span, stride_t, stride_k, groups,
    PAIRS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, SWIZZLED: tl.constexpr, KIND: tl.constexpr,
    CARRY: tl.constexpr, EXACT_BITS: tl.constexpr, PADDED_T: tl.constexpr, PADDED_K: tl.constexpr, GROUPS: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, BAND: tl.constexpr,
):  # fmt: skip
    """Codes and scales of a tile in the layouts asked for; of sizes padded to multiples of PADDED_T and PADDED_K there
    are scales."""
    IN_TILES: tl.constexpr = SWIZZLED and KIND == "groups"
    padded_tokens = tokens + groups * (_TILE_ROWS - _BLOCK) if IN_TILES else tokens
    all_tokens = tl.cdiv(padded_tokens, PADDED_T) * PADDED_T
    all_features = tl.cdiv(features, PADDED_K) * PADDED_K
    pid = tl.program_id(0)
    pid_t, pid_k = _tile_of_program(pid, tl.cdiv(all_tokens, BLOCK_T), tl.cdiv(all_features, BLOCK_K), BAND)
    present = _present(ends_ptr, tokens, groups, KIND)
    first_t, pid_k = pid_t.to(tl.int64) * BLOCK_T, pid_k.to(tl.int64)
    scale_t, written, base, size = first_t, all_tokens, 0, 0
    if IN_TILES:
        tl.static_assert(BLOCK_T <= _TILE_ROWS)
        begin, base, end = _group_of_tile(ends_ptr, pid_t * BLOCK_T, present, groups, GROUPS, EXACT_BITS)
        written = padded_tokens // _TILE_ROWS * _TILE_ROWS
        size = tl.where(end == _NO_END, written - base, (end - begin + (_TILE_ROWS - 1)) & -_TILE_ROWS)
        size = tl.multiple_of(size, _TILE_ROWS)
        first_t = tl.multiple_of((begin + (pid_t * BLOCK_T - base)).to(tl.int64), _BLOCK)
        if first_t >= tokens:  # a tile of nothing but scales of padding
            _store_no_scales(
                row_scale_ptr, column_scale_ptr, scale_t, pid_k, base, size, features, span, written,
                ROWS, COLUMNS, BLOCK_T, BLOCK_K,
            )  # fmt: skip
            return
        present, tokens = tl.minimum(end, present), tl.minimum(end, tokens)
    if PAIRS:
        _cast_pairs(
            x_ptr, rows_ptr, row_scale_ptr, columns_ptr, column_scale_ptr,
            first_t, pid_k, scale_t, base, size, present, written, tokens, features, span, stride_t,
            ROWS, COLUMNS, SWIZZLED, KIND, CARRY, EXACT_BITS, BLOCK_T, BLOCK_K,
        )  # fmt: skip
    else:
        _cast_numbers(
            x_ptr, rows_ptr, row_scale_ptr, columns_ptr, column_scale_ptr,
            first_t, pid_k, scale_t, base, size, present, written, tokens, features, span, stride_t, stride_k,
            ROWS, COLUMNS, SWIZZLED, KIND, CARRY, EXACT_BITS, BLOCK_T, BLOCK_K,
        )  # fmt: skip


# How each kernel is launched. All of a plan's arguments tell launches apart, also those that it does not use.


class Rows(NamedTuple):
    """What the rows of an operand are. `span`: how many a transposed row has, N of experts; `groups`: how many."""

    kind: str
    span: int
    groups: int = 1


@planned(_cast_tiles_kernel)
def _launch_cast(
    device: int, shape: torch.Size, strides: tuple[int, int], dtype: torch.dtype, of: Rows,
    rows: bool, columns: bool, swizzled: bool, mode: str, tile: Tile, in_pairs: bool,
) -> Plan:  # fmt: skip
    """dtype: of x."""
    tokens, features = shape
    padded_t = layout.TILE_ROWS if swizzled and of.kind == DENSE else BLOCK if columns else 1
    padded_k = layout.TILE_ROWS if swizzled else BLOCK
    constants: dict[str, Any] = {
        "PAIRS": in_pairs, "ROWS": rows, "COLUMNS": columns, "SWIZZLED": swizzled, "KIND": of.kind,
        "CARRY": CARRY[mode], "EXACT_BITS": bits.exact_bits(device), "PADDED_T": padded_t, "PADDED_K": padded_k,
        "GROUPS": next_power_of_2(of.groups), "BLOCK_T": tile.tokens, "BLOCK_K": tile.features, "BAND": tile.band,
        "num_warps": tile.warps, "maxnreg": tile.registers,
    }  # fmt: skip
    padding = (layout.TILE_ROWS - BLOCK) * of.groups if swizzled and of.kind == GROUPS else 0
    all_tokens, all_features = cdiv(tokens + padding, padded_t) * padded_t, cdiv(features, padded_k) * padded_k
    programs = cdiv(all_tokens, tile.tokens) * cdiv(all_features, tile.features)
    return Plan(programs, (tokens, features, of.span, *strides, of.groups), constants)


def _dequantize_plan(
    device: int, shape: torch.Size, strides: tuple[int, int], dtype: torch.dtype, of: Rows,
    rows: bool, columns: bool, mode: str, tile: Tile,
) -> Plan:  # fmt: skip
    """dtype: of x."""
    tokens, features = shape
    constants: dict[str, Any] = {
        "ROWS": rows, "COLUMNS": columns, "KIND": of.kind, "CARRY": CARRY[mode], "EXACT_BITS": bits.exact_bits(device),
        "BLOCK_T": tile.tokens, "BLOCK_K": tile.features, "BAND": tile.band,
        "num_warps": tile.warps, "maxnreg": tile.registers,
    }  # fmt: skip
    programs = cdiv(tokens, tile.tokens) * cdiv(features, tile.features)
    return Plan(programs, (tokens, features, *strides, of.groups), constants)


_launch_dequantize = planned(_quantize_dequantize_kernel)(_dequantize_plan)
_launch_dequantize_pairs = planned(_quantize_dequantize_pairs_kernel)(_dequantize_plan)


def cast(
    x: Tensor, of: Rows, ends: Tensor | None, mode: str, *, rows: bool, columns: bool, swizzled: bool
) -> tuple[Tensor, ...]:
    """Codes and scale by rows, if asked for, and by columns, if asked for, of x `[T, K]`: shapes as `_new_rows` and
    `_new_columns` say."""
    by_rows = _new_rows(x, of, swizzled) if rows else ()
    by_columns = _new_columns(x, of, swizzled) if columns else ()
    in_pairs = _is_in_pairs(x)
    tile = _tile_of(in_pairs, of.kind, rows, columns, swizzled)
    # A pointer that a variant of the kernel never follows still has to be one.
    tensors = x, x if ends is None else ends, *(by_rows or by_columns), *(by_columns or by_rows)
    _launch_cast(tensors, x.shape, x.stride(), x.dtype, of, rows, columns, swizzled, mode, tile, in_pairs)
    return *by_rows, *by_columns


def _tile_of(in_pairs: bool, kind: str, rows: bool, columns: bool, swizzled: bool) -> Tile:
    if not in_pairs:
        by_layouts = ROWS_TILE, COLUMNS_TILE, BOTH_OF_EXPERTS_TILE if kind == EXPERTS else BOTH_TILE
    elif kind == EXPERTS or (kind == GROUPS and swizzled):
        by_layouts = ROWS_OF_PAIRS_TILE, COLUMNS_OF_GROUPS_TILE, BOTH_OF_GROUPS_TILE
    else:
        both = BOTH_OF_PAIRS_TILE if swizzled else BOTH_PLAIN_OF_PAIRS_TILE
        by_layouts = ROWS_OF_PAIRS_TILE, COLUMNS_OF_PAIRS_TILE, both
    return by_layouts[2 if rows and columns else 0 if rows else 1]


def _is_in_pairs(x: Tensor) -> bool:
    """Whether each row is whole 32-bit words of two bf16 numbers."""
    return (
        IN_PAIRS and x.dtype == torch.bfloat16 and x.stride(1) == 1 and x.stride(0) % 2 == 0 and x.data_ptr() % 4 == 0
    )


def quantize_dequantize(
    x: Tensor, of: Rows, ends: Tensor | None, mode: str, *, rows: bool, columns: bool
) -> tuple[Tensor, ...]:
    """What the codes of x `[T, K]` by rows, if asked for, and by columns, if asked for, stand for: bf16 `[T, K]`."""
    results = tuple(torch.empty(x.shape, dtype=torch.bfloat16, device=x.device) for wanted in (rows, columns) if wanted)
    in_pairs = _is_in_pairs(x)
    launch, tile = _launch_dequantize, QUANTIZE_DEQUANTIZE_TILE
    if in_pairs:
        launch, tile = _launch_dequantize_pairs, QUANTIZE_DEQUANTIZE_PAIRS_TILE
    integers = torch.int32 if in_pairs else torch.int16
    tensors = x, x if ends is None else ends, *(result.view(integers) for result in (results[0], results[-1]))
    launch(tensors, x.shape, x.stride(), x.dtype, of, rows, columns, mode, tile)
    return results


def _new_rows(x: Tensor, of: Rows, swizzled: bool) -> tuple[Tensor, Tensor]:
    """Codes `[T, K]` and scale `[T, K/32]`, or swizzled as `layout.py` says."""
    (tokens, features), experts = x.shape, x.shape[0] // of.span if of.kind == EXPERTS else 0
    codes = bits.new_codes(tokens, features, dtype=E4M3, device=x.device)
    if not swizzled:
        return codes, _new_scale(x, (tokens, features // BLOCK))
    if of.kind == GROUPS:
        shape = layout.rows_of_groups(tokens, of.groups), layout.padded_shape(0, features // BLOCK)[1]
        return codes, _new_scale(x, shape)
    if of.kind == EXPERTS:
        rows, columns = layout.padded_shape(of.span, features // BLOCK)
        return codes, _new_scale(x, (experts, rows * columns), zero=rows != of.span)
    return codes, _new_scale(x, layout.padded_shape(tokens, features // BLOCK))


def _new_columns(x: Tensor, of: Rows, swizzled: bool) -> tuple[Tensor, Tensor]:
    """Codes `[K, span]` and scale `[K, span/32]`, of experts `[E, K, N]` and `[E, K, N/32]`, or swizzled as `layout.py`
    says."""
    features, blocks = x.shape[1], of.span // BLOCK
    batch = (x.shape[0] // of.span,) if of.kind == EXPERTS else ()
    codes_t = bits.new_codes(*batch, features, of.span, dtype=E4M3, device=x.device)
    if not swizzled:
        return codes_t, _new_scale(x, (*batch, blocks, features)).transpose(-2, -1)
    rows, columns = layout.padded_shape(features, blocks)
    if of.kind == GROUPS:
        return codes_t, _new_scale(x, (rows, layout.rows_of_groups(of.span, of.groups) // BLOCK))
    if of.kind == EXPERTS:
        return codes_t, _new_scale(x, (*batch, rows * columns), zero=columns != blocks)
    return codes_t, _new_scale(x, (rows, columns))


def _new_scale(x: Tensor, shape: tuple[int, ...], zero: bool = False) -> Tensor:
    if zero:
        return torch.zeros(shape, dtype=torch.uint8, device=x.device).view(E8M0)
    return bits.new_codes(*shape, dtype=E8M0, device=x.device)


def dense(x: Tensor) -> Rows:
    """Rows of x `[T, K]` that are tokens."""
    return Rows(DENSE, padded(x.shape[0]))
