"""The fused update and the sum of squares as Triton kernels. `reference.py` says what they compute.

An update reads weight, gradient and both means and writes all but the gradient: 28 bytes an element in fp32, in one
pass that applies the clip factor on the way and finds the largest |w| for the next cast. A skipped step (`skip` not
zero) writes nothing but that.

One launch a parameter; parameters are contiguous, and their shape does not matter. Offsets are 64-bit. Sums of squares
are those of the programs, in a vector that is summed after: the same order in every run.
"""

# Triton's language is not Python's; pyright takes the kernels for ordinary functions.
# pyright: reportCallIssue=false, reportAssignmentType=false, reportOperatorIssue=false, reportAttributeAccessIssue=false
# pyright: reportGeneralTypeIssues=false

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from titan_fp8.kernels.adam.reference import Constants
from titan_fp8.kernels.float8.bits import _abs_bits
from titan_fp8.kernels.launch import Plan, cdiv, planned

UPDATE_BLOCK, UPDATE_WARPS = 2048, 4
SQUARES_BLOCK, SQUARES_STEPS, SQUARES_WARPS = 4096, 8, 8


@triton.jit
def _update_kernel(
    weight_ptr, grad_ptr, mean_ptr, square_ptr, factors_ptr, clip_ptr, skip_ptr, amax_ptr, numel,
    BETA1: tl.constexpr, REST1: tl.constexpr, BETA2: tl.constexpr, REST2: tl.constexpr, EPS: tl.constexpr,
    WEIGHT_DECAY: tl.constexpr, CLIPS: tl.constexpr, SKIPS: tl.constexpr, AMAX: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """BLOCK elements. WEIGHT_DECAY: Adam's, added to the gradient; AdamW's is in the factors. AMAX: integer maximum of
    |w|, as it is stored, into amax_ptr (zeroed)."""
    skips = False
    if SKIPS:
        skips = tl.load(skip_ptr) != 0
    offset = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offset < numel
    w = tl.load(weight_ptr + offset, mask=mask, other=0).to(tl.float32)
    if not skips:
        g = tl.load(grad_ptr + offset, mask=mask, other=0).to(tl.float32)
        m = tl.load(mean_ptr + offset, mask=mask, other=0).to(tl.float32)
        v = tl.load(square_ptr + offset, mask=mask, other=0).to(tl.float32)
        decay, step_size, root_divisor = tl.load(factors_ptr), tl.load(factors_ptr + 1), tl.load(factors_ptr + 2)
        if CLIPS:
            g = g * tl.load(clip_ptr)
        if WEIGHT_DECAY != 0:
            g = g + WEIGHT_DECAY * w
        m = BETA1 * m + REST1 * g
        v = BETA2 * v + REST2 * (g * g)
        w = w * decay - step_size * tl.div_rn(m, tl.div_rn(tl.sqrt_rn(v), root_divisor) + EPS)
        tl.store(mean_ptr + offset, m.to(mean_ptr.dtype.element_ty), mask=mask)
        tl.store(square_ptr + offset, v.to(square_ptr.dtype.element_ty), mask=mask)
        stored = w.to(weight_ptr.dtype.element_ty)
        tl.store(weight_ptr + offset, stored, mask=mask)
        w = stored.to(tl.float32)
    if AMAX:
        largest = tl.max(_abs_bits(tl.where(mask, w, 0.0)), axis=0)
        tl.atomic_max(amax_ptr, largest, sem="relaxed")


@triton.jit
def _squares_kernel(x_ptr, sums_ptr, numel, BLOCK: tl.constexpr, STEPS: tl.constexpr):
    """The sum of squares of BLOCK * STEPS elements."""
    start = tl.program_id(0).to(tl.int64) * (BLOCK * STEPS)
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for step in range(STEPS):
        offset = start + step * BLOCK + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + offset, mask=offset < numel, other=0).to(tl.float32)
        total += x * x
    tl.store(sums_ptr + tl.program_id(0), tl.sum(total, axis=0))


@planned(_update_kernel)
def _launch_update(
    device: int, numel: int, dtypes: tuple[torch.dtype, ...], constants: Constants, options: tuple[Any, ...]
) -> Plan:
    """dtypes: of weight, gradient and means. options: whether it clips, skips and finds amax; block and
    warps."""
    clips, skips, finds_amax, block, warps = options
    compile_time = {
        "BETA1": constants.beta1,
        "REST1": 1 - constants.beta1,
        "BETA2": constants.beta2,
        "REST2": 1 - constants.beta2,
        "EPS": constants.eps,
        "WEIGHT_DECAY": 0.0 if constants.decoupled else constants.weight_decay,
        "CLIPS": clips,
        "SKIPS": skips,
        "AMAX": finds_amax,
        "BLOCK": block,
        "num_warps": warps,
    }
    return Plan(cdiv(numel, block), (numel,), compile_time)


@planned(_squares_kernel)
def _launch_squares(device: int, numel: int, dtype: torch.dtype, block: int, steps: int, warps: int) -> Plan:
    return Plan(cdiv(numel, block * steps), (numel,), {"BLOCK": block, "STEPS": steps, "num_warps": warps})


def update(
    weight: Tensor,
    grad: Tensor,
    mean: Tensor,
    square: Tensor,
    factors: Tensor,
    clip: Tensor | None,
    skip: Tensor | None,
    constants: Constants,
    amax: Tensor | None,
) -> None:
    """See `adam.update`; all tensors are contiguous, and not empty."""
    unused = factors
    pointers = tuple(unused if tensor is None else tensor for tensor in (clip, skip, amax))
    dtypes = weight.dtype, grad.dtype, mean.dtype, square.dtype
    options = clip is not None, skip is not None, amax is not None, UPDATE_BLOCK, UPDATE_WARPS
    _launch_update((weight, grad, mean, square, factors, *pointers), weight.numel(), dtypes, constants, options)


def square_sum(tensors: Sequence[Tensor]) -> Tensor:
    """See `reference.square_sum`; all tensors are dense in memory, not empty, and on one device."""
    counts = [cdiv(tensor.numel(), SQUARES_BLOCK * SQUARES_STEPS) for tensor in tensors]
    sums = torch.empty(sum(counts), dtype=torch.float32, device=tensors[0].device)
    for tensor, part in zip(tensors, sums.split(counts), strict=True):
        _launch_squares((tensor, part), tensor.numel(), tensor.dtype, SQUARES_BLOCK, SQUARES_STEPS, SQUARES_WARPS)
    return sums.sum()
