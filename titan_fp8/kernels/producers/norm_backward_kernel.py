"""Backward of RMSNorm in one read of its operands, with the gradient of the residual stream added, as Triton kernels.

Each reader of the norm's output gives a gradient of it; they are summed on the way, in fp32.

    _rms_norm_backward_kernel        a program walks down some rows: gradient of x, rounded once with the residual's
                                     added, and what its rows add to the gradient of the weight, fp32
    _rms_norm_backward_sum_kernel    those, one row a program, summed in their order: no atomics, so a result repeats

Bytes moved for `a` values in bf16: 6a, and 2a more with a residual or for each further gradient. The partial sums stay
in the L2 cache.

Rows longer than `norm_kernel.ROW_BLOCK_MAX`, which do not fit a program, take the reference's formula.

T tokens, K features, P programs.
"""

# Triton's language is not Python's; pyright takes the kernels for ordinary functions.
# pyright: reportCallIssue=false, reportAssignmentType=false, reportOperatorIssue=false, reportAttributeAccessIssue=false
# pyright: reportGeneralTypeIssues=false

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from titan_fp8.kernels.float8 import bits
from titan_fp8.kernels.launch import Plan, cdiv, next_power_of_2, planned
from titan_fp8.kernels.producers import norm_kernel, reference
from titan_fp8.kernels.producers.reference import MAX_GRADS
from titan_fp8.kernels.producers.tiles import LAUNCH, _rounded

ROW_VALUES = 4096
"""Short rows are taken several at a time, up to so many values."""
AHEAD_BYTES = 98304
"""What waits in shared memory at most; the smallest GPUs that have FP8 give a program 99 KiB of it."""
REGISTERS = 128
"""Of a thread at most, so that as many programs fit as `Walk` says."""
SUM_PROGRAMS, SUM_FEATURES, SUM_WARPS = 128, 32, 8
"""The block of partial sums that is added up at a time."""


class Walk(NamedTuple):
    """How many programs walk down the rows, how many warps each has, and the rows that it has on their way at a time.

    The accumulators of a row, the weight and the operands are a hundred registers for 16 values a thread, so that two
    programs of 8 warps fit a multiprocessor of the 132 that an H100 or H200 has; one, where a row takes 16 warps. The
    number of programs decides in what order the weight's gradient is summed, so it is the same on every GPU.
    """

    programs: int
    warps: int
    stages: int


SHORT_ROWS, LONG_ROWS = Walk(264, 8, 3), Walk(132, 16, 3)
"""For blocks of up to ROW_VALUES values, and for longer ones."""


@triton.jit(do_not_specialize=["tokens", "rows_per_program"])
def _rms_norm_backward_kernel(
    grad_ptr, grad2_ptr, grad3_ptr, x_ptr, residual_ptr, weight_ptr, rstd_ptr, grad_x_ptr, partial_ptr,
    tokens, features, rows_per_program, stride_grad, stride_grad2, stride_grad3, stride_x, stride_residual,
    GRADS: tl.constexpr, ADD: tl.constexpr, EXACT_BITS: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Gradients of `rows_per_program` rows, BLOCK_T at a time. GRADS: how many gradients of the output are summed. ADD:
    the residual's is added to that of x."""
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    k = tl.arange(0, BLOCK_K).to(tl.int64)
    weight = _rounded(tl.load(weight_ptr + k, mask=k < features, other=0).to(tl.float32), dtype, EXACT_BITS)
    pid = tl.program_id(0).to(tl.int64)
    first = pid * rows_per_program
    inv_features = 1.0 / features
    of_weight = tl.zeros([BLOCK_T, BLOCK_K], dtype=tl.float32)
    for step in tl.range(0, rows_per_program, BLOCK_T, num_stages=STAGES):
        t = first + step + tl.arange(0, BLOCK_T)
        mask_t = t < tokens
        mask = mask_t[:, None] & (k < features)[None, :]
        grad = tl.load(grad_ptr + t[:, None] * stride_grad + k[None, :], mask=mask, other=0).to(tl.float32)
        if GRADS > 1:
            grad2 = tl.load(grad2_ptr + t[:, None] * stride_grad2 + k[None, :], mask=mask, other=0)
            grad += grad2.to(tl.float32)
        if GRADS > 2:
            grad3 = tl.load(grad3_ptr + t[:, None] * stride_grad3 + k[None, :], mask=mask, other=0)
            grad += grad3.to(tl.float32)
        x = tl.load(x_ptr + t[:, None] * stride_x + k[None, :], mask=mask, other=0).to(tl.float32)
        rstd = tl.load(rstd_ptr + t, mask=mask_t, other=0.0)[:, None]
        normed = x * rstd
        of_weight += grad * normed
        scaled = grad * weight[None, :]
        mean = tl.sum(scaled * normed, axis=1)[:, None] * inv_features
        grad_x = rstd * (scaled - normed * mean)
        if ADD:
            residual = tl.load(residual_ptr + t[:, None] * stride_residual + k[None, :], mask=mask, other=0)
            grad_x += residual.to(tl.float32)
        grad_x = _rounded(grad_x, dtype, EXACT_BITS).to(dtype)
        tl.store(grad_x_ptr + t[:, None] * features + k[None, :], grad_x, mask=mask)
    tl.store(partial_ptr + pid * features + k, tl.sum(of_weight, axis=0), mask=k < features)


@triton.jit(do_not_specialize=["programs"])
def _rms_norm_backward_sum_kernel(
    partial_ptr, sum_ptr, programs, features,
    EXACT_BITS: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Sum of partial `[P, K]` over P, rounded once."""
    dtype: tl.constexpr = sum_ptr.dtype.element_ty
    k = tl.program_id(0).to(tl.int64) * BLOCK_K + tl.arange(0, BLOCK_K)
    total = tl.zeros([BLOCK_P, BLOCK_K], dtype=tl.float32)
    for first in range(0, programs, BLOCK_P):
        p = first + tl.arange(0, BLOCK_P)
        mask = (p < programs)[:, None] & (k < features)[None, :]
        total += tl.load(partial_ptr + p[:, None] * features + k[None, :], mask=mask, other=0.0)
    total = _rounded(tl.sum(total, axis=0), dtype, EXACT_BITS)
    tl.store(sum_ptr + k, total.to(dtype), mask=k < features)


@planned(_rms_norm_backward_kernel)
def _launch_rows(
    device: int,
    shape: torch.Size,
    strides: tuple[int, ...],
    dtypes: tuple[torch.dtype, torch.dtype],
    grads: int,
    adds: bool,
    blocks: tuple[int, int],
    rows: int,
    walk: Walk,
    exact_bits: bool,
) -> Plan:
    loaded = blocks[0] * blocks[1] * dtypes[0].itemsize * (1 + grads + adds)
    constants = {
        "GRADS": grads,
        "ADD": adds,
        "EXACT_BITS": exact_bits,
        "BLOCK_T": blocks[0],
        "BLOCK_K": blocks[1],
        "STAGES": min(walk.stages, 1 + AHEAD_BYTES // loaded),
        "num_warps": walk.warps,
        "maxnreg": REGISTERS,
    }
    return Plan(cdiv(shape[0], rows), (*shape, rows, *strides), constants | LAUNCH)


@planned(_rms_norm_backward_sum_kernel)
def _launch_sum(device: int, shape: torch.Size, dtype: torch.dtype, exact_bits: bool) -> Plan:
    constants = {"EXACT_BITS": exact_bits, "BLOCK_P": SUM_PROGRAMS, "BLOCK_K": SUM_FEATURES, "num_warps": SUM_WARPS}
    return Plan(cdiv(shape[1], SUM_FEATURES), tuple(shape), constants | LAUNCH)


def rms_norm_backward(
    grads: Sequence[Tensor], x: Tensor, weight: Tensor, rstd: Tensor, residual_grad: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """See `titan_fp8.kernels.producers.rms_norm_backward`. Tensors have contiguous rows, at least one."""
    tokens, features = x.shape
    if features > norm_kernel.ROW_BLOCK_MAX:
        return reference.norm_backward(grads, x, weight, rstd, residual_grad)
    block_k = max(next_power_of_2(features), 128)
    block_t = max(1, ROW_VALUES // block_k)
    walk = SHORT_ROWS if block_k <= ROW_VALUES else LONG_ROWS
    rows = block_t * cdiv(tokens, walk.programs * block_t)
    grad_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    grad_weight = torch.empty(features, dtype=x.dtype, device=x.device)
    partial = torch.empty(cdiv(tokens, rows), features, dtype=torch.float32, device=x.device)
    first, second, third = (grads[min(number, len(grads) - 1)] for number in range(MAX_GRADS))
    operands = first, second, third, x, first if residual_grad is None else residual_grad
    exact_bits = bits.exact_bits(x.device)
    _launch_rows(
        (*operands, weight, rstd, grad_x, partial),
        x.shape,
        tuple(operand.stride(0) for operand in operands),
        (x.dtype, weight.dtype),
        len(grads),
        residual_grad is not None,
        (block_t, block_k),
        rows,
        walk,
        exact_bits,
    )
    _launch_sum((partial, grad_weight), partial.shape, x.dtype, exact_bits)
    return grad_x, grad_weight
