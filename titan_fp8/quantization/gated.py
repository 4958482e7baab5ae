"""The first half of a gated feed-forward in float8: `silu(x w1.T) * (x w3.T)`, made straight into codes for w2.

Between the products of w1 and w3 and that of w2 nothing is written in bf16 but their two results, gate and up, which
backward needs. In backward the gradient that w2 returns becomes the float8 gradients of gate and up, in both layouts,
without being written in between:

    forward    gate = x @ w1.T;  up = x @ w3.T;  hidden = silu(gate) * up, codes only
    backward   grad_hidden -> codes of grad_gate and grad_up
               grad_x  = grad_gate @ w1 + grad_up @ w3
               grad_w1 = grad_gate.T @ x;  grad_w3 = grad_up.T @ x

Everything else is as `function.py` says.

T tokens, K in features, H hidden features.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from titan_fp8.kernels.producers import Cast
from titan_fp8.quantization import producer_ops
from titan_fp8.quantization.activation import QuantizedActivation
from titan_fp8.quantization.casts import Codes, product
from titan_fp8.quantization.function import (
    Float8Config,
    WeightOperand,
    both_layouts,
    columns_of_weight,
    differentiable_once,
    later_or_now,
)
from titan_fp8.quantization.linear import Float8Linear
from titan_fp8.quantization.produced import input_cast, quantized, value_of
from titan_fp8.runtime.deferred import WeightSink

_Layouts = tuple[Tensor, Tensor, Tensor | None, Tensor | None]
"""Codes and scale by rows, and by columns, as `both_layouts` gives them."""


def gated_hidden(
    x: Tensor | QuantizedActivation, w1: Float8Linear, w3: Float8Linear, *, columns: bool
) -> QuantizedActivation:
    """`silu(w1(x)) * w3(x)`, `[..., H]`, for a linear of w1's and w3's recipe to read.

    Args:
        x: `[..., K]`.
        w1, w3: linears without bias and of one config, whose weight gradient is a float8 product.
        columns: whether the linear that reads the result will be asked for its weight's gradient.
    """
    assert w1.config == w3.config
    assert w1.bias is None
    assert w3.bias is None
    config = w1.config
    value, x_rows, x_columns = w1.quantize_input(x)
    grad = torch.is_grad_enabled()
    if x_columns is None and grad and w3.weight.requires_grad:
        value, x_rows, x_columns = w3.quantize_input(x)
    cast = input_cast(config.recipe, columns=columns, emit=False)
    operands = [linear.weight_operand() for linear in (w1, w3)]
    outputs = _GatedHidden.apply(
        value,
        w1.local_weight(),
        w3.local_weight(),
        *both_layouts(x_rows, x_columns),
        *both_layouts(operands[0].rows, operands[0].columns),
        *both_layouts(operands[1].rows, operands[1].columns),
        config,
        cast,
        tuple(_saves_weight(operand, config) for operand in operands),
        grad and value.requires_grad,
        (grad and w1.weight.requires_grad, grad and w3.weight.requires_grad),
        (w1.weight_sink, w3.weight_sink),
    )
    return quantized(outputs[0], outputs[1:], cast, config.recipe, columns=columns)


def _saves_weight(operand: WeightOperand, config: Float8Config) -> bool:
    return operand.is_transient and config.recompute_weight_in_backward


class _GatedHidden(torch.autograd.Function):
    """`(value, *codes)` of the hidden activation."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        w1: Tensor,
        w3: Tensor,
        x_codes: Tensor,
        x_scale: Tensor,
        x_codes_t: Tensor | None,
        x_scale_t: Tensor | None,
        w1_codes: Tensor,
        w1_scale: Tensor,
        w1_codes_t: Tensor | None,
        w1_scale_t: Tensor | None,
        w3_codes: Tensor,
        w3_scale: Tensor,
        w3_codes_t: Tensor | None,
        w3_scale_t: Tensor | None,
        config: Float8Config,
        cast: Cast,
        saves_weights: tuple[bool, bool],
        needs_grad_input: bool,
        needs_grad_weights: tuple[bool, bool],
        sinks: tuple[WeightSink | None, WeightSink | None],
    ) -> tuple[Tensor, ...]:
        """x `[..., K]`, of which only shape and dtype are used; w1 and w3 `[H, K]`; operands in the layouts of
        `function.Float8LinearFunction`; the rest says what is computed and saved."""
        x_rows = Codes(x_codes, x_scale)
        gate, up = (
            product(x_rows, rows, None, x.dtype, blockwise=config.blockwise, fast_accum=True, emulate=config.emulate)
            for rows in (Codes(w1_codes, w1_scale), Codes(w3_codes, w3_scale))
        )
        codes = tuple(producer_ops.swiglu_cast(gate, up, *cast))
        hidden = value_of(None, (*x.shape[:-1], gate.shape[1]), like=gate)
        saved: list[Tensor | None] = [gate, up, None, None]
        if any(needs_grad_weights):
            saved[2:] = [x_codes_t, x_scale if x_scale_t is None else x_scale_t]
        for weight, saves_weight, layouts in (
            (w1, saves_weights[0], (w1_codes, w1_scale, w1_codes_t, w1_scale_t)),
            (w3, saves_weights[1], (w3_codes, w3_scale, w3_codes_t, w3_scale_t)),
        ):
            saved += _for_grad_input(weight, layouts, saves_weight) if needs_grad_input else [None] * 3
        ctx.save_for_backward(*saved)
        ctx.mark_non_differentiable(*codes)
        if not torch.compiler.is_compiling():
            ctx.set_materialize_grads(False)  # nobody wants a zero gradient of codes
        ctx.config, ctx.sinks = config, sinks
        ctx.has_columns = w1_codes_t is not None, w3_codes_t is not None
        ctx.needs_grads = needs_grad_input, needs_grad_weights
        ctx.input_shape, ctx.input_dtype, ctx.weight_dtypes = x.shape, x.dtype, (w1.dtype, w3.dtype)
        return hidden, *codes

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad_hidden: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        """Gradients of x, w1 and w3 for that of the hidden activation `[..., H]`."""
        gate, up, x_codes_t, x_scale_t, *weights = ctx.saved_tensors
        config: Float8Config = ctx.config
        recipe = config.recipe
        needs_grad_input, needs_grad_weights = ctx.needs_grads
        if grad_hidden is None:
            return (None,) * 21
        cast = Cast(
            recipe.granularity.value,
            recipe.grad_output_dtype,
            recipe.power_of_two_scales,
            rows=needs_grad_input,
            columns=any(needs_grad_weights),
        )
        tensors = iter(producer_ops.swiglu_backward_cast(grad_hidden.reshape(gate.shape), gate, up, *cast))
        if not torch.compiler.is_compiling():
            # The products that follow need memory, and gate and up, as large as what they make, are done with.
            ctx.maybe_clear_saved_tensors()
        del gate, up
        grads = [producer_ops.forms(tensors, cast) for _ in range(2)]
        grad_x = None
        grad_weights: list[Tensor | None] = [None, None]
        for number in range(2):
            rows, columns = grads[0].rows, grads.pop(0).columns
            if rows is not None:
                weight, codes, scale = weights[3 * number : 3 * number + 3]
                w_columns = columns_of_weight(weight, codes, scale, config, has_columns=ctx.has_columns[number])
                part = config.gradient_product(rows, w_columns, ctx.input_dtype)
                grad_x = part if grad_x is None else grad_x + part
            if columns is not None and needs_grad_weights[number]:
                kept = Codes(x_codes_t, x_scale_t)
                make = partial(config.gradient_product, columns, kept, config.grad_weight_dtype)
                grad_weights[number] = later_or_now(ctx.sinks[number], make, ctx.weight_dtypes[number])
        grad_x = None if grad_x is None else grad_x.view(ctx.input_shape)
        return grad_x, *grad_weights, *[None] * 18


def _for_grad_input(weight: Tensor, layouts: _Layouts, saves_weight: bool) -> list[Tensor | None]:
    """What is saved of a weight: the parameter, or codes and scale by columns or by rows."""
    codes, scale, codes_t, scale_t = layouts
    if codes_t is not None:
        return [None, codes_t, scale if scale_t is None else scale_t]
    return [weight, None, None] if saves_weight else [None, codes, scale]
