"""RMSNorm -> float8, alone or with the residual add before it, as Triton kernels.

    _norm_rows_kernel     a program owns whole rows: sum, rstd, output; row codes where their scale lies in the row
                          (rowwise, blockwise); amax of the tensor or of columns
    _norm_tiles_kernel    everything else, in a second read of x: the output of a tile again, from rstd, and its codes

The output is not kept between the two: it is two products away from x, so the second pass reads x in its place. Bytes
moved for a tensor of `a` values in bf16, without a residual add (which adds 2a to read and 2a to write):

    rowwise, blockwise: rows 3a; rows and columns 6a       tensorwise: rows 5a; rows and columns 6a
    columns alone, later: 3a

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

from titan_fp8.kernels.blockwise.reference import BLOCK as BLOCK_SIZE
from titan_fp8.kernels.float8.bits import Tile, _abs_bits, _quads_of_tile, _scales, _tile_of_program, _to_codes
from titan_fp8.kernels.launch import cdiv, fast, next_power_of_2
from titan_fp8.kernels.producers import reference, tiles
from titan_fp8.kernels.producers.reference import BLOCK, ROW, TENSOR, Cast, Produced
from titan_fp8.kernels.producers.tiles import _rounded, _store_codes

# Static block sizes: a search at the first step could choose differently on different ranks.
ROW_BLOCK_MAX = 16384
"""The longest row that a program holds."""
ROW_VALUES, ROW_VALUES_PER_WARP = 4096, 1024
"""Short rows are normed several at a time, up to so many values in a program; and the values of a warp."""
PROGRAMS, STAGES = 2112, 3
"""So many programs walk down the rows, so that each loads the weight once for many of them; and the rows that it has on
their way at a time. With an add, which moves much more, a program takes one block of rows unless it finds amax."""
AMAX_PROGRAMS, AMAX_STAGES = 528, 3
"""The same where amax is found on the way, which ends with atomics."""
AHEAD_BYTES = 65536
"""What waits in shared memory at most; the smallest GPUs that have FP8 give a program 99 KiB of it. Longer rows are not
loaded ahead."""
ROWS_TILE, COLUMNS_TILE, BOTH_TILE = Tile(64, 128, 8, 1), Tile(128, 128, 8, 4, 128), Tile(64, 128, 8, 4)
BLOCK_TILE = Tile(BLOCK_SIZE, BLOCK_SIZE, 8, 4, 128)
"""Tiles of the second pass by the layouts it writes; of blocks, it writes columns."""


@triton.jit(do_not_specialize=["tokens", "rows_per_program"])
def _norm_rows_kernel(
    x_ptr, branch_ptr, weight_ptr, sum_ptr, rstd_ptr, output_ptr, rows_ptr, scale_ptr, amax_ptr,
    tokens, features, rows_per_program, stride_x, stride_branch, eps,
    ADD: tl.constexpr, EMIT: tl.constexpr, GRANULARITY: tl.constexpr, AMAX: tl.constexpr,
    E5M2: tl.constexpr, POWER_OF_TWO: tl.constexpr, EXACT_BITS: tl.constexpr,
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
            largest = tl.maximum(largest, bits)
        if GRANULARITY == "row":
            inv_scale, scale = _scales(tl.max(bits, axis=1), E5M2, True)
            tl.store(scale_ptr + t, scale, mask=mask_t)
            codes = _to_codes(output * inv_scale[:, None], E5M2, EXACT_BITS)
            tl.store(rows_ptr + t[:, None] * features + k[None, :], codes, mask=mask)
        if GRANULARITY == "block":
            blocks: tl.constexpr = BLOCK_K // 128
            inv_scale, scale = _scales(tl.max(tl.reshape(bits, [BLOCK_T, blocks, 128]), axis=2), E5M2, POWER_OF_TWO)
            block = tl.arange(0, blocks).to(tl.int64)
            mask_block = mask_t[:, None] & (block * 128 < features)[None, :]
            tl.store(scale_ptr + block[None, :] * tokens + t[:, None], scale, mask=mask_block)
            scaled = tl.reshape(output, [BLOCK_T, blocks, 128]) * inv_scale[:, :, None]
            codes = _to_codes(tl.reshape(scaled, [BLOCK_T, BLOCK_K]), E5M2, EXACT_BITS)
            tl.store(rows_ptr + t[:, None] * features + k[None, :], codes, mask=mask)
    if AMAX:
        of_columns = tl.max(largest, axis=0)
        if GRANULARITY == "tensor":
            tl.atomic_max(amax_ptr, tl.max(of_columns, axis=0), sem="relaxed")
        else:
            tl.atomic_max(amax_ptr + k, of_columns, mask=k < features, sem="relaxed")


@triton.jit
def _normed(x_ptr, rstd_ptr, weight, t, k, tokens, features, stride_x, dtype: tl.constexpr, EXACT_BITS: tl.constexpr):
    """The norm of rows t, whose rstd is known, rounded to dtype; zero outside."""
    mask = (t < tokens)[:, None] & (k < features)[None, :]
    value = tl.load(x_ptr + t[:, None] * stride_x + k[None, :], mask=mask, other=0).to(tl.float32)
    rstd = tl.load(rstd_ptr + t, mask=t < tokens, other=0.0)
    return _rounded((value * rstd[:, None]) * weight[None, :], dtype, EXACT_BITS)


@triton.jit(do_not_specialize=["tokens"])
def _norm_tiles_kernel(
    x_ptr, rstd_ptr, weight_ptr, row_amax_ptr, column_amax_ptr,
    rows_ptr, row_scale_ptr, columns_ptr, column_scale_ptr,
    tokens, features, padded_tokens, stride_x,
    GRANULARITY: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    E5M2: tl.constexpr, POWER_OF_TWO: tl.constexpr, EXACT_BITS: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, BAND: tl.constexpr,
):  # fmt: skip
    """Codes of one tile of the norm of x, whose rstd is known."""
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    pid_t, pid_k = _tile_of_program(tl.program_id(0), tl.cdiv(padded_tokens, BLOCK_T), tl.cdiv(features, BLOCK_K), BAND)
    quad, k = _quads_of_tile(pid_t, pid_k, BLOCK_T, BLOCK_K)
    t = 4 * quad
    weight = _rounded(tl.load(weight_ptr + k, mask=k < features, other=0).to(tl.float32), dtype, EXACT_BITS)
    # All loads come before any store: pointers may alias, so the compiler keeps their order.
    a = _normed(x_ptr, rstd_ptr, weight, t, k, tokens, features, stride_x, dtype, EXACT_BITS)
    b = _normed(x_ptr, rstd_ptr, weight, t + 1, k, tokens, features, stride_x, dtype, EXACT_BITS)
    c = _normed(x_ptr, rstd_ptr, weight, t + 2, k, tokens, features, stride_x, dtype, EXACT_BITS)
    d = _normed(x_ptr, rstd_ptr, weight, t + 3, k, tokens, features, stride_x, dtype, EXACT_BITS)
    _store_codes(
        a, b, c, d, pid_t, pid_k, tokens, features, padded_tokens,
        row_amax_ptr, column_amax_ptr, rows_ptr, row_scale_ptr, columns_ptr, column_scale_ptr,
        GRANULARITY, ROWS, COLUMNS, E5M2, POWER_OF_TWO, EXACT_BITS, BLOCK_T, BLOCK_K,
    )  # fmt: skip


def rms_norm(
    x: Tensor, branch: Tensor | None, weight: Tensor, eps: float, cast: Cast, *, keeps_amax: bool = False
) -> tuple[Tensor | None, Tensor, Tensor | None, Produced]:
    """See `titan_fp8.kernels.producers.rms_norm`. Tensors have contiguous rows."""
    if x.shape[1] > ROW_BLOCK_MAX:
        return reference.rms_norm(x, branch, weight, eps, cast, keeps_amax=keeps_amax)
    total = None if branch is None else torch.empty(x.shape, dtype=x.dtype, device=x.device)
    rstd = tiles.new_fp32(x.shape[0], like=x)
    forms = tiles.new_forms(x, cast)
    needs_amax = cast.granularity == TENSOR or (cast.granularity == ROW and (cast.columns or keeps_amax))
    amax = rstd
    if needs_amax:
        (amax,) = tiles.new_amaxes(1 if cast.granularity == TENSOR else x.shape[1], device=x.device)
    _launch_rows(x, branch, weight, eps, (total, rstd, amax), forms, needs_amax=needs_amax)
    if cast.granularity == TENSOR or cast.columns:
        _launch_tiles(x if total is None else total, weight, rstd, amax, forms)
    if not (keeps_amax and needs_amax):
        return total, rstd, None, forms.result()
    return total, rstd, amax[0] if cast.granularity == TENSOR else amax[: x.shape[1]], forms.result()


def norm_columns(x: Tensor, weight: Tensor, rstd: Tensor, amax: Tensor | None, cast: Cast) -> Produced:
    """See `titan_fp8.kernels.producers.norm_columns`. x has contiguous rows."""
    if x.shape[1] > ROW_BLOCK_MAX:
        return reference.norm_columns(x, weight, rstd, cast)
    forms = tiles.new_forms(x, reference.columns_alone(cast))
    _launch_tiles(x, weight, rstd, rstd if amax is None else amax, forms)
    return forms.result()


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
    # Neither block sizes nor warps may depend on what is asked for: rstd would be summed in another order. How many
    # rows a program takes, and how many ahead, may.
    block_k = max(next_power_of_2(features), 128)
    block_t = max(1, ROW_VALUES // block_k)
    rows_per_program, stages = block_t, 1
    if needs_amax or branch is None:
        programs, stages = (AMAX_PROGRAMS, AMAX_STAGES) if needs_amax else (PROGRAMS, STAGES)
        rows_per_program = block_t * cdiv(tokens, programs * block_t)
        loaded = block_t * block_k * x.element_size() * (1 if branch is None else 2)
        stages = stages if (stages - 1) * loaded <= AHEAD_BYTES else 1
    fast(_norm_rows_kernel)[(cdiv(tokens, rows_per_program),)](
        x, x if branch is None else branch, weight, x if total is None else total, rstd, output, rows, scale, amax,
        tokens, features, rows_per_program, x.stride(0), 0 if branch is None else branch.stride(0), eps,
        ADD=branch is not None, EMIT=cast.emit, GRANULARITY=cast.granularity, AMAX=needs_amax,
        BLOCK_T=block_t, BLOCK_K=block_k, STAGES=stages,
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
    constants: dict[str, Any] = tiles.flags(cast, x.device) | {"ROWS": rows}
    grid = (cdiv(forms.padded_tokens, tile.tokens) * cdiv(features, tile.features),)
    fast(_norm_tiles_kernel)[grid](
        x, rstd, weight, amax, amax, *forms.pointers(rstd)[1:], tokens, features, forms.padded_tokens, x.stride(0),
        BLOCK_T=tile.tokens, BLOCK_K=tile.features, BAND=tile.band, num_warps=tile.warps, maxnreg=tile.registers,
        **constants, **tiles.LAUNCH,
    )  # fmt: skip
