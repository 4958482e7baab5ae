"""Column codes of experts' weights from their row codes as Triton kernels, see `reference.columns_of_experts`.

    _amax_kernel       largest value of each column of each expert
    _columns_kernel    codes of a tile, transposed, and their scales

Of grouped rows only the device knows where a group ends. Weights have as many rows in each expert, so here a tile lies
in one expert, and a column has one factor in it. Both kernels read codes, which are a quarter of a master weight.

E experts, N out features, K in features; N and K are multiples of 16.
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
from titan_fp8.kernels.float8.bits import Tile, _from_codes, _quads_of_tile, _store_columns_tile, _tile_of_program
from titan_fp8.kernels.float8.kernel import _load_tile
from titan_fp8.kernels.launch import Plan, cdiv, planned

# Static block sizes: a search at the first step could choose differently on different ranks.
AMAX_BLOCK_N, AMAX_BLOCK_K, AMAX_STEPS, AMAX_WARPS = 64, 128, 4, 4
TILE = Tile(128, 128, 4, 4)


@triton.jit
def _load_codes(codes_ptr, scale_ptr, expert, n, k, rows, columns, EXACT_BITS: tl.constexpr):
    """What the codes of an expert at rows n and columns k stand for, fp32; zero outside."""
    codes_ptr += expert * rows * columns
    return _load_tile(codes_ptr, scale_ptr + expert * rows, n, k, rows, columns, columns, 1, True, False, EXACT_BITS)


@triton.jit
def _amax_kernel(
    codes_ptr, scale_ptr, amax_ptr, rows, columns,
    EXACT_BITS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """Integer maxima of each column of an expert, into zeroed int32."""
    blocks_n, blocks_k = tl.cdiv(rows, BLOCK_N * STEPS), tl.cdiv(columns, BLOCK_K)
    pid = tl.program_id(0)
    expert = (pid // (blocks_n * blocks_k)).to(tl.int64)
    first = (pid // blocks_k % blocks_n).to(tl.int64) * (BLOCK_N * STEPS)
    k = (pid % blocks_k).to(tl.int64) * BLOCK_K + tl.arange(0, BLOCK_K)
    place = codes_ptr + expert * rows * columns + k[None, :]
    largest = tl.zeros([BLOCK_N, BLOCK_K], dtype=tl.int32)
    # Unrolled, so that many loads are under way: a step alone would wait for each.
    for step in tl.static_range(STEPS):
        n = first + step * BLOCK_N + tl.arange(0, BLOCK_N)
        codes = tl.load(place + n[:, None] * columns, mask=(n < rows)[:, None] & (k < columns)[None, :], other=0)
        # Magnitudes of factors in place of the product's: on a GPU they are part of the multiplication.
        scale = tl.abs(tl.load(scale_ptr + expert * rows + n, mask=n < rows, other=0.0))
        product = tl.abs(_from_codes(codes, False, EXACT_BITS)) * scale[:, None]
        largest = tl.maximum(largest, product.to(tl.int32, bitcast=True))
    tl.atomic_max(amax_ptr + expert * columns + k, tl.max(largest, axis=0), mask=k < columns, sem="relaxed")


@triton.jit
def _columns_kernel(
    codes_ptr, scale_ptr, amax_ptr, codes_t_ptr, scale_t_ptr, rows, columns,
    EXACT_BITS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BAND: tl.constexpr,
):  # fmt: skip
    """Transposed codes of one tile of an expert from known amax; the tiles of its first rows store the scales."""
    tiles_n, tiles_k = tl.cdiv(rows, BLOCK_N), tl.cdiv(columns, BLOCK_K)
    pid = tl.program_id(0)
    expert = (pid // (tiles_n * tiles_k)).to(tl.int64)
    pid_n, pid_k = _tile_of_program(pid % (tiles_n * tiles_k), tiles_n, tiles_k, BAND)
    quad, k = _quads_of_tile(pid_n, pid_k, BLOCK_N, BLOCK_K)
    n = 4 * quad
    # All loads come before any store: pointers may alias, so the compiler keeps their order.
    a = _load_codes(codes_ptr, scale_ptr, expert, n, k, rows, columns, EXACT_BITS)
    b = _load_codes(codes_ptr, scale_ptr, expert, n + 1, k, rows, columns, EXACT_BITS)
    c = _load_codes(codes_ptr, scale_ptr, expert, n + 2, k, rows, columns, EXACT_BITS)
    d = _load_codes(codes_ptr, scale_ptr, expert, n + 3, k, rows, columns, EXACT_BITS)
    _store_columns_tile(
        a, b, c, d, amax_ptr + expert * columns, scale_t_ptr + expert * columns, codes_t_ptr + expert * columns * rows,
        quad, k, pid_n == 0, rows, columns, rows, False, EXACT_BITS,
    )  # fmt: skip


@planned(_amax_kernel)
def _launch_amax(device: int, shape: torch.Size, dtype: torch.dtype, blocks: tuple[int, int, int, int]) -> Plan:
    """dtype: of the scale. blocks: `AMAX_BLOCK_N` and so on."""
    experts, rows, columns = shape
    block_n, block_k, steps, warps = blocks
    constants: dict[str, Any] = {
        "EXACT_BITS": bits.exact_bits(device), "BLOCK_N": block_n, "BLOCK_K": block_k, "STEPS": steps,
        "num_warps": warps,
    }  # fmt: skip
    return Plan(experts * cdiv(rows, block_n * steps) * cdiv(columns, block_k), (rows, columns), constants)


@planned(_columns_kernel)
def _launch_columns(device: int, shape: torch.Size, dtype: torch.dtype, tile: Tile) -> Plan:
    """dtype: of the scale."""
    experts, rows, columns = shape
    constants: dict[str, Any] = {
        "EXACT_BITS": bits.exact_bits(device), "BLOCK_N": tile.tokens, "BLOCK_K": tile.features, "BAND": tile.band,
        "num_warps": tile.warps, "maxnreg": tile.registers,
    }  # fmt: skip
    return Plan(experts * cdiv(rows, tile.tokens) * cdiv(columns, tile.features), (rows, columns), constants)


def columns_of_experts(codes: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """See `titan_fp8.kernels.grouped.columns_of_experts`; codes are contiguous."""
    shape, device = codes.shape, codes.device
    experts, rows, columns = shape
    scale = scale.contiguous()
    amax = torch.zeros(experts, columns, dtype=torch.int32, device=device)
    _launch_amax((codes, scale, amax), shape, scale.dtype, (AMAX_BLOCK_N, AMAX_BLOCK_K, AMAX_STEPS, AMAX_WARPS))
    codes_t = bits.new_codes(experts, columns, rows, dtype=codes.dtype, device=device)
    scale_t = torch.empty(experts, columns, dtype=torch.float32, device=device)
    _launch_columns((codes, scale, amax, codes_t, scale_t), shape, scale.dtype, TILE)
    return codes_t, scale_t
