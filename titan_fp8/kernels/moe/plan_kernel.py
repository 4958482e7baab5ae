"""Where each token's choices go, as Triton kernels: a stable counting sort by expert that nobody waits for.

    _count_kernel    how many choices of a block go to each expert
    _before_kernel   how many of all blocks before; and of all
    _place_kernel    the row of each choice, and the choice of each row

A choice's row is where its group begins, plus the choices of that expert in earlier blocks, plus those before it in its
own. Blocks are small enough to compare each choice of one with each other.

T tokens, k choices of each, E experts, M rows of the groups, B blocks.
"""

# Triton's language is not Python's; pyright takes the kernels for ordinary functions.
# pyright: reportCallIssue=false, reportAssignmentType=false, reportOperatorIssue=false, reportAttributeAccessIssue=false
# pyright: reportGeneralTypeIssues=false

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from titan_fp8.kernels.launch import Plan, cdiv, next_power_of_2, planned

# Static block sizes: a search at the first step could choose differently on different ranks.
BLOCK, SCAN_BLOCK = 128, 1024
"""Choices of a program; blocks that are summed at a time."""


@triton.jit(do_not_specialize=["choices"])
def _count_kernel(experts_ptr, counts_ptr, choices, experts, EXPERTS: tl.constexpr, BLOCK: tl.constexpr):
    """Row `program` of counts `[B, E]`. EXPERTS: a power of two, not less than E."""
    block = tl.program_id(0)
    at = block * BLOCK + tl.arange(0, BLOCK)
    e = tl.arange(0, EXPERTS)
    chosen = tl.load(experts_ptr + at, mask=at < choices, other=-1).to(tl.int32)
    counts = tl.sum((chosen[:, None] == e[None, :]).to(tl.int32), axis=0)
    tl.store(counts_ptr + block.to(tl.int64) * experts + e, counts, mask=e < experts)


@triton.jit(do_not_specialize=["blocks"])
def _before_kernel(counts_ptr, total_ptr, blocks, experts, SCAN_BLOCK: tl.constexpr):
    """Column `program` of counts becomes the sums of what stands before, and its total `[E]`."""
    expert = tl.program_id(0)
    carried = tl.full([], 0, tl.int32)
    for start in range(0, blocks, SCAN_BLOCK):
        b = start + tl.arange(0, SCAN_BLOCK)
        place = counts_ptr + b.to(tl.int64) * experts + expert
        counts = tl.load(place, mask=b < blocks, other=0)
        tl.store(place, carried + tl.cumsum(counts, axis=0) - counts, mask=b < blocks)
        carried += tl.sum(counts, axis=0)
    tl.store(total_ptr + expert, carried)


@triton.jit(do_not_specialize=["choices"])
def _place_kernel(
    experts_ptr, before_ptr, total_ptr, ends_ptr, position_ptr, source_ptr, choices, experts, alignment,
    EXPERTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """position of the choices of a block, and source of their rows; the first program writes where groups end."""
    block = tl.program_id(0)
    place = tl.arange(0, BLOCK)
    at = block * BLOCK + place
    e = tl.arange(0, EXPERTS)
    total = tl.load(total_ptr + e, mask=e < experts, other=0)
    padded = tl.cdiv(total, alignment) * alignment
    ends = tl.cumsum(padded, axis=0)
    if block == 0:
        tl.store(ends_ptr + e, ends, mask=e < experts)
    chosen = tl.load(experts_ptr + at, mask=at < choices, other=-1).to(tl.int32)
    before = tl.load(before_ptr + block.to(tl.int64) * experts + e, mask=e < experts, other=0)
    first = tl.sum(tl.where(chosen[:, None] == e[None, :], (ends - padded + before)[None, :], 0), axis=1)
    is_earlier = (chosen[:, None] == chosen[None, :]) & (place[None, :] < place[:, None])
    row = first + tl.sum(is_earlier.to(tl.int32), axis=1)
    tl.store(position_ptr + at, row, mask=at < choices)
    tl.store(source_ptr + row, at, mask=at < choices)


@planned(_count_kernel)
def _launch_count(device: int, choices: int, experts: int, dtype: torch.dtype, block: int) -> Plan:
    return Plan(cdiv(choices, block), (choices, experts), _constants(experts, block))


@planned(_before_kernel)
def _launch_before(device: int, blocks: int, experts: int, scan_block: int) -> Plan:
    size = min(scan_block, next_power_of_2(blocks))
    return Plan(experts, (blocks, experts), {"SCAN_BLOCK": size, "num_warps": 4})


@planned(_place_kernel)
def _launch_place(device: int, choices: int, experts: int, alignment: int, dtype: torch.dtype, block: int) -> Plan:
    return Plan(cdiv(choices, block), (choices, experts, alignment), _constants(experts, block))


def _constants(experts: int, block: int) -> dict[str, Any]:
    return {"EXPERTS": next_power_of_2(experts), "BLOCK": block, "num_warps": 4}


def plan(chosen: Tensor, n_experts: int, alignment: int, rows: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `titan_fp8.kernels.moe.plan`; chosen `[T, k]` contiguous and not empty, M rows."""
    choices, device = chosen.numel(), chosen.device
    blocks = cdiv(choices, BLOCK)
    # Before the sources: they are written where there are any.
    source = torch.full((rows,), -1, dtype=torch.int32, device=device)
    counts = torch.empty(blocks, n_experts, dtype=torch.int32, device=device)
    total, ends = (torch.empty(n_experts, dtype=torch.int32, device=device) for _ in range(2))
    position = torch.empty(chosen.shape, dtype=torch.int32, device=device)
    _launch_count((chosen, counts), choices, n_experts, chosen.dtype, BLOCK)
    _launch_before((counts, total), blocks, n_experts, SCAN_BLOCK)
    tensors = chosen, counts, total, ends, position, source
    _launch_place(tensors, choices, n_experts, alignment, chosen.dtype, BLOCK)
    return total, ends, position, source
