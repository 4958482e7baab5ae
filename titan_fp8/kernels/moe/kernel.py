"""The ways between tokens and groups as Triton kernels: each value is read and written once.

A program takes one row, of the groups or of the tokens, whole: rows are long (2048 features and more) and lie together,
so that wherever a row comes from it is read at full width. Gradients of scores are inner products of rows that the
gradient of the rows reads anyway, so both come from one kernel; they come alone where that gradient is cast on its way.

Products and sums are not contracted to fused multiply-adds, and a token's rows are summed in the order of its choices,
so that rows have the bits of the reference. Inner products are summed in another order than there.

T tokens, k choices of each, D features, M rows of the groups.
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
MAX_BLOCK, VALUES_PER_WARP, MAX_WARPS = 8192, 1024, 8
"""Values of a row that a program has at a time, and of a warp: 32 a thread, four loads of 16 bytes in bf16."""
LAUNCH: dict[str, Any] = {"enable_fp_fusion": False}


@triton.jit(do_not_specialize=["top_k"])
def _to_groups_kernel(
    x_ptr, source_ptr, scores_ptr, y_ptr, out_ptr, products_ptr, features, stride_x, stride_y, top_k,
    SCALED: tl.constexpr, PRODUCTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Row m of the groups: x of its token, times its score; PRODUCTS: and the inner product of x and row m of y."""
    row = tl.program_id(0).to(tl.int64)
    choice = tl.load(source_ptr + row)
    held = choice >= 0
    safe = tl.maximum(choice, 0).to(tl.int64)
    token = safe // top_k
    score = 1.0
    if SCALED:
        score = tl.load(scores_ptr + safe)
    product = tl.zeros([BLOCK], dtype=tl.float32)
    for start in range(0, features, BLOCK):
        d = start + tl.arange(0, BLOCK)
        mask = d < features
        x = tl.load(x_ptr + token * stride_x + d, mask=mask & held, other=0)
        if PRODUCTS:
            y = tl.load(y_ptr + row * stride_y + d, mask=mask & held, other=0)
            product += x.to(tl.float32) * y.to(tl.float32)
        if SCALED:
            x = x.to(tl.float32) * score
        tl.store(out_ptr + row * features + d, x.to(out_ptr.dtype.element_ty), mask=mask)
    if PRODUCTS:
        tl.store(products_ptr + safe, tl.sum(product, axis=0), mask=held)


@triton.jit
def _to_tokens_kernel(
    y_ptr, position_ptr, scores_ptr, x_ptr, out_ptr, products_ptr, features, stride_y, stride_x,
    SCALED: tl.constexpr, SUMS: tl.constexpr, PRODUCTS: tl.constexpr,
    TOP_K: tl.constexpr, BLOCK: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """Token t, SUMS: the sum of its choices' rows of y, times their scores; PRODUCTS: the inner product of each of
    these rows with x of the token."""
    token = tl.program_id(0).to(tl.int64)
    for step in tl.static_range(STEPS):
        d = step * BLOCK + tl.arange(0, BLOCK)
        mask = d < features
        total = tl.zeros([BLOCK], dtype=tl.float32)
        if PRODUCTS:
            x = tl.load(x_ptr + token * stride_x + d, mask=mask, other=0).to(tl.float32)
        for choice in tl.static_range(TOP_K):
            row = tl.load(position_ptr + token * TOP_K + choice).to(tl.int64)
            y = tl.load(y_ptr + row * stride_y + d, mask=mask, other=0).to(tl.float32)
            if PRODUCTS:
                product = tl.sum(x * y, axis=0)
                place = products_ptr + token * TOP_K + choice
                if step > 0:
                    product += tl.load(place)
                tl.store(place, product)
            if SCALED:
                y = y * tl.load(scores_ptr + token * TOP_K + choice)
            # Not zero plus the first: that would turn a negative zero into a positive one.
            total = y if choice == 0 else total + y
        if SUMS:
            tl.store(out_ptr + token * features + d, total.to(out_ptr.dtype.element_ty), mask=mask)


def _blocks(features: int, max_block: int, values_per_warp: int) -> dict[str, int]:
    block = min(next_power_of_2(features), max_block)
    return {"BLOCK": block, "num_warps": min(MAX_WARPS, max(1, block // values_per_warp))}


@planned(_to_groups_kernel)
def _launch_to_groups(
    device: int,
    rows: int,
    features: int,
    strides: tuple[int, int],
    top_k: int,
    dtypes: tuple[torch.dtype, torch.dtype],
    scaled: bool,
    products: bool,
    blocks: tuple[int, int],
) -> Plan:
    """dtypes: of x and of y."""
    constants: dict[str, Any] = {"SCALED": scaled, "PRODUCTS": products}
    return Plan(rows, (features, *strides, top_k), constants | _blocks(features, *blocks) | LAUNCH)


@planned(_to_tokens_kernel)
def _launch_to_tokens(
    device: int,
    tokens: int,
    features: int,
    strides: tuple[int, int],
    top_k: int,
    dtypes: tuple[torch.dtype, torch.dtype],
    scaled: bool,
    made: tuple[bool, bool],
    blocks: tuple[int, int],
) -> Plan:
    """dtypes: of y and of x. made: whether sums are, and whether products are."""
    sizes = _blocks(features, *blocks)
    constants: dict[str, Any] = {"SCALED": scaled, "SUMS": made[0], "PRODUCTS": made[1], "TOP_K": top_k}
    constants["STEPS"] = cdiv(features, sizes["BLOCK"])
    return Plan(tokens, (features, *strides), constants | sizes | LAUNCH)


def to_groups(
    x: Tensor, source: Tensor, scores: Tensor | None, top_k: int, y: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """`permute(x, source, scores, top_k)` and, with y `[M, D]`, `row_products(x, y, position)`. Features are
    contiguous."""
    (tokens, features), rows = x.shape, source.shape[0]
    out = torch.empty(rows, features, dtype=x.dtype, device=x.device)
    products = None if y is None else torch.empty(tokens, top_k, dtype=torch.float32, device=x.device)
    # A pointer that a variant of the kernel never follows still has to be one.
    other, strides = (x if y is None else y), (x.stride(0), 0 if y is None else y.stride(0))
    tensors = x, source, out if scores is None else scores, other, out, out if products is None else products
    dtypes, blocks = (x.dtype, other.dtype), (MAX_BLOCK, VALUES_PER_WARP)
    _launch_to_groups(tensors, rows, features, strides, top_k, dtypes, scores is not None, y is not None, blocks)
    return out, products


def to_tokens(y: Tensor, position: Tensor, scores: Tensor | None, x: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """`unpermute(y, position, scores)` and, with x `[T, D]`, `row_products(x, y, position)`. Features are
    contiguous."""
    (tokens, top_k), features = position.shape, y.shape[1]
    out = torch.empty(tokens, features, dtype=y.dtype, device=y.device)
    products = None if x is None else torch.empty(tokens, top_k, dtype=torch.float32, device=y.device)
    other, strides = (y if x is None else x), (y.stride(0), 0 if x is None else x.stride(0))
    tensors = y, position, out if scores is None else scores, other, out, out if products is None else products
    dtypes, blocks, made = (y.dtype, other.dtype), (MAX_BLOCK, VALUES_PER_WARP), (True, x is not None)
    _launch_to_tokens(tensors, tokens, features, strides, top_k, dtypes, scores is not None, made, blocks)
    return out, products


def row_products(x: Tensor, y: Tensor, position: Tensor) -> Tensor:
    """See `titan_fp8.kernels.moe.row_products`. Features are contiguous."""
    (tokens, top_k), features = position.shape, y.shape[1]
    products = torch.empty(tokens, top_k, dtype=torch.float32, device=y.device)
    tensors = y, position, products, x, products, products
    dtypes, blocks, made = (y.dtype, x.dtype), (MAX_BLOCK, VALUES_PER_WARP), (False, True)
    _launch_to_tokens(tensors, tokens, features, (y.stride(0), x.stride(0)), top_k, dtypes, False, made, blocks)
    return products
