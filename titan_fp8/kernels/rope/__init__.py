"""Rotary embedding: queries and keys turned by the angles of their positions, both at once.

`reference.py` says what is computed, `kernel.py` computes it on a GPU in one launch that reads and writes each value
once. Both give the same bits. The rotation by the negative angle takes the gradient of the output to that of the input.

B sequences, S tokens, H heads, D features of a head.
"""

import functools
import importlib
from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from titan_fp8.kernels import float8
from titan_fp8.kernels.rope import reference

__all__ = ["DTYPES", "rotate"]

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
"""What is rotated."""


@functools.cache
def _kernel() -> ModuleType:
    return importlib.import_module("titan_fp8.kernels.rope.kernel")


def rotate(xs: Sequence[Tensor], cos: Tensor, sin: Tensor, *, inverse: bool = False) -> list[Tensor]:
    """Turn features `2i` and `2i + 1`, taken as a complex number, by the token's angle; computed in fp32, rounded once.

    Args:
        xs: one or two tensors `[B, S, H, D]` with any H each, D even, of one dtype (bf16, fp16 or fp32) on one device;
            any strides, though features that are not contiguous cost a copy.
        cos, sin: fp32 `[S, D / 2]`, of the angles.
        inverse: turn by minus the angles.

    Returns:
        For each tensor one of its shape and dtype, contiguous.

    Raises:
        ValueError: for shapes, dtypes or devices that do not fit.
    """
    _check(xs, cos, sin)
    if not xs[0].is_cuda or not float8.has_triton():
        return [reference.rotate(x, cos, sin, inverse=inverse).contiguous() for x in xs]
    if all(x.numel() for x in xs):
        dense = [x if x.stride(3) == 1 else x.contiguous() for x in xs]
        return _kernel().rotate(dense, cos.contiguous(), sin.contiguous(), inverse=inverse)
    return [rotate([x], cos, sin, inverse=inverse)[0] if x.numel() else x.new_empty(x.shape) for x in xs]


def _check(xs: Sequence[Tensor], cos: Tensor, sin: Tensor) -> None:
    first = xs[0]
    angles = (*first.shape[1:2], first.shape[-1] // 2)
    are_tables = all(t.shape == angles and t.dtype == torch.float32 and t.device == first.device for t in (cos, sin))
    are_like_first = all(
        x.dim() == 4
        and x.shape[:2] == first.shape[:2]
        and x.shape[3] == first.shape[3]
        and (x.dtype, x.device) == (first.dtype, first.device)
        for x in xs
    )
    if not are_tables or not are_like_first or len(xs) > 2 or first.shape[3] % 2 or first.dtype not in DTYPES:
        got = ", ".join(f"{x.dtype} {list(x.shape)} on {x.device}" for x in (*xs, cos, sin))
        raise ValueError(
            "expected one or two tensors [B, S, H, D] of bf16, fp16 or fp32, alike but for H, with D even, and cos and "
            f"sin in fp32 [S, D / 2], got {got}"
        )
