"""The sum of what several ranks have computed, in fp32, in one pass.

`reference.py` says what is computed, `kernel.py` computes it on a GPU. Both give the same bits.
"""

import functools
import importlib
from types import ModuleType

import torch
from torch import Tensor

from titan_fp8.kernels import float8
from titan_fp8.kernels.partial_sums import reference

__all__ = ["square_count", "sum_parts"]

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@functools.cache
def _kernel() -> ModuleType:
    return importlib.import_module("titan_fp8.kernels.partial_sums.kernel")


def square_count(numel: int) -> int:
    """How many sums of squares there are of a sum of `numel` values."""
    return -(-numel // reference.BLOCK)


def sum_parts(
    own: Tensor, others: Tensor, rank: int, out: Tensor, *, adds: bool = False, squares: Tensor | None = None
) -> None:
    """Write to `out` the sum of R parts, added up in fp32 in the order of the ranks and rounded once.

    Args:
        own: `[n]`, contiguous, bf16, fp16 or fp32: the part of rank `rank`.
        others: `[R - 1, n]` of own's dtype, contiguous: those of the other ranks, in their order.
        rank: from 0 to R - 1.
        out: `[n]`, contiguous, bf16, fp16 or fp32.
        adds: add the sum to what `out` holds, in fp32 and before it is rounded, in place of overwriting that.
        squares: fp32 `[square_count(n)]`, contiguous: becomes sums of squares of what `out` holds then, a block each.

    Raises:
        ValueError: for shapes, dtypes, strides or devices that do not fit.
    """
    tensors = (own, others, out)
    fits = own.dim() == 1 and out.shape == own.shape and others.dim() == 2 and others.shape[1:] == own.shape
    same = others.dtype == own.dtype and len({tensor.device for tensor in tensors}) == 1
    allowed = own.dtype in _DTYPES and out.dtype in _DTYPES and all(tensor.is_contiguous() for tensor in tensors)
    if not (fits and same and allowed and 0 <= rank <= others.shape[0]):
        described = ", ".join(f"{tensor.dtype} {list(tensor.shape)} on {tensor.device}" for tensor in tensors)
        raise ValueError(
            f"expected contiguous parts [n] and [R - 1, n] of one dtype, a rank below R and a sum [n], all bf16, fp16 "
            f"or fp32 on one device; got {described} and rank {rank}"
        )
    if squares is not None and not _fits_squares(squares, own):
        raise ValueError(
            f"expected squares as {square_count(own.numel())} contiguous float32 on {own.device}, got {squares.dtype} "
            f"{list(squares.shape)} on {squares.device}"
        )
    if own.is_cuda and own.numel() and float8.has_triton():
        _kernel().sum_parts(own, others, rank, out, adds=adds, squares=squares)
    elif own.numel():
        reference.sum_parts(own, others, rank, out, adds=adds, squares=squares)


def _fits_squares(squares: Tensor, own: Tensor) -> bool:
    is_right = squares.dtype == torch.float32 and squares.shape == (square_count(own.numel()),)
    return is_right and squares.device == own.device and squares.is_contiguous()
