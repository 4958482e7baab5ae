"""A gated feed-forward in float8: `(silu(x w1.T) * (x w3.T)) w2.T`, what lies in between made straight into codes.

Between the products of w1 and w3 and that of w2 nothing is written in bf16 but their two results, gate and up, which
backward needs. In backward the gradient of the hidden activation becomes the float8 gradients of gate and up, in both
layouts, without being written in between:

    forward    gate = x @ w1.T;  up = x @ w3.T;  hidden = silu(gate) * up, codes only;  output = hidden @ w2.T
    backward   grad_hidden = grad_output @ w2
               grad_hidden -> codes of grad_gate and grad_up, and once more those of hidden
               grad_x  = grad_gate @ w1 + grad_up @ w3
               grad_w1 = grad_gate.T @ x;  grad_w3 = grad_up.T @ x;  grad_w2 = grad_output.T @ hidden

Gate and up are the largest tensors that a block keeps. With `Float8Config.keeps_gate_up_in_float8` their e4m3 codes are
kept in their place, with a scale a token: backward reads half the bytes, and computes the three gradients that depend
on them from the rounded values. Forward does not change.

`gated_feed_forward` is all of it, and keeps gate and up alone: their backward reads them anyway, and makes the codes of
hidden that grad_w2 multiplies in the same pass. `gated_hidden` is the first half, for a w2 that is another module's or
computes otherwise (a part of a product that several ranks compute); w2 then keeps those codes.

Everything else is as `function.py` and `shared_input.py` say.

T tokens, K in features, H hidden features.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from titan_fp8.kernels.float8 import E4M3
from titan_fp8.kernels.producers import Cast
from titan_fp8.kernels.producers.reference import output_cast
from titan_fp8.quantization import ops, producer_ops
from titan_fp8.quantization.activation import QuantizedActivation
from titan_fp8.quantization.casts import Codes, as_matrix
from titan_fp8.quantization.function import differentiable_once
from titan_fp8.quantization.linear import Float8Linear
from titan_fp8.quantization.produced import input_cast, quantized, value_of
from titan_fp8.quantization.producer_ops import Forms
from titan_fp8.quantization.shared_input import Operands, Plan, Saved, add_part, arguments_of
from titan_fp8.quantization.tensor_parallel import cast_gradient


class _Kept(NamedTuple):
    """What backward has of gate and up `[T, H]`: themselves, or their codes and their scales `[T, 1]`."""

    gate: Tensor
    up: Tensor
    gate_scale: Tensor | None = None
    up_scale: Tensor | None = None

    @classmethod
    def of(cls, gate: Tensor, up: Tensor, *, in_float8: bool) -> "_Kept":
        """What to keep of them."""
        if not in_float8:
            return cls(gate, up)
        (gate_codes, gate_scale), (up_codes, up_scale) = (ops.cast_rows(each, E4M3) for each in (gate, up))
        return cls(gate_codes, up_codes, gate_scale, up_scale)

    def values(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Gate and up as tensors."""
        if self.gate_scale is None or self.up_scale is None:
            return self.gate, self.up
        pairs = (self.gate, self.gate_scale), (self.up, self.up_scale)
        gate, up = ((codes.float() * scale).to(dtype) for codes, scale in pairs)
        return gate, up


class _GatedPlan(NamedTuple):
    """What one call of a feed-forward does, apart from its tensors.

    Attributes:
        linears: of w1, w3 and, if it is a part of the function, w2.
        cast: how hidden is cast.
    """

    linears: Plan
    cast: Cast

    @property
    def has_w2(self) -> bool:
        """Whether w2 is a part of the function."""
        return len(self.linears.weights) > 2

    @property
    def needs_columns(self) -> bool:
        """Whether a gradient of w1 or w3 is wanted."""
        return any(weight.needs_grad for weight in self.linears.weights[:2])

    @property
    def needs_grad_hidden(self) -> bool:
        """Whether backward goes on beyond w2."""
        return self.linears.needs_grad_input or self.needs_columns


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
    *arguments, plan = arguments_of(x, (w1, w3)).flat
    outputs = _GatedFeedForward.apply(*arguments, _GatedPlan(plan, cast))
    return quantized(outputs[0], outputs[1:], cast, recipe, columns=columns)


def gated_feed_forward(x: Tensor | QuantizedActivation, w1: Float8Linear, w3: Float8Linear, w2: Float8Linear) -> Tensor:
    """`w2(silu(w1(x)) * w3(x))`, `[..., N]` for x `[..., K]`.

    Args:
        w1, w3, w2: linears without bias and of one config, whose weight gradient is a float8 product and whose outputs
            no other ranks add to.
    """
    cast = input_cast(w1.config.recipe, columns=False, emit=False)
    *arguments, plan = arguments_of(x, (w1, w3), (w2,)).flat
    return _GatedFeedForward.apply(*arguments, _GatedPlan(plan, cast))[0]


class _GatedFeedForward(torch.autograd.Function):
    """`(output,)`, or without w2 `(value, *codes)` of the hidden activation."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, ...]:
        """`shared_input.Arguments.flat` of w1, w3 and, if it is a part of the function, w2; and a `_GatedPlan`."""
        *tensors, plan = arguments
        linears: Plan = plan.linears
        operands = Operands(tensors, linears)
        shape = operands.value.shape
        gate, up = (operands.multiply(operands.x_rows, number, linears) for number in range(2))
        codes = tuple(producer_ops.swiglu_cast(gate, up, *plan.cast))
        if plan.has_w2:
            hidden = producer_ops.forms(iter(codes), plan.cast).rows
            assert hidden is not None
            output = operands.multiply(hidden, 2, linears)
            if len(shape) != 2:  # not a view for autograd: see `function.py`
                output = torch.ops.aten._unsafe_view.default(output, [*shape[:-1], output.shape[1]])
            outputs = (output,)
        else:
            outputs = value_of(None, (*shape[:-1], gate.shape[1]), like=gate), *codes
            ctx.mark_non_differentiable(*codes)
        needs_grads = [linears.needs_grad_input] * 2 + [plan.needs_grad_hidden] * plan.has_w2
        needs_any = linears.needs_grad_input or any(weight.needs_grad for weight in linears.weights)
        kept = _Kept.of(gate, up, in_float8=linears.config.keeps_gate_up_in_float8 and needs_any)
        ctx.save_for_backward(*kept, *operands.for_backward(linears, needs_grads))
        if not torch.compiler.is_compiling():
            ctx.set_materialize_grads(False)  # nobody wants a zero gradient of codes
        ctx.plan, ctx.input_shape, ctx.arguments = plan, shape, len(arguments)
        return outputs

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        """Gradients of the values of x, of w1, w3 and w2 for that of the output `[..., N]`, or without w2 of the hidden
        activation."""
        plan: _GatedPlan = ctx.plan
        linears = plan.linears
        of_values: list[Tensor | None] = [None] * linears.values
        of_weights: list[Tensor | None] = [None] * len(linears.weights)
        if grad is not None:
            gate, up, gate_scale, up_scale, *others = ctx.saved_tensors
            kept = _Kept(gate, up, gate_scale, up_scale)
            saved, after, g_columns = Saved(others, linears), grad, None
            if plan.has_w2:
                grad, g_columns = _through_w2(grad, saved, plan)
            of_gate, of_up, hidden = _through_swiglu(grad, kept, plan, output=g_columns is not None)
            if not torch.compiler.is_compiling():
                # The products that follow need memory, and gate and up, as large as what they make, are done with.
                ctx.maybe_clear_saved_tensors()
            del gate, up, kept, grad, others
            if g_columns is not None and hidden is not None:
                of_weights[2] = saved.grad_weight(g_columns, hidden, 2)
            x_columns = saved.x_columns(after) if plan.needs_columns else None
            for number, forms in enumerate((of_gate, of_up)):
                if linears.needs_grad_input:
                    add_part(of_values, number, saved.grad_input(forms.rows, number).view(ctx.input_shape))
                if linears.weights[number].needs_grad:
                    assert x_columns is not None
                    of_weights[number] = saved.grad_weight(forms.columns, x_columns, number)
        return *of_values, *of_weights, *[None] * (ctx.arguments - len(of_values) - len(of_weights))


def _through_w2(grad: Tensor, saved: Saved, plan: _GatedPlan) -> tuple[Tensor | None, Codes | None]:
    """The gradient of hidden `[T, H]` for that of the output, and that of the output by columns; each if needed."""
    rows, columns = plan.needs_grad_hidden, plan.linears.weights[2].needs_grad
    recipe = plan.linears.config.recipe
    _, g_rows, g_columns = cast_gradient(as_matrix(grad), recipe, None, rows=rows, columns=columns)
    return saved.grad_input(g_rows, 2) if rows else None, g_columns


def _through_swiglu(
    grad: Tensor | None, kept: _Kept, plan: _GatedPlan, *, output: bool
) -> tuple[Forms, Forms, Codes | None]:
    """The gradients of gate and up for that of hidden, if there is one; and, if asked, hidden by columns."""
    recipe = plan.linears.config.recipe
    rows, columns = plan.linears.needs_grad_input, plan.needs_columns
    cast = Cast(recipe.granularity.value, recipe.grad_output_dtype, recipe.power_of_two_scales, rows, columns)
    hidden_cast = output_cast(cast, recipe.input_dtype)
    if grad is None:
        none = Forms(None, None, None)
        tensors = iter(producer_ops.swiglu_cast(*kept.values(plan.linears.dtype), *hidden_cast))
        return none, none, producer_ops.forms(tensors, hidden_cast).columns
    dtype = recipe.input_dtype if output else None
    gate, up, *scales = kept
    tensors = iter(producer_ops.swiglu_backward_cast(grad.reshape(gate.shape), gate, up, *cast, dtype, *scales))
    of_gate, of_up = (producer_ops.forms(tensors, cast) for _ in range(2))
    return of_gate, of_up, producer_ops.forms(tensors, hidden_cast).columns if output else None
