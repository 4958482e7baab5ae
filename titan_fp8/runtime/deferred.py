"""Gradients of weights that are computed later than those of inputs.

Zero-bubble pipelines (arXiv 2401.10241) run the two halves of a backward pass apart: the gradient of a stage's input,
for which another rank waits, and then, when there is nothing better to do, those of its weights. A layer takes part by
handing the product that makes its weight's gradient to a `WeightSink` in place of computing it:

    queue = DeferredWeights()                                   one a stage
    linear.weight_sink = queue.sink_of(linear)                  its backward calls sink.later(product)
    loss.backward()                                             gradients of inputs
    run = queue.take()                                          what has been handed over so far
    run()                                                       gradients of weights, added up in fp32
    queue.flush()                                               into `weight.grad`, when all microbatches are through
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

Product = Callable[[], Tensor]


class WeightSink:
    """Takes the products that make the gradient of one module's weight. Made by `DeferredWeights.sink_of`."""

    def __init__(self, module: nn.Module, waiting: "list[tuple[WeightSink, Product]]") -> None:
        self._module = module
        self._waiting = waiting
        self._total: Tensor | None = None

    def later(self, product: Product) -> None:
        """Let `product()`, which gives what this rank has of the gradient `[N, K]`, be computed later."""
        self._waiting.append((self, product))

    @torch.no_grad()
    def add(self, grad: Tensor) -> None:
        """Add to the gradient, in fp32 at least."""
        if self._total is None:
            self._total = grad.to(torch.promote_types(grad.dtype, torch.float32))
        else:
            self._total += grad

    @torch.no_grad()
    def flush(self, give: "Give") -> None:
        """Hand the gradient over, as a tensor like the weight."""
        if self._total is None:
            return
        weight: Any = self._module.weight
        grad, self._total = self._total, None
        if isinstance(weight, DTensor):
            whole: Any = {"shape": weight.shape, "stride": weight.stride()}
            grad = DTensor.from_local(grad, weight.device_mesh, weight.placements, run_check=False, **whole)
        give(weight, grad)


Give = Callable[[Tensor, Tensor], None]
"""What becomes of a weight's gradient, which is fp32 at least: `give(weight, grad)`."""


def add_to_grad(weight: Tensor, grad: Tensor) -> None:
    """Add to `weight.grad`, in the weight's dtype."""
    grad = grad.to(weight.dtype)
    weight.grad = grad if weight.grad is None else weight.grad + grad


class DeferredWeights:
    """The products that the layers of one pipeline stage have handed over."""

    def __init__(self) -> None:
        self._sinks: list[WeightSink] = []
        self._waiting: list[tuple[WeightSink, Product]] = []

    def sink_of(self, module: nn.Module) -> WeightSink:
        """A sink for the gradient of `module.weight`."""
        self._sinks.append(WeightSink(module, self._waiting))
        return self._sinks[-1]

    def take(self) -> Callable[[], None]:
        """What computes all that was handed over since the last call."""
        taken = self._waiting.copy()
        self._waiting.clear()

        def run() -> None:
            for sink, product in taken:
                sink.add(product())
            taken.clear()

        return run

    def flush(self, give: Give = add_to_grad) -> None:
        """`WeightSink.flush` of every sink."""
        for sink in self._sinks:
            sink.flush(give)
