"""The output layer and the loss together, some tokens at a time, so that the logits of all never exist.

Logits are the largest tensor of a training step: 16384 tokens times 128256 words in bf16 are 4.2 GB, their gradient is
as much again, and both exist when all other activations do. Here a chunk's logits are computed, become their own
gradient (`kernels/cross_entropy`), and are multiplied into the gradients of the hidden states and of the weight, all in
the forward pass; those two are kept for the backward pass, which multiplies them by the gradient of the loss.

    numbers                logits at once               some tokens at a time
    logits, gradient       2 T V                        chunk V
    kept for backward      T V                          T D and V D, in fp32

A chunk's logits are those that `Linear` computes, and the loss is summed in fp32. An output layer in float8 is that of
`quantization/chunked_head.py`, one in MXFP8 that of `quantization/mx_chunked_head.py`. T tokens, D features, V words.
Source: arXiv 2410.10989, section 3.2 (Liger kernels).
"""

from typing import Any

import torch
from torch import Tensor

from titan_fp8.kernels.cross_entropy import cross_entropy_
from titan_fp8.kernels.cross_entropy.chunks import LossWithGradients, add_product, wide_product
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
        hidden, weight, grad = input.flatten(0, -2), self.weight, torch.is_grad_enabled()
        loss_and_gradients = _chunked_cross_entropy(
            hidden,
            weight,
            labels.flatten(),
            self.chunk_tokens,
            grad and hidden.requires_grad,
            grad and weight.requires_grad,
        )
        return LossWithGradients.apply(hidden, weight, *loss_and_gradients, torch.float32)


def chunk_loss(output: Any, chunk_tokens: int) -> None:
    """Make a `ChunkedHead` of a model's output layer, in place; before it is sharded.

    Raises:
        UserError: it is no `Linear` without a bias.
    """
    if type(output) is not Linear or output.bias is not None:
        kind = type(output).__name__
        raise UserError(
            f"training.loss_chunk_tokens = {chunk_tokens}: the output layer must be a Linear without a bias, in high "
            f"precision, float8 or MXFP8, and the model's is a {kind}{' with one' if type(output) is Linear else ''}; "
            "set the key to 0"
        )
    head: Any = output  # which the check above has made a Linear for the type checker
    head.__class__ = ChunkedHead
    head.chunk_tokens = chunk_tokens


@torch.no_grad()
def _chunked_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    chunk_tokens: int,
    needs_grad_hidden: bool,
    needs_grad_weight: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """hidden `[T, D]`, weight `[V, D]`, labels `[T]` -> the loss, fp32 `[]`, and its gradients in fp32, each if
    needed."""
    cast = weight.to(hidden.dtype)
    loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
    grad_hidden = torch.empty_like(hidden, dtype=torch.float32) if needs_grad_hidden else None
    grad_weight: Tensor | None = None
    for start in range(0, hidden.shape[0], chunk_tokens):
        rows = slice(start, start + chunk_tokens)
        logits = hidden[rows] @ cast.t()
        losses = cross_entropy_(logits, labels[rows], grad=needs_grad_hidden or needs_grad_weight)
        loss += losses.sum()
        if grad_hidden is not None:
            grad_hidden[rows] = wide_product(logits, cast)
        if needs_grad_weight:
            grad_weight = add_product(grad_weight, logits, hidden[rows])
        del logits  # before the next chunk has its own
    return loss, grad_hidden, grad_weight
