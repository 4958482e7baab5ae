"""SwiGLU -> float8 and its backward straight to float8 gradients, as Triton kernels.

    _swiglu_tiles_kernel   the output (or both gradients) of one tile, and its codes in the layouts asked for
    _swiglu_amax_kernel    before it, where a scale spans tiles: amax of the tensor, or of rows and columns
    _swiglu_rows_kernel    in place of both for rowwise codes by rows alone: a program owns whole rows

A program of 128 x 128 values owns the blocks of both layouts, so blockwise is one pass. The others compute the output
twice and never store it: reading gate and up again costs as many bytes as writing the output and reading it back, and
in backward fewer; no temporary is allocated. Bytes moved for tensors of `a` values in bf16, forward / backward:

    blockwise: 6a / 10a     tensorwise, rowwise: 10a / 16a     rowwise, rows alone: 5a forward

T tokens, H hidden features.
"""

# Triton's language is not Python's; pyright takes the kernels for ordinary functions.
# pyright: reportCallIssue=false, reportAssignmentType=false, reportOperatorIssue=false, reportAttributeAccessIssue=false
# pyright: reportGeneralTypeIssues=false

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from titan_fp8.kernels.float8.kernel import (
    Tile,
    _abs_bits,
    _exact_bits,
    _on_device,
    _scales,
    _tile_of_program,
    _to_codes,
)
from titan_fp8.kernels.producers import tiles
from titan_fp8.kernels.producers.reference import BLOCK, ROW, TENSOR, Cast, Produced
from titan_fp8.kernels.producers.tiles import _rounded, _store_codes


class Amax(NamedTuple):
    """Blocks of the amax kernel: it walks `steps` tiles down the tokens."""

    tokens: int
    features: int
    steps: int
    warps: int


# Static block sizes: a search at the first step could choose differently on different ranks.
FORWARD_AMAX, BACKWARD_AMAX = Amax(16, 256, 16, 4), Amax(16, 256, 16, 8)
FORWARD_ROWS_TILE, FORWARD_TILE = Tile(128, 64, 8, 1), Tile(64, 128, 8, 4)
BACKWARD_TILE = Tile(64, 128, 8, 4)
FORWARD_BLOCK_TILE, BACKWARD_BLOCK_TILE = Tile(128, 128, 16, 2), Tile(128, 128, 8, 2)
ROW_BLOCK_MAX = 16384
"""A row of up to this many values stays in registers between its amax and its cast; a longer one is computed twice."""
ROW_VALUES, ROW_VALUES_PER_WARP = 4096, 1024
"""Short rows are cast several at a time, up to so many values in a program; and the values of a warp."""


@triton.jit
def _output(gate, up, dtype: tl.constexpr, EXACT_BITS: tl.constexpr):
    """`silu(gate) * up` of fp32 tiles, rounded to dtype."""
    return _rounded(gate / (1.0 + tl.exp(-gate)) * up, dtype, EXACT_BITS)


@triton.jit
def _gradient(grad, gate, up, OF_GATE: tl.constexpr, dtype: tl.constexpr, EXACT_BITS: tl.constexpr):
    """The gradient of gate, or of up, of fp32 tiles, rounded to dtype."""
    sigmoid = 1.0 / (1.0 + tl.exp(-gate))
    slope = up * (sigmoid * (1.0 + gate * (1.0 - sigmoid))) if OF_GATE else gate * sigmoid
    return _rounded(grad * slope, dtype, EXACT_BITS)


@triton.jit
def _load(x_ptr, t, k, stride, mask):
    return tl.load(x_ptr + t[:, None] * stride + k[None, :], mask=mask, other=0).to(tl.float32)


@triton.jit
def _accumulate_amax(value, largest, row_amax_ptr, t, tokens, ROWS: tl.constexpr):
    """The larger of `largest` and |value| as bits; with ROWS, each row's maximum goes to row_amax_ptr."""
    bits = _abs_bits(value)
    if ROWS:
        tl.atomic_max(row_amax_ptr + t, tl.max(bits, axis=1), mask=t < tokens)
    return tl.maximum(largest, bits)


@triton.jit
def _store_amax(largest, row_amax_ptr, column_amax_ptr, k, features, TENSOR: tl.constexpr, COLUMNS: tl.constexpr):
    of_columns = tl.max(largest, axis=0)
    if TENSOR:
        tl.atomic_max(row_amax_ptr, tl.max(of_columns, axis=0))
    elif COLUMNS:
        tl.atomic_max(column_amax_ptr + k, of_columns, mask=k < features)


@triton.jit(do_not_specialize=["tokens"])
def _swiglu_amax_kernel(
    grad_ptr, gate_ptr, up_ptr, row_amax_ptr, column_amax_ptr, up_row_amax_ptr, up_column_amax_ptr,
    tokens, features, stride_grad, stride_gate, stride_up,
    BACKWARD: tl.constexpr, TENSOR: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, EXACT_BITS: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """Integer maxima of the output, or of grad_gate and grad_up, into zeroed int32: TENSOR: of everything, at
    row_amax_ptr; ROWS: of each row; COLUMNS: of each column."""
    dtype: tl.constexpr = gate_ptr.dtype.element_ty
    blocks_k = tl.cdiv(features, BLOCK_K)
    pid = tl.program_id(0)
    k = (pid % blocks_k).to(tl.int64) * BLOCK_K + tl.arange(0, BLOCK_K)
    first = (pid // blocks_k).to(tl.int64) * (BLOCK_T * STEPS)
    largest = tl.zeros([BLOCK_T, BLOCK_K], dtype=tl.int32)
    up_largest = tl.zeros([BLOCK_T, BLOCK_K], dtype=tl.int32)
    for step in range(STEPS):
        t = first + step * BLOCK_T + tl.arange(0, BLOCK_T)
        mask = (t < tokens)[:, None] & (k < features)[None, :]
        gate, up = _load(gate_ptr, t, k, stride_gate, mask), _load(up_ptr, t, k, stride_up, mask)
        if BACKWARD:
            grad = _load(grad_ptr, t, k, stride_grad, mask)
            value = _gradient(grad, gate, up, True, dtype, EXACT_BITS)
            up_value = _gradient(grad, gate, up, False, dtype, EXACT_BITS)
            up_largest = _accumulate_amax(up_value, up_largest, up_row_amax_ptr, t, tokens, ROWS)
        else:
            value = _output(gate, up, dtype, EXACT_BITS)
        largest = _accumulate_amax(value, largest, row_amax_ptr, t, tokens, ROWS)
    _store_amax(largest, row_amax_ptr, column_amax_ptr, k, features, TENSOR, COLUMNS)
    if BACKWARD:
        _store_amax(up_largest, up_row_amax_ptr, up_column_amax_ptr, k, features, TENSOR, COLUMNS)


@triton.jit(do_not_specialize=["tokens"])
def _swiglu_tiles_kernel(
    grad_ptr, gate_ptr, up_ptr,
    row_amax_ptr, column_amax_ptr, output_ptr, rows_ptr, row_scale_ptr, columns_ptr, column_scale_ptr,
    up_row_amax_ptr, up_column_amax_ptr, up_output_ptr, up_rows_ptr, up_row_scale_ptr, up_columns_ptr,
    up_column_scale_ptr,
    tokens, features, padded_tokens, stride_grad, stride_gate, stride_up,
    BACKWARD: tl.constexpr, GRANULARITY: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, EMIT: tl.constexpr,
    E5M2: tl.constexpr, POWER_OF_TWO: tl.constexpr, EXACT_BITS: tl.constexpr, SELECT_NAN: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, BAND: tl.constexpr,
):  # fmt: skip
    """Codes of one tile of the output, or of grad_gate and grad_up (the pointers that begin with `up_`)."""
    dtype: tl.constexpr = gate_ptr.dtype.element_ty
    pid_t, pid_k = _tile_of_program(tl.program_id(0), tl.cdiv(padded_tokens, BLOCK_T), tl.cdiv(features, BLOCK_K), BAND)
    t = pid_t.to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    k = pid_k.to(tl.int64) * BLOCK_K + tl.arange(0, BLOCK_K)
    mask = (t < tokens)[:, None] & (k < features)[None, :]
    offsets = t[:, None] * features + k[None, :]
    gate, up = _load(gate_ptr, t, k, stride_gate, mask), _load(up_ptr, t, k, stride_up, mask)
    if BACKWARD:
        grad = _load(grad_ptr, t, k, stride_grad, mask)
        output = _gradient(grad, gate, up, True, dtype, EXACT_BITS)
        # Kept in few registers, the inputs in none, while the first output is cast.
        up_output = _gradient(grad, gate, up, False, dtype, EXACT_BITS).to(dtype)
    else:
        output = _output(gate, up, dtype, EXACT_BITS)
    if EMIT:
        tl.store(output_ptr + offsets, output.to(dtype), mask=mask)
    _store_codes(
        output, pid_t, pid_k, tokens, features, padded_tokens,
        row_amax_ptr, column_amax_ptr, rows_ptr, row_scale_ptr, columns_ptr, column_scale_ptr,
        GRANULARITY, ROWS, COLUMNS, E5M2, POWER_OF_TWO, EXACT_BITS, SELECT_NAN, BLOCK_T, BLOCK_K,
    )  # fmt: skip
    if BACKWARD:
        if EMIT:
            tl.store(up_output_ptr + offsets, up_output, mask=mask)
        _store_codes(
            up_output.to(tl.float32), pid_t, pid_k, tokens, features, padded_tokens,
            up_row_amax_ptr, up_column_amax_ptr, up_rows_ptr, up_row_scale_ptr, up_columns_ptr, up_column_scale_ptr,
            GRANULARITY, ROWS, COLUMNS, E5M2, POWER_OF_TWO, EXACT_BITS, SELECT_NAN, BLOCK_T, BLOCK_K,
        )  # fmt: skip


@triton.jit(do_not_specialize=["tokens"])
def _swiglu_rows_kernel(
    gate_ptr, up_ptr, output_ptr, codes_ptr, scale_ptr, tokens, features, stride_gate, stride_up,
    EMIT: tl.constexpr, E5M2: tl.constexpr, POWER_OF_TWO: tl.constexpr, EXACT_BITS: tl.constexpr,
    SELECT_NAN: tl.constexpr, ONE_BLOCK: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr,
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
        codes = _to_codes(output * inv_scale[:, None], E5M2, EXACT_BITS, SELECT_NAN)
        tl.store(codes_ptr + t[:, None] * features + k[None, :], codes, mask=mask)


def swiglu(gate: Tensor, up: Tensor, cast: Cast) -> Produced:
    """See `titan_fp8.kernels.producers.swiglu`. Tensors have contiguous rows."""
    forms = tiles.new_forms(gate, cast)
    with _on_device(gate):
        if cast.granularity == ROW and cast.rows and not cast.columns:
            _launch_rows(gate, up, forms)
        else:
            _launch_tiles(None, gate, up, [forms])
    return forms.result()


def swiglu_backward(grad: Tensor, gate: Tensor, up: Tensor, cast: Cast) -> tuple[Produced, Produced]:
    """See `titan_fp8.kernels.producers.swiglu_backward`. Tensors have contiguous rows."""
    forms = [tiles.new_forms(gate, cast) for _ in range(2)]
    with _on_device(gate):
        _launch_tiles(grad, gate, up, forms)
    return forms[0].result(), forms[1].result()


def _launch_rows(gate: Tensor, up: Tensor, forms: tiles.Forms) -> None:
    tokens, features = gate.shape
    block_k = min(triton.next_power_of_2(features), ROW_BLOCK_MAX)
    block_t = max(1, ROW_VALUES // block_k)
    output, codes, scale, *_ = forms.pointers(gate)
    _swiglu_rows_kernel[(triton.cdiv(tokens, block_t),)](
        gate, up, output, codes, scale, tokens, features, gate.stride(0), up.stride(0),
        EMIT=forms.cast.emit, ONE_BLOCK=features <= block_k, BLOCK_T=block_t, BLOCK_K=block_k,
        num_warps=min(16, max(4, block_k // ROW_VALUES_PER_WARP)),
        **tiles.format_flags(forms.cast, gate.device), **tiles.LAUNCH,
    )  # fmt: skip


def _launch_tiles(grad: Tensor | None, gate: Tensor, up: Tensor, forms: list[tiles.Forms]) -> None:
    """Fill the forms of the output (grad None), or of grad_gate and grad_up."""
    tokens, features = gate.shape
    cast, padded_tokens = forms[0].cast, forms[0].padded_tokens
    is_backward = grad is not None
    inputs = (gate if grad is None else grad, gate, up)
    strides = [each.stride(0) for each in inputs]
    amaxes = [gate] * 4
    if cast.granularity != BLOCK and (cast.rows or cast.columns):
        amaxes = _amaxes(inputs, cast, is_backward=is_backward)
    pointers = [
        pointer
        for number in (0, 1)
        for pointer in (*amaxes[2 * number : 2 * number + 2], *forms[number if is_backward else 0].pointers(gate))
    ]
    tile = _tile(cast, is_backward=is_backward)
    _swiglu_tiles_kernel[(triton.cdiv(padded_tokens, tile.tokens) * triton.cdiv(features, tile.features),)](
        *inputs, *pointers, tokens, features, padded_tokens, *strides,
        BACKWARD=is_backward, BLOCK_T=tile.tokens, BLOCK_K=tile.features, BAND=tile.band, num_warps=tile.warps,
        **tiles.flags(cast, gate.device), **tiles.LAUNCH,
    )  # fmt: skip


def _tile(cast: Cast, *, is_backward: bool) -> Tile:
    if cast.granularity == BLOCK:
        return BACKWARD_BLOCK_TILE if is_backward else FORWARD_BLOCK_TILE
    if is_backward:
        return BACKWARD_TILE
    return FORWARD_TILE if cast.columns else FORWARD_ROWS_TILE


def _amaxes(inputs: tuple[Tensor, Tensor, Tensor], cast: Cast, *, is_backward: bool) -> list[Tensor]:
    """`[row_amax, column_amax]` of the output, or of both gradients; unused ones are as long as they need be."""
    tokens, features = inputs[1].shape
    is_tensor = cast.granularity == TENSOR
    sizes = (1 if is_tensor else tokens, 0 if is_tensor else features) * (2 if is_backward else 1)
    amaxes = tiles.new_amaxes(*sizes, device=inputs[1].device)
    amaxes *= 1 if is_backward else 2
    block = BACKWARD_AMAX if is_backward else FORWARD_AMAX
    blocks_t = triton.cdiv(tokens, block.tokens * block.steps)
    _swiglu_amax_kernel[(blocks_t * triton.cdiv(features, block.features),)](
        *inputs, *amaxes, tokens, features, *[each.stride(0) for each in inputs],
        BACKWARD=is_backward, TENSOR=is_tensor, ROWS=cast.rows and not is_tensor,
        COLUMNS=cast.columns and not is_tensor, BLOCK_T=block.tokens, BLOCK_K=block.features, STEPS=block.steps,
        EXACT_BITS=_exact_bits(inputs[1].device), num_warps=block.warps, **tiles.LAUNCH,
    )  # fmt: skip
    return amaxes
