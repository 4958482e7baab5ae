"""The output layer in float8 and the loss together, some tokens at a time; see `models/chunked_loss.py`.

The hidden states x and the weight w are quantized as in `Float8Linear`, all of them before the first chunk. Then for
each chunk, all in the forward pass:

    logits       = x rows @ w rows.T                             [t, V]
    gradient     = softmax(logits) - onehot(labels)              [t, V] in their place; cast by rows and by columns
    grad_hidden  = gradient rows @ w columns.T                   [t, D]
    grad_weight += gradient columns @ (x columns of the t).T     [V, D], in fp32

Where a tensor has one scale, that of the gradient is made from an amax of 1, which nobody has to look for: a logit's
gradient lies between -1 and 1, and one token whose word the model holds for unlikely makes it -1 in bf16. Scales of a
row, and of a block of 128 tokens, see the same values in every chunk that begins at a multiple of the block. So the
size of the chunks decides the order in which fp32 numbers are added up, and one thing more: a `rowwise` scale of the
gradient's columns belongs to a chunk. Such scales are powers of two, so that it shows in subnormal values alone.

A float8 product cannot add to what is there. All chunks but the first take a product `[V, D]` of their own and a sum,
which is why large chunks pay; where the weight's gradient is no float8 product, it is added up in place.

T tokens, t of them in a chunk, D features, V words.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from titan_fp8.kernels.blockwise import BLOCK
from titan_fp8.kernels.cross_entropy import cross_entropy_
from titan_fp8.kernels.cross_entropy.chunks import LossWithGradients, add_product
from titan_fp8.quantization.activation import QuantizedActivation
from titan_fp8.quantization.casts import Codes, as_matrix, cast_activation, product, weight_columns
from titan_fp8.quantization.function import Float8Config, WeightOperand
from titan_fp8.quantization.linear import Float8Linear
from titan_fp8.quantization.recipes import Float8Recipe
from titan_fp8.runtime.errors import UserError


class Float8ChunkedHead(Float8Linear):
    """A `Float8Linear` that gives the loss in place of the logits if it is given labels.

    Attributes:
        chunk_tokens: tokens whose logits are computed at a time; whole blocks of scales.
    """

    chunk_tokens: int

    def forward(self, input: Tensor | QuantizedActivation, labels: Tensor | None = None) -> Tensor:
        """Logits `[..., V]` of input `[..., D]`; with labels `[...]` (int64, -100 where a token does not count) the
        fp32 sum of the cross-entropy."""
        if labels is None:
            return super().forward(input)
        assert self.config.parallel is None
        value, rows, columns = self.quantize_input(input)
        hidden, weight, grad = as_matrix(value), self.local_weight(), torch.is_grad_enabled()
        with torch.autocast(hidden.device.type, enabled=False):
            loss_and_gradients = _chunked_cross_entropy(
                _Hidden(hidden, rows, columns),
                self.weight_operand(),
                labels.flatten(),
                self.chunk_tokens,
                self.config,
                grad and hidden.requires_grad,
                grad and weight.requires_grad,
            )
        return LossWithGradients.apply(hidden, weight, *loss_and_gradients, self.config.grad_weight_dtype)


def chunk_float8_loss(output: Any, chunk_tokens: int) -> None:
    """Make a `Float8ChunkedHead` of a model's output layer, in place; before it is sharded.

    Args:
        output: the layer.
        chunk_tokens: tokens whose logits to compute at a time; rounded up to a multiple of 16, or of the 128 of a
            block.

    Raises:
        UserError: it has a bias, or is of another class.
    """
    make_head(output, Float8Linear, Float8ChunkedHead, chunk_tokens)
    multiple = output.config.recipe.dim_multiple
    output.chunk_tokens = -(-chunk_tokens // multiple) * multiple


def make_head(output: Any, linear: type[nn.Linear], head: type[nn.Linear], chunk_tokens: int) -> None:
    """Make a `head` of an output layer of class `linear`, in place; see `chunk_float8_loss` for what raises."""
    if type(output) is not linear or output.bias is not None:
        with_bias = " with one" if output.bias is not None else ""
        raise UserError(
            f"training.loss_chunk_tokens = {chunk_tokens}: the output layer must be of class {linear.__name__} without "
            f"a bias, and the model's is a {type(output).__name__}{with_bias}; set the key to 0"
        )
    output.__class__ = head


class _Hidden(NamedTuple):
    """Hidden states: the numbers `[T, D]`, which may stand for codes alone, and the codes by rows and by columns."""

    value: Tensor
    rows: Codes
    columns: Codes | None

    def tokens(self, part: slice, *, blockwise: bool) -> "_Hidden":
        """Those of some tokens, each tensor as if they had been cast alone. The slice starts at, and if it is not the
        last ends at, a multiple of the tokens that share a scale."""
        codes, scale = self.rows
        # Scales of blocks have their rows contiguous.
        rows = Codes(codes[part], scale[part].t().contiguous().t() if scale.dim() else scale)
        columns = self.columns
        if columns is not None:
            codes, scale = columns
            if blockwise:
                scale = scale[:, part.start // BLOCK : part.stop // BLOCK]
            columns = Codes(codes[:, part].contiguous(), scale)
        return _Hidden(self.value[part], rows, columns)


@torch.no_grad()
def _chunked_cross_entropy(
    x: _Hidden,
    weight: WeightOperand,
    labels: Tensor,
    chunk_tokens: int,
    config: Float8Config,
    needs_grad_hidden: bool,
    needs_grad_weight: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The loss, fp32 `[]`, and its gradients in fp32, each if needed: that of hidden `[T, D]` and that of the weight
    `[V, D]`."""
    value = x.value
    loss = torch.zeros((), dtype=torch.float32, device=value.device)
    grad_hidden = torch.empty(value.shape, dtype=torch.float32, device=value.device) if needs_grad_hidden else None
    grad_weight: Tensor | None = None
    columns = weight.columns
    if needs_grad_hidden and columns is None:
        columns = weight_columns(weight.rows, config.recipe)
    operand = WeightOperand(weight.rows, columns)
    for start in range(0, value.shape[0], chunk_tokens):
        part = slice(start, start + chunk_tokens)
        chunk_grad = None if grad_hidden is None else grad_hidden[part]
        hidden = x.tokens(part, blockwise=config.blockwise)
        chunk_loss, grad_weight = _chunk(
            hidden, operand, labels[part], config, chunk_grad, grad_weight, needs_grad_weight
        )
        loss += chunk_loss
    return loss, grad_hidden, grad_weight


def _chunk(
    x: _Hidden,
    weight: WeightOperand,
    labels: Tensor,
    config: Float8Config,
    grad_hidden: Tensor | None,
    grad_weight: Tensor | None,
    needs_grad_weight: bool,
) -> tuple[Tensor, Tensor | None]:
    """The loss of some tokens, and the weight's gradient with what they add to it. Their own is written to grad_hidden
    `[t, D]`, if there is one. Tensors of t times V are dropped as soon as they have been read."""
    recipe, dtype, rows = config.recipe, x.value.dtype, grad_hidden is not None
    logits = product(
        x.rows, weight.rows, None, dtype, blockwise=config.blockwise, fast_accum=True, emulate=config.emulate
    )
    loss = cross_entropy_(logits, labels, grad=rows or needs_grad_weight).sum()
    columns = needs_grad_weight and recipe.grad_weight_in_float8
    g_rows, g_columns = _cast_gradient(logits, recipe, rows=rows, columns=columns)
    if needs_grad_weight and not columns:
        grad_weight = add_product(grad_weight, logits, x.value)
    del logits
    if grad_hidden is not None:
        assert g_rows is not None
        assert weight.columns is not None
        grad_hidden.copy_(config.gradient_product(g_rows, weight.columns, torch.float32))
    del g_rows
    if g_columns is not None:
        assert x.columns is not None
        added = config.gradient_product(g_columns, x.columns, torch.float32)
        grad_weight = added if grad_weight is None else grad_weight.add_(added)
    return loss, grad_weight


def _cast_gradient(
    gradient: Tensor, recipe: Float8Recipe, *, rows: bool, columns: bool
) -> tuple[Codes | None, Codes | None]:
    """The gradient of logits `[t, V]` by rows and by columns, each if asked for."""
    if not (rows or columns):
        return None, None
    one = torch.ones((), dtype=torch.float32, device=gradient.device).view(torch.int32)
    return cast_activation(gradient, recipe, recipe.grad_output_dtype, rows=rows, columns=columns, amax=one)
