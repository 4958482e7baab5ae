"""What output layers share that compute the loss of some tokens at a time: sums of products, and a loss whose
gradients exist already.

T tokens, D features, V words.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def wide_product(a: Tensor, b: Tensor) -> Tensor:
    """`a [M, K] @ b [K, N]` of one dtype, in fp32."""
    if a.is_cuda and a.dtype != torch.float32:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()


def add_product(total: Tensor | None, grad_logits: Tensor, hidden: Tensor) -> Tensor:
    """`total + grad_logits.T @ hidden` in fp32 `[V, D]`, in place; None is zero. grad_logits `[T, V]` and hidden
    `[T, D]` are of one dtype."""
    if total is None:
        return wide_product(grad_logits.t(), hidden)
    if hidden.is_cuda and hidden.dtype != torch.float32:
        return torch.addmm(total, grad_logits.t(), hidden, out_dtype=torch.float32, out=total)
    return total.addmm_(grad_logits.t().float(), hidden.float())


_HALVINGS = 6
"""The first part that `narrow_` rounds is one of two to the power of this."""


def narrow_(wide: Tensor, dtype: torch.dtype) -> Tensor:
    """`wide`, fp32 of any shape, rounded to a dtype of 16 bits in the first half of its own memory; wide is lost.

    The result is a view of that memory, so no second tensor of this size exists, and all of it is held as long as the
    result is. A part that is as long as all before it goes where those lay, which have moved by then; the first of the
    parts goes by way of a copy.

    Raises:
        RuntimeError: wide is not contiguous.
    """
    assert wide.dtype == torch.float32
    assert dtype.itemsize == 2
    source = wide.view(-1)
    result = source.view(dtype)[: source.numel()]
    stop = -(-source.numel() >> _HALVINGS)
    result[:stop] = source[:stop].to(dtype)
    while stop < source.numel():
        part = slice(stop, min(2 * stop, source.numel()))
        result[part] = source[part]
        stop = part.stop
    return result.view(wide.shape)


class LossWithGradients(torch.autograd.Function):
    """The loss, to autograd a function of hidden and weight, from gradients that were computed along with it."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        loss: Tensor,
        grad_hidden: Tensor | None,
        grad_weight: Tensor | None,
        dtype: torch.dtype,
    ) -> Tensor:
        """The loss, fp32 `[]`.

        Args:
            hidden: `[T, D]`.
            weight: `[V, D]`.
            loss: fp32 `[]`.
            grad_hidden: its gradient for hidden, fp32 `[T, D]`; None if nobody wants it. Rounded to hidden's dtype
                before it is multiplied, and again after, all of it would be too long or too short, by a sixth of a
                percent where the factor is just below or above a power of two.
            grad_weight: its gradient for weight, fp32 `[V, D]`, overwritten in backward; None if nobody wants it.
            dtype: what grad_weight is rounded to in backward before it is given weight's dtype.
        """
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.dtype, ctx.weight_dtype, ctx.hidden_dtype = dtype, weight.dtype, hidden.dtype
        return loss.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients of hidden and weight, multiplied by that of the loss `[]`."""
        grad_hidden, grad_weight = ctx.saved_tensors
        if grad_hidden is not None:
            grad_hidden = (grad_hidden * grad).to(ctx.hidden_dtype)
        if grad_weight is not None:
            # In place, for it is large and all activations exist; a second backward pass through what this changes is
            # an error of autograd. This is twice as fast as mul_.
            torch._foreach_mul_([grad_weight], grad)  # pyright: ignore[reportPrivateImportUsage]
            if torch.promote_types(ctx.dtype, ctx.weight_dtype) != ctx.dtype:
                for rows in grad_weight.chunk(32):
                    rows.copy_(rows.to(ctx.dtype))
            narrows = ctx.weight_dtype.itemsize == 2
            grad_weight = narrow_(grad_weight, ctx.weight_dtype) if narrows else grad_weight.to(ctx.weight_dtype)
        return grad_hidden, grad_weight, None, None, None, None
