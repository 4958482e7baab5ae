"""Cross-entropy of logits, and its gradient in their place.

`reference.py` says what is computed, `kernel.py` computes it on a GPU in one read and one write of the logits.
"""

import functools
import importlib
from types import ModuleType

import torch
from torch import Tensor

from titan_fp8.kernels import float8
from titan_fp8.kernels.cross_entropy import reference

__all__ = ["cross_entropy_"]

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@functools.cache
def _kernel() -> ModuleType:
    return importlib.import_module("titan_fp8.kernels.cross_entropy.kernel")


def cross_entropy_(logits: Tensor, labels: Tensor, *, grad: bool) -> Tensor:
    """`-log softmax(logits)[label]` of each row, computed in fp32.

    Args:
        logits: `[T, V]`, bf16, fp16 or fp32, the V logits of a row contiguous. With `grad` they are overwritten by the
            gradient of the sum of all losses, `softmax(logits) - onehot(label)`, zero where a row does not count.
        labels: int64 `[T]`; -100 where a row does not count.
        grad: whether the gradient is wanted.

    Returns:
        fp32 `[T]`: 0 where a row does not count, NaN for a label that is none of the V.

    Raises:
        ValueError: for shapes, dtypes, strides or devices that do not fit.
    """
    rows_are_dense = logits.dim() == 2 and (logits.stride(1) == 1 or logits.shape[1] == 1)
    fits = labels.shape == logits.shape[:1] and labels.dtype == torch.int64 and labels.device == logits.device
    if not rows_are_dense or logits.dtype not in _DTYPES or not fits:
        raise ValueError(
            f"expected logits [T, V] of bf16, fp16 or fp32 with contiguous rows and int64 labels [T] beside them, got "
            f"{logits.dtype} {list(logits.shape)} with strides {logits.stride()} on {logits.device} and "
            f"{labels.dtype} {list(labels.shape)} on {labels.device}"
        )
    if logits.is_cuda and logits.numel() and float8.has_triton():
        return _kernel().cross_entropy(logits, labels.contiguous(), grad=grad)
    return reference.cross_entropy(logits, labels, grad=grad)
