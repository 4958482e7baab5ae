"""The update of Adam and AdamW in one pass over memory, and the sum of squares of many tensors.

`reference.py` says what they compute, `kernel.py` computes it on a GPU. Each function takes the Triton kernel for CUDA
tensors where Triton is installed, otherwise the reference; they agree to a few units in the last place.
"""

import functools
import importlib
from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from titan_fp8.kernels import float8
from titan_fp8.kernels.adam import reference
from titan_fp8.kernels.adam.reference import Constants, step_factors

__all__ = ["Constants", "square_sum", "step_factors", "update"]


@functools.cache
def _kernel() -> ModuleType:
    return importlib.import_module("titan_fp8.kernels.adam.kernel")


def update(
    weight: Tensor,
    grad: Tensor,
    mean: Tensor,
    square: Tensor,
    factors: Tensor,
    constants: Constants,
    *,
    clip: Tensor | None = None,
    skip: Tensor | None = None,
    amax: Tensor | None = None,
) -> None:
    """One step of one parameter, in place.

    Args:
        weight, grad, mean, square: w, g, m, v: of one shape, contiguous, on one device; fp32, bf16 or fp16.
        factors: fp32 `[4]`, a row of `step_factors`.
        constants: of the optimizer.
        clip: fp32 `[]`, what the gradient is multiplied by; None: 1.
        skip: fp32 `[]`; not zero: nothing is written but amax.
        amax: int32 `[]`, zeroed; gets the bits of the largest |w| after the step, as `kernels.float8.amax` finds it.

    Raises:
        ValueError: shapes differ, a tensor is not contiguous, or what is to be fp32 beside the weight is not.
    """
    for tensor in (weight, grad, mean, square):
        if tensor.shape != weight.shape or not tensor.is_contiguous():
            raise ValueError(
                f"expected contiguous tensors of one shape, got {list(tensor.shape)} with strides "
                f"{tensor.stride()} beside {list(weight.shape)}"
            )
    for name, scalar in (("factors", factors), ("clip", clip), ("skip", skip)):
        if scalar is not None and (scalar.dtype != torch.float32 or scalar.device != weight.device):
            raise ValueError(f"expected {name} in float32 on {weight.device}, got {scalar.dtype} on {scalar.device}")
    if amax is not None and (amax.dtype != torch.int32 or amax.device != weight.device or amax.numel() != 1):
        raise ValueError(f"expected amax as one int32 on {weight.device}, got {amax.dtype} on {amax.device}")
    if weight.numel() == 0:
        return
    if weight.is_cuda and float8.has_triton():
        _kernel().update(weight, grad, mean, square, factors, clip, skip, constants, amax)
        return
    reference.update(weight, grad, mean, square, factors, clip, skip, constants)
    if amax is not None:
        amax.copy_(torch.maximum(amax, float8.amax(weight.view(1, -1)).view(amax.shape)))


def square_sum(tensors: Sequence[Tensor]) -> Tensor:
    """Sum of the squares of all elements of all tensors, which are on one device: fp32 `[]`. One read of each."""
    present = [tensor for tensor in tensors if tensor.numel()]
    if not present:
        raise ValueError("expected tensors with elements")
    dense = [tensor if tensor.is_contiguous() else tensor.contiguous() for tensor in present]
    if dense[0].is_cuda and float8.has_triton():
        return _kernel().square_sum(dense)
    return reference.square_sum(dense)
