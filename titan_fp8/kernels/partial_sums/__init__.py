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

__all__ = ["sum_parts"]

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@functools.cache
def _kernel() -> ModuleType:
    return importlib.import_module("titan_fp8.kernels.partial_sums.kernel")


def sum_parts(own: Tensor, others: Tensor, rank: int, out: Tensor, *, adds: bool = False) -> None:
    """Write to `out` the sum of R parts, added up in fp32 in the order of the ranks and rounded once.

    Args:
        own: `[n]`, contiguous, bf16, fp16 or fp32: the part of rank `rank`.
        others: `[R - 1, n]` of own's dtype, contiguous: those of the other ranks, in their order.
        rank: from 0 to R - 1.
        out: `[n]`, contiguous, bf16, fp16 or fp32.
        adds: add the sum to what `out` holds, in fp32 and before it is rounded, in place of overwriting that.

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
    if own.is_cuda and own.numel() and float8.has_triton():
        _kernel().sum_parts(own, others, rank, out, adds=adds)
    else:
        reference.sum_parts(own, others, rank, out, adds=adds)
