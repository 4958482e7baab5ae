"""A float8 linear's forward and backward: which tensor is cast how, and what the three products consume.

    product      left operand                       right operand
    output       x rows            [T, K]           w rows            [N, K]
    grad_input   grad_output rows  [T, N]           w columns         [K, N]
    grad_weight  grad_output cols  [N, padded(T)]   x columns         [K, padded(T)]

Every operand lies with its summed dimension contiguous, so x and grad_output are needed in both layouts, and one cast
writes both. Forward makes the columns of x at once and saves them, 8 bits a value, in place of x. The weight itself is
saved, not its codes: it is the parameter, which is in memory anyway or which FSDP frees and gathers again, and
casting it a second time costs less than keeping it.

What is cast depends only on which gradients autograd will ask for: under `torch.no_grad()`, or with a frozen weight,
the columns of x are never made.

T tokens, K in features, N out features.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from titan_fp8.quantization import ops
from titan_fp8.quantization.recipes import Float8Recipe, Granularity


@dataclass(frozen=True)
class Float8Config:
    """How one linear computes.

    Attributes:
        recipe: formats and scales.
        emulate: multiply the codes in fp32, on any device.
        fast_accum_in_backward: fast accumulation in the two gradient products; the output always has it.
        grad_weight_dtype: type in which the weight's gradient leaves its product.
    """

    recipe: Float8Recipe
    emulate: bool = False
    fast_accum_in_backward: bool = False
    grad_weight_dtype: torch.dtype = torch.bfloat16


class Codes(NamedTuple):
    """Float8 codes and the scale that turns them back: [], or one a row of `codes`."""

    codes: Tensor
    scale: Tensor


def cast_activation(
    x: Tensor, recipe: Float8Recipe, dtype: torch.dtype, *, rows: bool, columns: bool
) -> tuple[Codes | None, Codes | None]:
    """Cast x `[T, K]` into the layouts asked for: rows `[T, K]` and columns `[K, padded(T)]`; None for the other."""
    if recipe.granularity is Granularity.TENSOR:
        amax = ops.amax(x)
        if rows and columns:
            codes, codes_t, scale = ops.cast_tensor_both(x, amax, dtype)
            return Codes(codes, scale), Codes(codes_t, scale)
        if rows:
            return Codes(*ops.cast_tensor(x, amax, dtype)), None
        return None, Codes(*ops.cast_tensor_columns(x, amax, dtype))
    if rows and columns:
        codes, scale, codes_t, scale_t = ops.cast_rows_and_columns(x, dtype)
        return Codes(codes, scale), Codes(codes_t, scale_t)
    if rows:
        return Codes(*ops.cast_rows(x, dtype)), None
    return None, Codes(*ops.cast_columns(x, dtype))


def cast_weight(weight: Tensor, recipe: Float8Recipe) -> tuple[Codes, Tensor | None]:
    """The weight `[N, K]` by rows, for `output`; and its amax, which spares backward a pass (None if rowwise)."""
    if recipe.granularity is Granularity.TENSOR:
        amax = ops.amax(weight)
        return Codes(*ops.cast_tensor(weight, amax, recipe.weight_dtype)), amax
    return Codes(*ops.cast_rows(weight, recipe.weight_dtype)), None


def cast_weight_columns(weight: Tensor, amax: Tensor | None, recipe: Float8Recipe) -> Codes:
    """The weight `[N, K]` by columns, `[K, N]`, for `grad_input`; `amax` as `cast_weight` gave it."""
    if recipe.granularity is Granularity.TENSOR:
        return Codes(*ops.cast_tensor_columns(weight, amax, recipe.weight_dtype))
    return Codes(*ops.columns_from_rows(*ops.cast_rows(weight, recipe.weight_dtype)))


class Float8LinearFunction(torch.autograd.Function):
    """`output = x @ weight.T + bias` with all three matrix products in float8."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        config: Float8Config,
        needs_grad_input: bool,
        needs_grad_weight: bool,
    ) -> Tensor:
        """x `[T, K]`, weight `[N, K]`, bias `[N]` or None; the output `[T, N]` has x's dtype."""
        recipe = config.recipe
        x_rows, x_columns = cast_activation(x, recipe, recipe.input_dtype, rows=True, columns=needs_grad_weight)
        assert x_rows is not None
        w_rows, w_amax = cast_weight(weight, recipe)
        output = ops.scaled_mm(
            x_rows.codes, w_rows.codes, x_rows.scale, w_rows.scale, bias, x.dtype, True, config.emulate
        )
        for_grad_input = (weight, w_amax) if needs_grad_input else (None, None)
        for_grad_weight = x_columns if x_columns is not None else (None, None)
        ctx.save_for_backward(*for_grad_input, *for_grad_weight)
        ctx.config = config
        ctx.input_dtype, ctx.weight_dtype = x.dtype, weight.dtype
        ctx.bias_dtype = None if bias is None else bias.dtype
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of x `[T, K]`, weight `[N, K]` and bias `[N]`; None where not asked for."""
        weight, w_amax, x_codes_t, x_scale_t = ctx.saved_tensors
        config: Float8Config = ctx.config
        recipe = config.recipe
        fast, emulate = config.fast_accum_in_backward, config.emulate
        grad_input = grad_weight = grad_bias = g_rows = g_columns = None
        rows, columns = weight is not None, x_codes_t is not None
        if rows or columns:
            g_rows, g_columns = cast_activation(
                grad_output, recipe, recipe.grad_output_dtype, rows=rows, columns=columns
            )
        if g_rows is not None:
            w_t = cast_weight_columns(weight, w_amax, recipe)
            grad_input = ops.scaled_mm(
                g_rows.codes, w_t.codes, g_rows.scale, w_t.scale, None, ctx.input_dtype, fast, emulate
            )
        if g_columns is not None:
            grad_weight = ops.scaled_mm(
                g_columns.codes, x_codes_t, g_columns.scale, x_scale_t, None, config.grad_weight_dtype, fast, emulate
            ).to(ctx.weight_dtype)
        if ctx.bias_dtype is not None and ctx.needs_input_grad[2]:
            grad_bias = ops.sum_rows(grad_output).to(ctx.bias_dtype)
        return grad_input, grad_weight, grad_bias, None, None, None
