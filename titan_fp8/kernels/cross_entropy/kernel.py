"""The cross-entropy as a Triton kernel: a program owns a row, reads it twice and, for the gradient, writes it once.

The second read finds the row in the L2 cache, so that memory sees one read and one write. The largest value and the sum
of exponentials are kept lane by lane on the way, and put together at the end.
"""

# Triton's language is not Python's; pyright takes the kernels for ordinary functions.
# pyright: reportCallIssue=false, reportAssignmentType=false, reportOperatorIssue=false, reportAttributeAccessIssue=false
# pyright: reportGeneralTypeIssues=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from titan_fp8.kernels.cross_entropy.reference import IGNORE_INDEX
from titan_fp8.kernels.launch import Plan, planned

BLOCK, WARPS = 4096, 8
_LOWEST: tl.constexpr = tl.constexpr(-3.0e38)
_NONE: tl.constexpr = tl.constexpr(IGNORE_INDEX)


@triton.jit
def _cross_entropy_kernel(
    logits_ptr, labels_ptr, losses_ptr, vocabulary, stride, GRAD: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """The loss of one row; with GRAD, the row becomes its gradient."""
    row = tl.program_id(0).to(tl.int64)
    start = logits_ptr + row * stride
    label = tl.load(labels_ptr + row)
    if label == _NONE:
        tl.store(losses_ptr + row, 0.0)
        if GRAD:
            for first in range(0, vocabulary, BLOCK):
                column = first + tl.arange(0, BLOCK)
                zero = tl.zeros([BLOCK], dtype=logits_ptr.dtype.element_ty)
                tl.store(start + column, zero, mask=column < vocabulary)
    else:
        is_known = (label >= 0) & (label < vocabulary)
        # Before the reductions, whose barrier keeps faster warps from writing the gradient in its place.
        chosen = tl.load(start + label, mask=is_known, other=0).to(tl.float32)
        largest = tl.full([BLOCK], _LOWEST, dtype=tl.float32)
        total = tl.zeros([BLOCK], dtype=tl.float32)
        for first in range(0, vocabulary, BLOCK):
            column = first + tl.arange(0, BLOCK)
            x = tl.load(start + column, mask=column < vocabulary, other=float("-inf")).to(tl.float32)
            larger = tl.maximum(largest, x)
            total = total * tl.exp(largest - larger) + tl.exp(x - larger)
            largest = larger
        peak = tl.max(largest, axis=0)
        normalizer = peak + tl.log(tl.sum(total * tl.exp(largest - peak), axis=0))
        tl.store(losses_ptr + row, tl.where(is_known, normalizer - chosen, float("nan")))
        if GRAD:
            for first in range(0, vocabulary, BLOCK):
                column = first + tl.arange(0, BLOCK)
                mask = column < vocabulary
                x = tl.load(start + column, mask=mask, other=float("-inf")).to(tl.float32)
                gradient = tl.exp(x - normalizer) - tl.where(column == label, 1.0, 0.0)
                tl.store(start + column, gradient.to(logits_ptr.dtype.element_ty), mask=mask)


@planned(_cross_entropy_kernel)
def _launch(
    device: int, shape: torch.Size, stride: int, dtype: torch.dtype, grad: bool, block: int, warps: int
) -> Plan:
    return Plan(shape[0], (shape[1], stride), {"GRAD": grad, "BLOCK": block, "num_warps": warps})


def cross_entropy(logits: Tensor, labels: Tensor, *, grad: bool) -> Tensor:
    """See `cross_entropy.cross_entropy_`; the logits of a row are contiguous."""
    losses = torch.empty(logits.shape[0], dtype=torch.float32, device=logits.device)
    _launch((logits, labels, losses), logits.shape, logits.stride(0), logits.dtype, grad, BLOCK, WARPS)
    return losses
