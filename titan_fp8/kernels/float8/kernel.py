"""The float8 casts as Triton kernels. `reference.py` says what each computes; these give the same bits.

A cast needs its group's amax first, so each layout costs a pass for amax and one for codes, unless a program owns the
whole group:

    _amax_kernel            one amax of a tensor
    _column_amax_kernel     amax of every column, and of every row if asked
    _cast_rows_kernel       rowwise codes in one read of memory, since a program owns whole rows, as long as it can hold
                            them
    _cast_tiles_kernel      from known amax: codes in the input's layout, transposed, or both, with one scale, or with a
                            scale a row and a scale a column

So rowwise codes in both layouts take two reads, with the second and the last. `bits.py` holds what numerics rest on.
Codes are stored as bytes. Offsets are 64-bit. Every load and store is masked. T is not specialized on, so a new number
of tokens never recompiles.

T tokens (rows), K features (columns), `padded` is T rounded up to a multiple of 16.
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
    _INF_BITS,
    _NAN_BITS,
    Tile,
    _abs_bits,
    _from_codes,
    _quads_of_tile,
    _scales,
    _store_tile,
    _tile_of_program,
    _to_codes,
)
from titan_fp8.kernels.float8.reference import E4M3, E5M2, FP8_MAX, padded
from titan_fp8.kernels.launch import Plan, cdiv, next_power_of_2, planned, zeros

# Static block sizes: a first-step search could choose differently on different ranks. `scripts/bench_casts.py --sweep`
# times others.
AMAX_BLOCK, AMAX_STEPS, AMAX_WARPS = 4096, 4, 8
COLUMN_AMAX_BLOCK_T, COLUMN_AMAX_BLOCK_K, COLUMN_AMAX_STEPS, COLUMN_AMAX_WARPS = 64, 128, 8, 4
CODES_COLUMN_AMAX_STEPS = 16
ROW_BLOCK_MAX = 32768
"""A row of up to this many values stays in registers between its amax and its cast; a longer one is read twice."""
ROW_VALUES, ROW_VALUES_PER_WARP = 4096, 2048
"""Short rows are cast several at a time, up to so many values in a program; and the values of a warp."""
LONG_ROW_BLOCK, LONG_ROW_WARPS = 16384, 16
"""Of rows that are read twice."""
ROWS_TILE, COLUMNS_TILE, BOTH_TILE = Tile(32, 512, 8, 1), Tile(64, 128, 4, 4), Tile(64, 128, 4, 4)
"""By the layouts that are written."""


@triton.jit
def _load_tile(
    x_ptr, code_scale_ptr, t, k, tokens, features, stride_t, stride_k,
    FROM_CODES: tl.constexpr, E5M2: tl.constexpr, EXACT_BITS: tl.constexpr,
):  # fmt: skip
    """Tile of x in fp32 at rows t `[BT]` and columns k `[BK]`, zero outside; with FROM_CODES, x is float8 codes and
    their scale a row."""
    mask = (t < tokens)[:, None] & (k < features)[None, :]
    x = tl.load(x_ptr + t[:, None] * stride_t + k[None, :] * stride_k, mask=mask, other=0)
    if FROM_CODES:
        scale = tl.load(code_scale_ptr + t, mask=t < tokens, other=0.0)
        value = _from_codes(x, E5M2, EXACT_BITS) * scale[:, None]
    else:
        value = x.to(tl.float32)
    return value


@triton.jit
def _amax_kernel(
    x_ptr, amax_ptr, numel, features, stride_t, stride_k,
    DENSE: tl.constexpr, BLOCK: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """Integer maximum of |x| into amax_ptr (zero before). DENSE: memory holds the `numel` values without gaps."""
    start = tl.program_id(0).to(tl.int64) * (BLOCK * STEPS)
    largest = tl.zeros([BLOCK], dtype=tl.int32)
    for step in range(STEPS):
        index = start + step * BLOCK + tl.arange(0, BLOCK)
        offset = index
        if not DENSE:
            t = index // features
            offset = t * stride_t + (index - t * features) * stride_k
        x = tl.load(x_ptr + offset, mask=index < numel, other=0)
        largest = tl.maximum(largest, _abs_bits(x))
    total = tl.max(largest, axis=0)
    tl.atomic_max(amax_ptr, tl.where(total > _INF_BITS, _NAN_BITS, total), sem="relaxed")


@triton.jit(do_not_specialize=["tokens"])
def _column_amax_kernel(
    x_ptr, code_scale_ptr, row_amax_ptr, amax_ptr, tokens, features, stride_t, stride_k,
    ROWS: tl.constexpr, FROM_CODES: tl.constexpr, E5M2: tl.constexpr, EXACT_BITS: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """Integer maxima of |x| of each column, and with ROWS of each row, into zeroed int32 vectors."""
    blocks_k = tl.cdiv(features, BLOCK_K)
    pid = tl.program_id(0)
    k = (pid % blocks_k).to(tl.int64) * BLOCK_K + tl.arange(0, BLOCK_K)
    first = (pid // blocks_k).to(tl.int64) * (BLOCK_T * STEPS)
    largest = tl.zeros([BLOCK_T, BLOCK_K], dtype=tl.int32)
    for step in range(STEPS):
        t = first + step * BLOCK_T + tl.arange(0, BLOCK_T)
        x = _load_tile(x_ptr, code_scale_ptr, t, k, tokens, features, stride_t, stride_k, FROM_CODES, E5M2, EXACT_BITS)
        bits_of_x = _abs_bits(x)
        largest = tl.maximum(largest, bits_of_x)
        if ROWS:
            tl.atomic_max(row_amax_ptr + t, tl.max(bits_of_x, axis=1), mask=t < tokens, sem="relaxed")
    tl.atomic_max(amax_ptr + k, tl.max(largest, axis=0), mask=k < features, sem="relaxed")


@triton.jit(do_not_specialize=["tokens"])
def _cast_rows_kernel(
    x_ptr, codes_ptr, scale_ptr, tokens, features, stride_t, stride_k,
    E5M2: tl.constexpr, EXACT_BITS: tl.constexpr, ONE_BLOCK: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Rowwise codes and scales of BLOCK_T whole rows. ONE_BLOCK: a row fits one block and is read once."""
    k = tl.arange(0, BLOCK_K).to(tl.int64)
    t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    rows = codes_ptr + t[:, None] * features
    mask_t = (t < tokens)[:, None]
    x = tl.zeros([BLOCK_T, BLOCK_K], dtype=tl.float32)
    if ONE_BLOCK:
        x = _load_tile(x_ptr, x_ptr, t, k, tokens, features, stride_t, stride_k, False, E5M2, EXACT_BITS)
        largest = _abs_bits(x)
    else:
        largest = tl.zeros([BLOCK_T, BLOCK_K], dtype=tl.int32)
        for start in range(0, features, BLOCK_K):
            part = _load_tile(x_ptr, x_ptr, t, start + k, tokens, features, stride_t, stride_k, False, E5M2, EXACT_BITS)
            largest = tl.maximum(largest, _abs_bits(part))
    inv_scale, scale = _scales(tl.max(largest, axis=1), E5M2, True)
    tl.store(scale_ptr + t, scale, mask=t < tokens)
    if ONE_BLOCK:
        codes = _to_codes(x * inv_scale[:, None], E5M2, EXACT_BITS)
        tl.store(rows + k[None, :], codes, mask=mask_t & (k < features)[None, :])
    else:
        for start in range(0, features, BLOCK_K):
            part = _load_tile(x_ptr, x_ptr, t, start + k, tokens, features, stride_t, stride_k, False, E5M2, EXACT_BITS)
            codes = _to_codes(part * inv_scale[:, None], E5M2, EXACT_BITS)
            tl.store(rows + (start + k)[None, :], codes, mask=mask_t & (start + k < features)[None, :])


@triton.jit(do_not_specialize=["tokens"])
def _cast_tiles_kernel(
    x_ptr, code_scale_ptr, row_amax_ptr, column_amax_ptr, rows_ptr, row_scale_ptr, columns_ptr, column_scale_ptr,
    tokens, features, padded_tokens, stride_t, stride_k,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, PER_TENSOR: tl.constexpr, FROM_CODES: tl.constexpr,
    E5M2: tl.constexpr, EXACT_BITS: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, BAND: tl.constexpr,
):  # fmt: skip
    """Codes of one tile from known amax, in the layouts asked for; see `_store_tile`. BAND: see `Tile`."""
    pid = tl.program_id(0)
    pid_t, pid_k = _tile_of_program(pid, tl.cdiv(padded_tokens, BLOCK_T), tl.cdiv(features, BLOCK_K), BAND)
    quad, k = _quads_of_tile(pid_t, pid_k, BLOCK_T, BLOCK_K)
    t = 4 * quad
    # All loads come before any store: pointers may alias, so the compiler keeps their order.
    a = _load_tile(x_ptr, code_scale_ptr, t, k, tokens, features, stride_t, stride_k, FROM_CODES, E5M2, EXACT_BITS)
    b = _load_tile(x_ptr, code_scale_ptr, t + 1, k, tokens, features, stride_t, stride_k, FROM_CODES, E5M2, EXACT_BITS)
    c = _load_tile(x_ptr, code_scale_ptr, t + 2, k, tokens, features, stride_t, stride_k, FROM_CODES, E5M2, EXACT_BITS)
    d = _load_tile(x_ptr, code_scale_ptr, t + 3, k, tokens, features, stride_t, stride_k, FROM_CODES, E5M2, EXACT_BITS)
    _store_tile(
        a, b, c, d, row_amax_ptr, column_amax_ptr, rows_ptr, row_scale_ptr, columns_ptr, column_scale_ptr,
        quad, k, pid_t, pid_k, tokens, features, padded_tokens, ROWS, COLUMNS, PER_TENSOR, E5M2, EXACT_BITS,
    )  # fmt: skip


# How each kernel is launched. All of a plan's arguments tell launches apart, also those that it does not use.


@planned(_amax_kernel)
def _launch_amax(
    device: int, shape: torch.Size, strides: tuple[int, int], dtype: torch.dtype, block: int, steps: int, warps: int
) -> Plan:
    numel, (stride_t, stride_k) = shape.numel(), strides
    dense = (stride_k == 1 and stride_t == shape[1]) or (stride_t == 1 and stride_k == shape[0])
    constants: dict[str, Any] = {"DENSE": dense, "BLOCK": block, "STEPS": steps, "num_warps": warps}
    return Plan(cdiv(numel, block * steps), (numel, shape[1], stride_t, stride_k), constants)


@planned(_cast_rows_kernel)
def _launch_rows(
    device: int,
    shape: torch.Size,
    strides: tuple[int, int],
    dtypes: tuple[torch.dtype, torch.dtype],
    blocks: tuple[int, int, int, int, int],
) -> Plan:
    """dtypes: of x and the codes. blocks: `ROW_BLOCK_MAX` and so on."""
    tokens, features = shape
    block_max, row_values, values_per_warp, long_block, warps = blocks
    block_k = next_power_of_2(features)
    if block_k > block_max:
        block_k = long_block
    else:
        warps = min(16, max(4, block_k // values_per_warp))
    block_t = max(1, row_values // block_k)
    constants: dict[str, Any] = {
        "E5M2": dtypes[1] == E5M2, "EXACT_BITS": bits.exact_bits(device),
        "ONE_BLOCK": features <= block_k, "BLOCK_T": block_t, "BLOCK_K": block_k,
        "num_warps": warps,
    }  # fmt: skip
    return Plan(cdiv(tokens, block_t), (tokens, features, *strides), constants)


@planned(_column_amax_kernel)
def _launch_column_amax(
    device: int,
    shape: torch.Size,
    strides: tuple[int, int],
    dtypes: tuple[torch.dtype, torch.dtype],
    rows: bool,
    blocks: tuple[int, int, int, int],
) -> Plan:
    """dtypes: of x and of its scale, or of x again. blocks: `COLUMN_AMAX_BLOCK_T` and so on."""
    tokens, features = shape
    block_t, block_k, steps, warps = blocks
    constants: dict[str, Any] = {
        "ROWS": rows, "FROM_CODES": dtypes[0] in FP8_MAX, "E5M2": dtypes[0] == E5M2,
        "EXACT_BITS": bits.exact_bits(device),
        "BLOCK_T": block_t, "BLOCK_K": block_k, "STEPS": steps, "num_warps": warps,
    }  # fmt: skip
    return Plan(cdiv(tokens, block_t * steps) * cdiv(features, block_k), (tokens, features, *strides), constants)


@planned(_cast_tiles_kernel)
def _launch_tiles(
    device: int,
    shape: torch.Size,
    strides: tuple[int, int],
    dtypes: tuple[torch.dtype, torch.dtype, torch.dtype, torch.dtype],
    rows: bool,
    columns: bool,
    per_tensor: bool,
    tile: Tile,
) -> Plan:
    """dtypes: of x, of its scale or of x again, of amax, of the codes."""
    (tokens, features), padded_tokens = shape, padded(shape[0])
    constants: dict[str, Any] = {
        "ROWS": rows, "COLUMNS": columns, "PER_TENSOR": per_tensor, "FROM_CODES": dtypes[0] in FP8_MAX,
        "E5M2": dtypes[3] == E5M2, "EXACT_BITS": bits.exact_bits(device),
        "BLOCK_T": tile.tokens, "BLOCK_K": tile.features, "BAND": tile.band,
        "num_warps": tile.warps, "maxnreg": tile.registers,
    }  # fmt: skip
    programs = cdiv(padded_tokens, tile.tokens) * cdiv(features, tile.features)
    return Plan(programs, (tokens, features, padded_tokens, *strides), constants)


def amax(x: Tensor) -> Tensor:
    """See `titan_fp8.kernels.float8.amax`."""
    result = zeros(x)
    _launch_amax((x, result), x.shape, x.stride(), x.dtype, AMAX_BLOCK, AMAX_STEPS, AMAX_WARPS)
    return result


def cast_tensor(
    x: Tensor, amax: Tensor, dtype: torch.dtype, *, rows: bool, columns: bool
) -> tuple[Tensor | None, Tensor | None, Tensor]:
    """See `titan_fp8.kernels.float8.cast_tensor`."""
    shape, device = x.shape, x.device
    tokens, features = shape
    codes = bits.new_codes(tokens, features, dtype=dtype, device=device) if rows else None
    codes_t = bits.new_codes(features, padded(tokens), dtype=dtype, device=device) if columns else None
    scale = torch.empty_like(amax, dtype=torch.float32)
    tile = BOTH_TILE if rows and columns else ROWS_TILE if rows else COLUMNS_TILE
    # A pointer that a variant of the kernel never follows still has to be one.
    outputs = x if codes is None else codes, scale, x if codes_t is None else codes_t, scale
    dtypes = x.dtype, x.dtype, amax.dtype, dtype
    _launch_tiles((x, x, amax, amax, *outputs), shape, x.stride(), dtypes, rows, columns, True, tile)
    return codes, codes_t, scale


def cast_rows(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """See `titan_fp8.kernels.float8.cast_rows`."""
    shape, device = x.shape, x.device
    tokens, features = shape
    codes = bits.new_codes(tokens, features, dtype=dtype, device=device)
    scale = torch.empty(tokens, 1, dtype=torch.float32, device=device)
    blocks = ROW_BLOCK_MAX, ROW_VALUES, ROW_VALUES_PER_WARP, LONG_ROW_BLOCK, LONG_ROW_WARPS
    _launch_rows((x, codes, scale), shape, x.stride(), (x.dtype, dtype), blocks)
    return codes, scale


def cast_columns(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """See `titan_fp8.kernels.float8.cast_columns`."""
    return _cast_columns(x, x, _column_amax(x, x, None), dtype)


def cast_rows_and_columns(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `titan_fp8.kernels.float8.cast_rows_and_columns`."""
    row_amax = zeros(x, next_power_of_2(x.shape[0]))  # a pool for each size, and tokens come in ever new numbers
    return _cast_both(x, row_amax, _column_amax(x, x, row_amax), dtype)


def columns_from_rows(codes: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """See `titan_fp8.kernels.float8.columns_from_rows`."""
    return _cast_columns(codes, scale, _column_amax(codes, scale, None), codes.dtype)


def _column_amax(x: Tensor, code_scale: Tensor, row_amax: Tensor | None) -> Tensor:
    """Integer maxima of |x| of each column; for codes, of those times `code_scale`, otherwise that is x again. The
    zeroed `row_amax` is filled on the way."""
    amax = zeros(x, x.shape[1])
    steps = CODES_COLUMN_AMAX_STEPS if x.element_size() == 1 else COLUMN_AMAX_STEPS
    blocks = COLUMN_AMAX_BLOCK_T, COLUMN_AMAX_BLOCK_K, steps, COLUMN_AMAX_WARPS
    tensors = x, code_scale, amax if row_amax is None else row_amax, amax
    _launch_column_amax(tensors, x.shape, x.stride(), (x.dtype, code_scale.dtype), row_amax is not None, blocks)
    return amax


def _cast_columns(x: Tensor, code_scale: Tensor, column_amax: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Codes and scales by columns, of x or, as in `_column_amax`, of what codes stand for."""
    shape, device = x.shape, x.device
    tokens, features = shape
    codes_t = bits.new_codes(features, padded(tokens), dtype=dtype, device=device)
    scale_t = torch.empty(features, 1, dtype=torch.float32, device=device)
    dtypes = x.dtype, code_scale.dtype, torch.int32, dtype
    tensors = x, code_scale, column_amax, column_amax, codes_t, scale_t, codes_t, scale_t
    _launch_tiles(tensors, shape, x.stride(), dtypes, False, True, False, COLUMNS_TILE)
    return codes_t, scale_t


def _cast_both(
    x: Tensor, row_amax: Tensor, column_amax: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Codes and scales by rows and by columns, from one read of x."""
    shape, device = x.shape, x.device
    tokens, features = shape
    codes = bits.new_codes(tokens, features, dtype=dtype, device=device)
    codes_t = bits.new_codes(features, padded(tokens), dtype=dtype, device=device)
    scale = torch.empty(tokens, 1, dtype=torch.float32, device=device)
    scale_t = torch.empty(features, 1, dtype=torch.float32, device=device)
    dtypes = x.dtype, x.dtype, torch.int32, dtype
    tensors = x, x, row_amax, column_amax, codes, scale, codes_t, scale_t
    _launch_tiles(tensors, shape, x.stride(), dtypes, True, True, False, BOTH_TILE)
    return codes, scale, codes_t, scale_t


assert set(FP8_MAX) == {E4M3, E5M2}, "the kernels know two formats"
