"""RMSNorm that hands its output to float8 linears as codes, alone or together with the residual add before it.

What is normed, x or the sum x + branch, is the residual stream, which goes on beside the norm. It is an output too, so
that the gradients of both meet in one backward, which adds them before it rounds.

The unfused way writes the norm's output in bf16 and reads it again to cast it. Here one operator (`producer_ops.py`)
writes the codes that the linears multiply, and the output itself exists only where a reader asks for it. Autograd sees
a *value* of the output's shape: the output where it exists, otherwise one NaN that takes no memory. The gradients that
the linears return for it meet there, and one backward of the norm follows.

Where one function multiplies for all readers (`shared_input.py`), each has a value of its own, so that backward
gets their gradients one by one and adds them up as it goes; and the codes by columns, which only the weights' gradients
multiply, are left to that function to make in backward (`later_columns.py`).

T tokens, K features.
"""

from typing import Any

import torch
from torch import Tensor

from titan_fp8.kernels.producers import Cast
from titan_fp8.quantization import producer_ops
from titan_fp8.quantization.activation import QuantizedActivation, is_recomputed_later
from titan_fp8.quantization.function import differentiable_once
from titan_fp8.quantization.later_columns import LaterColumns
from titan_fp8.quantization.produced import input_cast, quantized, value_of, values_of
from titan_fp8.quantization.recipes import Float8Recipe, Granularity


def rms_norm(
    x: Tensor, weight: Tensor, eps: float, recipe: Float8Recipe, *, columns: bool, emit: bool, readers: int = 1
) -> QuantizedActivation:
    """RMSNorm of x `[..., K]` over K, for linears of one recipe.

    Args:
        x: bf16, fp16 or fp32.
        weight: `[K]`; rounded to x's dtype, as `models.norm.RMSNorm` does.
        eps: added to the mean square.
        recipe: of the linears that read the output.
        columns: whether a linear will be asked for a weight gradient that is a float8 product.
        emit: whether somebody reads the output itself; otherwise its value is NaN.
        readers: more than 1: so many linears read the output in one function (`shared_input.py`), which makes the
            columns itself.
    """
    return keep_and_rms_norm(x, weight, eps, recipe, columns=columns, emit=emit, readers=readers)[1]


def keep_and_rms_norm(
    x: Tensor, weight: Tensor, eps: float, recipe: Float8Recipe, *, columns: bool, emit: bool, readers: int = 1
) -> tuple[Tensor, QuantizedActivation]:
    """x `[..., K]` to go on with, and `rms_norm` of it."""
    return _norm(x, None, weight, eps, recipe, columns, emit, readers)


def add_rms_norm(
    x: Tensor,
    branch: Tensor,
    weight: Tensor,
    eps: float,
    recipe: Float8Recipe,
    *,
    columns: bool,
    emit: bool,
    readers: int = 1,
) -> tuple[Tensor, QuantizedActivation]:
    """x + branch `[..., K]`, of one dtype, and `rms_norm` of it."""
    return _norm(x, branch, weight, eps, recipe, columns, emit, readers)


def _norm(
    x: Tensor,
    branch: Tensor | None,
    weight: Tensor,
    eps: float,
    recipe: Float8Recipe,
    columns: bool,
    emit: bool,
    readers: int,
) -> tuple[Tensor, QuantizedActivation]:
    if readers == 1 or emit:
        cast = input_cast(recipe, columns=columns, emit=emit)
        stream, value, _, *codes = _RmsNorm.apply(x, branch, weight, eps, cast, 1, False)
        return stream, quantized(value, tuple(codes), cast, recipe, columns=columns)
    cast = input_cast(recipe, columns=False, emit=False)
    # The first pass of checkpointing looks for no column's largest value, which the second will find.
    is_first = recipe.granularity is Granularity.ROW and not torch.compiler.is_compiling() and is_recomputed_later()
    stream, *results = _RmsNorm.apply(x, branch, weight, eps, cast, readers, columns and not is_first)
    values, rstd, rest = results[:readers], results[readers], results[readers + 1 :]
    amax = None
    if columns and is_first:
        amax = x.new_empty((), dtype=torch.int32).expand(x.shape[-1])
    elif columns and recipe.granularity is not Granularity.BLOCK:
        amax, *rest = rest
    activation = quantized(values[0], tuple(rest), cast, recipe, columns=False)
    later = None
    if columns:
        flat = stream.detach().reshape(-1, stream.shape[-1])
        later = LaterColumns(flat, weight.detach(), rstd, amax, cast)
    return stream, activation._replace(columns=later, more_values=tuple(values[1:]))


class _RmsNorm(torch.autograd.Function):
    """`(stream, *values, rstd, *[amax], *codes)` of the norm of the stream, which is x or x + branch."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        branch: Tensor | None,
        weight: Tensor,
        eps: float,
        cast: Cast,
        readers: int,
        keeps_amax: bool,
    ) -> tuple[Tensor, ...]:
        """x and branch `[..., K]`, weight `[K]`; codes as `producer_ops.forms` orders them."""
        flat = x.reshape(-1, x.shape[-1])
        options = *cast, keeps_amax
        if branch is None:
            tensors = iter(producer_ops.rms_norm_cast(flat, weight, eps, *options))
            stream = x.view_as(x)  # what autograd makes of an input that is returned
        else:
            tensors = iter(producer_ops.add_rms_norm_cast(flat, branch.reshape(flat.shape), weight, eps, *options))
            x = stream = next(tensors).view(x.shape)
        rstd = next(tensors)
        values = (value_of(next(tensors), x.shape, like=x),) if cast.emit else values_of(x.shape, readers, like=x)
        codes = tuple(tensors)
        ctx.save_for_backward(x, weight, rstd)
        ctx.has_branch, ctx.readers = branch is not None, readers
        ctx.mark_non_differentiable(rstd, *codes)
        if not torch.compiler.is_compiling():
            ctx.set_materialize_grads(False)  # nobody wants a zero gradient of codes
        return stream, *values, rstd, *codes

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, of_stream: Tensor | None, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """Gradients of x, branch and weight for those of the stream and of the values."""
        x, weight, rstd = ctx.saved_tensors
        grad_x, grad_weight = of_stream, None
        shape = -1, x.shape[-1]
        of_values = [grad.reshape(shape) for grad in grads[: ctx.readers] if grad is not None]
        if of_values:
            residual = None if of_stream is None else of_stream.reshape(shape)
            grad_x, grad_weight = producer_ops.rms_norm_backward(of_values, x.reshape(shape), weight, rstd, residual)
            grad_x, grad_weight = grad_x.view(x.shape), grad_weight.to(weight.dtype)
        return grad_x, grad_x if ctx.has_branch else None, grad_weight, *[None] * 4
