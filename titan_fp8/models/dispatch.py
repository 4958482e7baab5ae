"""How tokens get to their experts and back: the dispatcher of a layer, for one device.

A dispatcher owns what the grouped products need of its groups, such as their alignment. Another one, for experts that
are spread over ranks, takes its place in a layer (`titan_fp8.parallel.expert`).

T tokens, k choices of each, E experts, D features, M rows of the groups.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

from torch import Tensor

from titan_fp8.kernels.moe.functions import Rows, plan

BF16_ALIGNMENT = 8
"""Rows that a group in bf16 is a multiple of: 16 bytes, where rows are the dimension that is summed over."""


@dataclass(frozen=True)
class Groups:
    """Rows sorted by expert.

    Attributes:
        rows: what makes them, and brings back what experts make of them.
        ends: int32 `[E]`, the row behind each group.
        way_back: what else the dispatcher needs to bring rows back.
    """

    rows: Rows
    ends: Tensor
    way_back: Any = None


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

    def dispatch(
        self, x: Tensor, experts: Tensor, scores: Tensor | None, factors: Tensor | None = None
    ) -> UnderWay[Groups]:
        """Send tokens x `[T, D]` to the experts `[T, k]` each, times scores fp32 `[T, k]` if there are any; what they
        make of them is to be multiplied by factors, of the same kind."""
        ...

    def combine(self, y: Tensor, groups: Groups) -> UnderWay[Tensor]:
        """Send back what `groups.rows` brought back of the experts' results, summed up for each token: `[T, D]`."""
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

    def dispatch(
        self, x: Tensor, experts: Tensor, scores: Tensor | None, factors: Tensor | None = None
    ) -> UnderWay[Groups]:
        """See `Dispatcher`."""
        _, ends, position, source = plan(experts, self.n_experts, self.alignment)
        return UnderWay(x, lambda x: Groups(Rows(x, scores, position, source, factors), ends))

    def combine(self, y: Tensor, groups: Groups) -> UnderWay[Tensor]:
        """See `Dispatcher`."""
        return UnderWay(y, lambda y: y)
