"""The kernels of the dispatch as operators that a compiled graph may contain, and differentiable.

T tokens, k choices of each, E experts, D features, M rows of the groups.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from titan_fp8.kernels import moe
from titan_fp8.runtime.operators import register_operator


class Rows(NamedTuple):
    """Rows sorted by expert that are not made yet: experts may cast them as they are brought together, and the
    gradients of what they make of them too.

    Attributes:
        x: `[T, D]`, where they come from.
        scores: fp32 `[T, k]`, factors, or None.
        position: int32 `[T, k]`, the row of each choice.
        source: int32 `[M]`, the choice that each row holds, or -1 (`titan_fp8.kernels.moe.plan`).
        factors: fp32 `[T, k]`, of what becomes of the rows, or None.
    """

    x: Tensor
    scores: Tensor | None
    position: Tensor
    source: Tensor
    factors: Tensor | None = None

    def make(self) -> Tensor:
        """The rows, `[M, D]`; zero where no token is."""
        return Permute.apply(self.x, self.scores, self.position, self.source)

    def bring_back(self, y: Tensor) -> Tensor:
        """What became of the rows, `[M, D]`, summed for each token and times the factors: `[T, D]`."""
        return Unpermute.apply(y, self.factors, self.position, self.source)


class Permute(torch.autograd.Function):
    """x `[T, D]`, scores `[T, k]` or None, position `[T, k]`, source `[M]` -> `[M, D]`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scores: Tensor | None, position: Tensor, source: Tensor) -> Tensor:
        needs_scores = scores is not None and ctx.needs_input_grad[1]
        ctx.save_for_backward(x if needs_scores else None, scores, position)
        return permute(x, source, scores, position.shape[1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, scores, position = ctx.saved_tensors
        if x is not None:
            return *permute_backward(grad, x, position, scores), None, None
        return unpermute(grad, position, scores) if ctx.needs_input_grad[0] else None, None, None, None


class Unpermute(torch.autograd.Function):
    """y `[M, D]`, scores `[T, k]` or None, position `[T, k]`, source `[M]` -> `[T, D]`."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, scores: Tensor | None, position: Tensor, source: Tensor) -> Tensor:
        needs_scores = scores is not None and ctx.needs_input_grad[1]
        ctx.save_for_backward(y if needs_scores else None, scores, position, source)
        return unpermute(y, position, scores)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        y, scores, position, source = ctx.saved_tensors
        if y is not None:
            return *unpermute_backward(grad, y, position, source, scores), None, None
        return permute(grad, source, scores, position.shape[1]) if ctx.needs_input_grad[0] else None, None, None, None


def _plan_shapes(experts: Tensor, n_experts: int, alignment: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows = moe.rows_for(experts.numel(), n_experts, alignment)
    shapes = ((n_experts,), (n_experts,), experts.shape, (rows,))
    counts, ends, position, source = (experts.new_empty(shape, dtype=torch.int32) for shape in shapes)
    return counts, ends, position, source


plan = register_operator(
    "moe_plan(Tensor experts, int n_experts, int alignment) -> (Tensor, Tensor, Tensor, Tensor)",
    moe.plan,
    _plan_shapes,
)
"""Opaque to the compiler, as all below: see `kernels.moe.plan`."""

permute = register_operator(
    "moe_permute(Tensor x, Tensor source, Tensor? scores, int top_k) -> Tensor",
    moe.permute,
    lambda x, source, scores, top_k: x.new_empty((source.shape[0], x.shape[1])),
)
"""See `kernels.moe.permute`."""

unpermute = register_operator(
    "moe_unpermute(Tensor y, Tensor position, Tensor? scores) -> Tensor",
    moe.unpermute,
    lambda y, position, scores: y.new_empty((position.shape[0], y.shape[1])),
)
"""See `kernels.moe.unpermute`."""

permute_backward = register_operator(
    "moe_permute_backward(Tensor grad, Tensor x, Tensor position, Tensor scores) -> (Tensor, Tensor)",
    moe.permute_backward,
    lambda grad, x, position, scores: (x.new_empty(x.shape), scores.new_empty(scores.shape)),
)
"""See `kernels.moe.permute_backward`."""

unpermute_backward = register_operator(
    "moe_unpermute_backward(Tensor grad, Tensor y, Tensor position, Tensor source, Tensor scores) -> (Tensor, Tensor)",
    moe.unpermute_backward,
    lambda grad, y, position, source, scores: (y.new_empty(y.shape), scores.new_empty(scores.shape)),
)
"""See `kernels.moe.unpermute_backward`."""

row_products = register_operator(
    "moe_row_products(Tensor x, Tensor y, Tensor position) -> Tensor",
    moe.row_products,
    lambda x, y, position: x.new_empty(position.shape, dtype=torch.float32),
)
"""See `kernels.moe.row_products`."""
