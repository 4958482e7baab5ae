"""Grouped products of e4m3 codes as Triton kernels for Hopper.

    rows        result[rows of e] = (a[rows of e] codes @ b[e] codes .T) * scale_a * scale_b[e]               [M, N]
    columns     result[e] = (a[:, rows of e] codes @ b[:, rows of e] codes .T) * scale_a[e] * scale_b[e]      [E, N, K]

Tensor cores of Hopper sum float8 products with 14 bits of mantissa. Without fast accumulation these sums are added up
in fp32 after every 128 products, in registers: PyTorch's grouped product does it too, but for small experts at a third
of the speed (docs/moe.md). Products by columns are never accumulated fast. Operands come through the tensor memory
accelerator, which fills with zeros what lies behind the last row or column; what belongs to the next group is masked.

M rows, a multiple of 16, K and N features, multiples of 16, E groups. `ends` int32 [E]: the row behind each group,
ascending, multiples of 16.
"""

# Triton's language is not Python's; pyright takes the kernels for ordinary functions.
# pyright: reportCallIssue=false, reportAssignmentType=false, reportOperatorIssue=false, reportAttributeAccessIssue=false
# pyright: reportGeneralTypeIssues=false

from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from titan_fp8.kernels.float8.bits import _tile_of_program
from titan_fp8.kernels.grouped.kernel import _bounds
from titan_fp8.kernels.launch import cdiv, next_power_of_2

EXACT_PRODUCTS = tl.constexpr(128)
"""How many products the tensor cores sum before fp32 takes over."""


class GemmTile(NamedTuple):
    """Blocks of a product: of the result, and of what is summed over. Programs walk `band` tiles down the first operand
    before they go on along the second, so that both stay in the L2 cache. `registers` limits those of a thread."""

    first: int
    second: int
    depth: int
    warps: int
    stages: int
    band: int = 16
    registers: int | None = None


_ALIGNMENT = 16
# Static, since a search at the first step could choose differently on different ranks.
# `scripts/bench_grouped_gemm.py --sweep` times others.
FAST_ROWS_TILE = GemmTile(128, 128, 128, 8, 3)
ROWS_TILE = GemmTile(64, 128, 128, 4, 3)
COLUMNS_TILE = GemmTile(256, 128, 128, 8, 4)
"""Those of sums that are exact to fp32 hold each sum twice, in registers, and so are smaller or have a GPU's
multiprocessor for themselves."""


@triton.jit
def _dot(a, b, sums, FAST: tl.constexpr):
    """sums + a `[I, L]` @ b `[J, L]`.T"""
    exact: tl.constexpr = EXACT_PRODUCTS if a.shape[1] > EXACT_PRODUCTS else a.shape[1]
    return tl.dot(a, b.T, sums) if FAST else tl.dot(a, b.T, sums, max_num_imprecise_acc=exact)


@triton.jit
def _group_of_program(ends_ptr, groups, tiles_n, GROUPS: tl.constexpr, BLOCK_M: tl.constexpr):
    """The group of a program, and which of the group's it is; `groups` or more for a program that has nothing to do.
    GROUPS: a power of two, not less than their number."""
    pid = tl.program_id(0)
    e = tl.arange(0, GROUPS)
    ends = tl.load(ends_ptr + e, mask=e < groups, other=0)
    begins = tl.load(ends_ptr + e - 1, mask=(e > 0) & (e < groups), other=0)
    programs = tl.where(e < groups, tl.cdiv(ends - begins, BLOCK_M) * tiles_n, 0)
    group = tl.sum((tl.cumsum(programs, 0) <= pid).to(tl.int32), 0)
    return group, pid - tl.sum(tl.where(e < group, programs, 0), 0)


@triton.jit
def _rows_kernel(
    a_desc, b_desc, ends_ptr, scale_a_ptr, scale_b_ptr, out_ptr, features, depth, groups,
    GROUPS: tl.constexpr, FAST: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BAND: tl.constexpr,
):  # fmt: skip
    """A tile of the product by rows; a `[M, K]`, b `[E * N, K]`, features N, depth K."""
    tiles_n = tl.cdiv(features, BLOCK_N)
    group, program = _group_of_program(ends_ptr, groups, tiles_n, GROUPS, BLOCK_M)
    if group < groups:
        begin, end = _bounds(ends_ptr, group)
        pid_m, pid_n = _tile_of_program(program, tl.cdiv(end - begin, BLOCK_M), tiles_n, BAND)
        row, column = begin + pid_m * BLOCK_M, pid_n * BLOCK_N
        sums = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
        for k in range(0, depth, BLOCK_K):
            a = a_desc.load([row, k])
            b = b_desc.load([group * features + column, k])
            sums = _dot(a, b, sums, FAST)
        m = row + tl.arange(0, BLOCK_M)
        n = column + tl.arange(0, BLOCK_N)
        scale_a = tl.load(scale_a_ptr + m, mask=m < end, other=0.0)
        scale_b = tl.load(scale_b_ptr + group * features + n, mask=n < features, other=0.0)
        place = out_ptr + m.to(tl.int64)[:, None] * features + n[None, :]
        result = sums * scale_a[:, None] * scale_b[None, :]
        tl.store(place, result.to(out_ptr.dtype.element_ty), mask=(m < end)[:, None] & (n < features)[None, :])


@triton.jit
def _columns_kernel(
    a_desc, b_desc, ends_ptr, scale_a_ptr, scale_b_ptr, out_ptr, first, second,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_M: tl.constexpr, BAND: tl.constexpr,
):  # fmt: skip
    """A tile of the product by columns of groups; a `[N, M]`, b `[K, M]`, first N, second K."""
    tiles_n, tiles_k = tl.cdiv(first, BLOCK_N), tl.cdiv(second, BLOCK_K)
    group = tl.program_id(0) // (tiles_n * tiles_k)
    begin, end = _bounds(ends_ptr, group)
    pid_n, pid_k = _tile_of_program(tl.program_id(0) % (tiles_n * tiles_k), tiles_n, tiles_k, BAND)
    sums = tl.zeros([BLOCK_N, BLOCK_K], dtype=tl.float32)
    whole = begin + (end - begin) // BLOCK_M * BLOCK_M
    for m in range(begin, whole, BLOCK_M):
        a = a_desc.load([pid_n * BLOCK_N, m])
        b = b_desc.load([pid_k * BLOCK_K, m])
        sums = _dot(a, b, sums, False)
    if whole < end:
        # The last rows of the group; those behind them are of the next one, and may be NaN.
        is_inside = (whole + tl.arange(0, BLOCK_M) < end)[None, :]
        a = tl.where(is_inside, a_desc.load([pid_n * BLOCK_N, whole]).to(tl.uint8, bitcast=True), 0)
        b = tl.where(is_inside, b_desc.load([pid_k * BLOCK_K, whole]).to(tl.uint8, bitcast=True), 0)
        sums = _dot(a.to(tl.float8e4nv, bitcast=True), b.to(tl.float8e4nv, bitcast=True), sums, False)
    n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    k = pid_k * BLOCK_K + tl.arange(0, BLOCK_K)
    scale_a = tl.load(scale_a_ptr + group * first + n, mask=n < first, other=0.0)
    scale_b = tl.load(scale_b_ptr + group * second + k, mask=k < second, other=0.0)
    # A group without rows has no scales that mean anything.
    result = tl.where(begin < end, sums * scale_a[:, None] * scale_b[None, :], 0.0)
    place = out_ptr + (group.to(tl.int64) * first + n)[:, None] * second + k[None, :]
    tl.store(place, result.to(out_ptr.dtype.element_ty), mask=(n < first)[:, None] & (k < second)[None, :])


def grouped_mm_rows(
    a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, ends: Tensor, out_dtype: torch.dtype, fast_accum: bool
) -> Tensor:
    """a `[M, K]`, scale_a `[M, 1]`, b `[E, N, K]`, scale_b `[E, N]` -> `[M, N]` in `out_dtype`; rows behind the last
    group may be anything."""
    (rows, depth), (experts, features) = a.shape, b.shape[:2]
    result = torch.empty(rows, features, dtype=out_dtype, device=a.device)
    if not rows:
        return result
    tile = FAST_ROWS_TILE if fast_accum else ROWS_TILE
    operands = _described(a, tile.first, tile.depth), _described(b.reshape(-1, depth), tile.second, tile.depth)
    # Where groups end is not known here: each may have a tile that is not full.
    programs = (cdiv(rows, tile.first) + experts) * cdiv(features, tile.second)
    with _on_device_of(a):
        _rows_kernel[(programs,)](
            *operands, ends.contiguous(), scale_a.contiguous(), scale_b.contiguous(), result, features, depth, experts,
            GROUPS=next_power_of_2(experts), FAST=fast_accum,
            BLOCK_M=tile.first, BLOCK_N=tile.second, BLOCK_K=tile.depth, BAND=tile.band,
            num_warps=tile.warps, num_stages=tile.stages, maxnreg=tile.registers,
        )  # fmt: skip
    return result


def grouped_mm_columns(
    a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, ends: Tensor, out_dtype: torch.dtype
) -> Tensor:
    """a `[N, M]`, scale_a `[E, N]`, b `[K, M]`, scale_b `[E, K]` -> `[E, N, K]` in `out_dtype`; zero of an expert
    without rows."""
    (first, rows), second, experts = a.shape, b.shape[0], ends.shape[0]
    if not rows:
        return torch.zeros(experts, first, second, dtype=out_dtype, device=a.device)
    result = torch.empty(experts, first, second, dtype=out_dtype, device=a.device)
    tile = COLUMNS_TILE
    operands = _described(a, tile.first, tile.depth), _described(b, tile.second, tile.depth)
    programs = experts * cdiv(first, tile.first) * cdiv(second, tile.second)
    with _on_device_of(a):
        _columns_kernel[(programs,)](
            *operands, ends.contiguous(), scale_a.contiguous(), scale_b.contiguous(), result, first, second,
            BLOCK_N=tile.first, BLOCK_K=tile.second, BLOCK_M=tile.depth, BAND=tile.band,
            num_warps=tile.warps, num_stages=tile.stages, maxnreg=tile.registers,
        )  # fmt: skip
    return result


def _on_device_of(x: Tensor) -> AbstractContextManager[object]:
    """Triton launches on the current device, which need not be that of x."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def _described(x: Tensor, block_rows: int, block_columns: int) -> TensorDescriptor:
    """x for the tensor memory accelerator, which reads rows that begin at multiples of 16 bytes."""
    if x.stride(1) != 1 or x.stride(0) % _ALIGNMENT or x.data_ptr() % _ALIGNMENT:
        x = x.clone(memory_format=torch.contiguous_format)
    return TensorDescriptor(x, list(x.shape), list(x.stride()), [block_rows, block_columns])
