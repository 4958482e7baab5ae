"""Float8 codes to the transposed layout as Triton kernels, see `reference.transpose_codes` and
`reference.tensor_columns_from_rows`.

One kernel: it moves bytes, and where each row has a scale of its own and the result has one for all, it shifts
exponents on the way. The matrix is a weight's, whose sizes are multiples of 16; for activations the casts write the
transposed layout themselves.

N rows, K columns.
"""

# Triton's language is not Python's; pyright takes the kernels for ordinary functions.
# pyright: reportCallIssue=false, reportAssignmentType=false, reportOperatorIssue=false, reportAttributeAccessIssue=false
# pyright: reportGeneralTypeIssues=false

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from titan_fp8.kernels.float8 import bits, kernel
from titan_fp8.kernels.float8.bits import (
    Tile,
    _from_codes,
    _pack,
    _pack_codes,
    _quads_of_tile,
    _store_columns,
    _tile_of_program,
)
from titan_fp8.kernels.float8.reference import E5M2
from titan_fp8.kernels.launch import Plan, cdiv, planned

TILE = Tile(128, 128, 4, 4)


@triton.jit
def _load_codes(codes_ptr, n, k, rows, columns, stride_n, stride_k):
    mask = (n < rows)[:, None] & (k < columns)[None, :]
    return tl.load(codes_ptr + n[:, None] * stride_n + k[None, :] * stride_k, mask=mask, other=0)


@triton.jit
def _rescaled(codes, scale_ptr, inv_largest, n, rows, E5M2: tl.constexpr, EXACT_BITS: tl.constexpr):
    shift = tl.load(scale_ptr + n, mask=n < rows, other=0.0) * inv_largest
    return _from_codes(codes, E5M2, EXACT_BITS) * shift[:, None]


@triton.jit
def _transpose_kernel(
    codes_ptr, scale_ptr, largest_ptr, codes_t_ptr, rows, columns, stride_n, stride_k,
    RESCALE: tl.constexpr, E5M2: tl.constexpr, EXACT_BITS: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BAND: tl.constexpr,
):  # fmt: skip
    """One tile. RESCALE: from `scale_ptr`, one a row, to the one at `largest_ptr`."""
    pid_n, pid_k = _tile_of_program(tl.program_id(0), tl.cdiv(rows, BLOCK_N), tl.cdiv(columns, BLOCK_K), BAND)
    quad, k = _quads_of_tile(pid_n, pid_k, BLOCK_N, BLOCK_K)
    n = 4 * quad
    a = _load_codes(codes_ptr, n, k, rows, columns, stride_n, stride_k)
    b = _load_codes(codes_ptr, n + 1, k, rows, columns, stride_n, stride_k)
    c = _load_codes(codes_ptr, n + 2, k, rows, columns, stride_n, stride_k)
    d = _load_codes(codes_ptr, n + 3, k, rows, columns, stride_n, stride_k)
    if RESCALE:
        largest = tl.load(largest_ptr)
        inv_largest = tl.div_rn(1.0, largest)
        word = _pack(
            _rescaled(a, scale_ptr, inv_largest, n, rows, E5M2, EXACT_BITS),
            _rescaled(b, scale_ptr, inv_largest, n + 1, rows, E5M2, EXACT_BITS),
            _rescaled(c, scale_ptr, inv_largest, n + 2, rows, E5M2, EXACT_BITS),
            _rescaled(d, scale_ptr, inv_largest, n + 3, rows, E5M2, EXACT_BITS),
            E5M2, EXACT_BITS,
        )  # fmt: skip
        _store_columns(codes_t_ptr, word, quad, k, rows, columns, rows)
    else:
        _store_columns(codes_t_ptr, _pack_codes(a, b, c, d, EXACT_BITS), quad, k, rows, columns, rows)


@planned(_transpose_kernel)
def _launch(
    device: int,
    shape: torch.Size,
    strides: tuple[int, int],
    dtypes: tuple[torch.dtype, torch.dtype],
    rescale: bool,
    tile: Tile,
) -> Plan:
    """dtypes: of the codes and of their scale."""
    rows, columns = shape
    constants: dict[str, Any] = {
        "RESCALE": rescale, "E5M2": dtypes[0] == E5M2, "EXACT_BITS": bits.exact_bits(device),
        "BLOCK_N": tile.tokens, "BLOCK_K": tile.features, "BAND": tile.band, "num_warps": tile.warps,
    }  # fmt: skip
    return Plan(cdiv(rows, tile.tokens) * cdiv(columns, tile.features), (rows, columns, *strides), constants)


def transpose_codes(codes: Tensor) -> Tensor:
    """See `titan_fp8.kernels.float8.transpose_codes`."""
    return _transpose(codes, None, None)


def tensor_columns_from_rows(codes: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """See `titan_fp8.kernels.float8.tensor_columns_from_rows`."""
    largest = kernel.amax(scale).view(torch.float32)
    return _transpose(codes, scale.contiguous(), largest), largest


def _transpose(codes: Tensor, scale: Tensor | None, largest: Tensor | None) -> Tensor:
    shape = codes.shape
    rows, columns = shape
    codes_t = bits.new_codes(columns, rows, dtype=codes.dtype, device=codes.device)
    # A pointer that a variant of the kernel never follows still has to be one.
    scales = codes if scale is None else scale, codes if largest is None else largest
    dtypes = codes.dtype, scales[0].dtype
    _launch((codes, *scales, codes_t), shape, codes.stride(), dtypes, scale is not None, TILE)
    return codes_t
