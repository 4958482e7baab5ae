"""The float8 casts as Triton kernels. `reference.py` says what each computes; these give the same bits.

Four kernels cover everything. A cast needs its group's amax first, so each layout costs a pass for amax and one for
codes:

    _amax_kernel            one amax of a tensor
    _group_amax_kernel      amax of every column, and of every row if asked, in one read
    _cast_rows_kernel       rowwise codes in one read of memory: a program owns whole rows
    _cast_tiles_kernel      codes in the input's layout, transposed, or both, in one read, from known amax

What the numerics rest on:

* amax is an integer maximum of `bits & 0x7FFFFFFF`: it sees NaN and Inf, and atomics give it in any order, bitwise
repeatable.
* Division is `div_rn`, correctly rounded; `/` in Triton is not.
* fp32 -> code is one helper, `_to_codes`. The hardware's conversion rounds to nearest even and saturates. Triton's
  interpreter casts wrongly, and GPUs before SM89 have no such conversion, so for them the helper does the same with
  integer arithmetic. There is no clamp: one that propagates NaN beside a transposed FP8 store is miscompiled
  (triton#11111).
* Codes are stored as bytes. Offsets are 64-bit. Every load and store is masked. T is not specialized on, so a new
  number of tokens never recompiles.

T tokens (rows), K features (columns), `padded` is T rounded up to a multiple of 16.
"""

# Triton's language is not Python's; pyright takes the kernels for ordinary functions.
# pyright: reportCallIssue=false, reportAssignmentType=false, reportOperatorIssue=false, reportAttributeAccessIssue=false
# pyright: reportGeneralTypeIssues=false

import contextlib
import functools
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from titan_fp8.kernels.float8.reference import E4M3, E5M2, FP8_MAX, padded
from titan_fp8.kernels.launch import INTERPRETED, cdiv, fast, next_power_of_2, zero

# Static block sizes: a first-step search could choose differently on different ranks. `scripts/bench_casts.py --sweep`
# times others.
AMAX_BLOCK, AMAX_STEPS, AMAX_WARPS = 4096, 8, 8
GROUP_AMAX_BLOCK_T, GROUP_AMAX_BLOCK_K, GROUP_AMAX_STEPS, GROUP_AMAX_WARPS = 16, 256, 16, 4
ROW_BLOCK_MAX = 16384
"""A row of up to this many values stays in registers between its amax and its cast; a longer one is read twice."""
ROW_VALUES, ROW_VALUES_PER_WARP = 4096, 2048
"""Short rows are cast several at a time, up to so many values in a program; and the values of a warp."""
SELECT_NAN = True
"""Replace the code that the hardware's conversion gives for NaN: on an H200 it is another one than 0x7F."""


class Tile(NamedTuple):
    """Blocks of the tile kernel. Programs walk `band` tiles down the tokens before they go on along the features, so
    that pieces of one transposed row are written close in time."""

    tokens: int
    features: int
    warps: int
    band: int


ROWS_TILE, COLUMNS_TILE, BOTH_TILE = Tile(128, 64, 8, 1), Tile(64, 128, 4, 4), Tile(64, 128, 4, 4)
"""By the layouts that are written."""

_ABS_MASK = tl.constexpr(0x7FFFFFFF)
_INF_BITS = tl.constexpr(0x7F800000)
_NAN_BITS = tl.constexpr(0x7FC00000)
_AMAX_FLOOR = tl.constexpr(1e-12)


@triton.jit
def _abs_bits(x):
    """|x| as the bits of an fp32 number, which order as the numbers do, NaN above Inf above the rest."""
    return x.to(tl.float32).to(tl.int32, bitcast=True) & _ABS_MASK


@triton.jit
def _scales(amax, E5M2: tl.constexpr, POWER_OF_TWO: tl.constexpr):
    """`(inv_scale, scale)` for amax bits; NaN where amax is not finite."""
    fp8_max: tl.constexpr = 57344.0 if E5M2 else 448.0
    value = amax.to(tl.float32, bitcast=True)
    value = tl.where(value < _AMAX_FLOOR, _AMAX_FLOOR, value)
    inv_bits = tl.div_rn(fp8_max, value).to(tl.int32, bitcast=True)
    if POWER_OF_TWO:
        inv_bits = inv_bits & _INF_BITS
    bad = amax >= _INF_BITS
    inv_scale = tl.where(bad, _NAN_BITS, inv_bits).to(tl.float32, bitcast=True)
    scale_bits = tl.div_rn(1.0, inv_scale).to(tl.int32, bitcast=True)
    return inv_scale, tl.where(bad, _NAN_BITS, scale_bits).to(tl.float32, bitcast=True)


@triton.jit
def _to_codes(scaled, E5M2: tl.constexpr, EXACT_BITS: tl.constexpr, SELECT_NAN: tl.constexpr):
    """fp32 -> float8 codes as bytes: nearest even, saturated, 0x7F for NaN.

    EXACT_BITS: integer arithmetic in place of the hardware's conversion.
    SELECT_NAN: do not rely on the hardware's code for NaN.
    """
    if EXACT_BITS:
        mantissa: tl.constexpr = 2 if E5M2 else 3
        bias: tl.constexpr = 15 if E5M2 else 7
        largest: tl.constexpr = 0x7B if E5M2 else 0x7E
        # Adding `magic` leaves the subnormal's units, 2^(1 - bias - mantissa), as the lowest bits of the sum.
        magic: tl.constexpr = 2.0 ** (24 - bias - mantissa)
        shift: tl.constexpr = 23 - mantissa
        bits = scaled.to(tl.int32, bitcast=True)
        magnitude = bits & _ABS_MASK
        rounded = magnitude + ((1 << (shift - 1)) - 1) + ((magnitude >> shift) & 1)
        normal = (rounded >> shift) - ((127 - bias) << mantissa)
        tiny = magnitude < ((128 - bias) << 23)
        # Large magnitudes are kept out of the sum, which serves the subnormals alone.
        small = tl.where(tiny, magnitude, 0).to(tl.float32, bitcast=True)
        subnormal = (small + magic).to(tl.int32, bitcast=True) & 0xFF
        code = tl.where(tiny, subnormal, tl.minimum(normal, largest)) | ((bits >> 24) & 0x80)
        # Rounding up may carry NaN's bits past the sign; it is replaced here.
        code = tl.where(magnitude > _INF_BITS, 0x7F, code).to(tl.uint8)
    else:
        if E5M2:
            code = scaled.to(tl.float8e5).to(tl.uint8, bitcast=True)
        else:
            code = scaled.to(tl.float8e4nv).to(tl.uint8, bitcast=True)
        if SELECT_NAN:
            code = tl.where(scaled != scaled, 0x7F, code).to(tl.uint8)
    return code


@triton.jit
def _from_codes(code, E5M2: tl.constexpr, EXACT_BITS: tl.constexpr):
    """Float8 codes as bytes -> their exact fp32 values."""
    if EXACT_BITS:
        mantissa: tl.constexpr = 2 if E5M2 else 3
        bias: tl.constexpr = 15 if E5M2 else 7
        inf: tl.constexpr = 0x7C if E5M2 else 0x7F
        byte = code.to(tl.int32)
        magnitude = byte & 0x7F
        bits = (magnitude << (23 - mantissa)) + ((127 - bias) << 23)
        bits = tl.where(magnitude >= inf, _INF_BITS | (magnitude << (23 - mantissa)), bits)
        subnormal = (magnitude.to(tl.float32) * (2.0 ** (1 - bias - mantissa))).to(tl.int32, bitcast=True)
        bits = tl.where(magnitude < (1 << mantissa), subnormal, bits)
        value = (bits | ((byte & 0x80) << 24)).to(tl.float32, bitcast=True)
    elif E5M2:
        value = code.to(tl.float8e5, bitcast=True).to(tl.float32)
    else:
        value = code.to(tl.float8e4nv, bitcast=True).to(tl.float32)
    return value


@triton.jit
def _tile_of_program(pid, tiles_t, tiles_k, BAND: tl.constexpr):
    """`(row, column)` of a program's tile: BAND tiles down the tokens before the next ones along the features."""
    first = pid // (BAND * tiles_k) * BAND
    height = tl.minimum(BAND, tiles_t - first)
    within = pid % (BAND * tiles_k)
    return first + within % height, within // height


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
    tl.atomic_max(amax_ptr, tl.where(total > _INF_BITS, _NAN_BITS, total))


@triton.jit(do_not_specialize=["tokens"])
def _group_amax_kernel(
    x_ptr, code_scale_ptr, row_amax_ptr, column_amax_ptr, tokens, features, stride_t, stride_k,
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
        bits = _abs_bits(x)
        largest = tl.maximum(largest, bits)
        if ROWS:
            tl.atomic_max(row_amax_ptr + t, tl.max(bits, axis=1), mask=t < tokens)
    tl.atomic_max(column_amax_ptr + k, tl.max(largest, axis=0), mask=k < features)


@triton.jit(do_not_specialize=["tokens"])
def _cast_rows_kernel(
    x_ptr, codes_ptr, scale_ptr, tokens, features, stride_t, stride_k,
    E5M2: tl.constexpr, EXACT_BITS: tl.constexpr, SELECT_NAN: tl.constexpr, ONE_BLOCK: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Rowwise codes and scales of BLOCK_T whole rows. ONE_BLOCK: a row fits one block and is read once."""
    t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    k = tl.arange(0, BLOCK_K).to(tl.int64)
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
    rows = codes_ptr + t[:, None] * features
    mask_t = (t < tokens)[:, None]
    if ONE_BLOCK:
        codes = _to_codes(x * inv_scale[:, None], E5M2, EXACT_BITS, SELECT_NAN)
        tl.store(rows + k[None, :], codes, mask=mask_t & (k < features)[None, :])
    else:
        for start in range(0, features, BLOCK_K):
            part = _load_tile(x_ptr, x_ptr, t, start + k, tokens, features, stride_t, stride_k, False, E5M2, EXACT_BITS)
            codes = _to_codes(part * inv_scale[:, None], E5M2, EXACT_BITS, SELECT_NAN)
            tl.store(rows + (start + k)[None, :], codes, mask=mask_t & ((start + k) < features)[None, :])


@triton.jit(do_not_specialize=["tokens"])
def _cast_tiles_kernel(
    x_ptr, code_scale_ptr, row_amax_ptr, column_amax_ptr,
    rows_ptr, columns_ptr, row_scale_ptr, column_scale_ptr,
    tokens, features, padded_tokens, stride_t, stride_k,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, PER_TENSOR: tl.constexpr, FROM_CODES: tl.constexpr,
    E5M2: tl.constexpr, EXACT_BITS: tl.constexpr, SELECT_NAN: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, BAND: tl.constexpr,
):  # fmt: skip
    """Codes of one tile from known amax, in the layouts asked for.

    PER_TENSOR: one amax and one scale for all (at row_amax_ptr and row_scale_ptr); otherwise one a row for the rows
    layout and one a column for the columns layout, powers of two. BAND: see `Tile`.
    """
    pid = tl.program_id(0)
    pid_t, pid_k = _tile_of_program(pid, tl.cdiv(padded_tokens, BLOCK_T), tl.cdiv(features, BLOCK_K), BAND)
    t = pid_t.to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    k = pid_k.to(tl.int64) * BLOCK_K + tl.arange(0, BLOCK_K)
    x = _load_tile(x_ptr, code_scale_ptr, t, k, tokens, features, stride_t, stride_k, FROM_CODES, E5M2, EXACT_BITS)
    if PER_TENSOR:
        inv_scale, scale = _scales(tl.load(row_amax_ptr), E5M2, False)
        if pid == 0:
            tl.store(row_scale_ptr, scale)
        # The padding is zero even where the scale is NaN.
        inv_scales = tl.where(t < tokens, inv_scale, 0.0)
        codes = _to_codes(x * inv_scales[:, None], E5M2, EXACT_BITS, SELECT_NAN)
    if ROWS:
        if not PER_TENSOR:
            row_amax = tl.load(row_amax_ptr + t, mask=t < tokens, other=0)
            inv_scale, scale = _scales(row_amax, E5M2, True)
            if pid_k == 0:
                tl.store(row_scale_ptr + t, scale, mask=t < tokens)
            codes = _to_codes(x * inv_scale[:, None], E5M2, EXACT_BITS, SELECT_NAN)
        mask = (t < tokens)[:, None] & (k < features)[None, :]
        tl.store(rows_ptr + t[:, None] * features + k[None, :], codes, mask=mask)
    if COLUMNS:
        if not PER_TENSOR:
            column_amax = tl.load(column_amax_ptr + k, mask=k < features, other=0)
            inv_scale, scale = _scales(column_amax, E5M2, True)
            if pid_t == 0:
                tl.store(column_scale_ptr + k, scale, mask=k < features)
            scaled = tl.where((t < tokens)[:, None], x * inv_scale[None, :], 0.0)
            codes = _to_codes(scaled, E5M2, EXACT_BITS, SELECT_NAN)
        mask = (k < features)[:, None] & (t < padded_tokens)[None, :]
        tl.store(columns_ptr + k[:, None] * padded_tokens + t[None, :], tl.trans(codes), mask=mask)


def new_codes(*shape: int, device: torch.device) -> Tensor:
    """Uninitialized bytes for codes."""
    return torch.empty(shape, dtype=torch.uint8, device=device)


@functools.cache
def _exact_bits(device: torch.device) -> bool:
    return INTERPRETED or torch.cuda.get_device_capability(device) < (8, 9)


def _on_device(x: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Triton launches on the current device, which x need not be on."""
    if not x.is_cuda or x.device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(x.device)


def amax(x: Tensor) -> Tensor:
    """See `titan_fp8.kernels.float8.amax`."""
    result = zero(x.device)
    numel = x.numel()
    stride_t, stride_k = x.stride()
    dense = (stride_k == 1 and stride_t == x.shape[1]) or (stride_t == 1 and stride_k == x.shape[0])
    grid = (cdiv(numel, AMAX_BLOCK * AMAX_STEPS),)
    fast(_amax_kernel)[grid](
        x, result, numel, x.shape[1], stride_t, stride_k,
        DENSE=dense, BLOCK=AMAX_BLOCK, STEPS=AMAX_STEPS, num_warps=AMAX_WARPS,
    )  # fmt: skip
    return result


def cast_tensor(
    x: Tensor, amax: Tensor, dtype: torch.dtype, *, rows: bool, columns: bool
) -> tuple[Tensor | None, Tensor | None, Tensor]:
    """See `titan_fp8.kernels.float8.cast_tensor`."""
    scale = torch.empty((), dtype=torch.float32, device=x.device)
    codes, codes_t = _cast_tiles(x, None, (amax, amax), (scale, scale), dtype, rows, columns, per_tensor=True)
    return codes, codes_t, scale


def cast_rows(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """See `titan_fp8.kernels.float8.cast_rows`."""
    tokens, features = x.shape
    codes = new_codes(tokens, features, device=x.device)
    scale = torch.empty(tokens, 1, dtype=torch.float32, device=x.device)
    block_k = min(next_power_of_2(features), ROW_BLOCK_MAX)
    block_t = max(1, ROW_VALUES // block_k)
    fast(_cast_rows_kernel)[(cdiv(tokens, block_t),)](
        x, codes, scale, tokens, features, *x.stride(),
        E5M2=dtype == E5M2, EXACT_BITS=_exact_bits(x.device), SELECT_NAN=SELECT_NAN,
        ONE_BLOCK=features <= block_k, BLOCK_T=block_t, BLOCK_K=block_k,
        num_warps=min(16, max(4, block_k // ROW_VALUES_PER_WARP)),
    )  # fmt: skip
    return codes.view(dtype), scale


def cast_columns(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """See `titan_fp8.kernels.float8.cast_columns`."""
    return _cast_columns(x, None, dtype)


def cast_rows_and_columns(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `titan_fp8.kernels.float8.cast_rows_and_columns`. Two reads of x: one for amax, one for both codes."""
    tokens, features = x.shape
    amaxes = torch.zeros(tokens + features, dtype=torch.int32, device=x.device).split((tokens, features))
    _group_amax(x, None, amaxes, dtype, rows=True)
    scale = torch.empty(tokens, 1, dtype=torch.float32, device=x.device)
    scale_t = torch.empty(features, 1, dtype=torch.float32, device=x.device)
    codes, codes_t = _cast_tiles(x, None, amaxes, (scale, scale_t), dtype, True, True, per_tensor=False)
    assert codes is not None
    assert codes_t is not None
    return codes, scale, codes_t, scale_t


def columns_from_rows(codes: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """See `titan_fp8.kernels.float8.columns_from_rows`."""
    return _cast_columns(codes.view(torch.uint8), scale, codes.dtype)


def _cast_columns(x: Tensor, code_scale: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    column_amax = torch.zeros(x.shape[1], dtype=torch.int32, device=x.device)
    scale_t = torch.empty(x.shape[1], 1, dtype=torch.float32, device=x.device)
    _group_amax(x, code_scale, (column_amax, column_amax), dtype, rows=False)
    _, codes_t = _cast_tiles(
        x, code_scale, (column_amax, column_amax), (scale_t, scale_t), dtype, False, True, per_tensor=False
    )
    assert codes_t is not None
    return codes_t, scale_t


def _group_amax(
    x: Tensor, code_scale: Tensor | None, amaxes: tuple[Tensor, ...], dtype: torch.dtype, *, rows: bool
) -> None:
    """Fill the zeroed `amaxes`: of rows (if `rows`) and of columns."""
    tokens, features = x.shape
    blocks_t = cdiv(tokens, GROUP_AMAX_BLOCK_T * GROUP_AMAX_STEPS)
    fast(_group_amax_kernel)[(blocks_t * cdiv(features, GROUP_AMAX_BLOCK_K),)](
        x, x if code_scale is None else code_scale, *amaxes, tokens, features, *x.stride(),
        ROWS=rows, FROM_CODES=code_scale is not None, E5M2=dtype == E5M2, EXACT_BITS=_exact_bits(x.device),
        BLOCK_T=GROUP_AMAX_BLOCK_T, BLOCK_K=GROUP_AMAX_BLOCK_K, STEPS=GROUP_AMAX_STEPS,
        num_warps=GROUP_AMAX_WARPS,
    )  # fmt: skip


def _cast_tiles(
    x: Tensor,
    code_scale: Tensor | None,
    amaxes: tuple[Tensor, ...],
    scales: tuple[Tensor, Tensor],
    dtype: torch.dtype,
    rows: bool,
    columns: bool,
    *,
    per_tensor: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """Codes in the layouts asked for; `scales` is filled."""
    tokens, features = x.shape
    padded_tokens = padded(tokens)
    codes = new_codes(tokens, features, device=x.device) if rows else None
    codes_t = new_codes(features, padded_tokens, device=x.device) if columns else None
    # A pointer that a variant of the kernel never follows still has to be one.
    unused = codes if codes is not None else codes_t
    tile = BOTH_TILE if rows and columns else ROWS_TILE if rows else COLUMNS_TILE
    fast(_cast_tiles_kernel)[(cdiv(padded_tokens, tile.tokens) * cdiv(features, tile.features),)](
        x, x if code_scale is None else code_scale, *amaxes,
        unused if codes is None else codes, unused if codes_t is None else codes_t, *scales,
        tokens, features, padded_tokens, *x.stride(),
        ROWS=rows, COLUMNS=columns, PER_TENSOR=per_tensor, FROM_CODES=code_scale is not None,
        E5M2=dtype == E5M2, EXACT_BITS=_exact_bits(x.device), SELECT_NAN=SELECT_NAN,
        BLOCK_T=tile.tokens, BLOCK_K=tile.features, BAND=tile.band, num_warps=tile.warps,
    )  # fmt: skip
    return None if codes is None else codes.view(dtype), None if codes_t is None else codes_t.view(dtype)


assert set(FP8_MAX) == {E4M3, E5M2}, "the kernels know two formats"
