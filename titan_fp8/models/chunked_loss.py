"""The output layer and the loss together, some tokens at a time, so that the logits of all never exist.

Logits are the largest tensor of a training step: 16384 tokens times 128256 words in bf16 are 4.2 GB, their gradient is
as much again, and both exist when all other activations do. Here a chunk's logits are computed, become their own
gradient (`kernels/cross_entropy`), and are multiplied into the gradients of the hidden states and of the weight, all in
the forward pass; those two are kept for the backward pass, which multiplies them by the gradient of the loss.

    numbers                logits at once               some tokens at a time
    logits, gradient       2 T V                        chunk V
    kept for backward      T V                          T D and, in fp32, V D (two of these while chunks are added up)

A chunk's logits are those that `Linear` computes, and the loss is summed in fp32. T tokens, D features, V words.
Source: arXiv 2410.10989, section 3.2 (Liger kernels).
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from titan_fp8.kernels.cross_entropy import cross_entropy_
from titan_fp8.models.linear import Linear
from titan_fp8.runtime.errors import UserError


class ChunkedHead(Linear):
    """A `Linear` that gives the loss in place of the logits if it is given labels.

    Attributes:
        chunk_tokens: tokens whose logits are computed at a time.
    """

    chunk_tokens: int

    def forward(self, input: Tensor, labels: Tensor | None = None) -> Tensor:
        """Logits `[..., V]` of input `[..., D]`; with labels `[...]` (int64, -100 where a token does not count) the
        fp32 sum of the cross-entropy."""
        if labels is None:
            return super().forward(input)
        hidden, labels = input.flatten(0, -2), labels.flatten()
        grad = torch.is_grad_enabled()
        return _ChunkedCrossEntropy.apply(
            hidden,
            self.weight,
            labels,
            self.chunk_tokens,
            grad and hidden.requires_grad,
            grad and self.weight.requires_grad,
        )


def chunk_loss(output: Any, chunk_tokens: int) -> None:
    """Make a `ChunkedHead` of a model's output layer, in place; before it is sharded.

    Raises:
        UserError: it is no `Linear` without a bias.
    """
    if type(output) is not Linear or output.bias is not None:
        raise UserError(
            f"training.loss_chunk_tokens computes the output layer in high precision, and the model's is a "
            f"{type(output).__name__}; leave `output` out of the conversion (filter_fqns), or set the key to 0"
        )
    head: Any = output  # which the check above has made a Linear for the type checker
    head.__class__ = ChunkedHead
    head.chunk_tokens = chunk_tokens


class _ChunkedCrossEntropy(torch.autograd.Function):
    """hidden `[T, D]`, weight `[V, D]`, labels `[T]` -> fp32 `[]`."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        chunk_tokens: int,
        needs_grad_hidden: bool,
        needs_grad_weight: bool,
    ) -> Tensor:
        cast = weight.to(hidden.dtype)
        loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if needs_grad_hidden else None
        grad_weight: Tensor | None = None
        for start in range(0, hidden.shape[0], chunk_tokens):
            rows = slice(start, start + chunk_tokens)
            logits = hidden[rows] @ cast.t()
            losses = cross_entropy_(logits, labels[rows], grad=needs_grad_hidden or needs_grad_weight)
            loss += losses.sum()
            if grad_hidden is not None:
                torch.mm(logits, cast, out=grad_hidden[rows])
            if needs_grad_weight:
                grad_weight = _add_product(grad_weight, logits, hidden[rows])
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.weight_dtype = weight.dtype
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_weight = ctx.saved_tensors
        if grad_hidden is not None:
            # Of a bf16 tensor and an fp32 [], a GPU rounds the latter to bf16 first.
            grad_hidden = (grad_hidden.float() * grad).to(grad_hidden.dtype)
        if grad_weight is not None:
            # In place, for it is large; a second backward pass through what this changes is an error of autograd.
            grad_weight = grad_weight.mul_(grad).to(ctx.weight_dtype)
        return grad_hidden, grad_weight, None, None, None, None


def _add_product(total: Tensor | None, grad_logits: Tensor, hidden: Tensor) -> Tensor:
    """`total + grad_logits.T @ hidden` in fp32 `[V, D]`, in place; None is zero."""
    if hidden.is_cuda and hidden.dtype != torch.float32:
        product = torch.mm(grad_logits.t(), hidden, out_dtype=torch.float32)
        return product if total is None else total.add_(product)
    left, right = grad_logits.t().float(), hidden.float()
    return left @ right if total is None else total.addmm_(left, right)
