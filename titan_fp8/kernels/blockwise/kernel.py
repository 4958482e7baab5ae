"""The block-scaled casts as Triton kernels. `reference.py` says what each computes; these give the same bits.

    _cast_block_tiles_kernel   1x128 codes along K, along T (transposed), or both, in one read
    _weight_tiles_kernel       128x128 tiles of a weight or of a shard: their amax, their codes from amax known before,
                               or amax, scale and codes in one read
    _block_scale_kernel        scales from amax

No pass for amax comes first, as it does for larger groups: a program that holds a 128x128 tile holds every block of
both layouts that crosses it.

Amax, division, conversion and transposed words are the helpers of `titan_fp8.kernels.float8.bits`; what is said there
holds here, and what `titan_fp8.kernels.float8.kernel` says of 64-bit offsets, masks and tokens that are not specialized
on. The features are whole blocks.

T tokens (rows), K features (columns), n rows of a shard.
"""

# Triton's language is not Python's; pyright takes the kernels for ordinary functions.
# pyright: reportCallIssue=false, reportAssignmentType=false, reportOperatorIssue=false, reportAttributeAccessIssue=false
# pyright: reportGeneralTypeIssues=false, reportArgumentType=false

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from titan_fp8.kernels.blockwise.reference import BLOCK, blocks, empty_scale, padded
from titan_fp8.kernels.float8 import bits
from titan_fp8.kernels.float8.bits import (
    _INF_BITS,
    _NAN_BITS,
    Tile,
    _abs_bits,
    _pack,
    _quads_of_tile,
    _scales,
    _store_columns,
    _tile_of_program,
    _to_codes,
)
from titan_fp8.kernels.float8.reference import E5M2
from titan_fp8.kernels.launch import Plan, cdiv, planned

_BLOCK = tl.constexpr(BLOCK)


# Static: a first-step search could choose differently on different ranks.
ROWS_TILE, COLUMNS_TILE, BOTH_TILE = Tile(64, BLOCK, 4, 1), Tile(BLOCK, BLOCK, 4, 2), Tile(BLOCK, BLOCK, 8, 2, 128)
"""By the layouts that are written. All have the 128 features of a block; one that writes columns has 128 tokens too."""
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


@triton.jit
def _load_rows(x_ptr, t, k, tokens, stride_t, stride_k):
    at = x_ptr + t[:, None] * stride_t + k[None, :] * stride_k
    return tl.load(at, mask=(t < tokens)[:, None], other=0).to(tl.float32)


@triton.jit
def _row_amax(a, b, c, d, BLOCK_T: tl.constexpr):
    """Amax bits of the rows of a tile of one block of features, given as the four rows of each quad: `[BLOCK_T]`, the
    rows of a quad in the order a, c, b, d."""
    amax_ab = tl.join(tl.max(_abs_bits(a), axis=1), tl.max(_abs_bits(b), axis=1))
    amax_cd = tl.join(tl.max(_abs_bits(c), axis=1), tl.max(_abs_bits(d), axis=1))
    return tl.reshape(tl.join(amax_ab, amax_cd), [BLOCK_T])


@triton.jit
def _column_amax(a, b, c, d):
    """Amax bits of the columns of a tile of one block of tokens, given as the four rows of each quad: `[128]`."""
    largest = tl.maximum(tl.maximum(_abs_bits(a), _abs_bits(b)), tl.maximum(_abs_bits(c), _abs_bits(d)))
    return tl.max(largest, axis=0)


@triton.jit
def _store_block_rows(
    a, b, c, d, amax, quad, k, pid_t, block_k, tokens, features, rows_ptr, scale_ptr,
    BLOCK_T: tl.constexpr, E5M2: tl.constexpr, POWER_OF_TWO: tl.constexpr, EXACT_BITS: tl.constexpr,
):  # fmt: skip
    """Scales and codes by rows of a tile whose `_row_amax` is known."""
    inv_scale, scale = _block_scales(amax, BLOCK_T, E5M2, POWER_OF_TWO)
    index = tl.arange(0, BLOCK_T)
    row = pid_t.to(tl.int64) * BLOCK_T + (index // 4 * 4 + index % 2 * 2 + index // 2 % 2)
    tl.store(scale_ptr + block_k.to(tl.int64) * tokens + row, scale, mask=row < tokens)
    inv_ab, inv_cd = tl.split(tl.reshape(inv_scale, [BLOCK_T // 4, 2, 2]))
    inv_a, inv_b = tl.split(inv_ab)
    inv_c, inv_d = tl.split(inv_cd)
    t = 4 * quad
    at = rows_ptr + t[:, None] * features + k[None, :]
    tl.store(at, _to_codes(a * inv_a[:, None], E5M2, EXACT_BITS), mask=(t < tokens)[:, None])
    tl.store(at + features, _to_codes(b * inv_b[:, None], E5M2, EXACT_BITS), mask=(t + 1 < tokens)[:, None])
    tl.store(at + 2 * features, _to_codes(c * inv_c[:, None], E5M2, EXACT_BITS), mask=(t + 2 < tokens)[:, None])
    tl.store(at + 3 * features, _to_codes(d * inv_d[:, None], E5M2, EXACT_BITS), mask=(t + 3 < tokens)[:, None])


@triton.jit
def _store_block_columns(
    a, b, c, d, amax, quad, k, block_t, tokens, features, columns_ptr, scale_ptr,
    E5M2: tl.constexpr, POWER_OF_TWO: tl.constexpr, EXACT_BITS: tl.constexpr,
):  # fmt: skip
    """Scales and transposed codes of a tile of 128 tokens and 128 features whose `_column_amax` is known."""
    if POWER_OF_TWO:  # without a division, dealing them out costs more than it saves
        inv_scale, scale = _scales(amax, E5M2, True)
    else:
        inv_scale, scale = _block_scales(amax, _BLOCK, E5M2, False)
    tl.store(scale_ptr + block_t.to(tl.int64) * features + k, scale, mask=k < features)
    factor = inv_scale[None, :]
    word = _pack(a * factor, b * factor, c * factor, d * factor, E5M2, EXACT_BITS)
    padded_tokens = tl.cdiv(tokens, _BLOCK) * _BLOCK
    _store_columns(columns_ptr, word, quad, k, tokens, features, padded_tokens)


@triton.jit
def _store_block_tile(
    a, b, c, d, quad, k, pid_t, pid_k, tokens, features, rows_ptr, row_scale_ptr, columns_ptr, column_scale_ptr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, E5M2: tl.constexpr, POWER_OF_TWO: tl.constexpr,
    EXACT_BITS: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """Scales and codes of a tile (fp32, as the four rows of each quad) in the layouts asked for."""
    # Both before either is used: the bits then need no registers while codes are made.
    row_amax = _row_amax(a, b, c, d, BLOCK_T)
    column_amax = _column_amax(a, b, c, d)
    if ROWS:
        _store_block_rows(
            a, b, c, d, row_amax, quad, k, pid_t, pid_k, tokens, features, rows_ptr, row_scale_ptr,
            BLOCK_T, E5M2, POWER_OF_TWO, EXACT_BITS,
        )  # fmt: skip
    if COLUMNS:
        _store_block_columns(
            a, b, c, d, column_amax, quad, k, pid_t, tokens, features, columns_ptr, column_scale_ptr,
            E5M2, POWER_OF_TWO, EXACT_BITS,
        )  # fmt: skip


@triton.jit(do_not_specialize=["tokens"])
def _cast_block_tiles_kernel(
    x_ptr, rows_ptr, row_scale_ptr, columns_ptr, column_scale_ptr, tokens, features, stride_t, stride_k,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, POWER_OF_TWO: tl.constexpr,
    E5M2: tl.constexpr, EXACT_BITS: tl.constexpr, BLOCK_T: tl.constexpr, BAND: tl.constexpr,
):  # fmt: skip
    """Codes and scales of a tile of BLOCK_T tokens by 128 features, in the layouts asked for."""
    pid_t, pid_k = _tile_of_program(tl.program_id(0), tl.cdiv(tokens, BLOCK_T), features // _BLOCK, BAND)
    quad, k = _quads_of_tile(pid_t, pid_k, BLOCK_T, _BLOCK)
    t = 4 * quad
    # All loads come before any store: pointers may alias, so the compiler keeps their order.
    a = _load_rows(x_ptr, t, k, tokens, stride_t, stride_k)
    b = _load_rows(x_ptr, t + 1, k, tokens, stride_t, stride_k)
    c = _load_rows(x_ptr, t + 2, k, tokens, stride_t, stride_k)
    d = _load_rows(x_ptr, t + 3, k, tokens, stride_t, stride_k)
    _store_block_tile(
        a, b, c, d, quad, k, pid_t, pid_k, tokens, features, rows_ptr, row_scale_ptr, columns_ptr, column_scale_ptr,
        ROWS, COLUMNS, E5M2, POWER_OF_TWO, EXACT_BITS, BLOCK_T,
    )  # fmt: skip


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
        codes = _to_codes(x * inv_scale, E5M2, EXACT_BITS)
        tl.store(codes_ptr + t[:, None] * features + k[None, :], codes, mask=inside)
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


@planned(_cast_block_tiles_kernel)
def _launch_tiles(
    device: int,
    shape: torch.Size,
    strides: tuple[int, int],
    dtypes: tuple[torch.dtype, torch.dtype],
    rows: bool,
    columns: bool,
    power_of_two: bool,
    tile: Tile,
) -> Plan:
    """dtypes: of x and the codes."""
    tokens, features = shape
    constants: dict[str, Any] = {
        "ROWS": rows, "COLUMNS": columns, "POWER_OF_TWO": power_of_two,
        "E5M2": dtypes[1] == E5M2, "EXACT_BITS": bits.exact_bits(device),
        "BLOCK_T": tile.tokens, "BAND": tile.band, "num_warps": tile.warps, "maxnreg": tile.registers,
    }  # fmt: skip
    return Plan(cdiv(tokens, tile.tokens) * (features // BLOCK), (tokens, features, *strides), constants)


@planned(_weight_tiles_kernel)
def _launch_weight_tiles(
    device: int,
    shape: torch.Size,
    strides: tuple[int, int],
    dtypes: tuple[torch.dtype, torch.dtype],
    first_row: int,
    find_amax: bool,
    cast: bool,
    power_of_two: bool,
    warps: int,
) -> Plan:
    """dtypes: of x and the codes; without codes, any."""
    held, features = shape
    tile_rows = blocks(first_row + held) - first_row // BLOCK
    constants: dict[str, Any] = {
        "FIND_AMAX": find_amax, "CAST": cast, "POWER_OF_TWO": power_of_two,
        "E5M2": dtypes[1] == E5M2, "EXACT_BITS": bits.exact_bits(device), "num_warps": warps,
    }  # fmt: skip
    return Plan(tile_rows * (features // BLOCK), (held, first_row, features, *strides), constants)


@planned(_block_scale_kernel)
def _launch_scale(device: int, numel: int, e5m2: bool, power_of_two: bool, block: int) -> Plan:
    constants: dict[str, Any] = {"POWER_OF_TWO": power_of_two, "E5M2": e5m2, "BLOCK": block}
    return Plan(cdiv(numel, block), (numel,), constants)


def cast_block_rows(x: Tensor, dtype: torch.dtype, power_of_two: bool) -> tuple[Tensor, Tensor]:
    """See `titan_fp8.kernels.blockwise.cast_block_rows`."""
    codes, scale = _new_rows(x, dtype)
    tensors = x, codes, scale, codes, scale
    _launch_tiles(tensors, x.shape, x.stride(), (x.dtype, dtype), True, False, power_of_two, ROWS_TILE)
    return codes, scale


def cast_block_columns(x: Tensor, dtype: torch.dtype, power_of_two: bool) -> tuple[Tensor, Tensor]:
    """See `titan_fp8.kernels.blockwise.cast_block_columns`."""
    codes_t, scale_t = _new_columns(x, dtype)
    tensors = x, codes_t, scale_t, codes_t, scale_t
    _launch_tiles(tensors, x.shape, x.stride(), (x.dtype, dtype), False, True, power_of_two, COLUMNS_TILE)
    return codes_t, scale_t


def cast_block_both(x: Tensor, dtype: torch.dtype, power_of_two: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `titan_fp8.kernels.blockwise.cast_block_both`."""
    codes, scale = _new_rows(x, dtype)
    codes_t, scale_t = _new_columns(x, dtype)
    tensors = x, codes, scale, codes_t, scale_t
    _launch_tiles(tensors, x.shape, x.stride(), (x.dtype, dtype), True, True, power_of_two, BOTH_TILE)
    return codes, scale, codes_t, scale_t


def cast_blocks(weight: Tensor, dtype: torch.dtype, power_of_two: bool) -> tuple[Tensor, Tensor]:
    """See `titan_fp8.kernels.blockwise.cast_blocks`."""
    shape, device = weight.shape, weight.device
    rows, features = shape
    codes = bits.new_codes(rows, features, dtype=dtype, device=device)
    scale = torch.empty(blocks(rows), features // BLOCK, dtype=torch.float32, device=device)
    tensors, dtypes = (weight, codes, codes, scale), (weight.dtype, dtype)
    _launch_weight_tiles(tensors, shape, weight.stride(), dtypes, 0, True, True, power_of_two, WEIGHT_WARPS)
    return codes, scale


def block_amax(shard: Tensor, first_row: int, rows: int) -> Tensor:
    """See `titan_fp8.kernels.blockwise.block_amax`."""
    amax = torch.zeros(blocks(rows), shard.shape[1] // BLOCK, dtype=torch.int32, device=shard.device)
    tensors, dtypes = (shard, amax, amax, amax), (shard.dtype, amax.dtype)
    _launch_weight_tiles(tensors, shard.shape, shard.stride(), dtypes, first_row, True, False, False, WEIGHT_WARPS)
    return amax


def cast_blocks_from_amax(
    shard: Tensor, amax: Tensor, dtype: torch.dtype, power_of_two: bool, first_row: int
) -> Tensor:
    """See `titan_fp8.kernels.blockwise.cast_blocks_from_amax`."""
    shape = shard.shape
    codes = bits.new_codes(*shape, dtype=dtype, device=shard.device)
    tensors, dtypes = (shard, amax.contiguous(), codes, codes), (shard.dtype, dtype)
    _launch_weight_tiles(tensors, shape, shard.stride(), dtypes, first_row, False, True, power_of_two, WEIGHT_WARPS)
    return codes


def block_scale(amax: Tensor, dtype: torch.dtype, power_of_two: bool) -> Tensor:
    """See `titan_fp8.kernels.blockwise.block_scale`."""
    amax = amax.contiguous()
    scale = torch.empty_like(amax, dtype=torch.float32)
    _launch_scale((amax, scale), amax.numel(), dtype == E5M2, power_of_two, SCALE_BLOCK)
    return scale


# A pointer that a variant of a kernel never follows still has to be one; above, any of the right dtype.


def _new_rows(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    tokens, features = x.shape
    device = x.device
    codes = bits.new_codes(tokens, features, dtype=dtype, device=device)
    return codes, empty_scale(tokens, features // BLOCK, device)


def _new_columns(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    tokens, features = x.shape
    device = x.device
    codes_t = bits.new_codes(features, padded(tokens), dtype=dtype, device=device)
    return codes_t, empty_scale(features, blocks(tokens), device)
