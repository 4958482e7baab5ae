"""Block-scaled float8 casts: `reference.py` says what they compute, `kernel.py` computes it on a GPU in one read.

Each function here checks its input and takes the Triton kernel for CUDA tensors where Triton is installed, otherwise
the reference. Both give the same bits. Inputs are 2-D bf16, fp16 or fp32 tensors of any strides whose second size is a
multiple of 128.

T tokens, N out features (rows of a weight), K features; `padded(T)` is T rounded up to a multiple of 128. Blocks are
1x128 (activations and gradients) or 128x128 (weights); see `reference.py` for scales, padding, NaN and shards.
"""

import functools
import importlib
from types import ModuleType

import torch
from torch import Tensor

from titan_fp8.kernels import float8
from titan_fp8.kernels.blockwise import reference
from titan_fp8.kernels.blockwise.reference import BLOCK, blocks, padded

__all__ = [
    "BLOCK",
    "block_amax",
    "block_scale",
    "blocks",
    "cast_block_both",
    "cast_block_columns",
    "cast_block_rows",
    "cast_blocks",
    "cast_blocks_from_amax",
    "padded",
]


@functools.cache
def _kernel() -> ModuleType:
    return importlib.import_module("titan_fp8.kernels.blockwise.kernel")


def _check(x: Tensor, dtype: torch.dtype | None = None) -> None:
    float8.check_input(x, dtype)
    if x.shape[1] % BLOCK:
        raise ValueError(f"expected features in multiples of {BLOCK} for blockwise scales, got shape {list(x.shape)}")


def _check_shard(shard: Tensor, first_row: int, tile_rows: int) -> None:
    last = first_row + shard.shape[0]
    if first_row < 0 or blocks(last) > tile_rows:
        raise ValueError(
            f"expected rows of a weight of {tile_rows} rows of {BLOCK}x{BLOCK} tiles, got rows {first_row} to {last}"
        )


def cast_block_rows(x: Tensor, dtype: torch.dtype, power_of_two: bool) -> tuple[Tensor, Tensor]:
    """Cast x `[T, K]` by 1x128 blocks along K: `(codes [T, K], scale [T, K/128])`, the scale with strides (1, T)."""
    _check(x, dtype)
    return (_kernel() if float8.uses_kernel(x) else reference).cast_block_rows(x, dtype, power_of_two)


def cast_block_columns(x: Tensor, dtype: torch.dtype, power_of_two: bool) -> tuple[Tensor, Tensor]:
    """Cast x `[T, K]` by 1x128 blocks along T: `(codes_t [K, padded(T)], scale_t [K, padded(T)/128])`, the scale with
    strides (1, K)."""
    _check(x, dtype)
    return (_kernel() if float8.uses_kernel(x) else reference).cast_block_columns(x, dtype, power_of_two)


def cast_block_both(x: Tensor, dtype: torch.dtype, power_of_two: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`cast_block_rows` and `cast_block_columns` of one tensor, from one read: `(codes, scale, codes_t, scale_t)`."""
    _check(x, dtype)
    if float8.uses_kernel(x):
        return _kernel().cast_block_both(x, dtype, power_of_two)
    return *reference.cast_block_rows(x, dtype, power_of_two), *reference.cast_block_columns(x, dtype, power_of_two)


def cast_blocks(weight: Tensor, dtype: torch.dtype, power_of_two: bool) -> tuple[Tensor, Tensor]:
    """Cast a weight `[N, K]`, N a multiple of 128, by 128x128 tiles in one read: `(codes [N, K], scale [N/128,
    K/128])`."""
    _check(weight, dtype)
    if weight.shape[0] % BLOCK:
        raise ValueError(f"expected a weight of whole {BLOCK}x{BLOCK} tiles, got shape {list(weight.shape)}")
    return (_kernel() if float8.uses_kernel(weight) else reference).cast_blocks(weight, dtype, power_of_two)


def block_amax(shard: Tensor, first_row: int, rows: int) -> Tensor:
    """Part of the amax of a weight's 128x128 tiles that one shard knows.

    Args:
        shard: `[n, K]`, the weight's rows `first_row` to `first_row + n`; n may be 0.
        first_row: any row, not only a tile's first.
        rows: rows of the whole weight.

    Returns:
        int32 `[ceil(rows/128), K/128]`, the bits of fp32 numbers; zero for tiles that the shard has no row of, so that
        an integer MAX over all shards gives every tile's amax.
    """
    _check(shard)
    _check_shard(shard, first_row, blocks(rows))
    return (_kernel() if float8.uses_kernel(shard) else reference).block_amax(shard, first_row, rows)


def block_scale(amax: Tensor, dtype: torch.dtype, power_of_two: bool) -> Tensor:
    """The fp32 scale of each block of this amax (int32 bits), contiguous and of the same shape."""
    return (_kernel() if float8.uses_kernel(amax) else reference).block_scale(amax, dtype, power_of_two)


def cast_blocks_from_amax(
    shard: Tensor, amax: Tensor, dtype: torch.dtype, power_of_two: bool, first_row: int
) -> Tensor:
    """Codes `[n, K]` of a shard, the weight's rows from `first_row` on, by the amax of all the weight's tiles (int32
    bits `[ceil(rows/128), K/128]`): the rows that `cast_blocks` of the whole weight would have."""
    _check(shard, dtype)
    _check_shard(shard, first_row, amax.shape[0])
    if amax.dtype != torch.int32 or amax.dim() != 2 or amax.shape[1] != shard.shape[1] // BLOCK:
        raise ValueError(f"expected int32 amax [rows/128, {shard.shape[1] // BLOCK}], got {amax.dtype} {amax.shape}")
    implementation = _kernel() if float8.uses_kernel(shard) else reference
    return implementation.cast_blocks_from_amax(shard, amax, dtype, power_of_two, first_row)
