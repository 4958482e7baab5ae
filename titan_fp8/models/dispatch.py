"""How tokens get to their experts and back: the dispatcher of a layer, for one device.

A dispatcher owns what the grouped products need of its groups, such as their alignment. Another one, for experts that
are spread over ranks, takes its place in a layer (`titan_fp8.parallel.expert`).

T tokens, k choices of each, E experts, D features, M rows of the groups.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from titan_fp8.kernels import moe
from titan_fp8.runtime.operators import register_operator

BF16_ALIGNMENT = 8
"""Rows that a group in bf16 is a multiple of: 16 bytes, where rows are the dimension that is summed over."""


class Rows(NamedTuple):
    """Rows sorted by expert that are not made yet: experts may cast them as they are brought together.

    Attributes:
        x: `[T, D]`, where they come from.
        scores: fp32 `[T, k]`, factors, or None.
        position: int32 `[T, k]`, the row of each choice.
        source: int32 `[M]`, the choice that each row holds, or -1 (`titan_fp8.kernels.moe.plan`).
    """

    x: Tensor
    scores: Tensor | None
    position: Tensor
    source: Tensor

    def make(self) -> Tensor:
        """The rows, `[M, D]`; zero where no token is."""
        return Permute.apply(*self)


@dataclass(frozen=True)
class Groups:
    """Rows sorted by expert.

    Attributes:
        rows: what makes them.
        ends: int32 `[E]`, the row behind each group.
        way_back: what the dispatcher needs to bring rows back.
    """

    rows: Rows
    ends: Tensor
    way_back: Any


R_co = TypeVar("R_co", covariant=True)


@dataclass(frozen=True)
class UnderWay(Generic[R_co]):
    """Rows that travel: what is computed before they have come needs them not.

    Attributes:
        tensor: the rows as autograd sees them, `[R, D]`; it holds nothing yet.
        arrive: waits for them. It takes `tensor`, or what an autograd function gave out in its place.
    """

    tensor: Tensor
    arrive: Callable[[Tensor], R_co]

    def wait(self) -> R_co:
        """What has come."""
        return self.arrive(self.tensor)


class Dispatcher(Protocol):
    """Brings tokens to experts and back.

    Attributes:
        n_experts: E.
        alignment: rows that each group is a multiple of, as the grouped products want it.
    """

    n_experts: int
    alignment: int

    def dispatch(self, x: Tensor, experts: Tensor, scores: Tensor | None) -> UnderWay[Groups]:
        """Send tokens x `[T, D]` to the experts `[T, k]` each, times scores fp32 `[T, k]` if there are any."""
        ...

    def combine(self, y: Tensor, groups: Groups, scores: Tensor | None) -> UnderWay[Tensor]:
        """Send back what the experts made of the groups' rows, `[M, D]`, summed up for each token, times scores if
        there are any: `[T, D]`."""
        ...


class LocalDispatcher:
    """All experts are here.

    Args:
        n_experts: E.
        alignment: rows that each group is a multiple of.
    """

    def __init__(self, n_experts: int, alignment: int = BF16_ALIGNMENT):
        self.n_experts = n_experts
        self.alignment = alignment

    def dispatch(self, x: Tensor, experts: Tensor, scores: Tensor | None) -> UnderWay[Groups]:
        """See `Dispatcher`."""
        _, ends, position, source = plan(experts, self.n_experts, self.alignment)
        return UnderWay(x, lambda x: Groups(Rows(x, scores, position, source), ends, (position, source)))

    def combine(self, y: Tensor, groups: Groups, scores: Tensor | None) -> UnderWay[Tensor]:
        """See `Dispatcher`."""
        return UnderWay(y, lambda y: Unpermute.apply(y, scores, *groups.way_back))


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
