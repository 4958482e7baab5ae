"""The largest values of SwiGLU's output or of its gradients, by which the codes of `swiglu_kernel.py` are scaled.

Rounding keeps the order of values, so it is left to the largest of each, in place of all.

T tokens, H hidden features.
"""

# Triton's language is not Python's; pyright takes the kernels for ordinary functions.
# pyright: reportCallIssue=false, reportAssignmentType=false, reportOperatorIssue=false, reportAttributeAccessIssue=false
# pyright: reportGeneralTypeIssues=false

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from titan_fp8.kernels.float8.bits import _abs_bits, exact_bits
from titan_fp8.kernels.launch import cdiv, fast
from titan_fp8.kernels.producers import tiles
from titan_fp8.kernels.producers.reference import TENSOR, Cast
from titan_fp8.kernels.producers.swiglu_values import _load, _load_value, _unrounded, _unrounded_gradients
from titan_fp8.kernels.producers.tiles import _rounded


class Amax(NamedTuple):
    """Blocks of the amax kernel: it walks `steps` tiles down the tokens, `stages` of them on their way at a time."""

    tokens: int
    features: int
    steps: int
    warps: int
    stages: int = 1


# Static block sizes: a search at the first step could choose differently on different ranks.
FORWARD_AMAX, BACKWARD_AMAX = Amax(32, 128, 16, 4, 2), Amax(8, 128, 16, 4)


@triton.jit
def _rounded_bits(bits, dtype: tl.constexpr, EXACT_BITS: tl.constexpr):
    """Of the largest |value| as bits, those of the largest rounded |value|: rounding keeps the order."""
    return _abs_bits(_rounded(bits.to(tl.float32, bitcast=True), dtype, EXACT_BITS))


@triton.jit
def _accumulate_amax(
    value, largest, row_amax_ptr, t, tokens, ROWS: tl.constexpr, dtype: tl.constexpr, EXACT_BITS: tl.constexpr
):  # fmt: skip
    """The larger of `largest` and |value| as bits, not rounded; with ROWS, each row's maximum, rounded, goes to
    row_amax_ptr."""
    bits = _abs_bits(value)
    if ROWS:
        of_rows = _rounded_bits(tl.max(bits, axis=1), dtype, EXACT_BITS)
        tl.atomic_max(row_amax_ptr + t, of_rows, mask=t < tokens, sem="relaxed")
    return tl.maximum(largest, bits)


@triton.jit
def _store_amax(
    largest, row_amax_ptr, column_amax_ptr, k, features, TENSOR: tl.constexpr, COLUMNS: tl.constexpr,
    dtype: tl.constexpr, EXACT_BITS: tl.constexpr,
):  # fmt: skip
    of_columns = _rounded_bits(tl.max(largest, axis=0), dtype, EXACT_BITS)
    if TENSOR:
        tl.atomic_max(row_amax_ptr, tl.max(of_columns, axis=0), sem="relaxed")
    elif COLUMNS:
        tl.atomic_max(column_amax_ptr + k, of_columns, mask=k < features, sem="relaxed")


@triton.jit(do_not_specialize=["tokens"])
def _swiglu_amax_kernel(
    grad_ptr, gate_ptr, up_ptr, gate_scale_ptr, up_scale_ptr,
    row_amax_ptr, column_amax_ptr, up_row_amax_ptr, up_column_amax_ptr, output_amax_ptr,
    tokens, features, stride_grad, stride_gate, stride_up,
    BACKWARD: tl.constexpr, CODES: tl.constexpr, OUTPUT: tl.constexpr, TENSOR: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, EXACT_BITS: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, STEPS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Integer maxima of the output, or of grad_gate and grad_up, into zeroed int32: TENSOR: of everything, at
    row_amax_ptr; ROWS: of each row; COLUMNS: of each column. OUTPUT: of the output as well, of everything or of each
    column, at output_amax_ptr."""
    dtype: tl.constexpr = grad_ptr.dtype.element_ty
    blocks_k = tl.cdiv(features, BLOCK_K)
    pid = tl.program_id(0)
    k = (pid % blocks_k).to(tl.int64) * BLOCK_K + tl.arange(0, BLOCK_K)
    first = (pid // blocks_k).to(tl.int64) * (BLOCK_T * STEPS)
    largest = tl.zeros([BLOCK_T, BLOCK_K], dtype=tl.int32)
    up_largest = tl.zeros([BLOCK_T, BLOCK_K], dtype=tl.int32)
    output_largest = tl.zeros([BLOCK_T, BLOCK_K], dtype=tl.int32)
    for step in tl.range(STEPS, num_stages=STAGES):
        t = first + step * BLOCK_T + tl.arange(0, BLOCK_T)
        gate = _load_value(gate_ptr, gate_scale_ptr, t, k, stride_gate, tokens, features, CODES, EXACT_BITS)
        up = _load_value(up_ptr, up_scale_ptr, t, k, stride_up, tokens, features, CODES, EXACT_BITS)
        if BACKWARD:
            grad = _load(grad_ptr, t, k, stride_grad, (t < tokens)[:, None] & (k < features)[None, :])
            value, up_value = _unrounded_gradients(grad, gate, up, EXACT_BITS)
            up_largest = _accumulate_amax(up_value, up_largest, up_row_amax_ptr, t, tokens, ROWS, dtype, EXACT_BITS)
            if OUTPUT:
                output_largest = tl.maximum(output_largest, _abs_bits(_unrounded(gate, up, EXACT_BITS)))
        else:
            value = _unrounded(gate, up, EXACT_BITS)
        largest = _accumulate_amax(value, largest, row_amax_ptr, t, tokens, ROWS, dtype, EXACT_BITS)
    _store_amax(largest, row_amax_ptr, column_amax_ptr, k, features, TENSOR, COLUMNS, dtype, EXACT_BITS)
    if BACKWARD:
        _store_amax(up_largest, up_row_amax_ptr, up_column_amax_ptr, k, features, TENSOR, COLUMNS, dtype, EXACT_BITS)
    if OUTPUT:
        _store_amax(output_largest, output_amax_ptr, output_amax_ptr, k, features, TENSOR, True, dtype, EXACT_BITS)


def amaxes(
    inputs: tuple[Tensor, Tensor, Tensor],
    scales: tuple[Tensor, Tensor] | None,
    cast: Cast,
    *,
    is_backward: bool,
    of_output: bool,
) -> list[Tensor]:
    """`[row_amax, column_amax]` of the output, or of both gradients; and the amax of the output or of its columns, for
    the backward. Unused ones are as long as they need be. scales: of gate and up, where these are codes."""
    tokens, features = inputs[1].shape
    is_tensor = cast.granularity == TENSOR
    per_column = 1 if is_tensor else features
    sizes = (1 if is_tensor else tokens, 0 if is_tensor else features) * (2 if is_backward else 1)
    amaxes = tiles.new_amaxes(*sizes, *([per_column] if of_output else []), device=inputs[1].device)
    if not is_backward:
        amaxes *= 2
    amaxes = [*amaxes, amaxes[0]][:5]
    block = BACKWARD_AMAX if is_backward else FORWARD_AMAX
    blocks_t = cdiv(tokens, block.tokens * block.steps)
    fast(_swiglu_amax_kernel)[(blocks_t * cdiv(features, block.features),)](
        *inputs, *(inputs[1:] if scales is None else scales), *amaxes,
        tokens, features, *[each.stride(0) for each in inputs],
        BACKWARD=is_backward, CODES=scales is not None, OUTPUT=of_output, TENSOR=is_tensor,
        ROWS=cast.rows and not is_tensor, COLUMNS=cast.columns and not is_tensor,
        EXACT_BITS=exact_bits(inputs[1].device), BLOCK_T=block.tokens, BLOCK_K=block.features, STEPS=block.steps,
        STAGES=block.stages, num_warps=block.warps, **tiles.LAUNCH,
    )  # fmt: skip
    return amaxes
