"""Float8 linears that read one input, as one function: wq, wk and wv of an attention, and w1 and w3 of `gated.py`.

    forward    output_i = x @ w_i.T
    backward   grad_w_i = grad_output_i.T @ x;  a part of grad_x: grad_output_i @ w_i

Over linears called one by one this has two advantages where x is a norm's output. Its codes by columns, which all
weights' gradients multiply, need not be kept from forward to backward: one function can make them once more
(`later_columns.py`). And each part of grad_x goes back to its own copy of x's value, which takes no memory, so that the
norm's backward adds the parts up, in fp32 and without a pass of its own.

Everything else is as `function.py` says.

T tokens, K in features, N out features.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from titan_fp8.kernels.producers import Cast
from titan_fp8.quantization import later_columns
from titan_fp8.quantization.activation import QuantizedActivation
from titan_fp8.quantization.casts import Codes, as_matrix, product
from titan_fp8.quantization.function import (
    Float8Config,
    both_layouts,
    columns_of_weight,
    differentiable_once,
    later_or_now,
)
from titan_fp8.quantization.later_columns import LaterColumns
from titan_fp8.quantization.linear import Float8Linear
from titan_fp8.quantization.tensor_parallel import cast_gradient
from titan_fp8.runtime.deferred import WeightSink

_INPUT, _WEIGHT = 6, 4
"""Tensors of x (its rows, and what its columns are or are made of) and of a weight (both layouts)."""


class WeightPlan(NamedTuple):
    """What is done with one weight, apart from its tensors.

    Attributes:
        saves_weight: save the parameter in place of its codes.
        has_columns: its columns are kept anyway.
        needs_grad: whether backward will be asked for its gradient.
        dtype: of the parameter.
        sink: takes the product for its gradient.
    """

    saves_weight: bool
    has_columns: bool
    needs_grad: bool
    dtype: torch.dtype
    sink: WeightSink | None


class Plan(NamedTuple):
    """What one call does, apart from its tensors.

    Attributes:
        config: of all linears.
        dtype: of x and of the outputs.
        values: how many values of x there are to take gradients: one, or one for each linear that reads x.
        needs_grad_input: whether backward will be asked for them.
        later: how to make x's columns again, if they are not kept.
        weights: of each linear.
    """

    config: Float8Config
    dtype: torch.dtype
    values: int
    needs_grad_input: bool
    later: Cast | None
    weights: tuple[WeightPlan, ...]


class Arguments(NamedTuple):
    """What an autograd function is called with, in this order and flattened: the values of x, the weights, the tensors
    that both are multiplied as."""

    values: tuple[Tensor, ...]
    weights: tuple[Tensor, ...]
    tensors: tuple[Tensor | None, ...]
    plan: Plan

    @property
    def flat(self) -> tuple[Any, ...]:
        """All of them, the plan last."""
        return *self.values, *self.weights, *self.tensors, self.plan


class Operands:
    """The tensors of `Arguments` inside an autograd function.

    Attributes:
        value: of x.
        weights: parameters `[N, K]`.
        x_rows: codes and scale.
        x_columns: what `for_backward` saves of x.
        layouts: of each weight, as `function.both_layouts` has them.
    """

    def __init__(self, arguments: Sequence[Any], plan: Plan) -> None:
        count = len(plan.weights)
        self.value: Tensor = arguments[0]
        self.weights: Sequence[Tensor] = arguments[plan.values : plan.values + count]
        tensors = arguments[plan.values + count :]
        self.x_rows = Codes(*tensors[:2])
        self.x_columns: list[Tensor | None] = list(tensors[2:_INPUT])
        if plan.later is None and self.x_columns[0] is not None and self.x_columns[1] is None:
            self.x_columns[1] = self.x_rows.scale
        self.layouts = [tensors[i : i + _WEIGHT] for i in range(_INPUT, _INPUT + _WEIGHT * count, _WEIGHT)]

    def multiply(self, x: Codes, number: int, plan: Plan) -> Tensor:
        """`x @ w.T` with the weight `number`."""
        config, rows = plan.config, Codes(*self.layouts[number][:2])
        return product(x, rows, None, plan.dtype, blockwise=config.blockwise, fast_accum=True, emulate=config.emulate)

    def for_backward(self, plan: Plan, needs_grad_input: Sequence[bool]) -> list[Tensor | None]:
        """What is saved: four tensors of x, and for each weight the parameter, or codes and scale by columns or by
        rows. needs_grad_input: whether the gradient of each linear's input will be asked for."""
        saved = [*self.x_columns]
        for weight, layouts, needed, each in zip(
            self.weights, self.layouts, needs_grad_input, plan.weights, strict=True
        ):
            codes, scale, codes_t, scale_t = layouts
            if not needed:
                saved += [None] * 3
            elif codes_t is not None:
                saved += [None, codes_t, scale if scale_t is None else scale_t]
            else:
                saved += [weight, None, None] if each.saves_weight else [None, codes, scale]
        return saved


class Saved:
    """What `Operands.for_backward` returned, in backward."""

    def __init__(self, tensors: Sequence[Tensor | None], plan: Plan) -> None:
        self._x = tensors[:4]
        self._weights = [tensors[i : i + 3] for i in range(4, 4 + 3 * len(plan.weights), 3)]
        self._plan = plan

    def x_columns(self, after: Tensor) -> Codes:
        """x by columns; after: a gradient."""
        plan = self._plan
        if plan.later is not None:
            return later_columns.made(self._x, plan.later, after)
        codes, scale = self._x[:2]
        assert codes is not None
        assert scale is not None
        return Codes(codes, scale)

    def grad_input(self, g_rows: Codes | None, number: int) -> Tensor:
        """`grad_output @ w` with the weight `number`."""
        assert g_rows is not None
        plan = self._plan
        weight, codes, scale = self._weights[number]
        has_columns = plan.weights[number].has_columns
        w_columns = columns_of_weight(weight, codes, scale, plan.config, has_columns=has_columns, after=g_rows.codes)
        return plan.config.gradient_product(g_rows, w_columns, plan.dtype)

    def grad_weight(self, g_columns: Codes | None, x_columns: Codes, number: int) -> Tensor | None:
        """`grad_output.T @ x`, or None where the weight's sink will have it computed."""
        assert g_columns is not None
        config, weight = self._plan.config, self._plan.weights[number]
        make = partial(config.gradient_product, g_columns, x_columns, config.grad_weight_dtype)
        return later_or_now(weight.sink, make, weight.dtype)


def arguments_of(
    x: Tensor | QuantizedActivation, readers: Sequence[Float8Linear], others: Sequence[Float8Linear] = ()
) -> Arguments:
    """For a function of x `[..., K]`.

    Args:
        x: of the readers' recipe.
        readers: linears that multiply it, without bias and of one config, whose weight gradient is a float8 product.
        others: more such linears, which multiply something else.
    """
    first, *_ = readers
    config, grad = first.config, torch.is_grad_enabled()
    linears = [*readers, *others]
    assert all(linear.config == config and linear.bias is None for linear in linears)
    wanted = grad and any(linear.weight.requires_grad for linear in readers)
    later = x.columns if wanted and isinstance(x, QuantizedActivation) else None
    later = later if isinstance(later, LaterColumns) else None
    value, rows, columns = first.quantize_input(x, columns=wanted and later is None)
    values = (value,)
    if isinstance(x, QuantizedActivation) and len(x.values) == len(readers):
        values = x.values
    kept: tuple[Tensor | None, ...] = (None,) * 4
    if later is not None:
        kept = later.tensors
    elif columns is not None:
        # One tensor must not stand in two places: as `both_layouts` has it.
        kept = (columns.codes, None if columns.scale is rows.scale else columns.scale, None, None)
    operands = [linear.weight_operand() for linear in linears]
    weights = tuple(linear.local_weight() for linear in linears)
    layouts = [both_layouts(each.rows, each.columns) for each in operands]
    plans = tuple(
        WeightPlan(
            operand.is_transient and config.recompute_weight_in_backward,
            operand.columns is not None,
            grad and linear.weight.requires_grad,
            weight.dtype,
            linear.weight_sink,
        )
        for linear, operand, weight in zip(linears, operands, weights, strict=True)
    )
    needs_grad_input = grad and value.requires_grad
    plan = Plan(config, value.dtype, len(values), needs_grad_input, None if later is None else later.cast, plans)
    tensors = (*rows, *kept, *(tensor for each in layouts for tensor in each))
    return Arguments(values, weights, tensors, plan)


def share_input(x: Tensor | QuantizedActivation, linears: Sequence[Float8Linear]) -> tuple[Tensor, ...]:
    """The outputs `[..., N]` of linears that read x `[..., K]`; see `arguments_of`."""
    return _SharedInput.apply(*arguments_of(x, linears).flat)


class _SharedInput(torch.autograd.Function):
    """The outputs of all linears."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, ...]:
        """`Arguments.flat`."""
        *tensors, plan = arguments
        operands = Operands(tensors, plan)
        shape = operands.value.shape
        outputs = []
        for number in range(len(plan.weights)):
            output = operands.multiply(operands.x_rows, number, plan)
            if len(shape) != 2:  # not a view for autograd: see `function.py`
                output = torch.ops.aten._unsafe_view.default(output, [*shape[:-1], output.shape[1]])
            outputs.append(output)
        ctx.save_for_backward(*operands.for_backward(plan, [plan.needs_grad_input] * len(plan.weights)))
        if not torch.compiler.is_compiling():
            ctx.set_materialize_grads(False)  # an output that nobody used has none
        ctx.plan, ctx.input_shape, ctx.arguments = plan, shape, len(arguments)
        return tuple(outputs)

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """Gradients of the values of x and of the weights for those of the outputs `[..., N]`."""
        plan: Plan = ctx.plan
        saved = Saved(ctx.saved_tensors, plan)
        of_values: list[Tensor | None] = [None] * plan.values
        of_weights: list[Tensor | None] = [None] * len(plan.weights)
        x_columns: Codes | None = None
        for number, (grad, weight) in enumerate(zip(grads, plan.weights, strict=True)):
            if grad is None:
                continue
            rows, columns = plan.needs_grad_input, weight.needs_grad
            _, g_rows, g_columns = cast_gradient(as_matrix(grad), plan.config.recipe, None, rows=rows, columns=columns)
            if rows:
                add_part(of_values, number, saved.grad_input(g_rows, number).view(ctx.input_shape))
            if columns:
                x_columns = saved.x_columns(grad) if x_columns is None else x_columns
                of_weights[number] = saved.grad_weight(g_columns, x_columns, number)
        return *of_values, *of_weights, *[None] * (ctx.arguments - plan.values - len(plan.weights))


def add_part(of_values: list[Tensor | None], number: int, part: Tensor) -> None:
    """Give a part of x's gradient, that of its reader `number`, to the value that takes it."""
    place = min(number, len(of_values) - 1)
    before = of_values[place]
    of_values[place] = part if before is None else before + part
