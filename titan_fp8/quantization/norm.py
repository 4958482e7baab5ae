"""RMSNorm that hands its output to float8 linears as codes, alone or together with the residual add before it.

What is normed, x or the sum x + branch, is the residual stream, which goes on beside the norm. It is an output too, so
that the gradients of both meet in one backward, which adds them before it rounds.

The unfused way writes the norm's output in bf16 and reads it again to cast it. Here one operator (`producer_ops.py`)
writes the codes that the linears multiply, and the output itself exists only where a reader asks for it. Autograd sees
a *value* of the output's shape: the output where it exists, otherwise one NaN that takes no memory. The gradients that
the linears return for it meet there, and one backward of the norm follows.

T tokens, K features.
"""

from typing import Any

import torch
from torch import Tensor

from titan_fp8.kernels.producers import Cast
from titan_fp8.quantization import producer_ops
from titan_fp8.quantization.activation import QuantizedActivation
from titan_fp8.quantization.function import differentiable_once
from titan_fp8.quantization.produced import input_cast, quantized, value_of
from titan_fp8.quantization.recipes import Float8Recipe


def rms_norm(
    x: Tensor, weight: Tensor, eps: float, recipe: Float8Recipe, *, columns: bool, emit: bool
) -> QuantizedActivation:
    """RMSNorm of x `[..., K]` over K, for linears of one recipe.

    Args:
        x: bf16, fp16 or fp32.
        weight: `[K]`; rounded to x's dtype, as `models.norm.RMSNorm` does.
        eps: added to the mean square.
        recipe: of the linears that read the output.
        columns: whether a linear will be asked for a weight gradient that is a float8 product.
        emit: whether somebody reads the output itself; otherwise its value is NaN.
    """
    return keep_and_rms_norm(x, weight, eps, recipe, columns=columns, emit=emit)[1]


def keep_and_rms_norm(
    x: Tensor, weight: Tensor, eps: float, recipe: Float8Recipe, *, columns: bool, emit: bool
) -> tuple[Tensor, QuantizedActivation]:
    """x `[..., K]` to go on with, and `rms_norm` of it."""
    cast = input_cast(recipe, columns=columns, emit=emit)
    value, stream, *codes = _RmsNorm.apply(x, None, weight, eps, cast)
    return stream, quantized(value, tuple(codes), cast, recipe, columns=columns)


def add_rms_norm(
    x: Tensor, branch: Tensor, weight: Tensor, eps: float, recipe: Float8Recipe, *, columns: bool, emit: bool
) -> tuple[Tensor, QuantizedActivation]:
    """x + branch `[..., K]`, of one dtype, and `rms_norm` of it."""
    cast = input_cast(recipe, columns=columns, emit=emit)
    value, stream, *codes = _RmsNorm.apply(x, branch, weight, eps, cast)
    return stream, quantized(value, tuple(codes), cast, recipe, columns=columns)


class _RmsNorm(torch.autograd.Function):
    """`(value, stream, *codes)` of the norm of the stream, which is x or x + branch."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, branch: Tensor | None, weight: Tensor, eps: float, cast: Cast
    ) -> tuple[Tensor, ...]:
        """x and branch `[..., K]`, weight `[K]`; codes as `producer_ops.forms` orders them."""
        flat = x.reshape(-1, x.shape[-1])
        if branch is None:
            tensors = iter(producer_ops.rms_norm_cast(flat, weight, eps, *cast))
            stream = x.view_as(x)  # what autograd makes of an input that is returned
        else:
            tensors = iter(producer_ops.add_rms_norm_cast(flat, branch.reshape(flat.shape), weight, eps, *cast))
            x = stream = next(tensors).view(x.shape)
        rstd = next(tensors)
        value = value_of(next(tensors) if cast.emit else None, x.shape, like=x)
        codes = tuple(tensors)
        ctx.save_for_backward(x, weight, rstd)
        ctx.has_branch = branch is not None
        ctx.mark_non_differentiable(*codes)
        if not torch.compiler.is_compiling():
            ctx.set_materialize_grads(False)  # nobody wants a zero gradient of codes
        return value, stream, *codes

    @staticmethod
    @differentiable_once
    def backward(
        ctx: Any, grad: Tensor | None, of_stream: Tensor | None, *_: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        """Gradients of x, branch and weight for those of the output and of the stream."""
        x, weight, rstd = ctx.saved_tensors
        grad_x, grad_weight = of_stream, None
        if grad is not None:
            shape = -1, x.shape[-1]
            residual = None if of_stream is None else of_stream.reshape(shape)
            grad_x, grad_weight = producer_ops.rms_norm_backward(
                grad.reshape(shape), x.reshape(shape), weight, rstd, residual
            )
            grad_x, grad_weight = grad_x.view(x.shape), grad_weight.to(weight.dtype)
        return grad_x, grad_x if ctx.has_branch else None, grad_weight, None, None
