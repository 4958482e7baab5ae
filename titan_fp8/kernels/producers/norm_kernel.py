"""RMSNorm -> float8, alone or with the residual add before it, as Triton kernels.

    _norm_rows_kernel     a program owns whole rows: sum, rstd, output; row codes where their scale lies in the row
                          (rowwise, blockwise); amax of the tensor or of columns
    _norm_tiles_kernel    everything else, in a second read of x: the output of a tile again, from rstd, and its codes

The output is not kept between the two: it is two products away from x, so the second pass reads x in its place. Bytes
moved for a tensor of `a` values in bf16, without a residual add (which adds 2a to read and 2a to write):

    rowwise, blockwise: rows 3a; rows and columns 6a       tensorwise: rows 5a; rows and columns 6a

A row must fit a program; rows longer than that (wider than any model's) take the reference's formula and the plain
casts.

T tokens, K features.
"""

# Triton's language is not Python's; pyright takes the kernels for ordinary functions.
# pyright: reportCallIssue=false, reportAssignmentType=false, reportOperatorIssue=false, reportAttributeAccessIssue=false
# pyright: reportGeneralTypeIssues=false

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from titan_fp8.kernels.float8.kernel import Tile, _abs_bits, _on_device, _scales, _tile_of_program, _to_codes
from titan_fp8.kernels.producers import reference, tiles
from titan_fp8.kernels.producers.reference import BLOCK, ROW, TENSOR, Cast, Produced
from titan_fp8.kernels.producers.tiles import _rounded, _store_codes

# Static block sizes: a search at the first step could choose differently on different ranks.
ROW_BLOCK_MAX = 16384
"""The longest row that a program holds."""
ROW_VALUES, ROW_VALUES_PER_WARP = 4096, 512
"""Short rows are normed several at a time, up to so many values in a program; and the values of a warp."""
AMAX_PROGRAMS, AMAX_STAGES = 528, 2
"""A kernel that also finds amax walks down the rows with so many programs, to combine them before it takes atomics;
and the rows it loads ahead."""
ROWS_TILE, COLUMNS_TILE, BOTH_TILE = Tile(128, 64, 8, 1), Tile(64, 128, 8, 4), Tile(64, 128, 8, 4)
BLOCK_TILE = Tile(128, 64, 8, 1)
"""Tiles of the second pass by the layouts it writes; of blocks, it writes columns."""


@triton.jit(do_not_specialize=["tokens", "rows_per_program"])
def _norm_rows_kernel(
    x_ptr, branch_ptr, weight_ptr, sum_ptr, rstd_ptr, output_ptr, rows_ptr, scale_ptr, amax_ptr,
    tokens, features, rows_per_program, stride_x, stride_branch, eps,
    ADD: tl.constexpr, EMIT: tl.constexpr, GRANULARITY: tl.constexpr, AMAX: tl.constexpr,
    E5M2: tl.constexpr, POWER_OF_TWO: tl.constexpr, EXACT_BITS: tl.constexpr, SELECT_NAN: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Norm of `rows_per_program` rows, BLOCK_T at a time.

    ADD: of x + branch, which is stored. EMIT: store the output. GRANULARITY "row" and "block": store row codes.
    AMAX: integer maximum of |output| into amax_ptr (zeroed): one number for "tensor", otherwise of each column.
    """
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    k = tl.arange(0, BLOCK_K).to(tl.int64)
    weight = _rounded(tl.load(weight_ptr + k, mask=k < features, other=0).to(tl.float32), dtype, EXACT_BITS)
    first = tl.program_id(0).to(tl.int64) * rows_per_program
    largest = tl.zeros([BLOCK_T, BLOCK_K], dtype=tl.int32)
    for step in tl.range(0, rows_per_program, BLOCK_T, num_stages=STAGES):
        t = first + step + tl.arange(0, BLOCK_T)
        mask_t = t < tokens
        mask = mask_t[:, None] & (k < features)[None, :]
        value = tl.load(x_ptr + t[:, None] * stride_x + k[None, :], mask=mask, other=0).to(tl.float32)
        if ADD:
            branch = tl.load(branch_ptr + t[:, None] * stride_branch + k[None, :], mask=mask, other=0)
            value = _rounded(value + branch.to(tl.float32), dtype, EXACT_BITS)
            tl.store(sum_ptr + t[:, None] * features + k[None, :], value.to(dtype), mask=mask)
        mean = tl.div_rn(tl.sum(value * value, axis=1), features * 1.0)
        rstd = tl.div_rn(1.0, tl.sqrt_rn(mean + eps))
        tl.store(rstd_ptr + t, rstd, mask=mask_t)
        output = _rounded((value * rstd[:, None]) * weight[None, :], dtype, EXACT_BITS)
        if EMIT:
            tl.store(output_ptr + t[:, None] * features + k[None, :], output.to(dtype), mask=mask)
        bits = _abs_bits(output)
        if AMAX:
            largest = tl.maximum(largest, tl.where(mask, bits, 0))
        if GRANULARITY == "row":
            inv_scale, scale = _scales(tl.max(bits, axis=1), E5M2, True)
            tl.store(scale_ptr + t, scale, mask=mask_t)
            codes = _to_codes(output * inv_scale[:, None], E5M2, EXACT_BITS, SELECT_NAN)
            tl.store(rows_ptr + t[:, None] * features + k[None, :], codes, mask=mask)
        if GRANULARITY == "block":
            blocks: tl.constexpr = BLOCK_K // 128
            inv_scale, scale = _scales(tl.max(tl.reshape(bits, [BLOCK_T, blocks, 128]), axis=2), E5M2, POWER_OF_TWO)
            block = tl.arange(0, blocks).to(tl.int64)
            mask_block = mask_t[:, None] & (block * 128 < features)[None, :]
            tl.store(scale_ptr + block[None, :] * tokens + t[:, None], scale, mask=mask_block)
            scaled = tl.reshape(output, [BLOCK_T, blocks, 128]) * inv_scale[:, :, None]
            codes = _to_codes(tl.reshape(scaled, [BLOCK_T, BLOCK_K]), E5M2, EXACT_BITS, SELECT_NAN)
            tl.store(rows_ptr + t[:, None] * features + k[None, :], codes, mask=mask)
    if AMAX:
        of_columns = tl.max(largest, axis=0)
        if GRANULARITY == "tensor":
            tl.atomic_max(amax_ptr, tl.max(of_columns, axis=0))
        else:
            tl.atomic_max(amax_ptr + k, of_columns, mask=k < features)


@triton.jit(do_not_specialize=["tokens"])
def _norm_tiles_kernel(
    x_ptr, rstd_ptr, weight_ptr, row_amax_ptr, column_amax_ptr,
    output_ptr, rows_ptr, row_scale_ptr, columns_ptr, column_scale_ptr,
    tokens, features, padded_tokens, stride_x,
    GRANULARITY: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, EMIT: tl.constexpr,
    E5M2: tl.constexpr, POWER_OF_TWO: tl.constexpr, EXACT_BITS: tl.constexpr, SELECT_NAN: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, BAND: tl.constexpr,
):  # fmt: skip
    """Codes of one tile of the norm of x, whose rstd is known."""
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    pid_t, pid_k = _tile_of_program(tl.program_id(0), tl.cdiv(padded_tokens, BLOCK_T), tl.cdiv(features, BLOCK_K), BAND)
    t = pid_t.to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    k = pid_k.to(tl.int64) * BLOCK_K + tl.arange(0, BLOCK_K)
    mask = (t < tokens)[:, None] & (k < features)[None, :]
    value = tl.load(x_ptr + t[:, None] * stride_x + k[None, :], mask=mask, other=0).to(tl.float32)
    rstd = tl.load(rstd_ptr + t, mask=t < tokens, other=0.0)
    weight = _rounded(tl.load(weight_ptr + k, mask=k < features, other=0).to(tl.float32), dtype, EXACT_BITS)
    output = _rounded((value * rstd[:, None]) * weight[None, :], dtype, EXACT_BITS)
    output = tl.where(mask, output, 0.0)  # a NaN of the weight must not reach the padding
    if EMIT:
        tl.store(output_ptr + t[:, None] * features + k[None, :], output.to(dtype), mask=mask)
    _store_codes(
        output, pid_t, pid_k, tokens, features, padded_tokens,
        row_amax_ptr, column_amax_ptr, rows_ptr, row_scale_ptr, columns_ptr, column_scale_ptr,
        GRANULARITY, ROWS, COLUMNS, E5M2, POWER_OF_TWO, EXACT_BITS, SELECT_NAN, BLOCK_T, BLOCK_K,
    )  # fmt: skip


def rms_norm(
    x: Tensor, branch: Tensor | None, weight: Tensor, eps: float, cast: Cast
) -> tuple[Tensor | None, Tensor, Produced]:
    """See `titan_fp8.kernels.producers.rms_norm`. Tensors have contiguous rows."""
    if x.shape[1] > ROW_BLOCK_MAX:
        return _wide_rms_norm(x, branch, weight, eps, cast)
    total = None if branch is None else torch.empty(x.shape, dtype=x.dtype, device=x.device)
    rstd = tiles.new_fp32(x.shape[0], like=x)
    forms = tiles.new_forms(x, cast)
    needs_amax = cast.granularity == TENSOR or (cast.granularity == ROW and cast.columns)
    amax = rstd
    if needs_amax:
        (amax,) = tiles.new_amaxes(1 if cast.granularity == TENSOR else x.shape[1], device=x.device)
    with _on_device(x):
        _launch_rows(x, branch, weight, eps, (total, rstd, amax), forms, needs_amax=needs_amax)
        if cast.granularity == TENSOR or cast.columns:
            _launch_tiles(x if total is None else total, weight, rstd, amax, forms)
    return total, rstd, forms.result()


def _launch_rows(
    x: Tensor,
    branch: Tensor | None,
    weight: Tensor,
    eps: float,
    outputs: tuple[Tensor | None, Tensor, Tensor],
    forms: tiles.Forms,
    *,
    needs_amax: bool,
) -> None:
    """Fill `outputs`: sum, rstd, amax; the emitted output; and the row codes, but for one scale for the tensor."""
    tokens, features = x.shape
    total, rstd, amax = outputs
    cast = forms.cast
    output, rows, scale, *_ = forms.pointers(rstd)
    # Block sizes must not depend on what is asked for: rstd would be summed in another order.
    block_k = max(triton.next_power_of_2(features), 128)
    block_t = max(1, ROW_VALUES // block_k)
    rows_per_program = block_t
    if needs_amax:
        rows_per_program *= triton.cdiv(tokens, AMAX_PROGRAMS * block_t)
    _norm_rows_kernel[(triton.cdiv(tokens, rows_per_program),)](
        x, x if branch is None else branch, weight, x if total is None else total, rstd, output, rows, scale, amax,
        tokens, features, rows_per_program, x.stride(0), 0 if branch is None else branch.stride(0), eps,
        ADD=branch is not None, EMIT=cast.emit, GRANULARITY=cast.granularity, AMAX=needs_amax,
        BLOCK_T=block_t, BLOCK_K=block_k, STAGES=AMAX_STAGES if needs_amax else 1,
        num_warps=min(16, max(4, block_k // ROW_VALUES_PER_WARP)),
        **tiles.format_flags(cast, x.device), **tiles.LAUNCH,
    )  # fmt: skip


def _launch_tiles(x: Tensor, weight: Tensor, rstd: Tensor, amax: Tensor, forms: tiles.Forms) -> None:
    """Fill the codes that the rows kernel has not."""
    tokens, features = x.shape
    cast = forms.cast
    rows = cast.rows and cast.granularity == TENSOR
    both_or_rows = BOTH_TILE if cast.columns else ROWS_TILE
    tile = both_or_rows if rows else BLOCK_TILE if cast.granularity == BLOCK else COLUMNS_TILE
    constants: dict[str, Any] = tiles.flags(cast, x.device) | {"ROWS": rows, "EMIT": False}
    grid = (triton.cdiv(forms.padded_tokens, tile.tokens) * triton.cdiv(features, tile.features),)
    _norm_tiles_kernel[grid](
        x, rstd, weight, amax, amax, *forms.pointers(rstd), tokens, features, forms.padded_tokens, x.stride(0),
        BLOCK_T=tile.tokens, BLOCK_K=tile.features, BAND=tile.band, num_warps=tile.warps, **constants, **tiles.LAUNCH,
    )  # fmt: skip


def _wide_rms_norm(
    x: Tensor, branch: Tensor | None, weight: Tensor, eps: float, cast: Cast
) -> tuple[Tensor | None, Tensor, Produced]:
    total, rstd, output = reference.norm_output(x, branch, weight, eps)
    return total, rstd, reference.quantize(output, cast)
