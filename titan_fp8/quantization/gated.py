"""A gated feed-forward in float8: `(silu(x w1.T) * (x w3.T)) w2.T`, what lies in between made straight into codes.

Between the products of w1 and w3 and that of w2 nothing is written in bf16 but their two results, gate and up, which
backward needs. In backward the gradient of the hidden activation becomes the float8 gradients of gate and up, in both
layouts, without being written in between:

    forward    gate = x @ w1.T;  up = x @ w3.T;  hidden = silu(gate) * up, codes only;  output = hidden @ w2.T
    backward   grad_hidden = grad_output @ w2
               grad_hidden -> codes of grad_gate and grad_up, and once more those of hidden
               grad_x  = grad_gate @ w1 + grad_up @ w3
               grad_w1 = grad_gate.T @ x;  grad_w3 = grad_up.T @ x;  grad_w2 = grad_output.T @ hidden

`gated_feed_forward` is all of it, and keeps gate and up alone: their backward reads them anyway, and makes the codes of
hidden that grad_w2 multiplies in the same pass. `gated_hidden` is the first half, for a w2 that is another module's or
computes otherwise (a part of a product that several ranks compute); w2 then keeps those codes.

Everything else is as `function.py` says.

T tokens, K in features, H hidden features.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from titan_fp8.kernels.producers import Cast
from titan_fp8.kernels.producers.reference import output_cast
from titan_fp8.quantization import producer_ops
from titan_fp8.quantization.activation import QuantizedActivation
from titan_fp8.quantization.casts import Codes, as_matrix, product
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
from titan_fp8.quantization.producer_ops import Forms
from titan_fp8.quantization.tensor_parallel import cast_gradient
from titan_fp8.runtime.deferred import WeightSink

_OPERANDS = 16
"""Tensors of the layouts of x, w1, w3 and w2."""


class _Plan(NamedTuple):
    """What one call of a feed-forward does, apart from its tensors. Tuples have an entry for w1, w3 and, if it is a
    part of the function, w2.

    Attributes:
        config: of all linears.
        cast: how hidden is cast.
        dtype: of x and of the outputs.
        saves_weights: save the parameter in place of its codes.
        has_columns: the weight's columns are kept anyway.
        needs_grad_input: whether backward will be asked for it.
        needs_grad_weights: likewise.
        weight_dtypes: of the parameters.
        sinks: take the products for the weights' gradients.
    """

    config: Float8Config
    cast: Cast
    dtype: torch.dtype
    saves_weights: tuple[bool, ...]
    has_columns: tuple[bool, ...]
    needs_grad_input: bool
    needs_grad_weights: tuple[bool, ...]
    weight_dtypes: tuple[torch.dtype, ...]
    sinks: tuple[WeightSink | None, ...]

    @property
    def has_w2(self) -> bool:
        """Whether w2 is a part of the function."""
        return len(self.sinks) > 2

    @property
    def needs_grad_hidden(self) -> bool:
        """Whether backward goes on beyond w2."""
        return self.needs_grad_input or any(self.needs_grad_weights[:2])


def gated_hidden(
    x: Tensor | QuantizedActivation, w1: Float8Linear, w3: Float8Linear, *, columns: bool
) -> QuantizedActivation:
    """`silu(w1(x)) * w3(x)`, `[..., H]`, for a linear of w1's and w3's recipe to read.

    Args:
        x: `[..., K]`.
        w1, w3: linears without bias and of one config, whose weight gradient is a float8 product.
        columns: whether the linear that reads the result will be asked for its weight's gradient.
    """
    recipe = w1.config.recipe
    cast = input_cast(recipe, columns=columns, emit=False)
    outputs = _apply(x, (w1, w3), cast)
    return quantized(outputs[0], outputs[1:], cast, recipe, columns=columns)


def gated_feed_forward(x: Tensor | QuantizedActivation, w1: Float8Linear, w3: Float8Linear, w2: Float8Linear) -> Tensor:
    """`w2(silu(w1(x)) * w3(x))`, `[..., N]` for x `[..., K]`.

    Args:
        w1, w3, w2: linears without bias and of one config, whose weight gradient is a float8 product and whose outputs
            no other ranks add to.
    """
    cast = input_cast(w1.config.recipe, columns=False, emit=False)
    return _apply(x, (w1, w3, w2), cast)[0]


def _apply(x: Tensor | QuantizedActivation, linears: tuple[Float8Linear, ...], cast: Cast) -> tuple[Tensor, ...]:
    w1, w3, *_ = linears
    config = w1.config
    assert all(linear.config == config and linear.bias is None for linear in linears)
    value, x_rows, x_columns = w1.quantize_input(x)
    grad = torch.is_grad_enabled()
    if x_columns is None and grad and w3.weight.requires_grad:
        value, x_rows, x_columns = w3.quantize_input(x)
    operands = [linear.weight_operand() for linear in linears]
    weights = [linear.local_weight() for linear in linears]
    plan = _Plan(
        config,
        cast,
        value.dtype,
        tuple(_saves_weight(operand, config) for operand in operands),
        tuple(operand.columns is not None for operand in operands),
        grad and value.requires_grad,
        tuple(grad and linear.weight.requires_grad for linear in linears),
        tuple(weight.dtype for weight in weights),
        tuple(linear.weight_sink for linear in linears),
    )
    layouts = [both_layouts(x_rows, x_columns), *(both_layouts(each.rows, each.columns) for each in operands)]
    none = [None] * (3 - len(linears))
    tensors = [tensor for each in layouts for tensor in each]
    return _GatedFeedForward.apply(value, *weights, *none, *tensors, *none * 4, plan)


def _saves_weight(operand: WeightOperand, config: Float8Config) -> bool:
    return operand.is_transient and config.recompute_weight_in_backward


class _GatedFeedForward(torch.autograd.Function):
    """`(output,)`, or without w2 `(value, *codes)` of the hidden activation."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, w1: Tensor, w3: Tensor, w2: Tensor | None, *operands_and_plan: Any
    ) -> tuple[Tensor, ...]:
        """x `[..., K]`, of which only shape and dtype are used; w1 and w3 `[H, K]`; w2 `[N, H]` or None; the layouts of
        x, w1, w3 and w2, each as in `function.Float8LinearFunction`; and a `_Plan`."""
        *operands, plan = operands_and_plan
        config: Float8Config = plan.config
        of_x, *of_weights = (operands[i : i + 4] for i in range(0, _OPERANDS, 4))
        multiply = partial(product, blockwise=config.blockwise, fast_accum=True, emulate=config.emulate)
        gate, up = (multiply(Codes(*of_x[:2]), Codes(*layouts[:2]), None, plan.dtype) for layouts in of_weights[:2])
        codes = tuple(producer_ops.swiglu_cast(gate, up, *plan.cast))
        if w2 is None:
            outputs = value_of(None, (*x.shape[:-1], gate.shape[1]), like=gate), *codes
            ctx.mark_non_differentiable(*codes)
        else:
            hidden = producer_ops.forms(iter(codes), plan.cast).rows
            assert hidden is not None
            output = multiply(hidden, Codes(*of_weights[2][:2]), None, plan.dtype)
            if x.dim() != 2:  # not a view for autograd: see `function.py`
                output = torch.ops.aten._unsafe_view.default(output, [*x.shape[:-1], output.shape[1]])
            outputs = (output,)
        saved = [gate, up, *_x_columns(of_x, plan)]
        for number, weight in enumerate((w1, w3, w2)[: len(plan.sinks)]):
            saved += _for_grad_input(weight, of_weights[number], number, plan)
        ctx.save_for_backward(*saved)
        if not torch.compiler.is_compiling():
            ctx.set_materialize_grads(False)  # nobody wants a zero gradient of codes
        ctx.plan, ctx.input_shape = plan, x.shape
        return outputs

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        """Gradients of x, w1, w3 and w2 for that of the output `[..., N]`, or without w2 of the hidden activation."""
        grads: list[Tensor | None] = [None] * 4
        if grad is not None:
            gate, up, x_codes_t, x_scale_t, *weights = ctx.saved_tensors
            plan: _Plan = ctx.plan
            g_columns = None
            if plan.has_w2:
                grad, g_columns = _through_w2(grad, weights[6:], plan)
            of_gate, of_up, hidden = _through_swiglu(grad, gate, up, plan, output=g_columns is not None)
            if not torch.compiler.is_compiling():
                # The products that follow need memory, and gate and up, as large as what they make, are done with.
                ctx.maybe_clear_saved_tensors()
            del gate, up, grad
            if g_columns is not None and hidden is not None:
                grads[3] = _grad_weight(g_columns, hidden, 2, plan)
            kept = Codes(x_codes_t, x_scale_t)
            for number, forms in enumerate((of_gate, of_up)):
                if plan.needs_grad_input:
                    part = _grad_input(forms.rows, weights[3 * number : 3 * number + 3], number, plan)
                    grads[0] = part if grads[0] is None else grads[0] + part
                if plan.needs_grad_weights[number]:
                    grads[1 + number] = _grad_weight(forms.columns, kept, number, plan)
        grad_x = None if grads[0] is None else grads[0].view(ctx.input_shape)
        return grad_x, *grads[1:], *[None] * (_OPERANDS + 1)


def _x_columns(of_x: Sequence[Tensor | None], plan: _Plan) -> list[Tensor | None]:
    """What is saved of x: codes and scale by columns."""
    if not any(plan.needs_grad_weights[:2]):
        return [None, None]
    return [of_x[2], of_x[1] if of_x[3] is None else of_x[3]]


def _for_grad_input(
    weight: Tensor | None, layouts: Sequence[Tensor | None], number: int, plan: _Plan
) -> list[Tensor | None]:
    """What is saved of a weight: the parameter, or codes and scale by columns or by rows."""
    codes, scale, codes_t, scale_t = layouts
    if not (plan.needs_grad_hidden if number == 2 else plan.needs_grad_input):
        return [None] * 3
    if codes_t is not None:
        return [None, codes_t, scale if scale_t is None else scale_t]
    return [weight, None, None] if plan.saves_weights[number] else [None, codes, scale]


def _through_w2(grad: Tensor, w2: Sequence[Tensor | None], plan: _Plan) -> tuple[Tensor | None, Codes | None]:
    """The gradient of hidden `[T, H]` for that of the output, and that of the output by columns; each if needed."""
    rows, columns = plan.needs_grad_hidden, plan.needs_grad_weights[2]
    _, g_rows, g_columns = cast_gradient(as_matrix(grad), plan.config.recipe, None, rows=rows, columns=columns)
    return _grad_input(g_rows, w2, 2, plan) if rows else None, g_columns


def _through_swiglu(
    grad: Tensor | None, gate: Tensor, up: Tensor, plan: _Plan, *, output: bool
) -> tuple[Forms, Forms, Codes | None]:
    """The gradients of gate and up for that of hidden, if there is one; and, if asked, hidden by columns."""
    recipe = plan.config.recipe
    rows, columns = plan.needs_grad_input, any(plan.needs_grad_weights[:2])
    cast = Cast(recipe.granularity.value, recipe.grad_output_dtype, recipe.power_of_two_scales, rows, columns)
    hidden_cast = output_cast(cast, recipe.input_dtype)
    if grad is None:
        none = Forms(None, None, None)
        return none, none, producer_ops.forms(iter(producer_ops.swiglu_cast(gate, up, *hidden_cast)), hidden_cast)[2]
    dtype = recipe.input_dtype if output else None
    tensors = iter(producer_ops.swiglu_backward_cast(grad.reshape(gate.shape), gate, up, *cast, dtype))
    of_gate, of_up = (producer_ops.forms(tensors, cast) for _ in range(2))
    return of_gate, of_up, producer_ops.forms(tensors, hidden_cast).columns if output else None


def _grad_input(g_rows: Codes | None, saved: Sequence[Tensor | None], number: int, plan: _Plan) -> Tensor:
    assert g_rows is not None
    weight, codes, scale = saved
    w_columns = columns_of_weight(weight, codes, scale, plan.config, has_columns=plan.has_columns[number])
    return plan.config.gradient_product(g_rows, w_columns, plan.dtype)


def _grad_weight(g_columns: Codes | None, x_columns: Codes, number: int, plan: _Plan) -> Tensor | None:
    """The gradient of a weight, or None where its sink will have it computed."""
    assert g_columns is not None
    make = partial(plan.config.gradient_product, g_columns, x_columns, plan.config.grad_weight_dtype)
    return later_or_now(plan.sinks[number], make, plan.weight_dtypes[number])
