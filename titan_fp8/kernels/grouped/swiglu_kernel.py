"""The backward of SwiGLU over grouped rows, straight to float8 in the layouts that the products of experts consume.

    _swiglu_groups_amax_kernel    largest values: of rows of both gradients, of columns in each group of these
                                  and of the output
    _swiglu_groups_cast_kernel    their codes

The gradients, and the output once more, are computed in both and never stored. As in `kernel.py`, a program of the
first belongs to one group, and one of the second to a tile of rows.

M rows, H hidden features, E groups. `ends` int32 [E]: the row behind each group, multiples of 16.
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
from titan_fp8.kernels.float8.bits import Tile, _abs_bits, _quads_of_tile, _store_rows_tile, _tile_of_program
from titan_fp8.kernels.grouped.kernel import _bounds, _groups_of, _store_group_columns, scales_of
from titan_fp8.kernels.launch import Plan, cdiv, next_power_of_2, planned
from titan_fp8.kernels.producers import tiles
from titan_fp8.kernels.producers.swiglu_amax_kernel import _rounded_bits
from titan_fp8.kernels.producers.swiglu_values import _gradients, _load, _output, _unrounded, _unrounded_gradients

# Static block sizes: a search at the first step could choose differently on different ranks.
AMAX_BLOCK_T, AMAX_BLOCK_K, AMAX_WARPS = 16, 128, 4
AMAX_ROWS, AMAX_SPLITS = 512, 8
"""As in `kernel.py`."""
TILE = Tile(32, 128, 4, 4)


@triton.jit(do_not_specialize=["splits"])
def _swiglu_groups_amax_kernel(
    grad_ptr, gate_ptr, up_ptr, ends_ptr, gate_rows_ptr, up_rows_ptr, gate_columns_ptr, up_columns_ptr, output_ptr,
    features, stride_grad, stride_gate, stride_up, groups, splits,
    EXACT_BITS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Integer maxima into zeroed int32. Rounding keeps the order of values, so only the largest are rounded."""
    dtype: tl.constexpr = gate_ptr.dtype.element_ty
    blocks_k = tl.cdiv(features, BLOCK_K)
    pid = tl.program_id(0)
    group = pid // (blocks_k * splits)
    split = (pid // blocks_k) % splits
    k = (pid % blocks_k).to(tl.int64) * BLOCK_K + tl.arange(0, BLOCK_K)
    begin, end = _bounds(ends_ptr, group)
    gate_largest = tl.zeros([BLOCK_T, BLOCK_K], dtype=tl.int32)
    up_largest = tl.zeros([BLOCK_T, BLOCK_K], dtype=tl.int32)
    output_largest = tl.zeros([BLOCK_T, BLOCK_K], dtype=tl.int32)
    for start in range(begin + split * BLOCK_T, end, splits * BLOCK_T):
        t = (start + tl.arange(0, BLOCK_T)).to(tl.int64)
        mask = (t < end)[:, None] & (k < features)[None, :]
        gate, up = _load(gate_ptr, t, k, stride_gate, mask), _load(up_ptr, t, k, stride_up, mask)
        grad = _load(grad_ptr, t, k, stride_grad, mask)
        of_gate, of_up = _unrounded_gradients(grad, gate, up, EXACT_BITS)
        gate_bits, up_bits = _abs_bits(of_gate), _abs_bits(of_up)
        row_mask = t < end
        gate_row = _rounded_bits(tl.max(gate_bits, axis=1), dtype, EXACT_BITS)
        up_row = _rounded_bits(tl.max(up_bits, axis=1), dtype, EXACT_BITS)
        tl.atomic_max(gate_rows_ptr + t, gate_row, mask=row_mask, sem="relaxed")
        tl.atomic_max(up_rows_ptr + t, up_row, mask=row_mask, sem="relaxed")
        gate_largest = tl.maximum(gate_largest, gate_bits)
        up_largest = tl.maximum(up_largest, up_bits)
        output_largest = tl.maximum(output_largest, _abs_bits(_unrounded(gate, up, EXACT_BITS)))
    if begin + split * BLOCK_T < end:
        at = group.to(tl.int64) * features + k
        mask_k = k < features
        gate_column = _rounded_bits(tl.max(gate_largest, axis=0), dtype, EXACT_BITS)
        up_column = _rounded_bits(tl.max(up_largest, axis=0), dtype, EXACT_BITS)
        output_column = _rounded_bits(tl.max(output_largest, axis=0), dtype, EXACT_BITS)
        tl.atomic_max(gate_columns_ptr + at, gate_column, mask=mask_k, sem="relaxed")
        tl.atomic_max(up_columns_ptr + at, up_column, mask=mask_k, sem="relaxed")
        tl.atomic_max(output_ptr + at, output_column, mask=mask_k, sem="relaxed")


@triton.jit
def _values(
    grad_ptr, gate_ptr, up_ptr, t, k, rows, features, stride_grad, stride_gate, stride_up, EXACT_BITS: tl.constexpr
):  # fmt: skip
    """`(grad_gate, grad_up, output)` at rows t: fp32, rounded, zero outside."""
    dtype: tl.constexpr = gate_ptr.dtype.element_ty
    mask = (t < rows)[:, None] & (k < features)[None, :]
    gate, up = _load(gate_ptr, t, k, stride_gate, mask), _load(up_ptr, t, k, stride_up, mask)
    grad = _load(grad_ptr, t, k, stride_grad, mask)
    of_gate, of_up = _gradients(grad, gate, up, dtype, EXACT_BITS)
    return of_gate, of_up, _output(gate, up, dtype, EXACT_BITS)


@triton.jit
def _swiglu_groups_cast_kernel(
    grad_ptr, gate_ptr, up_ptr, ends_ptr,
    gate_amax_ptr, gate_inv_scale_ptr, gate_codes_ptr, gate_scale_ptr, gate_codes_t_ptr,
    up_amax_ptr, up_inv_scale_ptr, up_codes_ptr, up_scale_ptr, up_codes_t_ptr,
    output_inv_scale_ptr, output_codes_t_ptr,
    rows, features, stride_grad, stride_gate, stride_up, groups,
    EXACT_BITS: tl.constexpr, GROUPS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, BAND: tl.constexpr,
):  # fmt: skip
    """Codes of one tile: of both gradients by rows and by columns, of the output by columns."""
    pid_t, pid_k = _tile_of_program(tl.program_id(0), tl.cdiv(rows, BLOCK_T), tl.cdiv(features, BLOCK_K), BAND)
    quad, k = _quads_of_tile(pid_t, pid_k, BLOCK_T, BLOCK_K)
    t = 4 * quad
    # All loads come before any store: pointers may alias, so the compiler keeps their order.
    a, a_up, a_out = _values(
        grad_ptr, gate_ptr, up_ptr, t, k, rows, features, stride_grad, stride_gate, stride_up, EXACT_BITS
    )
    b, b_up, b_out = _values(
        grad_ptr, gate_ptr, up_ptr, t + 1, k, rows, features, stride_grad, stride_gate, stride_up, EXACT_BITS
    )
    c, c_up, c_out = _values(
        grad_ptr, gate_ptr, up_ptr, t + 2, k, rows, features, stride_grad, stride_gate, stride_up, EXACT_BITS
    )
    d, d_up, d_out = _values(
        grad_ptr, gate_ptr, up_ptr, t + 3, k, rows, features, stride_grad, stride_gate, stride_up, EXACT_BITS
    )
    group = _groups_of(ends_ptr, t, groups, GROUPS)
    _store_rows_tile(
        a, b, c, d, gate_amax_ptr, gate_scale_ptr, gate_codes_ptr, quad, k, pid_k == 0, rows, features,
        False, EXACT_BITS,
    )  # fmt: skip
    _store_rows_tile(
        a_up, b_up, c_up, d_up, up_amax_ptr, up_scale_ptr, up_codes_ptr, quad, k, pid_k == 0, rows, features,
        False, EXACT_BITS,
    )  # fmt: skip
    _store_group_columns(
        a, b, c, d, group, gate_inv_scale_ptr, gate_codes_t_ptr, quad, k, rows, features, groups, EXACT_BITS
    )
    _store_group_columns(
        a_up, b_up, c_up, d_up, group, up_inv_scale_ptr, up_codes_t_ptr, quad, k, rows, features, groups,
        EXACT_BITS,
    )  # fmt: skip
    _store_group_columns(
        a_out, b_out, c_out, d_out, group, output_inv_scale_ptr, output_codes_t_ptr, quad, k, rows, features, groups,
        EXACT_BITS,
    )  # fmt: skip


@planned(_swiglu_groups_amax_kernel)
def _launch_amax(
    device: int, shape: tuple[int, int], strides: tuple[int, int, int], groups: int, dtype: torch.dtype,
    blocks: tuple[int, int, int, int, int],
) -> Plan:  # fmt: skip
    """blocks: `AMAX_BLOCK_T` and so on."""
    rows, features = shape
    block_t, block_k, warps, of_program, least = blocks
    splits = max(least, cdiv(rows, groups * of_program))
    constants: dict[str, Any] = {
        "EXACT_BITS": bits.exact_bits(device), "BLOCK_T": block_t, "BLOCK_K": block_k, "num_warps": warps,
    }  # fmt: skip
    programs = groups * splits * cdiv(features, block_k)
    return Plan(programs, (features, *strides, groups, splits), constants | tiles.LAUNCH)


@planned(_swiglu_groups_cast_kernel)
def _launch_cast(
    device: int, shape: tuple[int, int], strides: tuple[int, int, int], groups: int, dtype: torch.dtype, tile: Tile
) -> Plan:
    rows, features = shape
    constants: dict[str, Any] = {
        "EXACT_BITS": bits.exact_bits(device), "GROUPS": next_power_of_2(groups),
        "BLOCK_T": tile.tokens, "BLOCK_K": tile.features, "BAND": tile.band,
        "num_warps": tile.warps, "maxnreg": tile.registers,
    }  # fmt: skip
    programs = cdiv(rows, tile.tokens) * cdiv(features, tile.features)
    return Plan(programs, (rows, features, *strides, groups), constants | tiles.LAUNCH)


def swiglu_backward(
    grad: Tensor, gate: Tensor, up: Tensor, ends: Tensor, dtype: torch.dtype
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...], tuple[Tensor, Tensor]]:
    """See `titan_fp8.kernels.grouped.swiglu_backward`; features are contiguous."""
    (rows, features), groups, device = gate.shape, ends.shape[0], gate.device
    inputs = grad, gate, up
    strides = grad.stride(0), gate.stride(0), up.stride(0)
    shape = rows, features
    amaxes = tiles.new_amaxes(rows, rows, *[groups * features] * 3, device=device)
    blocks = AMAX_BLOCK_T, AMAX_BLOCK_K, AMAX_WARPS, AMAX_ROWS, AMAX_SPLITS
    _launch_amax((*inputs, ends, *amaxes), shape, strides, groups, gate.dtype, blocks)
    of_columns = [scales_of(amax[: groups * features].view(groups, features)) for amax in amaxes[2:]]
    codes = [bits.new_codes(rows, features, dtype=dtype, device=device) for _ in range(2)]
    scales = [torch.empty(rows, 1, dtype=torch.float32, device=device) for _ in range(2)]
    codes_t = [bits.new_codes(features, rows, dtype=dtype, device=device) for _ in range(3)]
    of_gate = amaxes[0], of_columns[0][0], codes[0], scales[0], codes_t[0]
    of_up = amaxes[1], of_columns[1][0], codes[1], scales[1], codes_t[1]
    tensors = *inputs, ends, *of_gate, *of_up, of_columns[2][0], codes_t[2]
    _launch_cast(tensors, shape, strides, groups, gate.dtype, TILE)
    both = [(codes[i], scales[i], codes_t[i], of_columns[i][1]) for i in range(2)]
    return both[0], both[1], (codes_t[2], of_columns[2][1])
