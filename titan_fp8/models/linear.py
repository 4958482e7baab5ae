"""The linear layer of the models: the weight is cast where it is used.

Mixed precision in this project is one idea: *the compute dtype is the dtype of the activations*. Parameters stay in
the dtype they are trained in (float32 as a rule), the decoder casts the embedding's output to the compute dtype, and
every layer casts its own parameters to the dtype of what it is given. One process without any wrapper is then as much
bf16 as a thousand of them, and a float8 layer that replaces this one can quantize from the float32 master instead.
"""

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from titan_fp8.runtime.deferred import WeightSink


class Linear(nn.Linear):
    """`nn.Linear` whose weight and bias are cast to the input's dtype: `y = x @ weight.to(x.dtype).T`.

    The parameters keep their names and their dtype, and their gradients arrive in that dtype.
    """

    casts_weight_to_input_dtype: ClassVar[bool] = True
    """Whoever replaces or wraps the layer may hand it weights of any floating dtype."""

    weight_sink: WeightSink | None = None
    """Where the product for the weight's gradient goes, if it is to be computed later."""

    def forward(self, input: Tensor) -> Tensor:
        """`[..., in_features]` of any floating dtype to `[..., out_features]` of the same dtype."""
        return linear(input, self.weight, self.bias, self.weight_sink)


def linear(input: Tensor, weight: Tensor, bias: Tensor | None, sink: WeightSink | None) -> Tensor:
    """`input [..., K] @ weight.T + bias` in input's dtype, to which weight `[N, K]` and bias are cast. With a sink the
    gradient of the weight is computed later."""
    bias = None if bias is None else bias.to(input.dtype)
    if sink is not None and torch.is_grad_enabled() and weight.requires_grad:
        output = _LinearWithLaterGradient.apply(input, weight, sink)
        return output if bias is None else output + bias
    return F.linear(input, weight.to(input.dtype), bias)


class _LinearWithLaterGradient(torch.autograd.Function):
    """`input @ weight.T`, which hands the product for the weight's gradient to a sink."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, sink: WeightSink) -> Tensor:
        cast = weight.to(input.dtype)
        ctx.save_for_backward(input, cast)
        ctx.sink = sink
        return F.linear(input, cast)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, None]:
        input, weight = ctx.saved_tensors
        grad = grad.flatten(0, -2)
        ctx.sink.later(lambda: grad.t() @ input.flatten(0, -2))
        return (grad @ weight).view(input.shape) if ctx.needs_input_grad[0] else None, None, None
