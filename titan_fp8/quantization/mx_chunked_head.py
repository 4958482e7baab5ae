"""The output layer in MXFP8 and the loss together, some tokens at a time; see `models/chunked_loss.py`.

The weight w is quantized as in `MXFP8Linear`, in both orientations before the first chunk, or comes from where
`mx_weight.py` says. Then for each chunk, all in the forward pass:

    logits       = x rows @ w rows.T                             [t, V]
    gradient     = softmax(logits) - onehot(labels)              [t, V] in their place; cast along V and along t
    grad_hidden  = gradient rows @ w columns.T                   [t, D]
    grad_weight += gradient columns @ (x columns of the t).T     [V, D], in fp32

Chunks are whole blocks of 32 tokens, and a block lies in one chunk, so that the hidden states x of a chunk and the
gradient of its logits have the codes that they would have among all. The size of the chunks decides the order in which
fp32 numbers are added up, and nothing else.

T tokens, t of them in a chunk, D features, V words.
"""

from typing import Any

import torch
from torch import Tensor

from titan_fp8.kernels.cross_entropy import cross_entropy_
from titan_fp8.kernels.cross_entropy.chunks import LossWithGradients, add_product
from titan_fp8.kernels.mx import BLOCK
from titan_fp8.quantization import mx_ops
from titan_fp8.quantization.casts import as_matrix
from titan_fp8.quantization.chunked_head import make_head
from titan_fp8.quantization.mx_linear import MXConfig, MXFP8Linear, check_device, operands
from titan_fp8.quantization.mx_weight import Operand, column_operand, made_of, row_operand


class MXFP8ChunkedHead(MXFP8Linear):
    """An `MXFP8Linear` that gives the loss in place of the logits if it is given labels.

    Attributes:
        chunk_tokens: tokens whose logits are computed at a time; whole blocks.
    """

    chunk_tokens: int

    def forward(self, input: Tensor, labels: Tensor | None = None) -> Tensor:
        """Logits `[..., V]` of input `[..., D]`; with labels `[...]` (int64, -100 where a token does not count) the
        fp32 sum of the cross-entropy."""
        if labels is None:
            return super().forward(input)
        check_device(input, self.config)
        kind = input.device.type
        if torch.is_autocast_enabled(kind):
            input = input.to(torch.get_autocast_dtype(kind))
        hidden, weight, grad = as_matrix(input), self.weight, torch.is_grad_enabled()
        needs_grad_hidden, needs_grad_weight = grad and hidden.requires_grad, grad and weight.requires_grad
        made, cast = made_of(self, "weight", weight, self.weight_cache), self.config.weight_cast
        with torch.no_grad(), torch.autocast(kind, enabled=False):
            rows = row_operand(weight, made, cast)
            columns = column_operand(weight, made, cast, hidden) if needs_grad_hidden else None
            loss_and_gradients = _chunked_cross_entropy(
                hidden.detach(), rows, columns, labels.flatten(), self.chunk_tokens, self.config, needs_grad_weight
            )
        # The weight's gradient is rounded as that of all logits at once is, whatever dtype FSDP sums in.
        return LossWithGradients.apply(hidden, weight, *loss_and_gradients, hidden.dtype)


def chunk_mx_loss(output: Any, chunk_tokens: int) -> None:
    """Make an `MXFP8ChunkedHead` of a model's output layer, in place; before it is sharded.

    Args:
        output: the layer.
        chunk_tokens: tokens whose logits to compute at a time; rounded up to a multiple of 32.

    Raises:
        UserError: it has a bias, or is of another class.
    """
    make_head(output, MXFP8Linear, MXFP8ChunkedHead, chunk_tokens)
    output.chunk_tokens = -(-chunk_tokens // BLOCK) * BLOCK


def _chunked_cross_entropy(
    x: Tensor,
    rows: Operand,
    columns: Operand | None,
    labels: Tensor,
    chunk_tokens: int,
    config: MXConfig,
    needs_grad_weight: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The loss, fp32 `[]`, and its gradients in fp32, each if needed: that of hidden states x `[T, D]`, for which there
    are the weight's columns, and that of the weight `[V, D]`."""
    loss = torch.zeros((), dtype=torch.float32, device=x.device)
    grad_hidden = None if columns is None else torch.empty(x.shape, dtype=torch.float32, device=x.device)
    grad_weight: Tensor | None = None
    for start in range(0, x.shape[0], chunk_tokens):
        part = slice(start, start + chunk_tokens)
        chunk_loss, chunk_grad, grad_weight = _chunk(
            x[part], rows, columns, labels[part], config, grad_weight, needs_grad_weight
        )
        loss += chunk_loss
        if grad_hidden is not None and chunk_grad is not None:
            grad_hidden[part] = chunk_grad
    if needs_grad_weight and grad_weight is None:  # no tokens
        grad_weight = torch.zeros(rows[0].shape[0], x.shape[1], dtype=torch.float32, device=x.device)
    return loss, grad_hidden, grad_weight


def _chunk(
    x: Tensor,
    rows: Operand,
    columns: Operand | None,
    labels: Tensor,
    config: MXConfig,
    grad_weight: Tensor | None,
    needs_grad_weight: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The loss of some tokens x `[t, D]`, its gradient for these, and the weight's gradient with what they add to it.
    Tensors of t times V are dropped as soon as they have been read."""
    quantizes = needs_grad_weight and not config.grad_weight_in_high_precision
    x_rows, x_columns = operands(x, config, rows=True, columns=quantizes)
    assert x_rows is not None
    logits = _product(x_rows, rows, x.dtype)
    loss = cross_entropy_(logits, labels, grad=columns is not None or needs_grad_weight).sum()
    g_rows, g_columns = operands(logits, config, rows=columns is not None, columns=quantizes)
    if needs_grad_weight and not quantizes:
        grad_weight = add_product(grad_weight, logits, x)
    del logits
    grad_hidden = None
    if columns is not None:
        assert g_rows is not None
        grad_hidden = _product(g_rows, columns, torch.float32, of_columns=True)
    del g_rows
    if g_columns is not None:
        assert x_columns is not None
        added = _product_over_tokens(g_columns, x_columns)
        grad_weight = added if grad_weight is None else grad_weight.add_(added)
    return loss, grad_hidden, grad_weight


def _product(a: Operand, weight: Operand, dtype: torch.dtype, *, of_columns: bool = False) -> Tensor:
    """Rows times the weight's operand, for what sums over D or, `of_columns`, over V."""
    (codes, scale), (right, w_scale) = a, weight
    if scale is None:
        return mx_ops.multiply_values(codes, right if of_columns else right.t(), dtype)
    return mx_ops.scaled_mm_op(codes, right, scale, w_scale, dtype)


def _product_over_tokens(grad: Operand, x: Operand) -> Tensor:
    """`grad [t, V].T @ x [t, D]` in fp32, both by blocks along t."""
    (codes, scale), (right, x_scale) = grad, x
    if scale is None:
        return mx_ops.multiply_values(codes.t(), right, torch.float32)
    return mx_ops.scaled_mm_op(codes, right, scale, x_scale, torch.float32)
