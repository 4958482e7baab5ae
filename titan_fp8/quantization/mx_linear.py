"""`MXFP8Linear`: an `nn.Linear` whose matrix products run in MXFP8, and the function that computes them.

    product      left operand                          right operand
    output       x           [T, K] by blocks of K     w           [N, K] by blocks of K
    grad_input   grad_output [T, N] by blocks of N     w           [N, K] by blocks of N
    grad_weight  grad_output [T, N] by blocks of T     x           [T, K] by blocks of T

On tensor cores that multiply blocks, forward casts x in both orientations from one read and saves the codes that
`grad_weight` needs, one byte a value in place of two; linears that read one tensor share them. Where products are
emulated each saves x, which whoever made it keeps as a rule, and quantizes it again in backward; compilers merge what
they do alike. Where the weight's operands come from is told in `mx_weight.py`: at the least they are quantized from
the parameter, once in the forward pass and, along N, once in the backward pass.

Made from an existing linear, a converted one keeps that one's parameters, the very same objects.

T tokens, K in features, N out features.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any, Self

import torch
from torch import Tensor, nn

from titan_fp8.quantization import mx_ops, ops
from titan_fp8.quantization.casts import as_matrix
from titan_fp8.quantization.function import differentiable_once, later_or_now, unquantized_product
from titan_fp8.quantization.linear import check_dims, with_state_of
from titan_fp8.quantization.mx_recipes import MXRecipe
from titan_fp8.quantization.mx_sharded import MXWeightState
from titan_fp8.quantization.mx_weight import Cast, Made, MXWeightCache, Operand, column_operand, made_of, row_operand
from titan_fp8.runtime.collectives import Axis, all_reduce
from titan_fp8.runtime.deferred import WeightSink
from titan_fp8.runtime.errors import UserError


@dataclass(frozen=True)
class MXConfig:
    """How one linear computes.

    Attributes:
        recipe: how scales are rounded.
        emulate: multiply what the codes stand for, on any device.
        dim1_kernel: what casts along T, and the weight along N: "triton", "cuda" or "torch".
        grad_weight_in_high_precision: multiply unquantized tensors for the weight's gradient.
    """

    recipe: MXRecipe
    emulate: bool = False
    dim1_kernel: str = mx_ops.TRITON
    grad_weight_in_high_precision: bool = False

    @property
    def weight_cast(self) -> Cast:
        """How the weight is cast."""
        return Cast(self.recipe.mode, self.dim1_kernel, self.emulate)


class MXFP8Linear(nn.Linear):
    """Linear layer in MXFP8. Weight `[N, K]` and bias `[N]` stay in high precision; the output has the input's dtype.

    Under autocast the input is cast to autocast's dtype first. Make one with `from_linear`.

    Attributes:
        config: recipe, emulation and kernels.
        weight_cache: the weight's operands, kept from one optimizer step to the next; or None.
        fsdp_weight_state: set if the weight is made to be gathered as codes; see `wrap_mx_weights_for_fsdp`.
        weight_sink: where the product for the weight's gradient goes, if it is to be computed later.
    """

    config: MXConfig
    weight_cache: MXWeightCache | None = None
    fsdp_weight_state: MXWeightState | None = None
    weight_sink: WeightSink | None = None

    @property
    def reads_master_weights(self) -> bool:
        """Whether the parameters must be gathered in full, not in the lower precision of activations: codes are those
        of the weight in full, and a bias is added in full."""
        return self.fsdp_weight_state is None or self.bias is not None

    @classmethod
    def from_linear(cls, linear: nn.Linear, config: MXConfig) -> Self:
        """An MX linear with the parameters, buffers, hooks and mode of `linear`.

        Raises:
            UserError: if in_features or out_features is not a multiple of 32.
        """
        problem = check_dims(linear.in_features, linear.out_features, config.recipe)
        if problem:
            raise UserError(f"MX linear: {problem}")
        converted = with_state_of(linear, cls)
        converted.config = config
        return converted

    def forward(self, input: Tensor) -> Tensor:
        """`[..., K]` -> `[..., N]`."""
        return self.multiply(input, self.weight, self.weight_sink)

    def multiply(self, input: Tensor, weight: Tensor, sink: WeightSink | None, sums_over: Axis | None = None) -> Tensor:
        """The output for what this rank multiplies of the weight; see `mx_linear`."""
        made = made_of(self, "weight", weight, self.weight_cache)
        return mx_linear(input, weight, self.bias, self.config, sink, made, sums_over)

    def extra_repr(self) -> str:
        """Dimensions, recipe and whether it is emulated."""
        emulated = ", emulated" if self.config.emulate else ""
        return f"{super().extra_repr()}, {self.config.recipe.name}{emulated}"


NOTHING_MADE = Made()


def mx_linear(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    config: MXConfig,
    sink: WeightSink | None,
    made_of_weight: Made = NOTHING_MADE,
    sums_over: Axis | None = None,
) -> Tensor:
    """`input [..., K] @ weight.T + bias` in input's dtype; weight `[N, K]`. With a sink the product for the weight's
    gradient is computed later; sums_over: ranks that have other tokens, over which that gradient is summed."""
    if not input.dim() or input.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"MX linear with in_features={weight.shape[1]} got input {list(input.shape)}; expected one or more "
            f"dimensions, [..., {weight.shape[1]}]"
        )
    owner = input
    if torch.is_autocast_enabled(input.device.type):
        input = input.to(torch.get_autocast_dtype(input.device.type))
    check_device(input, config)
    grad = torch.is_grad_enabled()
    needs = grad and input.requires_grad, grad and weight.requires_grad
    columns = needs[1] and not config.grad_weight_in_high_precision
    made = (None, None, None, None) if config.emulate else _shared_codes(as_matrix(input), owner, config, columns)
    return MXLinearFunction.apply(input, weight, bias, *made, *made_of_weight, config, sink, sums_over, *needs)


def check_device(input: Tensor, config: MXConfig) -> None:
    """Raise RuntimeError if `input` lies where products that are not emulated cannot run."""
    if not config.emulate and not runs_natively_on(input.device):
        raise RuntimeError(
            f"an MX linear converted with emulate=False got tensors on {input.device.type}, which has no products of "
            'blocks; move the model to a GPU that has (Blackwell), or convert with emulate=True or emulate="auto"'
        )


def runs_natively_on(device: torch.device) -> bool:
    """Whether tensors there may be multiplied without emulation; which GPUs can was found out at conversion."""
    return device.type == "cuda"


_ATTRIBUTE = "_titan_fp8_mx_codes"
"""Where a tensor carries its codes."""

Codes = tuple[Tensor, Tensor, Tensor | None, Tensor | None]
"""By blocks along K, and along T if they are needed; each before its swizzled scale."""


def _shared_codes(x: Tensor, owner: Tensor, config: MXConfig, columns: bool) -> Codes:
    """The codes of x `[T, K]`, cast only if no other linear that reads `owner` has."""
    # A leaf belongs to somebody outside, who may write to it behind autograd's back; compilers merge equal casts.
    if torch.compiler.is_compiling() or owner.is_leaf or owner.is_inference():
        return _cast(x, config, columns)
    key = config.recipe.mode, config.dim1_kernel, x.dtype, owner._version
    kept: tuple[Any, Codes] | None = getattr(owner, _ATTRIBUTE, None)
    if kept is None or kept[0] != key or (columns and kept[1][2] is None):
        kept = key, _cast(x, config, columns)
        setattr(owner, _ATTRIBUTE, kept)
    codes = kept[1]
    return codes if columns else (*codes[:2], None, None)


def _cast(x: Tensor, config: MXConfig, columns: bool) -> Codes:
    x = x.detach()
    if columns:
        return mx_ops.both(x, config.recipe.mode, config.dim1_kernel)
    return *mx_ops.rows(x, config.recipe.mode), None, None


class MXLinearFunction(torch.autograd.Function):
    """`output = x @ weight.T + bias` with the matrix products in MXFP8."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        x_codes: Tensor | None,
        x_scale: Tensor | None,
        x_codes_t: Tensor | None,
        x_scale_t: Tensor | None,
        w_rows: Tensor | None,
        w_row_scale: Tensor | None,
        w_columns: Tensor | None,
        w_column_scale: Tensor | None,
        plain: bool,
        config: MXConfig,
        sink: WeightSink | None,
        sums_over: Axis | None,
        needs_grad_input: bool,
        needs_grad_weight: bool,
    ) -> Tensor:
        """The output `[..., N]` in x's dtype, for x `[..., K]`, weight `[N, K]` and bias `[N]`; x_...: the codes of x,
        None where products are emulated; w_..., plain: see `Made`; needs_...: what backward will be asked for."""
        made = Made(w_rows, w_row_scale, w_columns, w_column_scale, plain)
        right, w_scale = row_operand(weight, made, config.weight_cast)
        if x_codes is None or x_scale is None:
            values = mx_ops.row_values(as_matrix(x), config.recipe.mode)
            output = mx_ops.multiply_values(values, right.t(), x.dtype)
        else:
            output = mx_ops.scaled_mm_op(x_codes, right, x_scale, w_scale, x.dtype)
        saved = (None, None) if not needs_grad_weight else (x, None) if x_codes_t is None else (x_codes_t, x_scale_t)
        if bias is not None:
            # The sum in fp32, and not in place: the gradient of a product that is changed in place is zero to the
            # compiler of PyTorch 2.11.
            output = (output + bias).to(x.dtype)
        of_weight = weight if w_columns is None else None, w_columns, w_column_scale
        ctx.save_for_backward(*(of_weight if needs_grad_input else [None] * 3), *saved)
        ctx.config, ctx.sink, ctx.sums_over, ctx.plain = config, sink, sums_over, plain
        ctx.needs_grads = needs_grad_input, needs_grad_weight
        ctx.input_shape, ctx.input_dtype, ctx.weight_dtype = x.shape, x.dtype, weight.dtype
        ctx.bias_dtype = None if bias is None else bias.dtype
        if x.dim() == 2:
            return output
        # Not a view for autograd: FSDP hooks the outputs of the modules it wraps.
        return torch.ops.aten._unsafe_view.default(output, [*x.shape[:-1], output.shape[1]])

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of x `[..., K]`, weight `[N, K]` and bias `[N]` for that of the output `[..., N]`; None where not
        asked for."""
        weight, w_columns, w_column_scale, x, x_scale = ctx.saved_tensors
        config: MXConfig = ctx.config
        needs_grad_input, needs_grad_weight = ctx.needs_grads
        quantizes = needs_grad_weight and not config.grad_weight_in_high_precision
        grad_output = as_matrix(grad_output)
        grad_input = grad_weight = grad_bias = None
        by_rows, by_columns = operands(grad_output, config, rows=needs_grad_input, columns=quantizes)
        if by_rows is not None:
            made = Made(None, None, w_columns, w_column_scale, ctx.plain)
            right = column_operand(weight, made, config.weight_cast, grad_output)
            grad_input = _grad_input(by_rows, right, ctx.input_dtype).view(ctx.input_shape)
        if needs_grad_weight:
            product = partial(_grad_weight, by_columns, grad_output, x, x_scale, config, ctx.sums_over)
            grad_weight = later_or_now(ctx.sink, product, ctx.weight_dtype)
        if ctx.bias_dtype is not None and ctx.needs_input_grad[2]:
            grad_bias = ops.sum_rows(grad_output).to(ctx.bias_dtype)
        return grad_input, grad_weight, grad_bias, *[None] * 14


def operands(grad: Tensor, config: MXConfig, *, rows: bool, columns: bool) -> tuple[Operand | None, Operand | None]:
    """A gradient or an activation `[T, N]` by blocks of N, and by blocks of T, as far as they are asked for."""
    mode, kernel = config.recipe.mode, config.dim1_kernel
    if config.emulate:
        if rows and columns:
            by_rows, by_columns = mx_ops.values(grad, mode, kernel)
            return (by_rows, None), (by_columns, None)
        return (
            (mx_ops.row_values(grad, mode), None) if rows else None,
            (mx_ops.column_values(grad, mode, kernel), None) if columns else None,
        )
    if rows and columns:
        codes, scale, codes_t, scale_t = mx_ops.both(grad, mode, kernel)
        return (codes, scale), (codes_t, scale_t)
    return mx_ops.rows(grad, mode) if rows else None, mx_ops.columns(grad, mode, kernel) if columns else None


def _grad_input(grad: Operand, weight: Operand, dtype: torch.dtype) -> Tensor:
    """`grad_output [T, N] @ weight [N, K]`."""
    (codes, scale), (right, w_scale) = grad, weight
    if scale is None:
        return mx_ops.multiply_values(codes, right, dtype)
    return mx_ops.scaled_mm_op(codes, right, scale, w_scale, dtype)


def _grad_weight(
    grad: Operand | None,
    grad_output: Tensor,
    x: Tensor,
    x_scale: Tensor | None,
    config: MXConfig,
    sums_over: Axis | None,
) -> Tensor:
    """`grad_output [T, N].T @ x [T, K]`, of the gradient's operand where there is one; x as it was saved. Of the tokens
    of other ranks too, in fp32, where there are any."""
    product = _product_over_tokens(grad, grad_output, x, x_scale, config)
    return product if sums_over is None else all_reduce(product.float(), sums_over)


def _product_over_tokens(
    grad: Operand | None, grad_output: Tensor, x: Tensor, x_scale: Tensor | None, config: MXConfig
) -> Tensor:
    if grad is None:
        # Sums over many tokens can be beyond the range of fp16.
        dtype = torch.float32 if grad_output.dtype == torch.float16 else grad_output.dtype
        return unquantized_product(grad_output, as_matrix(x), dtype)
    codes, scale = grad
    dtype = mx_ops.weight_gradient_dtype(grad_output.dtype)
    if scale is None:
        values = mx_ops.column_values(as_matrix(x), config.recipe.mode, config.dim1_kernel, grad_output)
        return mx_ops.multiply_values(codes.t(), values, dtype)
    assert x_scale is not None
    return mx_ops.scaled_mm_op(codes, x, scale, x_scale, dtype)
