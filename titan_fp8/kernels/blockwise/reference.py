"""Block-scaled float8 casts in plain PyTorch: the specification that the Triton kernels equal bit for bit.

A group is a block here, so that an outlier costs precision in its own block alone. There are two kinds:

    1x128     128 consecutive values along the dimension that a product sums over; activations and gradients
    128x128   a square tile; weights, whose transpose is then the same tiles transposed

Formats, scales, rounding, NaN and Inf are those of `titan_fp8.kernels.float8.reference`: per block, `inv_scale =
448 / max(amax, 1e-12)`, correctly rounded (its mantissa cleared if powers of two are asked for), `scale = 1 /
inv_scale`, and a block that holds NaN or Inf has scale NaN and every code NaN.

A product that sums over T wants T contiguous and in whole blocks, so the column layout is transposed and padded to a
multiple of 128 with zero codes. Padding takes no part in any amax.

Layout of scales. Tensor cores read the scales of a 1x128-scaled operand with the operand's rows contiguous: strides
`(1, rows)`, which is what "outer dimension major" means. Scales of 128x128 tiles are ordinary contiguous matrices.

A shard of a weight may begin anywhere in a tile. Then the tile's amax is a maximum over several shards: `block_amax`
gives each shard's part in the numbering of the whole weight, an integer MAX over the parts gives the whole, and
`cast_blocks_from_amax` casts each shard's rows.

T tokens, N out features (rows of a weight), K features; `padded(T)` is T rounded up to a multiple of 128.
Source: DeepSeek-V3 technical report (arXiv 2412.19437), section 3.3, for the block shapes.
"""

import torch
from torch import Tensor

from titan_fp8.kernels.float8 import reference as float8

BLOCK = 128
"""Values along each side of a block."""


def padded(tokens: int) -> int:
    """`tokens` rounded up to a multiple of 128. Works on symbolic sizes."""
    return blocks(tokens) * BLOCK


def blocks(size: int) -> int:
    """How many blocks cover `size`."""
    return (size + BLOCK - 1) // BLOCK


def empty_scale(rows: int, count: int, device: torch.device) -> Tensor:
    """Uninitialized fp32 `[rows, count]` with strides `(1, rows)`: scales of a 1x128-scaled operand."""
    return torch.empty_strided((rows, count), (1, max(rows, 1)), dtype=torch.float32, device=device)


def cast_block_rows(x: Tensor, dtype: torch.dtype, power_of_two: bool) -> tuple[Tensor, Tensor]:
    """Cast x `[T, K]` by 1x128 blocks along K: `(codes [T, K], scale [T, K/128])`, the scale with strides (1, T)."""
    tokens, features = x.shape
    split = x.unflatten(1, (features // BLOCK, BLOCK))
    inv_scale, scale = float8.scales(float8.amax_bits(split, dim=2), dtype, power_of_two)
    codes = float8.to_codes(split, inv_scale.unsqueeze(2), dtype).view(tokens, features)
    return codes, empty_scale(tokens, features // BLOCK, x.device).copy_(scale)


def cast_block_columns(x: Tensor, dtype: torch.dtype, power_of_two: bool) -> tuple[Tensor, Tensor]:
    """Cast x `[T, K]` by 1x128 blocks along T: `(codes_t [K, padded(T)], scale_t [K, padded(T)/128])`, transposed,
    the scale with strides (1, K)."""
    tokens, count = x.shape[0], blocks(x.shape[0])
    split = torch.nn.functional.pad(x, (0, 0, 0, padded(tokens) - tokens)).unflatten(0, (count, BLOCK))
    inv_scale, scale = float8.scales(float8.amax_bits(split, dim=1), dtype, power_of_two)
    codes = float8.to_codes(split, inv_scale.unsqueeze(1), dtype).view(torch.uint8).flatten(0, 1)
    codes[tokens:] = 0  # even where the scale is NaN
    return float8.transpose_codes(codes.view(dtype)), scale.t()


def block_amax(shard: Tensor, first_row: int, rows: int) -> Tensor:
    """Amax of each 128x128 tile of a weight `[rows, K]` over the rows that `shard [n, K]` holds, from `first_row` on:
    fp32 bits, int32 `[ceil(rows/128), K/128]`, zero for the tiles it has no row of."""
    held, features = shard.shape
    of_rows = float8.amax_bits(shard.unflatten(1, (features // BLOCK, BLOCK)), dim=2)
    after = padded(rows) - first_row - held
    of_all_rows = torch.nn.functional.pad(of_rows, (0, 0, first_row, after))
    return of_all_rows.unflatten(0, (blocks(rows), BLOCK)).amax(1)


def block_scale(amax: Tensor, dtype: torch.dtype, power_of_two: bool) -> Tensor:
    """The fp32 scales, contiguous, that blocks with this amax (bits, any shape) have."""
    return float8.scales(amax, dtype, power_of_two)[1]


def cast_blocks_from_amax(
    shard: Tensor, amax: Tensor, dtype: torch.dtype, power_of_two: bool, first_row: int
) -> Tensor:
    """Codes `[n, K]` of a weight's rows from `first_row` on, by the amax of all its tiles `[ceil(rows/128), K/128]`."""
    rows, features = shard.shape
    inv_scale, _ = float8.scales(amax, dtype, power_of_two)
    tile_rows = torch.arange(first_row, first_row + rows, device=shard.device) // BLOCK
    inv_scale = inv_scale.index_select(0, tile_rows).unsqueeze(2)
    codes = float8.to_codes(shard.unflatten(1, (features // BLOCK, BLOCK)), inv_scale, dtype)
    return codes.view(rows, features)


def cast_blocks(weight: Tensor, dtype: torch.dtype, power_of_two: bool) -> tuple[Tensor, Tensor]:
    """Cast a weight `[N, K]` by 128x128 tiles: `(codes [N, K], scale [N/128, K/128])`, both contiguous."""
    amax = block_amax(weight, 0, weight.shape[0])
    return cast_blocks_from_amax(weight, amax, dtype, power_of_two, 0), block_scale(amax, dtype, power_of_two)
