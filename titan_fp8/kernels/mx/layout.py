"""The layout in which Blackwell's tensor cores read MX scales: plain PyTorch, without waiting for the device.

A matrix of scales `[R, C]`, a row for each row of the operand and a column for each block along the summed dimension,
is padded with zero bytes to a multiple of 128 rows and of 4 columns and cut into tiles of 128 x 4, one row of tiles
after the other. A tile's 512 bytes are stored as `[32, 4, 4]`: the byte of row r and column c is at
`(r % 32) * 16 + (r // 32) * 4 + c`. PyTorch calls this SWIZZLE_32_4_4; here it is *swizzled*, the other one *plain*.
(cuBLAS documentation, "1D Block Scaling Factors Layout".)

Operands of a grouped product, of which `ends` int32 [E] divides the rows M, have a swizzled matrix for each group, one
behind the other (the contract of `torch.nn.functional.scaled_grouped_mm` with BlockWise1x32 scales):

    row groups       x [M, K] times weights [E, K, N]: the scales `[size, K/32]` of a group, their rows padded to 128
    column groups    sums over M: the scales `[K, size/32]` of a group, their columns padded to 4
    experts          weights [E, N, K]: the scales `[N, K/32]` of an expert, as one row of a matrix with E rows

How much padding groups need is known on the device alone, so their matrices are as large as it can get
(`rows_of_groups`), and zero behind the last group. Groups are multiples of 32 rows. Bytes of padding are zero, which is
the scale 2^-127: a NaN there would reach results even beside codes of zero.

R rows, C columns of scales, M rows of an operand, K features, E groups.
"""

import torch
from torch import Tensor

from titan_fp8.kernels.mx.reference import BLOCK, E8M0

TILE_ROWS, TILE_COLUMNS = 128, 4
TILE_BYTES = TILE_ROWS * TILE_COLUMNS


def rounded_up(size: int, multiple: int) -> int:
    """`size` rounded up to a multiple. Works on symbolic sizes."""
    return (size + multiple - 1) // multiple * multiple


def padded_shape(rows: int, columns: int) -> tuple[int, int]:
    """`[R, C]` padded to whole tiles."""
    return rounded_up(rows, TILE_ROWS), rounded_up(columns, TILE_COLUMNS)


def rows_of_groups(rows: int, groups: int) -> int:
    """The most rows that groups of M rows, in multiples of 32, can have when each is padded to a multiple of 128."""
    return (rows + (TILE_ROWS - BLOCK) * groups) // TILE_ROWS * TILE_ROWS


def swizzle(scale: Tensor) -> Tensor:
    """Swizzled scales of plain ones.

    Args:
        scale: e8m0 `[R, C]`, or `[E, R, C]` of experts, with any strides.

    Returns:
        e8m0 `[R padded to 128, C padded to 4]`, the tiles one after the other; of experts `[E, bytes of one]`.
    """
    rows, columns = scale.shape[-2:]
    padded_rows, padded_columns = padded_shape(rows, columns)
    padding = (0, padded_columns - columns, 0, padded_rows - rows)
    whole = torch.nn.functional.pad(scale.view(torch.uint8), padding)
    count = 1 if scale.dim() == 2 else scale.shape[0]
    tiles = whole.view(count, padded_rows // TILE_ROWS, 4, 32, padded_columns // TILE_COLUMNS, TILE_COLUMNS)
    blocked = tiles.permute(0, 1, 4, 3, 2, 5).contiguous()  # [E, tile row, tile column, 32, 4, 4]
    shape = (padded_rows, padded_columns) if scale.dim() == 2 else (scale.shape[0], padded_rows * padded_columns)
    return blocked.view(shape).view(E8M0)


def unswizzle(blocked: Tensor, rows: int, columns: int) -> Tensor:
    """Plain scales of swizzled ones, as `swizzle` returns them: `[R, C]`, or `[E, R, C]`."""
    padded_rows, padded_columns = padded_shape(rows, columns)
    of_experts = blocked.dim() == 2 and tuple(blocked.shape) != (padded_rows, padded_columns)
    count = blocked.shape[0] if of_experts else 1
    if blocked.numel() != count * padded_rows * padded_columns:
        raise ValueError(
            f"swizzled scales of shape {list(blocked.shape)} are not those of {rows} x {columns} scales, which take "
            f"{padded_rows} x {padded_columns}; give the sizes of the plain scales"
        )
    grid = padded_rows // TILE_ROWS, padded_columns // TILE_COLUMNS
    tiles = blocked.view(torch.uint8).reshape(count, *grid, 32, 4, TILE_COLUMNS)
    plain = tiles.permute(0, 1, 4, 3, 2, 5).reshape(count, padded_rows, padded_columns)[:, :rows, :columns]
    return (plain if of_experts else plain[0]).contiguous().view(E8M0)


def swizzle_row_groups(scale: Tensor, ends: Tensor) -> Tensor:
    """Swizzled scales of an operand whose rows are groups, from plain `[M, C]`: `[rows_of_groups(M, E), C padded to
    4]`."""
    rows, columns = scale.shape
    padded_columns = rounded_up(columns, TILE_COLUMNS)
    shape = rows_of_groups(rows, ends.shape[0]), padded_columns
    return _scattered(scale, _row_group_places(ends, rows, columns), shape)


def unswizzle_row_groups(blocked: Tensor, ends: Tensor, rows: int, columns: int) -> Tensor:
    """Plain scales `[M, C]` of what `swizzle_row_groups` returned; zero bytes behind the last group."""
    return _gathered(blocked, _row_group_places(ends, rows, columns))


def swizzle_column_groups(scale_t: Tensor, ends: Tensor) -> Tensor:
    """Swizzled scales of a transposed operand whose columns are groups, from plain `[K, M/32]`: `[K padded to 128,
    rows_of_groups(M, E)/32]`."""
    features, blocks = scale_t.shape
    shape = rounded_up(features, TILE_ROWS), rows_of_groups(blocks * BLOCK, ends.shape[0]) // BLOCK
    return _scattered(scale_t, _column_group_places(ends, features, blocks), shape)


def unswizzle_column_groups(blocked: Tensor, ends: Tensor, features: int, blocks: int) -> Tensor:
    """Plain scales `[K, M/32]` of what `swizzle_column_groups` returned; zero bytes behind the last group."""
    return _gathered(blocked, _column_group_places(ends, features, blocks))


def _place(row: Tensor, column: Tensor, column_tiles: int | Tensor) -> Tensor:
    """Where the byte of a row and a column is, in a matrix with so many tiles side by side."""
    tile = row // TILE_ROWS * column_tiles + column // TILE_COLUMNS
    return tile * TILE_BYTES + row % 32 * 16 + row // 32 % 4 * 4 + column % TILE_COLUMNS


def _groups_of(ends: Tensor, rows: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of the group that each row is in: its first row, and with each group padded to 128 rows its first row and its
    size; and whether the row is in one."""
    sizes = ends.long().diff(prepend=ends.new_zeros(1, dtype=torch.long))
    padded = (sizes + TILE_ROWS - 1) // TILE_ROWS * TILE_ROWS
    group = torch.bucketize(rows, ends.long(), right=True)
    is_somewhere = group < ends.shape[0]
    group = group.clamp(max=ends.shape[0] - 1)
    return (ends - sizes)[group], (padded.cumsum(0) - padded)[group], padded[group], is_somewhere


def _row_group_places(ends: Tensor, rows: int, columns: int) -> Tensor:
    """Where the scale of each row and column is, int64 `[M, C]`; -1 behind the last group."""
    row, column = torch.arange(rows, device=ends.device), torch.arange(columns, device=ends.device)
    begin, base, _, is_somewhere = _groups_of(ends, row)
    place = _place((row - begin + base).unsqueeze(1), column, rounded_up(columns, TILE_COLUMNS) // TILE_COLUMNS)
    return torch.where(is_somewhere.unsqueeze(1), place, -1)


def _column_group_places(ends: Tensor, features: int, blocks: int) -> Tensor:
    """Where the scale of each feature and block of rows is, int64 `[K, M/32]`; -1 behind the last group."""
    feature = torch.arange(features, device=ends.device).unsqueeze(1)
    block = torch.arange(blocks, device=ends.device)
    begin, base, size, is_somewhere = _groups_of(ends, block * BLOCK)
    within = _place(feature, block - begin // BLOCK, size // BLOCK // TILE_COLUMNS)
    place = rounded_up(features, TILE_ROWS) * (base // BLOCK) + within
    return torch.where(is_somewhere, place, -1)


def _scattered(scale: Tensor, places: Tensor, shape: tuple[int, int]) -> Tensor:
    """Zero bytes of this shape with each scale at its place; those without one go to a byte behind the end."""
    end = shape[0] * shape[1]
    result = torch.zeros(end + 1, dtype=torch.uint8, device=scale.device)
    result[torch.where(places < 0, end, places)] = scale.view(torch.uint8)
    return result[:-1].view(shape).view(E8M0)


def _gathered(blocked: Tensor, places: Tensor) -> Tensor:
    """The scales at these places, zero bytes for those without one."""
    found = blocked.reshape(-1).view(torch.uint8)[places.clamp(min=0)]
    return torch.where(places < 0, 0, found).to(torch.uint8).view(E8M0)
