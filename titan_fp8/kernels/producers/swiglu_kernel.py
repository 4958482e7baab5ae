"""SwiGLU -> float8 and its backward straight to float8 gradients, as Triton kernels.

    _swiglu_tiles_kernel   the output (or both gradients) of one tile, and its codes in the layouts asked for
    _swiglu_rows_kernel    in its place for rowwise codes by rows alone: a program owns whole rows

Where a scale spans tiles, `swiglu_amax_kernel.py` comes first: the amax of the tensor, or of rows and columns.

A program of 128 x 128 values owns the blocks of both layouts, so blockwise is one pass. The others compute the output
twice and never store it: reading gate and up again costs as many bytes as writing the output and reading it back, and
in backward fewer; no temporary is allocated. Bytes moved for tensors of `a` values in bf16, forward / backward:

    blockwise: 6a / 10a     tensorwise, rowwise: 10a / 16a     rowwise, rows alone: 5a forward

and a more for the output's columns, made again in backward.

T tokens, H hidden features.
"""

# Triton's language is not Python's; pyright takes the kernels for ordinary functions.
# pyright: reportCallIssue=false, reportAssignmentType=false, reportOperatorIssue=false, reportAttributeAccessIssue=false
# pyright: reportGeneralTypeIssues=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from titan_fp8.kernels.blockwise.reference import BLOCK as BLOCK_SIZE
from titan_fp8.kernels.float8 import E5M2
from titan_fp8.kernels.float8.bits import (
    Tile,
    _abs_bits,
    _quads_of_tile,
    _scales,
    _tile_of_program,
    _to_codes,
)
from titan_fp8.kernels.launch import cdiv, fast, next_power_of_2
from titan_fp8.kernels.producers import swiglu_amax_kernel, tiles
from titan_fp8.kernels.producers.reference import BLOCK, ROW, TENSOR, Cast, Produced, output_cast
from titan_fp8.kernels.producers.swiglu_values import _gradients, _load, _load_value, _output, _value
from titan_fp8.kernels.producers.tiles import _store_codes

# Static block sizes: a search at the first step could choose differently on different ranks.
FORWARD_ROWS_TILE, FORWARD_TILE = Tile(64, 128, 8, 1), Tile(64, 128, 8, 4)
BACKWARD_TILE, BACKWARD_ROW_TILE = Tile(32, 128, 4, 8), Tile(32, 128, 4, 4)
FORWARD_BLOCK_TILE, BACKWARD_BLOCK_TILE = Tile(BLOCK_SIZE, BLOCK_SIZE, 8, 4), Tile(BLOCK_SIZE, BLOCK_SIZE, 16, 4)
ROW_BLOCK_MAX = 16384
"""A row of up to this many values stays in registers between its amax and its cast; a longer one is computed twice."""
ROW_VALUES, ROW_VALUES_PER_WARP, ROW_REGISTERS = 4096, 2048, 128
"""Short rows are cast several at a time, up to so many values in a program; the values of a warp; and the registers of
a thread, so that more than one program fits a multiprocessor."""


@triton.jit
def _inputs(
    grad_ptr, gate_ptr, up_ptr, t, k, tokens, features, stride_grad, stride_gate, stride_up, BACKWARD: tl.constexpr
):  # fmt: skip
    """`(grad, gate, up)` at rows t, as they are stored, zero outside; without BACKWARD, gate stands for grad."""
    mask = (t < tokens)[:, None] & (k < features)[None, :]
    gate = tl.load(gate_ptr + t[:, None] * stride_gate + k[None, :], mask=mask, other=0)
    up = tl.load(up_ptr + t[:, None] * stride_up + k[None, :], mask=mask, other=0)
    grad = gate
    if BACKWARD:
        grad = tl.load(grad_ptr + t[:, None] * stride_grad + k[None, :], mask=mask, other=0)
    return grad, gate, up


@triton.jit
def _values(
    grad, gate, up, gate_scale_ptr, up_scale_ptr, t, tokens,
    BACKWARD: tl.constexpr, CODES: tl.constexpr, dtype: tl.constexpr, EXACT_BITS: tl.constexpr,
):  # fmt: skip
    """The output twice, or `(grad_gate, grad_up)`, of rows t: fp32, rounded."""
    grad = grad.to(tl.float32)
    gate = _value(gate, gate_scale_ptr, t, tokens, CODES, EXACT_BITS)
    up = _value(up, up_scale_ptr, t, tokens, CODES, EXACT_BITS)
    if BACKWARD:
        value, up_value = _gradients(grad, gate, up, dtype, EXACT_BITS)
    else:
        value = _output(gate, up, dtype, EXACT_BITS)
        up_value = value
    return value, up_value


@triton.jit
def _again(
    gate_ptr, up_ptr, gate_scale_ptr, up_scale_ptr, t, k, tokens, features, stride_gate, stride_up,
    CODES: tl.constexpr, dtype: tl.constexpr, EXACT_BITS: tl.constexpr,
):  # fmt: skip
    """The output at rows t: fp32, rounded, zero outside."""
    gate = _load_value(gate_ptr, gate_scale_ptr, t, k, stride_gate, tokens, features, CODES, EXACT_BITS)
    up = _load_value(up_ptr, up_scale_ptr, t, k, stride_up, tokens, features, CODES, EXACT_BITS)
    return _output(gate, up, dtype, EXACT_BITS)


@triton.jit
def _emit(output_ptr, a, b, c, d, quad, k, tokens, features, dtype: tl.constexpr):
    """Store a tile in the activations' dtype, given as the four rows of each quad."""
    t = 4 * quad
    at = output_ptr + t[:, None] * features + k[None, :]
    mask_k = (k < features)[None, :]
    tl.store(at, a.to(dtype), mask=(t < tokens)[:, None] & mask_k)
    tl.store(at + features, b.to(dtype), mask=(t + 1 < tokens)[:, None] & mask_k)
    tl.store(at + 2 * features, c.to(dtype), mask=(t + 2 < tokens)[:, None] & mask_k)
    tl.store(at + 3 * features, d.to(dtype), mask=(t + 3 < tokens)[:, None] & mask_k)


@triton.jit(do_not_specialize=["tokens"])
def _swiglu_tiles_kernel(
    grad_ptr, gate_ptr, up_ptr, gate_scale_ptr, up_scale_ptr,
    row_amax_ptr, column_amax_ptr, output_ptr, rows_ptr, row_scale_ptr, columns_ptr, column_scale_ptr,
    up_row_amax_ptr, up_column_amax_ptr, up_output_ptr, up_rows_ptr, up_row_scale_ptr, up_columns_ptr,
    up_column_scale_ptr, output_amax_ptr, output_columns_ptr, output_scale_ptr,
    tokens, features, padded_tokens, stride_grad, stride_gate, stride_up,
    BACKWARD: tl.constexpr, CODES: tl.constexpr, OUTPUT: tl.constexpr, OUTPUT_GRANULARITY: tl.constexpr,
    OUTPUT_E5M2: tl.constexpr, GRANULARITY: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, EMIT: tl.constexpr,
    E5M2: tl.constexpr, POWER_OF_TWO: tl.constexpr, EXACT_BITS: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, BAND: tl.constexpr,
):  # fmt: skip
    """Codes of one tile of the output, or of grad_gate and grad_up (the pointers that begin with `up_`) and, with
    OUTPUT, of the output by columns. CODES: gate and up are e4m3 codes with a scale a row."""
    dtype: tl.constexpr = grad_ptr.dtype.element_ty
    pid_t, pid_k = _tile_of_program(tl.program_id(0), tl.cdiv(padded_tokens, BLOCK_T), tl.cdiv(features, BLOCK_K), BAND)
    quad, k = _quads_of_tile(pid_t, pid_k, BLOCK_T, BLOCK_K)
    t = 4 * quad
    # All loads come before any store: pointers may alias, so the compiler keeps their order.
    a_grad, a_gate, a_up = _inputs(
        grad_ptr, gate_ptr, up_ptr, t, k, tokens, features, stride_grad, stride_gate, stride_up, BACKWARD
    )
    b_grad, b_gate, b_up = _inputs(
        grad_ptr, gate_ptr, up_ptr, t + 1, k, tokens, features, stride_grad, stride_gate, stride_up, BACKWARD
    )
    c_grad, c_gate, c_up = _inputs(
        grad_ptr, gate_ptr, up_ptr, t + 2, k, tokens, features, stride_grad, stride_gate, stride_up, BACKWARD
    )
    d_grad, d_gate, d_up = _inputs(
        grad_ptr, gate_ptr, up_ptr, t + 3, k, tokens, features, stride_grad, stride_gate, stride_up, BACKWARD
    )
    a, a_up = _values(a_grad, a_gate, a_up, gate_scale_ptr, up_scale_ptr, t, tokens, BACKWARD, CODES, dtype, EXACT_BITS)
    b, b_up = _values(
        b_grad, b_gate, b_up, gate_scale_ptr, up_scale_ptr, t + 1, tokens, BACKWARD, CODES, dtype, EXACT_BITS
    )
    c, c_up = _values(
        c_grad, c_gate, c_up, gate_scale_ptr, up_scale_ptr, t + 2, tokens, BACKWARD, CODES, dtype, EXACT_BITS
    )
    d, d_up = _values(
        d_grad, d_gate, d_up, gate_scale_ptr, up_scale_ptr, t + 3, tokens, BACKWARD, CODES, dtype, EXACT_BITS
    )
    if EMIT:
        _emit(output_ptr, a, b, c, d, quad, k, tokens, features, dtype)
    _store_codes(
        a, b, c, d, pid_t, pid_k, tokens, features, padded_tokens,
        row_amax_ptr, column_amax_ptr, rows_ptr, row_scale_ptr, columns_ptr, column_scale_ptr,
        GRANULARITY, ROWS, COLUMNS, E5M2, POWER_OF_TWO, EXACT_BITS, BLOCK_T, BLOCK_K,
    )  # fmt: skip
    if BACKWARD:
        if EMIT:
            _emit(up_output_ptr, a_up, b_up, c_up, d_up, quad, k, tokens, features, dtype)
        _store_codes(
            a_up, b_up, c_up, d_up, pid_t, pid_k, tokens, features, padded_tokens,
            up_row_amax_ptr, up_column_amax_ptr, up_rows_ptr, up_row_scale_ptr, up_columns_ptr, up_column_scale_ptr,
            GRANULARITY, ROWS, COLUMNS, E5M2, POWER_OF_TWO, EXACT_BITS, BLOCK_T, BLOCK_K,
        )  # fmt: skip
    if OUTPUT:
        # Gate and up are loaded again, from a cache: kept until here, they would take registers from the gradients.
        a = _again(
            gate_ptr, up_ptr, gate_scale_ptr, up_scale_ptr, t, k, tokens, features, stride_gate, stride_up,
            CODES, dtype, EXACT_BITS,
        )  # fmt: skip
        b = _again(
            gate_ptr, up_ptr, gate_scale_ptr, up_scale_ptr, t + 1, k, tokens, features, stride_gate, stride_up,
            CODES, dtype, EXACT_BITS,
        )  # fmt: skip
        c = _again(
            gate_ptr, up_ptr, gate_scale_ptr, up_scale_ptr, t + 2, k, tokens, features, stride_gate, stride_up,
            CODES, dtype, EXACT_BITS,
        )  # fmt: skip
        d = _again(
            gate_ptr, up_ptr, gate_scale_ptr, up_scale_ptr, t + 3, k, tokens, features, stride_gate, stride_up,
            CODES, dtype, EXACT_BITS,
        )  # fmt: skip
        _store_codes(
            a, b, c, d, pid_t, pid_k, tokens, features, padded_tokens,
            output_amax_ptr, output_amax_ptr, output_columns_ptr, output_scale_ptr, output_columns_ptr,
            output_scale_ptr, OUTPUT_GRANULARITY, False, True, OUTPUT_E5M2, POWER_OF_TWO, EXACT_BITS, BLOCK_T, BLOCK_K,
        )  # fmt: skip


@triton.jit(do_not_specialize=["tokens"])
def _swiglu_rows_kernel(
    gate_ptr, up_ptr, output_ptr, codes_ptr, scale_ptr, tokens, features, stride_gate, stride_up,
    EMIT: tl.constexpr, E5M2: tl.constexpr, POWER_OF_TWO: tl.constexpr, EXACT_BITS: tl.constexpr,
    ONE_BLOCK: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Rowwise codes and scales of BLOCK_T whole rows. ONE_BLOCK: a row fits one block and is computed once."""
    dtype: tl.constexpr = gate_ptr.dtype.element_ty
    t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    mask_t = (t < tokens)[:, None]
    largest = tl.zeros([BLOCK_T, BLOCK_K], dtype=tl.int32)
    output = tl.zeros([BLOCK_T, BLOCK_K], dtype=tl.float32)
    for start in range(0, features, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K).to(tl.int64)
        mask = mask_t & (k < features)[None, :]
        gate, up = _load(gate_ptr, t, k, stride_gate, mask), _load(up_ptr, t, k, stride_up, mask)
        output = _output(gate, up, dtype, EXACT_BITS)
        largest = tl.maximum(largest, _abs_bits(output))
    inv_scale, scale = _scales(tl.max(largest, axis=1), E5M2, POWER_OF_TWO)
    tl.store(scale_ptr + t, scale, mask=t < tokens)
    for start in range(0, features, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K).to(tl.int64)
        mask = mask_t & (k < features)[None, :]
        if not ONE_BLOCK:
            gate, up = _load(gate_ptr, t, k, stride_gate, mask), _load(up_ptr, t, k, stride_up, mask)
            output = _output(gate, up, dtype, EXACT_BITS)
        if EMIT:
            tl.store(output_ptr + t[:, None] * features + k[None, :], output.to(dtype), mask=mask)
        codes = _to_codes(output * inv_scale[:, None], E5M2, EXACT_BITS)
        tl.store(codes_ptr + t[:, None] * features + k[None, :], codes, mask=mask)


def swiglu(gate: Tensor, up: Tensor, cast: Cast) -> Produced:
    """See `titan_fp8.kernels.producers.swiglu`. Tensors have contiguous rows."""
    forms = tiles.new_forms(gate, cast)
    if cast.granularity == ROW and cast.rows and not cast.columns:
        _launch_rows(gate, up, forms)
    else:
        _launch_tiles((gate, gate, up), None, [forms], None, is_backward=False)
    return forms.result()


def swiglu_backward(
    grad: Tensor,
    gate: Tensor,
    up: Tensor,
    cast: Cast,
    output_columns: torch.dtype | None,
    scales: tuple[Tensor, Tensor] | None = None,
) -> tuple[Produced, Produced, Produced | None]:
    """See `titan_fp8.kernels.producers.swiglu_backward`. Tensors have contiguous rows."""
    forms = [tiles.new_forms(grad, cast) for _ in range(2)]
    output = None if output_columns is None else tiles.new_forms(grad, output_cast(cast, output_columns))
    if scales is not None:
        gate, up = gate.view(torch.uint8), up.view(torch.uint8)
    _launch_tiles((grad, gate, up), scales, forms, output, is_backward=True)
    return forms[0].result(), forms[1].result(), None if output is None else output.result()


def _launch_rows(gate: Tensor, up: Tensor, forms: tiles.Forms) -> None:
    tokens, features = gate.shape
    block_k = min(next_power_of_2(features), ROW_BLOCK_MAX)
    block_t = max(1, ROW_VALUES // block_k)
    output, codes, scale, *_ = forms.pointers(gate)
    fast(_swiglu_rows_kernel)[(cdiv(tokens, block_t),)](
        gate, up, output, codes, scale, tokens, features, gate.stride(0), up.stride(0),
        EMIT=forms.cast.emit, ONE_BLOCK=features <= block_k, BLOCK_T=block_t, BLOCK_K=block_k,
        num_warps=min(16, max(4, block_k // ROW_VALUES_PER_WARP)), maxnreg=ROW_REGISTERS,
        **tiles.format_flags(forms.cast, gate.device), **tiles.LAUNCH,
    )  # fmt: skip


def _launch_tiles(
    inputs: tuple[Tensor, Tensor, Tensor],
    scales: tuple[Tensor, Tensor] | None,
    forms: list[tiles.Forms],
    output: tiles.Forms | None,
    *,
    is_backward: bool,
) -> None:
    """Fill the forms of the output, or of grad_gate and grad_up and then, if asked, those of the output.

    inputs: the gradient (forward: any tensor of the activations' dtype), gate and up; scales: of these, if codes.
    """
    gate = inputs[1]
    tokens, features = gate.shape
    cast, padded_tokens = forms[0].cast, forms[0].padded_tokens
    strides = [each.stride(0) for each in inputs]
    amaxes = [gate] * 5
    if cast.granularity != BLOCK and (cast.rows or cast.columns or output is not None):
        amaxes = swiglu_amax_kernel.amaxes(inputs, scales, cast, is_backward=is_backward, of_output=output is not None)
    pointers = [
        pointer
        for number in (0, 1)
        for pointer in (*amaxes[2 * number : 2 * number + 2], *forms[number if is_backward else 0].pointers(gate))
    ]
    pointers += [amaxes[4], *_output_pointers(output, gate)]
    tile = _tile(cast, is_backward=is_backward)
    fast(_swiglu_tiles_kernel)[(cdiv(padded_tokens, tile.tokens) * cdiv(features, tile.features),)](
        *inputs, *(inputs[1:] if scales is None else scales), *pointers, tokens, features, padded_tokens, *strides,
        BACKWARD=is_backward, CODES=scales is not None, OUTPUT=output is not None, OUTPUT_GRANULARITY=cast.granularity,
        OUTPUT_E5M2=output is not None and output.cast.dtype == E5M2, EMIT=cast.emit,
        BLOCK_T=tile.tokens, BLOCK_K=tile.features, BAND=tile.band,
        num_warps=tile.warps, maxnreg=tile.registers, **tiles.flags(cast, gate.device), **tiles.LAUNCH,
    )  # fmt: skip


def _output_pointers(output: tiles.Forms | None, unused: Tensor) -> tuple[Tensor, Tensor]:
    """Codes and scale of the output by columns."""
    if output is None:
        return unused, unused
    *_, scale, columns, column_scale = output.pointers(unused)
    return columns, scale if output.cast.granularity == TENSOR else column_scale


def _tile(cast: Cast, *, is_backward: bool) -> Tile:
    if cast.granularity == BLOCK:
        return BACKWARD_BLOCK_TILE if is_backward else FORWARD_BLOCK_TILE
    if is_backward:
        return BACKWARD_TILE if cast.granularity == TENSOR else BACKWARD_ROW_TILE
    return FORWARD_TILE if cast.columns else FORWARD_ROWS_TILE
