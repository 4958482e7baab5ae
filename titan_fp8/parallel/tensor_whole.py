"""What tensor parallelism leaves whole: modules that have all of their weight on every rank and see T / t tokens each.

Norms, the router's gate, and the linears from the stream to a latent vector: their weights are small, or narrow. Each
token is computed once, on the rank that holds it, and the gradient of a weight is the sum over the ranks.

T tokens, t ranks of the axis.
"""

from typing import Any

import torch
from torch import Tensor

from titan_fp8.models.linear import Linear, linear
from titan_fp8.models.moe import Gate, Logits
from titan_fp8.models.norm import RMSNorm
from titan_fp8.quantization.tensor_parallel import local_weight
from titan_fp8.runtime.collectives import Axis, all_reduce


class SequenceParallelRMSNorm(RMSNorm):
    """RMSNorm of some of the tokens, whose weight's gradient is that of all."""

    axis: Axis

    def scale(self, dtype: torch.dtype) -> Tensor:
        return SumGradient.apply(local_weight(self), self.axis).to(dtype)


class SequenceParallelLinear(Linear):
    """All output features of some of the tokens, `[..., T / t, K]` -> `[..., T / t, N]`; the weight's gradient is that
    of all tokens. It is computed with that of the input, also where others are left for later: it is summed at once."""

    axis: Axis

    def forward(self, input: Tensor) -> Tensor:
        return linear(input, SumGradient.apply(local_weight(self), self.axis), None, None)


class SequenceParallelGate(Gate):
    """The gate of some of the tokens; the weight's gradient is that of all."""

    axis: Axis

    def forward(self, input: Tensor) -> Tensor:
        return Logits.apply(input, SumGradient.apply(local_weight(self), self.axis).to(input.dtype))


class SumGradient(torch.autograd.Function):
    """A tensor that all ranks have; its gradient is the sum of theirs."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return all_reduce(grad.float(), ctx.axis).to(grad.dtype), None  # rounded once
