"""The MXFP8 casts as Triton kernels. `reference.py` and `layout.py` say what they compute; these give the same bits.

    _cast_tiles_kernel          codes and scales along K, along T (transposed), or both, in one read
    _quantize_dequantize_kernel what these codes stand for, in bf16 and as x lies, in one read

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
from titan_fp8.kernels.float8.bits import (
    _INF_BITS,
    _NAN_BITS,
    Tile,
    _abs_bits,
    _from_codes,
    _pack,
    _quads_of_tile,
    _tile_of_program,
    _to_codes,
)
from titan_fp8.kernels.float8.kernel import _load_tile
from titan_fp8.kernels.float8.reference import E4M3
from titan_fp8.kernels.launch import Plan, cdiv, next_power_of_2, planned
from titan_fp8.kernels.mx import layout
from titan_fp8.kernels.mx.places import _column_places, _groups_of_blocks, _row_shift, _store_row_scales
from titan_fp8.kernels.mx.reference import BLOCK, CARRY, E8M0, EMAX, NAN_BYTE, padded
from titan_fp8.kernels.mx.tiles_of_pairs import _cast_pairs

_BLOCK = tl.constexpr(BLOCK)
_EMAX = tl.constexpr(EMAX)
_NAN_BYTE = tl.constexpr(NAN_BYTE)

# Static: a first-step search could choose differently on different ranks. `scripts/bench_mx.py --sweep` times others.
ROWS_TILE, COLUMNS_TILE, BOTH_TILE = Tile(64, 128, 4, 1), Tile(64, 128, 4, 2), Tile(64, 128, 4, 2, 128)
"""By the layouts that are written, in multiples of 32."""
ROWS_OF_PAIRS_TILE, COLUMNS_OF_PAIRS_TILE, BOTH_OF_PAIRS_TILE = (
    Tile(64, 256, 8, 1),
    Tile(128, 64, 4, 1),
    Tile(128, 64, 4, 1),
)
"""The same for bf16 in pairs; a warp for each 32 tokens, see `tiles_of_pairs.py`."""
QUANTIZE_DEQUANTIZE_TILE = Tile(32, 128, 4, 1)
IN_PAIRS = True
"""Whether bf16 is cast in pairs where it can be."""

DENSE, EXPERTS, GROUPS = "dense", "experts", "groups"
"""What rows are; see `places.py`."""


@triton.jit
def _scale_bytes(amax, CARRY: tl.constexpr):
    """Bytes, int32, of the scales that blocks with these amax bits have."""
    return tl.where(amax >= _INF_BITS, _NAN_BYTE, tl.maximum(((amax + CARRY) >> 23) - _EMAX, 0))


@triton.jit
def _inverse(byte):
    """Reciprocals, fp32, of the scales that bytes stand for."""
    return tl.where(byte == _NAN_BYTE, _NAN_BITS, (2 * 127 - byte) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _value(byte):
    """Scales, fp32, that bytes stand for."""
    finite = tl.where(byte == 0, 1 << 22, byte << 23)  # 2^-127 is subnormal
    return tl.where(byte == _NAN_BYTE, _NAN_BITS, finite).to(tl.float32, bitcast=True)


@triton.jit
def _row_bytes(x, CARRY: tl.constexpr, ROWS: tl.constexpr, BLOCK_K: tl.constexpr):
    """Bytes of the scales along K of a tile `[ROWS, BLOCK_K]`: `[ROWS, BLOCK_K / 32]`."""
    split = tl.reshape(_abs_bits(x), [ROWS, BLOCK_K // _BLOCK, _BLOCK])
    return _scale_bytes(tl.max(split, axis=2), CARRY)


@triton.jit
def _of_row_blocks(factor, ROWS: tl.constexpr, BLOCK_K: tl.constexpr):
    """A number for each block along K, `[ROWS, BLOCK_K / 32]`, at each of the block's values."""
    return tl.reshape(tl.broadcast_to(factor[:, :, None], [ROWS, BLOCK_K // _BLOCK, _BLOCK]), [ROWS, BLOCK_K])


@triton.jit
def _column_bytes(a, b, c, d, CARRY: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr):
    """Bytes of the scales along T of a tile, given as the four rows of each quad: `[BLOCK_T / 32, BLOCK_K]`."""
    largest = tl.maximum(tl.maximum(_abs_bits(a), _abs_bits(b)), tl.maximum(_abs_bits(c), _abs_bits(d)))
    split = tl.reshape(largest, [BLOCK_T // _BLOCK, _BLOCK // 4, BLOCK_K])
    return _scale_bytes(tl.max(split, axis=1), CARRY)


@triton.jit
def _of_column_blocks(factor, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr):
    """A number for each block along T, `[BLOCK_T / 32, BLOCK_K]`, at each of the block's quads."""
    wide = tl.broadcast_to(factor[:, None, :], [BLOCK_T // _BLOCK, _BLOCK // 4, BLOCK_K])
    return tl.reshape(wide, [BLOCK_T // 4, BLOCK_K])


@triton.jit
def _store_row_codes(
    x, t, shift, k, block_k, tokens, features, written, codes_ptr, scale_ptr,
    CARRY: tl.constexpr, SWIZZLED: tl.constexpr, EXACT_BITS: tl.constexpr, ROWS: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Codes and scales along K of the rows t (fp32)."""
    byte = _row_bytes(x, CARRY, ROWS, BLOCK_K)
    _store_row_scales(byte, t, shift, block_k, features, written, scale_ptr, SWIZZLED)
    codes = _to_codes(x * _of_row_blocks(_inverse(byte), ROWS, BLOCK_K), False, EXACT_BITS)
    tl.store(codes_ptr + t[:, None] * features + k[None, :], codes, mask=((t < tokens)[:, None] & (k < features)))


@triton.jit
def _store_column_codes(
    a, b, c, d, byte, quad, k, present, all_quads, features, span, columns_ptr,
    ONE_SPAN: tl.constexpr, EXACT_BITS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Transposed codes along T of a tile, of `all_quads` with padding; a transposed row has `span` tokens."""
    factor = _of_column_blocks(_inverse(byte), BLOCK_T, BLOCK_K)
    word = _pack(a * factor, b * factor, c * factor, d * factor, False, EXACT_BITS)
    # Codes of padding are zero, also in a block whose scale is NaN.
    left = tl.minimum(tl.maximum(present - 4 * quad, 0), 4).to(tl.int32)
    word = word & tl.where(left == 4, -1, (1 << (8 * left)) - 1)[:, None]
    place = quad
    if not ONE_SPAN:
        # Spans are whole blocks of 8 quads, which the compiler cannot know and which makes stores wide.
        place = quad + 4 * quad // span * ((features - 1) * (span // 4))
        place = tl.max_contiguous(tl.multiple_of(place, 8), 8)
    at = columns_ptr.to(tl.pointer_type(tl.int32)) + k[:, None] * (span // 4) + place[None, :]
    tl.store(at, tl.trans(word), mask=(k < features)[:, None] & (quad < all_quads)[None, :])


@triton.jit
def _present(ends_ptr, tokens, groups, KIND: tl.constexpr):
    if KIND == "groups":
        tokens = tl.load(ends_ptr + groups - 1)
    return tokens


@triton.jit
def _load_quads(x_ptr, quad, k, present, features, stride_t, stride_k):
    """The four rows of each quad of a tile, fp32."""
    t = 4 * quad
    return (
        _load_tile(x_ptr, x_ptr, t, k, present, features, stride_t, stride_k, False, False, False),
        _load_tile(x_ptr, x_ptr, t + 1, k, present, features, stride_t, stride_k, False, False, False),
        _load_tile(x_ptr, x_ptr, t + 2, k, present, features, stride_t, stride_k, False, False, False),
        _load_tile(x_ptr, x_ptr, t + 3, k, present, features, stride_t, stride_k, False, False, False),
    )


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
    all_tokens = tl.cdiv(tokens, PADDED_T) * PADDED_T
    all_features = tl.cdiv(features, PADDED_K) * PADDED_K
    pid = tl.program_id(0)
    pid_t, pid_k = _tile_of_program(pid, tl.cdiv(all_tokens, BLOCK_T), tl.cdiv(all_features, BLOCK_K), BAND)
    quad, k = _quads_of_tile(pid_t, pid_k, BLOCK_T, BLOCK_K)
    present = _present(ends_ptr, tokens, groups, KIND)
    written = present if SWIZZLED and KIND == "groups" else all_tokens
    if PAIRS:
        _cast_pairs(
            x_ptr, ends_ptr, rows_ptr, row_scale_ptr, columns_ptr, column_scale_ptr,
            pid_t.to(tl.int64), pid_k.to(tl.int64), present, written, all_tokens, all_features,
            tokens, features, span, stride_t, groups,
            ROWS, COLUMNS, SWIZZLED, KIND, CARRY, EXACT_BITS, GROUPS, BLOCK_T, BLOCK_K,
        )  # fmt: skip
        return
    # All loads come before any store: pointers may alias, so the compiler keeps their order.
    a, b, c, d = _load_quads(x_ptr, quad, k, present, features, stride_t, stride_k)
    block_t = pid_t.to(tl.int64) * (BLOCK_T // _BLOCK) + tl.arange(0, BLOCK_T // _BLOCK)
    begin, base, size = _groups_of_blocks(ends_ptr, block_t, groups, SWIZZLED, KIND, GROUPS)
    if ROWS:
        t = 4 * quad
        shift = _row_shift(block_t, begin, base, span, SWIZZLED, KIND)
        shift = tl.reshape(tl.broadcast_to(shift[:, None], [BLOCK_T // _BLOCK, _BLOCK // 4]), [BLOCK_T // 4])
        block_k = pid_k.to(tl.int64) * (BLOCK_K // _BLOCK) + tl.arange(0, BLOCK_K // _BLOCK)
        limit = written if SWIZZLED else tokens
        _store_row_codes(
            a, t, shift, k, block_k, tokens, features, limit, rows_ptr, row_scale_ptr,
            CARRY, SWIZZLED, EXACT_BITS, BLOCK_T // 4, BLOCK_K,
        )  # fmt: skip
        _store_row_codes(
            b, t + 1, shift, k, block_k, tokens, features, limit, rows_ptr, row_scale_ptr,
            CARRY, SWIZZLED, EXACT_BITS, BLOCK_T // 4, BLOCK_K,
        )  # fmt: skip
        _store_row_codes(
            c, t + 2, shift, k, block_k, tokens, features, limit, rows_ptr, row_scale_ptr,
            CARRY, SWIZZLED, EXACT_BITS, BLOCK_T // 4, BLOCK_K,
        )  # fmt: skip
        _store_row_codes(
            d, t + 3, shift, k, block_k, tokens, features, limit, rows_ptr, row_scale_ptr,
            CARRY, SWIZZLED, EXACT_BITS, BLOCK_T // 4, BLOCK_K,
        )  # fmt: skip
    if COLUMNS:
        byte = _column_bytes(a, b, c, d, CARRY, BLOCK_T, BLOCK_K)
        place = _column_places(block_t, k, begin, base, size, features, span, SWIZZLED, KIND)
        inside = (block_t * _BLOCK < written)[:, None] & (k < all_features)[None, :]
        tl.store(column_scale_ptr + place, byte.to(tl.uint8), mask=inside)
        all_quads = tl.cdiv(tokens, _BLOCK) * (_BLOCK // 4)
        _store_column_codes(
            a, b, c, d, byte, quad, k, present, all_quads, features, span, columns_ptr,
            KIND != "experts", EXACT_BITS, BLOCK_T, BLOCK_K,
        )  # fmt: skip


@triton.jit
def _dequantized(x, inverse, scale, EXACT_BITS: tl.constexpr):
    """The bits, int16, of what x (fp32) is in e4m3 with this scale, in bf16; one NaN."""
    value = _from_codes(_to_codes(x * inverse, False, EXACT_BITS), False, EXACT_BITS) * scale
    if EXACT_BITS:  # the interpreter truncates to bf16; of all scales, only the smallest need rounding
        bits = value.to(tl.int32, bitcast=True)
        rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).to(tl.int16)
    else:
        rounded = value.to(tl.bfloat16).to(tl.int16, bitcast=True)
    return tl.where(value == value, rounded, 0x7FC0)


@triton.jit
def _store_dequantized(x, inverse, scale, t, k, tokens, features, target_ptr, EXACT_BITS: tl.constexpr):
    """`_dequantized` of the rows t and the features k."""
    mask = (t < tokens)[:, None] & (k < features)[None, :]
    tl.store(target_ptr + t[:, None] * features + k[None, :], _dequantized(x, inverse, scale, EXACT_BITS), mask=mask)


@triton.jit
def _store_dequantized_rows(
    x, t, k, tokens, features, target_ptr,
    CARRY: tl.constexpr, EXACT_BITS: tl.constexpr, ROWS: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """`_store_dequantized` with the scales along K of x."""
    byte = _row_bytes(x, CARRY, ROWS, BLOCK_K)
    inverse, scale = _of_row_blocks(_inverse(byte), ROWS, BLOCK_K), _of_row_blocks(_value(byte), ROWS, BLOCK_K)
    _store_dequantized(x, inverse, scale, t, k, tokens, features, target_ptr, EXACT_BITS)


@triton.jit(do_not_specialize=["tokens"])
def _quantize_dequantize_kernel(
    x_ptr, ends_ptr, rows_ptr, columns_ptr, tokens, features, stride_t, stride_k, groups,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, KIND: tl.constexpr, CARRY: tl.constexpr, EXACT_BITS: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, BAND: tl.constexpr,
):  # fmt: skip
    """What the codes of a tile stand for, along K and along T, as the bits of bf16 numbers."""
    pid = tl.program_id(0)
    pid_t, pid_k = _tile_of_program(pid, tl.cdiv(tokens, BLOCK_T), tl.cdiv(features, BLOCK_K), BAND)
    quad, k = _quads_of_tile(pid_t, pid_k, BLOCK_T, BLOCK_K)
    present = _present(ends_ptr, tokens, groups, KIND)
    # All loads come before any store: pointers may alias, so the compiler keeps their order.
    a, b, c, d = _load_quads(x_ptr, quad, k, present, features, stride_t, stride_k)
    t = 4 * quad
    if ROWS:
        _store_dequantized_rows(a, t, k, tokens, features, rows_ptr, CARRY, EXACT_BITS, BLOCK_T // 4, BLOCK_K)
        _store_dequantized_rows(b, t + 1, k, tokens, features, rows_ptr, CARRY, EXACT_BITS, BLOCK_T // 4, BLOCK_K)
        _store_dequantized_rows(c, t + 2, k, tokens, features, rows_ptr, CARRY, EXACT_BITS, BLOCK_T // 4, BLOCK_K)
        _store_dequantized_rows(d, t + 3, k, tokens, features, rows_ptr, CARRY, EXACT_BITS, BLOCK_T // 4, BLOCK_K)
    if COLUMNS:
        byte = _column_bytes(a, b, c, d, CARRY, BLOCK_T, BLOCK_K)
        inverse = _of_column_blocks(_inverse(byte), BLOCK_T, BLOCK_K)
        scale = _of_column_blocks(_value(byte), BLOCK_T, BLOCK_K)
        _store_dequantized(a, inverse, scale, t, k, tokens, features, columns_ptr, EXACT_BITS)
        _store_dequantized(b, inverse, scale, t + 1, k, tokens, features, columns_ptr, EXACT_BITS)
        _store_dequantized(c, inverse, scale, t + 2, k, tokens, features, columns_ptr, EXACT_BITS)
        _store_dequantized(d, inverse, scale, t + 3, k, tokens, features, columns_ptr, EXACT_BITS)


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
    all_tokens, all_features = cdiv(tokens, padded_t) * padded_t, cdiv(features, padded_k) * padded_k
    programs = cdiv(all_tokens, tile.tokens) * cdiv(all_features, tile.features)
    return Plan(programs, (tokens, features, of.span, *strides, of.groups), constants)


@planned(_quantize_dequantize_kernel)
def _launch_quantize_dequantize(
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


def cast(
    x: Tensor, of: Rows, ends: Tensor | None, mode: str, *, rows: bool, columns: bool, swizzled: bool
) -> tuple[Tensor, ...]:
    """Codes and scale by rows, if asked for, and by columns, if asked for, of x `[T, K]`: shapes as `_new_rows` and
    `_new_columns` say."""
    by_rows = _new_rows(x, of, swizzled) if rows else ()
    by_columns = _new_columns(x, of, swizzled) if columns else ()
    in_pairs = _is_in_pairs(x)
    tiles = (ROWS_TILE, COLUMNS_TILE, BOTH_TILE)
    if in_pairs:
        tiles = (ROWS_OF_PAIRS_TILE, COLUMNS_OF_PAIRS_TILE, BOTH_OF_PAIRS_TILE)
    tile = tiles[2 if rows and columns else 0 if rows else 1]
    # A pointer that a variant of the kernel never follows still has to be one.
    tensors = x, x if ends is None else ends, *(by_rows or by_columns), *(by_columns or by_rows)
    _launch_cast(tensors, x.shape, x.stride(), x.dtype, of, rows, columns, swizzled, mode, tile, in_pairs)
    return *by_rows, *by_columns


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
    tensors = x, x if ends is None else ends, *(result.view(torch.int16) for result in (results[0], results[-1]))
    _launch_quantize_dequantize(
        tensors, x.shape, x.stride(), x.dtype, of, rows, columns, mode, QUANTIZE_DEQUANTIZE_TILE
    )
    return results


def _new_rows(x: Tensor, of: Rows, swizzled: bool) -> tuple[Tensor, Tensor]:
    """Codes `[T, K]` and scale `[T, K/32]`, or swizzled as `layout.py` says."""
    (tokens, features), experts = x.shape, x.shape[0] // of.span if of.kind == EXPERTS else 0
    codes = bits.new_codes(tokens, features, dtype=E4M3, device=x.device)
    if not swizzled:
        return codes, _new_scale(x, (tokens, features // BLOCK))
    if of.kind == GROUPS:
        shape = layout.rows_of_groups(tokens, of.groups), layout.padded_shape(0, features // BLOCK)[1]
        return codes, _new_scale(x, shape, zero=True)
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
        return codes_t, _new_scale(x, (*batch, features, blocks))
    rows, columns = layout.padded_shape(features, blocks)
    if of.kind == GROUPS:
        return codes_t, _new_scale(x, (rows, layout.rows_of_groups(of.span, of.groups) // BLOCK), zero=True)
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
