"""The rotary embedding as a Triton kernel: queries and keys in one launch, in one read and one write.

A program takes a block of heads of q and one of k of the same token, so that it reads the token's cosines and sines
once; with the head counts of most models it has all heads. What it loads is contiguous, 16 bytes a thread: pairs are
split after they have been loaded and joined again before they are stored, both within a thread's registers.

Products and sums are not contracted to fused multiply-adds, so that the bits are those of the reference.
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

from titan_fp8.kernels.launch import Plan, cdiv, next_power_of_2, planned

# Static block sizes: a search at the first step could choose differently on different ranks.
VALUES, VALUES_PER_WARP = 4096, 1024
"""Values of q in a program, and in a warp: 32 a thread, four loads of 16 bytes in bf16, to which those of k come."""
MAX_WARPS = 8
LAUNCH: dict[str, Any] = {"enable_fp_fusion": False}


@triton.jit
def _load(x_ptr, token, head, d, mask, stride_h):
    """[H, D] of one token."""
    return tl.load(x_ptr + token + head[:, None] * stride_h + d[None, :], mask=mask, other=0)


@triton.jit
def _store_turned(out_ptr, x, token, head, d, mask, cos, sin, D: tl.constexpr):
    """x [H, D], turned by the angles of cos and sin [1, D / 2], to a place where heads are contiguous."""
    heads: tl.constexpr = x.shape[0]
    width: tl.constexpr = x.shape[1]
    real, imaginary = tl.split(tl.reshape(x.to(tl.float32), [heads, width // 2, 2]))
    turned = tl.reshape(tl.join(real * cos - imaginary * sin, real * sin + imaginary * cos), [heads, width])
    place = out_ptr + token + head[:, None] * D + d[None, :]
    tl.store(place, turned.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["seq_len", "q_heads", "k_heads"])
def _rotate_kernel(
    q_ptr, k_ptr, cos_ptr, sin_ptr, q_out_ptr, k_out_ptr,
    rows, seq_len, parts, q_heads, k_heads, q_stride_b, q_stride_s, q_stride_h, k_stride_b, k_stride_s, k_stride_h,
    INVERSE: tl.constexpr, BOTH: tl.constexpr, D: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One of a token's `parts` parts, which is BLOCK_Q heads of q and, with BOTH, BLOCK_K of k."""
    program = tl.program_id(0)
    part, token = program % parts, program // parts
    # The token of the same position in another sequence comes next, and finds the angles in the cache.
    b, s = (token % rows).to(tl.int64), (token // rows).to(tl.int64)
    t = b * seq_len + s
    d = tl.arange(0, BLOCK_D)
    # All loads come before any store: pointers may alias, so the compiler keeps their order.
    q_head = (part * BLOCK_Q + tl.arange(0, BLOCK_Q)).to(tl.int64)
    q_mask = (q_head < q_heads)[:, None] & (d < D)[None, :]
    q = _load(q_ptr, b * q_stride_b + s * q_stride_s, q_head, d, q_mask, q_stride_h)
    if BOTH:
        k_head = (part * BLOCK_K + tl.arange(0, BLOCK_K)).to(tl.int64)
        k_mask = (k_head < k_heads)[:, None] & (d < D)[None, :]
        k = _load(k_ptr, b * k_stride_b + s * k_stride_s, k_head, d, k_mask, k_stride_h)
    pair = tl.arange(0, BLOCK_D // 2)
    cos = tl.load(cos_ptr + s * (D // 2) + pair, mask=pair < D // 2, other=0)[None, :]
    sin = tl.load(sin_ptr + s * (D // 2) + pair, mask=pair < D // 2, other=0)[None, :]
    if INVERSE:
        sin = -sin
    _store_turned(q_out_ptr, q, t * q_heads * D, q_head, d, q_mask, cos, sin, D)
    if BOTH:
        _store_turned(k_out_ptr, k, t * k_heads * D, k_head, d, k_mask, cos, sin, D)


def blocks(q_heads: int, k_heads: int, head_dim: int, values: int, values_per_warp: int) -> tuple[int, dict[str, int]]:
    """In how many parts the heads of a token are turned; the sizes of a program's blocks, and `num_warps`."""
    block_d = next_power_of_2(head_dim)
    block_q = min(next_power_of_2(q_heads), max(1, values // block_d))
    parts = cdiv(max(q_heads, k_heads), block_q)
    block_k = next_power_of_2(max(1, cdiv(k_heads, parts)))
    warps = min(MAX_WARPS, max(1, block_q * block_d // values_per_warp))
    return parts, {"BLOCK_Q": block_q, "BLOCK_K": block_k, "BLOCK_D": block_d, "num_warps": warps}


@planned(_rotate_kernel)
def _launch(
    device: int,
    shapes: tuple[torch.Size, ...],
    strides: tuple[tuple[int, ...], ...],
    dtype: torch.dtype,
    inverse: bool,
    values: int,
    values_per_warp: int,
) -> Plan:
    """Of q, or of q and k."""
    rows, seq_len, q_heads, head_dim = shapes[0]
    is_pair = len(shapes) == 2
    k_heads = shapes[1][2] if is_pair else 0
    parts, sizes = blocks(q_heads, k_heads, head_dim, values, values_per_warp)
    integers = rows, seq_len, parts, q_heads, k_heads, *strides[0][:3], *strides[-1][:3]
    constants = {"INVERSE": inverse, "BOTH": is_pair, "D": head_dim}
    return Plan(rows * seq_len * parts, integers, constants | sizes | LAUNCH)


def rotate(xs: Sequence[Tensor], cos: Tensor, sin: Tensor, *, inverse: bool) -> list[Tensor]:
    """See `rope.rotate`: one or two tensors, not empty, features contiguous; cos and sin contiguous."""
    outputs = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in xs]
    pointers = (xs[0], xs[-1], cos, sin, outputs[0], outputs[-1])
    shapes, strides = tuple([x.shape for x in xs]), tuple([x.stride() for x in xs])
    _launch(pointers, shapes, strides, xs[0].dtype, inverse, VALUES, VALUES_PER_WARP)
    return outputs
