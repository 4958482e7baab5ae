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

import torch
import triton
import triton.language as tl
from torch import Tensor

from titan_fp8.kernels.float8 import kernel
from titan_fp8.kernels.float8.kernel import _from_codes, _tile_of_program, _to_codes
from titan_fp8.kernels.float8.reference import E5M2
from titan_fp8.kernels.launch import cdiv, fast

TILE = kernel.Tile(128, 128, 4, 4)


@triton.jit
def _transpose_kernel(
    codes_ptr, scale_ptr, largest_ptr, codes_t_ptr, rows, columns, stride_n, stride_k,
    RESCALE: tl.constexpr, E5M2: tl.constexpr, EXACT_BITS: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BAND: tl.constexpr,
):  # fmt: skip
    """One tile. RESCALE: from `scale_ptr`, one a row, to the one at `largest_ptr`."""
    pid_n, pid_k = _tile_of_program(tl.program_id(0), tl.cdiv(rows, BLOCK_N), tl.cdiv(columns, BLOCK_K), BAND)
    n = pid_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = pid_k.to(tl.int64) * BLOCK_K + tl.arange(0, BLOCK_K)
    mask = (n < rows)[:, None] & (k < columns)[None, :]
    codes = tl.load(codes_ptr + n[:, None] * stride_n + k[None, :] * stride_k, mask=mask, other=0)
    if RESCALE:
        largest = tl.load(largest_ptr)
        shift = tl.load(scale_ptr + n, mask=n < rows, other=0.0) * tl.div_rn(1.0, largest)
        codes = _to_codes(_from_codes(codes, E5M2, EXACT_BITS) * shift[:, None], E5M2, EXACT_BITS, False)
    codes_t_at = codes_t_ptr + k[:, None] * rows + n[None, :]
    mask_t = (k < columns)[:, None] & (n < rows)[None, :]
    tl.store(codes_t_at, tl.trans(codes), mask=mask_t)
    if RESCALE:  # noqa: SIM102 - settled when this is compiled, the next when it runs
        if largest != largest:
            # The hardware's code for NaN is not ours, and selecting ours for each value costs more than this.
            tl.debug_barrier()
            tl.store(codes_t_at, tl.full([BLOCK_K, BLOCK_N], 0x7F, tl.uint8), mask=mask_t)


def transpose_codes(codes: Tensor) -> Tensor:
    """See `titan_fp8.kernels.float8.transpose_codes`."""
    return _transpose(codes, None, None)


def tensor_columns_from_rows(codes: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """See `titan_fp8.kernels.float8.tensor_columns_from_rows`."""
    largest = kernel.amax(scale).view(torch.float32)
    return _transpose(codes, scale.contiguous(), largest), largest


def _transpose(codes: Tensor, scale: Tensor | None, largest: Tensor | None) -> Tensor:
    rows, columns = codes.shape
    codes_t = kernel.new_codes(columns, rows, device=codes.device)
    as_bytes = codes.view(torch.uint8)
    fast(_transpose_kernel)[(cdiv(rows, TILE.tokens) * cdiv(columns, TILE.features),)](
        as_bytes, *(codes_t if tensor is None else tensor for tensor in (scale, largest)), codes_t,
        rows, columns, *codes.stride(),
        RESCALE=scale is not None, E5M2=codes.dtype == E5M2, EXACT_BITS=kernel._exact_bits(codes.device),
        BLOCK_N=TILE.tokens, BLOCK_K=TILE.features, BAND=TILE.band, num_warps=TILE.warps,
    )  # fmt: skip
    return codes_t.view(codes.dtype)
