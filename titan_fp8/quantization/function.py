"""A float8 linear's forward and backward: what the three products consume, and what is kept in between.

    product      left operand                       right operand
    output       x rows            [T, K]           w rows            [N, K]
    grad_input   grad_output rows  [T, N]           w columns         [K, N]
    grad_weight  grad_output cols  [N, padded(T)]   x columns         [K, padded(T)]

Every operand lies with its summed dimension contiguous, so x and grad_output are needed in both layouts, and one cast
writes both. Forward gets x and the weight cast already (`activation.py`, `weights.py`), and saves for backward:

    for grad_weight   the columns of x, 8 bits a value, in place of x; where that product is not float8, or somebody
                      else keeps x, x itself
    for grad_input    the weight's columns where somebody keeps them anyway; otherwise its row codes, from which
                      backward derives the columns; or the parameter alone, which backward casts again

What is cast and saved depends only on which gradients autograd will ask for: under `torch.no_grad()`, or with a frozen
weight, the columns of x are never made.

T tokens, K in features, N out features.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from titan_fp8.quantization import ops
from titan_fp8.quantization.casts import Codes, as_matrix, cast_activation, cast_weight, product, weight_columns
from titan_fp8.quantization.recipes import Float8Recipe, Granularity
from titan_fp8.quantization.tensor_parallel import Split, TensorParallel, cast_gradient
from titan_fp8.runtime.collectives import Axis, all_reduce, reduce_scatter
from titan_fp8.runtime.deferred import WeightSink


@dataclass(frozen=True)
class Float8Config:
    """How one linear computes.

    Attributes:
        recipe: formats and scales.
        emulate: multiply the codes in fp32, on any device.
        fast_accum_in_backward: fast accumulation in the two gradient products; the output always has it.
        grad_weight_dtype: type in which the weight's gradient leaves its product.
        recompute_weight_in_backward: keep no codes of the weight between forward and backward: cast it again, or
            derive its columns again from cached or gathered row codes.
        keeps_input: save x in place of its codes by columns, and cast it again in backward: less memory where whoever
            made x keeps it for its own backward anyway, and no other linear reads it.
        keeps_gate_up_in_float8: a gated feed-forward keeps what w1 and w3 give as e4m3 codes (`gated.py`); of other
            linears it says nothing.
        parallel: the linear's part in a product that several ranks compute; see `tensor_parallel.py`.
    """

    recipe: Float8Recipe
    emulate: bool = False
    fast_accum_in_backward: bool = False
    grad_weight_dtype: torch.dtype = torch.bfloat16
    recompute_weight_in_backward: bool = False
    keeps_input: bool = False
    keeps_gate_up_in_float8: bool = False
    parallel: TensorParallel | None = None

    @property
    def blockwise(self) -> bool:
        """Whether scales belong to blocks of the summed dimension."""
        return self.recipe.granularity is Granularity.BLOCK

    @property
    def sums_over_ranks(self) -> Axis | None:
        """The ranks whose outputs are summed and scattered along the tokens."""
        return self._axis_of(Split.ROW)

    @property
    def input_axis(self) -> Axis | None:
        """The ranks that hold other parts of the same input: other features, or other tokens."""
        return self._axis_of(Split.ROW, Split.WHOLE)

    @property
    def weight_axis(self) -> Axis | None:
        """The ranks that hold other parts of the same weight."""
        return self._axis_of(Split.COLUMN, Split.ROW)

    @property
    def gradient_axis(self) -> Axis | None:
        """The ranks over which the gradients of the same weight are summed."""
        return self._axis_of(Split.WHOLE)

    def _axis_of(self, *splits: Split) -> Axis | None:
        return self.parallel.axis if self.parallel is not None and self.parallel.split in splits else None

    @property
    def saves_columns(self) -> bool:
        """Whether x is kept by columns for the weight's gradient; otherwise x itself is."""
        return self.recipe.grad_weight_in_float8 and not self.keeps_input

    def gradient_product(self, a: Codes, b: Codes, out_dtype: torch.dtype) -> Tensor:
        """`a [M, K] @ b [N, K].T` as the two gradient products compute it."""
        fast_accum, emulate = self.fast_accum_in_backward, self.emulate
        return product(a, b, None, out_dtype, blockwise=self.blockwise, fast_accum=fast_accum, emulate=emulate)


class WeightOperand(NamedTuple):
    """The codes of a weight as a linear gets them for one forward pass.

    Attributes:
        rows: `[N, K]`.
        columns: `[K, N]` where they are kept anyway, else None.
        is_transient: the rows are made for this pass alone, so saving them costs memory until backward.
    """

    rows: Codes
    columns: Codes | None = None
    is_transient: bool = True


def both_layouts(rows: Codes, columns: Codes | None) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """The four tensors as an autograd function takes them: the compiler refuses one tensor in two places, so a scale
    that both layouts share stands in the first alone."""
    if columns is None:
        return rows.codes, rows.scale, None, None
    return rows.codes, rows.scale, columns.codes, None if columns.scale is rows.scale else columns.scale


def differentiable_once(backward: Callable[..., Any]) -> Callable[..., Any]:
    """`once_differentiable`, at no cost where autograd makes no graph of the gradients."""
    with_error = once_differentiable(backward)

    @functools.wraps(backward)
    def wrapper(ctx: Any, *grads: Any) -> Any:
        return with_error(ctx, *grads) if torch.is_grad_enabled() else backward(ctx, *grads)

    return wrapper


class Float8LinearFunction(torch.autograd.Function):
    """`output = x @ weight.T + bias` with the matrix products in float8."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        x_codes: Tensor,
        x_scale: Tensor,
        x_codes_t: Tensor | None,
        x_scale_t: Tensor | None,
        w_codes: Tensor,
        w_scale: Tensor,
        w_codes_t: Tensor | None,
        w_scale_t: Tensor | None,
        config: Float8Config,
        saves_weight: bool,
        needs_grad_input: bool,
        needs_grad_weight: bool,
        sink: WeightSink | None,
    ) -> Tensor:
        """The output `[..., N]` in x's dtype; row parallel `[1, T / t, N]`, this rank's tokens of the sum.

        Args:
            x: `[..., K]`; its values are used only where `grad_weight` is not a float8 product.
            weight: the parameter `[N, K]`.
            bias: `[N]` or None.
            x_codes, x_scale: x by rows.
            x_codes_t, x_scale_t: x by columns, or None; a scale that is that of the rows is None too.
            w_codes, w_scale: the weight by rows.
            w_codes_t, w_scale_t: the weight by columns, or None: derived in backward. The scale likewise.
            config: how to compute.
            saves_weight: save the parameter in place of its codes.
            needs_grad_input, needs_grad_weight: what backward will be asked for.
            sink: takes the product for the weight's gradient, which backward then leaves out.
        """
        output = product(
            Codes(x_codes, x_scale),
            Codes(w_codes, w_scale),
            bias,
            x.dtype,
            blockwise=config.blockwise,
            fast_accum=True,
            emulate=config.emulate,
        )
        saved: list[Tensor | None] = [None] * 5  # weight; codes and scale of the weight; those of x
        if needs_grad_input:
            if w_codes_t is not None:
                saved[1:3] = [w_codes_t, w_scale if w_scale_t is None else w_scale_t]
            elif saves_weight:
                saved[0] = weight
            else:
                saved[1:3] = [w_codes, w_scale]
        if needs_grad_weight:
            x_scale_t = x_scale if x_scale_t is None else x_scale_t
            saved[3:5] = [x, None] if x_codes_t is None else [x_codes_t, x_scale_t]
        ctx.save_for_backward(*saved)
        ctx.config, ctx.sink = config, sink
        ctx.has_columns, ctx.has_x_columns = w_codes_t is not None, x_codes_t is not None
        ctx.needs_grads = needs_grad_input, needs_grad_weight
        ctx.input_shape, ctx.input_dtype, ctx.weight_dtype = x.shape, x.dtype, weight.dtype
        ctx.bias_dtype = None if bias is None else bias.dtype
        shape = [*x.shape[:-1], output.shape[1]]
        if config.sums_over_ranks is not None:
            output = reduce_scatter(output, config.sums_over_ranks)
            shape = [1, *output.shape]
        if len(shape) == 2:
            return output
        # Not a view for autograd: FSDP hooks the outputs of the modules it wraps, and a view would lose the hook when
        # it is changed in place.
        return torch.ops.aten._unsafe_view.default(output, shape)

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of x `[..., K]`, weight `[N, K]` and bias `[N]` for that of the output `[..., N]`; None where not
        asked for."""
        weight, w_codes, w_scale, x_or_codes_t, x_scale_t = ctx.saved_tensors
        config: Float8Config = ctx.config
        recipe = config.recipe
        needs_grad_input, needs_grad_weight = ctx.needs_grads
        grad_input = grad_weight = grad_bias = None
        columns = needs_grad_weight and recipe.grad_weight_in_float8
        grad_output, g_rows, g_columns = cast_gradient(
            as_matrix(grad_output), recipe, config.parallel, rows=needs_grad_input, columns=columns
        )
        if g_rows is not None:
            w_columns = columns_of_weight(
                weight, w_codes, w_scale, config, has_columns=ctx.has_columns, after=grad_output
            )
            grad_input = config.gradient_product(g_rows, w_columns, ctx.input_dtype)
            if len(ctx.input_shape) != 2:
                grad_input = grad_input.view(ctx.input_shape)
        if needs_grad_weight:
            kept = Codes(x_or_codes_t, x_scale_t)
            if columns and not ctx.has_x_columns:
                kept = _columns_of(kept.codes, recipe, after=grad_output)
            grad_weight = later_or_now(
                ctx.sink, partial(_grad_weight, g_columns, grad_output, kept, config), ctx.weight_dtype
            )
        if ctx.bias_dtype is not None and ctx.needs_input_grad[2]:
            grad_bias = ops.sum_rows(grad_output).to(ctx.bias_dtype)
        return grad_input, grad_weight, grad_bias, *[None] * 13


def later_or_now(sink: WeightSink | None, product: Callable[[], Tensor], dtype: torch.dtype) -> Tensor | None:
    """A weight's gradient in `dtype`; None where a sink will have it computed."""
    if sink is None:
        return product().to(dtype)
    sink.later(product)
    return None


def _grad_weight(g_columns: Codes | None, grad_output: Tensor, x: Codes, config: Float8Config) -> Tensor:
    """`grad_output.T @ x`, of their codes by columns if there are any; else x.codes is x in high precision."""
    if g_columns is not None:
        grad = config.gradient_product(g_columns, x, config.grad_weight_dtype)
    else:
        grad = unquantized_product(grad_output, as_matrix(x.codes), config.grad_weight_dtype)
    return grad if config.gradient_axis is None else all_reduce(grad.float(), config.gradient_axis)


def unquantized_product(grad_output: Tensor, x: Tensor, out_dtype: torch.dtype) -> Tensor:
    """`grad_output [T, N].T @ x [T, K]` in `out_dtype`, which may be wider than what is multiplied."""
    return grad_output.t() @ x if out_dtype == x.dtype else ops.high_precision_mm(grad_output, x, out_dtype)


def _columns_of(x: Tensor, recipe: Float8Recipe, *, after: Tensor) -> Codes:
    """x `[..., K]` by columns, of the bits that one cast into both layouts gives; made after the gradient `after`."""
    _, columns = cast_activation(as_matrix(x), recipe, recipe.input_dtype, rows=False, columns=True, after=after)
    assert columns is not None
    return columns


def columns_of_weight(
    weight: Tensor | None,
    codes: Tensor | None,
    scale: Tensor | None,
    config: Float8Config,
    *,
    has_columns: bool,
    after: Tensor,
) -> Codes:
    """The weight by columns `[K, N]` in backward, from what forward saved: the parameter, or codes and scale. after: a
    gradient, before which the compiler makes nothing of it."""
    recipe = config.recipe
    if weight is not None:
        return weight_columns(cast_weight(weight, recipe, config.weight_axis, after), recipe, after)
    assert codes is not None
    assert scale is not None
    return Codes(codes, scale) if has_columns else weight_columns(Codes(codes, scale), recipe, after)
