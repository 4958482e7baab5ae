"""The block-scaled casts as Triton kernels. `reference.py` says what each computes; these give the same bits.

    _cast_block_tiles_kernel   1x128 codes along K, along T (transposed), or both, in one read
    _weight_tiles_kernel       128x128 tiles of a weight or of a shard: their amax, their codes from amax known before,
                               or amax, scale and codes in one read
    _block_scale_kernel        scales from amax

No pass for amax comes first, as it does for larger groups: a program that holds a 128x128 tile holds every block of
both layouts that crosses it.

Amax, division and conversion are the helpers of `titan_fp8.kernels.float8.kernel`; what is said there about them,
about 64-bit offsets, masks and tokens that are not specialized on holds here too. The features are whole blocks, so
only rows are masked.

T tokens (rows), K features (columns), n rows of a shard.
"""

# Triton's language is not Python's; pyright takes the kernels for ordinary functions.
# pyright: reportCallIssue=false, reportAssignmentType=false, reportOperatorIssue=false, reportAttributeAccessIssue=false
# pyright: reportGeneralTypeIssues=false, reportArgumentType=false

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from titan_fp8.kernels.blockwise.reference import BLOCK, blocks, empty_scale, padded
from titan_fp8.kernels.float8 import kernel as float8
from titan_fp8.kernels.float8.kernel import _INF_BITS, _NAN_BITS, _abs_bits, _scales, _tile_of_program, _to_codes
from titan_fp8.kernels.float8.reference import E5M2
from titan_fp8.kernels.launch import cdiv, fast

_BLOCK = tl.constexpr(BLOCK)


class Tile(NamedTuple):
    """How a kernel cuts a matrix: tiles of `tokens` by 128 features, `band` as in `kernels.float8.kernel.Tile`.
    `registers` limits those of a thread, so that more programs fit a multiprocessor."""

    tokens: int
    warps: int
    band: int
    registers: int | None = None


# Static: a first-step search could choose differently on different ranks.
ROWS_TILE, COLUMNS_TILE, BOTH_TILE = Tile(64, 4, 1), Tile(128, 8, 4, 128), Tile(128, 8, 4, 128)
"""By the layouts that are written. One that writes columns has 128 tokens, a whole block."""
WEIGHT_WARPS = 8
SCALE_BLOCK = 1024


@triton.jit
def _block_scales(amax, COUNT: tl.constexpr, E5M2: tl.constexpr, POWER_OF_TWO: tl.constexpr):
    """`_scales` of COUNT blocks, each computed once.

    A maximum over one side of a tile leaves every thread with the values of all the rows or columns that it holds, the
    same in many threads, and two exact divisions for each of them would be half of all instructions. Gathering the
    values in their order deals them out among the threads; gathering the results deals them back.
    """
    order = tl.arange(0, COUNT)
    inv_scale, scale = _scales(tl.gather(amax, order, axis=0), E5M2, POWER_OF_TWO)
    return tl.gather(inv_scale, order, axis=0), scale


@triton.jit(do_not_specialize=["tokens"])
def _cast_block_tiles_kernel(
    x_ptr, rows_ptr, row_scale_ptr, columns_ptr, column_scale_ptr, tokens, features, stride_t, stride_k,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, POWER_OF_TWO: tl.constexpr,
    E5M2: tl.constexpr, EXACT_BITS: tl.constexpr, BLOCK_T: tl.constexpr, BAND: tl.constexpr,
):  # fmt: skip
    """Codes and scales of a tile of BLOCK_T tokens by 128 features, in the layouts asked for."""
    pid_t, pid_k = _tile_of_program(tl.program_id(0), tl.cdiv(tokens, BLOCK_T), features // _BLOCK, BAND)
    t = pid_t.to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    k = pid_k.to(tl.int64) * _BLOCK + tl.arange(0, _BLOCK)
    inside = t < tokens
    x = tl.load(x_ptr + t[:, None] * stride_t + k[None, :] * stride_k, mask=inside[:, None], other=0).to(tl.float32)
    # Both before either is used: the bits then need no registers while codes are made.
    row_amax, column_amax = tl.max(_abs_bits(x), axis=1), tl.max(_abs_bits(x), axis=0)
    rows_at = rows_ptr + t[:, None] * features + k[None, :]
    padded_tokens = tl.cdiv(tokens, _BLOCK) * _BLOCK
    columns_at = columns_ptr + k[:, None] * padded_tokens + t[None, :]
    if ROWS:
        inv_scale, scale = _block_scales(row_amax, BLOCK_T, E5M2, POWER_OF_TWO)
        tl.store(row_scale_ptr + pid_k.to(tl.int64) * tokens + t, scale, mask=inside)
        codes = _to_codes(x * inv_scale[:, None], E5M2, EXACT_BITS, False)
        tl.store(rows_at, codes, mask=inside[:, None])
    if COLUMNS:
        inv_scale, scale = _block_scales(column_amax, _BLOCK, E5M2, POWER_OF_TWO)
        tl.store(column_scale_ptr + pid_t.to(tl.int64) * features + k, scale)
        codes = _to_codes(x * inv_scale[None, :], E5M2, EXACT_BITS, False)
        tl.store(columns_at, tl.trans(codes))
    # A block with NaN or Inf has NaN for all its codes, except that padding is zero, and only such a block has any. The
    # hardware's code for NaN is not ours, and selecting ours for each value takes half as many instructions again, so
    # such blocks are written a second time.
    if tl.max(row_amax, axis=0) >= _INF_BITS:
        tl.debug_barrier()
        nan = tl.where(inside, 0x7F, 0).to(tl.uint8)
        if ROWS:
            bad = (inside & (row_amax >= _INF_BITS))[:, None]
            tl.store(rows_at, tl.broadcast_to(nan[:, None], [BLOCK_T, _BLOCK]), mask=bad)
        if COLUMNS:
            bad = (column_amax >= _INF_BITS)[:, None]
            tl.store(columns_at, tl.broadcast_to(nan[None, :], [_BLOCK, BLOCK_T]), mask=bad)


@triton.jit(do_not_specialize=["held", "first_row"])
def _weight_tiles_kernel(
    x_ptr, amax_ptr, codes_ptr, scale_ptr, held, first_row, features, stride_t, stride_k,
    FIND_AMAX: tl.constexpr, CAST: tl.constexpr, POWER_OF_TWO: tl.constexpr,
    E5M2: tl.constexpr, EXACT_BITS: tl.constexpr,
):  # fmt: skip
    """One of the 128x128 tiles of a weight that x, its rows `first_row` to `first_row + held`, has a part in.

    FIND_AMAX: amax of what x holds of the tile, otherwise amax is read. CAST: write codes. Amax is written if it is
    all that is asked for, the scale if both are.
    """
    tiles_k = features // _BLOCK
    tile = first_row // _BLOCK * tiles_k + tl.program_id(0)
    t = (tile // tiles_k).to(tl.int64) * _BLOCK + tl.arange(0, _BLOCK) - first_row
    k = (tile % tiles_k).to(tl.int64) * _BLOCK + tl.arange(0, _BLOCK)
    inside = ((t >= 0) & (t < held))[:, None]
    x = tl.load(x_ptr + t[:, None] * stride_t + k[None, :] * stride_k, mask=inside, other=0).to(tl.float32)
    if FIND_AMAX:
        largest = tl.max(tl.max(_abs_bits(x), axis=1), axis=0)
        amax = tl.where(largest > _INF_BITS, _NAN_BITS, largest)
    else:
        amax = tl.load(amax_ptr + tile)
    if CAST:
        inv_scale, scale = _scales(amax, E5M2, POWER_OF_TWO)
        codes_at = codes_ptr + t[:, None] * features + k[None, :]
        tl.store(codes_at, _to_codes(x * inv_scale, E5M2, EXACT_BITS, False), mask=inside)
        if amax >= _INF_BITS:  # as above
            tl.debug_barrier()
            tl.store(codes_at, tl.full([_BLOCK, _BLOCK], 0x7F, tl.uint8), mask=inside)
        if FIND_AMAX:
            tl.store(scale_ptr + tile, scale)
    else:
        tl.store(amax_ptr + tile, amax)


@triton.jit
def _block_scale_kernel(
    amax_ptr, scale_ptr, numel, POWER_OF_TWO: tl.constexpr, E5M2: tl.constexpr, BLOCK: tl.constexpr
):
    """Scales of the amax of `numel` blocks."""
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    _, scale = _scales(tl.load(amax_ptr + index, mask=index < numel, other=0), E5M2, POWER_OF_TWO)
    tl.store(scale_ptr + index, scale, mask=index < numel)


def cast_block_rows(x: Tensor, dtype: torch.dtype, power_of_two: bool) -> tuple[Tensor, Tensor]:
    """See `titan_fp8.kernels.blockwise.cast_block_rows`."""
    codes = float8.new_codes(*x.shape, device=x.device)
    scale = empty_scale(x.shape[0], x.shape[1] // BLOCK, x.device)
    _cast_block_tiles(x, (codes, scale), None, dtype, power_of_two)
    return codes.view(dtype), scale


def cast_block_columns(x: Tensor, dtype: torch.dtype, power_of_two: bool) -> tuple[Tensor, Tensor]:
    """See `titan_fp8.kernels.blockwise.cast_block_columns`."""
    codes_t = float8.new_codes(x.shape[1], padded(x.shape[0]), device=x.device)
    scale_t = empty_scale(x.shape[1], blocks(x.shape[0]), x.device)
    _cast_block_tiles(x, None, (codes_t, scale_t), dtype, power_of_two)
    return codes_t.view(dtype), scale_t


def cast_block_both(x: Tensor, dtype: torch.dtype, power_of_two: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `titan_fp8.kernels.blockwise.cast_block_both`."""
    tokens, features = x.shape
    codes = float8.new_codes(tokens, features, device=x.device)
    scale = empty_scale(tokens, features // BLOCK, x.device)
    codes_t = float8.new_codes(features, padded(tokens), device=x.device)
    scale_t = empty_scale(features, blocks(tokens), x.device)
    _cast_block_tiles(x, (codes, scale), (codes_t, scale_t), dtype, power_of_two)
    return codes.view(dtype), scale, codes_t.view(dtype), scale_t


def cast_blocks(weight: Tensor, dtype: torch.dtype, power_of_two: bool) -> tuple[Tensor, Tensor]:
    """See `titan_fp8.kernels.blockwise.cast_blocks`."""
    codes = float8.new_codes(*weight.shape, device=weight.device)
    scale = torch.empty(blocks(weight.shape[0]), weight.shape[1] // BLOCK, dtype=torch.float32, device=weight.device)
    _weight_tiles(weight, None, codes, scale, 0, dtype, power_of_two)
    return codes.view(dtype), scale


def block_amax(shard: Tensor, first_row: int, rows: int) -> Tensor:
    """See `titan_fp8.kernels.blockwise.block_amax`."""
    amax = torch.zeros(blocks(rows), shard.shape[1] // BLOCK, dtype=torch.int32, device=shard.device)
    _weight_tiles(shard, amax, None, None, first_row, E5M2, False)
    return amax


def cast_blocks_from_amax(
    shard: Tensor, amax: Tensor, dtype: torch.dtype, power_of_two: bool, first_row: int
) -> Tensor:
    """See `titan_fp8.kernels.blockwise.cast_blocks_from_amax`."""
    codes = float8.new_codes(*shard.shape, device=shard.device)
    _weight_tiles(shard, amax.contiguous(), codes, None, first_row, dtype, power_of_two)
    return codes.view(dtype)


def block_scale(amax: Tensor, dtype: torch.dtype, power_of_two: bool) -> Tensor:
    """See `titan_fp8.kernels.blockwise.block_scale`."""
    amax = amax.contiguous()
    scale = torch.empty_like(amax, dtype=torch.float32)
    fast(_block_scale_kernel)[(cdiv(amax.numel(), SCALE_BLOCK),)](
        amax, scale, amax.numel(), POWER_OF_TWO=power_of_two, E5M2=dtype == E5M2, BLOCK=SCALE_BLOCK
    )
    return scale


def _cast_block_tiles(
    x: Tensor,
    rows: tuple[Tensor, Tensor] | None,
    columns: tuple[Tensor, Tensor] | None,
    dtype: torch.dtype,
    power_of_two: bool,
) -> None:
    """Fill codes and scales in the layouts given."""
    tokens, features = x.shape
    tile = BOTH_TILE if rows and columns else ROWS_TILE if rows else COLUMNS_TILE
    # A pointer that a variant of the kernel never follows still has to be one.
    unused = rows or columns
    assert unused is not None
    fast(_cast_block_tiles_kernel)[(cdiv(tokens, tile.tokens) * (features // BLOCK),)](
        x, *(rows or unused), *(columns or unused), tokens, features, *x.stride(),
        ROWS=rows is not None, COLUMNS=columns is not None, POWER_OF_TWO=power_of_two,
        E5M2=dtype == E5M2, EXACT_BITS=float8._exact_bits(x.device),
        BLOCK_T=tile.tokens, BAND=tile.band, num_warps=tile.warps, maxnreg=tile.registers,
    )  # fmt: skip


def _weight_tiles(
    x: Tensor,
    amax: Tensor | None,
    codes: Tensor | None,
    scale: Tensor | None,
    first_row: int,
    dtype: torch.dtype,
    power_of_two: bool,
) -> None:
    """Fill what the kernel writes: `amax` alone, `codes` from `amax`, or `codes` and `scale`."""
    unused = next(tensor for tensor in (amax, codes) if tensor is not None)
    tile_rows = blocks(first_row + x.shape[0]) - first_row // BLOCK
    fast(_weight_tiles_kernel)[(tile_rows * (x.shape[1] // BLOCK),)](
        x, *(unused if tensor is None else tensor for tensor in (amax, codes, scale)),
        x.shape[0], first_row, x.shape[1], *x.stride(),
        FIND_AMAX=codes is None or amax is None, CAST=codes is not None, POWER_OF_TWO=power_of_two,
        E5M2=dtype == E5M2, EXACT_BITS=float8._exact_bits(x.device),
        num_warps=WEIGHT_WARPS,
    )  # fmt: skip
