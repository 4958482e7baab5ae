"""The product of rows that are sorted by expert with the experts' weights, in high precision.

In bf16 it is PyTorch's grouped product, which waits for nothing and wants K and N to be multiples of 8. Otherwise, and
in other dtypes, which PyTorch multiplies on some devices and compiles on none, it is one product an expert, whose rows
have to be known first: that waits for the device. Autocast changes neither.

M rows, K in features, N out features, E experts.
"""

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from titan_fp8.runtime.operators import register_operator

_MULTIPLE = 8
"""16 bytes, of which strides of a grouped product are multiples."""


def grouped_linear(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """`x[rows of e] @ weight[e].T` for each expert e, weights cast to x's dtype.

    Args:
        x: `[M, K]`, sorted by expert.
        weight: `[E, N, K]`, any floating dtype.
        ends: int32 `[E]`, the row behind each expert's rows, ascending.

    Returns:
        `[M, N]` in x's dtype; rows behind the last group may be anything, and so may their gradients.
    """
    weight = weight.to(x.dtype)
    if x.dtype == torch.bfloat16 and not (weight.shape[1] % _MULTIPLE or weight.shape[2] % _MULTIPLE):
        return F.grouped_mm(x, weight.transpose(-2, -1), offs=ends)
    return _OneByOne.apply(x, weight, ends)


class _OneByOne(torch.autograd.Function):
    """x `[M, K]`, weight `[E, N, K]`, ends `[E]` -> `[M, N]`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, ends)
        return multiply_rows(x, weight, ends)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, ends = ctx.saved_tensors
        grad_x = multiply_rows(grad, weight.transpose(-2, -1), ends) if ctx.needs_input_grad[0] else None
        return grad_x, multiply_columns(grad, x, ends) if ctx.needs_input_grad[1] else None, None


def _rows_of_experts(ends: Tensor) -> Iterator[tuple[int, slice]]:
    for expert, (begin, end) in enumerate(pairwise([0, *ends.tolist()])):
        yield expert, slice(begin, end)


def _multiply_rows(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    result = x.new_zeros(x.shape[0], weight.shape[1])
    with torch.autocast(x.device.type, enabled=False):
        for expert, rows in _rows_of_experts(ends):
            result[rows] = x[rows] @ weight[expert].t()
    return result


def _multiply_columns(grad: Tensor, x: Tensor, ends: Tensor) -> Tensor:
    with torch.autocast(x.device.type, enabled=False):
        return torch.stack([grad[rows].t() @ x[rows] for _, rows in _rows_of_experts(ends)])


multiply_rows = register_operator(
    "grouped_rows_one_by_one(Tensor x, Tensor weight, Tensor ends) -> Tensor",
    _multiply_rows,
    lambda x, weight, ends: x.new_empty((x.shape[0], weight.shape[1])),
)
"""`x [M, K]` by `weight [E, N, K]`: `[M, N]`, zero behind the last group."""

multiply_columns = register_operator(
    "grouped_columns_one_by_one(Tensor grad, Tensor x, Tensor ends) -> Tensor",
    _multiply_columns,
    lambda grad, x, ends: x.new_empty((ends.shape[0], grad.shape[1], x.shape[1])),
)
"""`grad [M, N].T @ x [M, K]` over the rows of each expert: `[E, N, K]`."""
