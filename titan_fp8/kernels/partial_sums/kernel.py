"""The sum of ranks' parts as a Triton kernel: each value of each part is read once, and squared on the way if asked."""

# Triton's language is not Python's; pyright takes the kernels for ordinary functions.
# pyright: reportCallIssue=false, reportAssignmentType=false, reportOperatorIssue=false, reportAttributeAccessIssue=false
# pyright: reportGeneralTypeIssues=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from titan_fp8.kernels.launch import Plan, cdiv, planned
from titan_fp8.kernels.partial_sums import reference

BLOCK, WARPS = reference.BLOCK, 8


@triton.jit
def _sum_parts_kernel(
    own_ptr, others_ptr, out_ptr, squares_ptr, numel,
    RANK: tl.constexpr, RANKS: tl.constexpr, ADDS: tl.constexpr, SQUARES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """BLOCK values of the sum. ADDS: and of what is there. SQUARES: also the sum of their squares, as stored."""
    offset = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offset < numel
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for rank in tl.static_range(RANKS):
        if rank == RANK:
            part = tl.load(own_ptr + offset, mask=mask, other=0).to(tl.float32)
        else:
            start = tl.cast(numel, tl.int64) * (rank - (rank > RANK))
            part = tl.load(others_ptr + start + offset, mask=mask, other=0).to(tl.float32)
        total = part if rank == 0 else total + part
    if ADDS:
        total = tl.load(out_ptr + offset, mask=mask, other=0).to(tl.float32) + total
    stored = total.to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + offset, stored, mask=mask)
    if SQUARES:
        value = stored.to(tl.float32)
        tl.store(squares_ptr + tl.program_id(0), tl.sum(value * value, axis=0))


@planned(_sum_parts_kernel)
def _launch(
    device: int,
    numel: int,
    rank: int,
    ranks: int,
    dtypes: tuple[torch.dtype, ...],
    options: tuple[bool, bool],
    block: int,
    warps: int,
) -> Plan:
    """dtypes: of the parts and of the sum. options: whether it adds, and squares."""
    adds, squares = options
    constants = {"RANK": rank, "RANKS": ranks, "ADDS": adds, "SQUARES": squares, "BLOCK": block, "num_warps": warps}
    return Plan(cdiv(numel, block), (numel,), constants)


def sum_parts(
    own: Tensor, others: Tensor, rank: int, out: Tensor, *, adds: bool = False, squares: Tensor | None = None
) -> None:
    """See `partial_sums.sum_parts`; nothing is empty but, for one rank, `others`."""
    options = adds, squares is not None
    key = own.numel(), rank, others.shape[0] + 1, (own.dtype, out.dtype), options, BLOCK, WARPS
    _launch((own, others if others.numel() else own, out, out if squares is None else squares), *key)
