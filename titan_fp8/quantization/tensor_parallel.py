"""Float8 linears whose products are spread over ranks: what travels between them, and in which form.

A product is split by the rows of its weight (*column parallel*: each rank has some output features) or by its columns
(*row parallel*: each has some input features, and the ranks' outputs are summed). Between the two, activations are
divided by features; elsewhere each rank has T / t of the tokens (sequence parallel). So the input of a column-parallel
linear is gathered along the tokens, and the output of a row-parallel one summed and scattered; in backward the reverse.
A linear whose weight is *whole* on every rank multiplies a rank's T / t tokens; its weight's gradient is summed.

    what is gathered                       tensorwise, rowwise           blockwise, rowwise_with_gw_hp
    input of column-parallel linears       codes, one gather for all     bf16, cast after
    output's gradient, row parallel        codes                         bf16, cast after

Codes travel at one byte a value. They are those of the unsharded tensor: tensorwise, the amax is the largest over the
ranks; rowwise, a row lies whole on one rank. The columns that a weight's gradient needs are derived from the gathered
row codes, a transpose and, rowwise, a shift of exponents (exact but for subnormals). A tensor that is split by
features is cast where it is; tensorwise with the amax of all ranks, rowwise with each rank's own scales, which are
powers of two and so change nothing but which values are subnormal. So is what a whole weight multiplies, a tensor that
is split by tokens: its rows, and tensorwise all of it, have the scales of the unsharded tensor, its columns those of a
rank's tokens. `blockwise` needs the columns' own amax and
`rowwise_with_gw_hp` the numbers themselves, so for them numbers travel.

T tokens, t ranks, K in features, N out features. Source: arXiv 1909.08053, 2205.05198.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.functional import pad

from titan_fp8.kernels.float8.reference import T_MULTIPLE
from titan_fp8.quantization import ops
from titan_fp8.quantization.activation import QuantizedActivation, columns_placeholder, is_recomputed_later
from titan_fp8.quantization.casts import Codes, as_matrix, cast_activation, reduced_amax
from titan_fp8.quantization.produced import value_of
from titan_fp8.quantization.recipes import Float8Recipe, Granularity
from titan_fp8.runtime.collectives import Axis, all_gather, reduce_scatter


class Split(Enum):
    """How a linear's weight `[N, K]` is divided over the ranks."""

    COLUMN = "column"
    """By rows: each rank has N / t output features."""
    ROW = "row"
    """By columns: each rank has K / t input features."""
    WHOLE = "whole"
    """Not at all: each rank has all of it, and T / t of the tokens."""


@dataclass(frozen=True)
class TensorParallel:
    """A linear's part in a product that several ranks compute.

    Attributes:
        split: how its weight is divided.
        axis: the ranks.
    """

    split: Split
    axis: Axis


def gathers_codes(recipe: Float8Recipe) -> bool:
    """Whether activations and gradients travel as float8 codes for this recipe."""
    return recipe.granularity is not Granularity.BLOCK and recipe.grad_weight_in_float8


def gather_codes(
    x: Tensor, recipe: Float8Recipe, dtype: torch.dtype, axis: Axis, *, columns: bool
) -> tuple[Codes, Codes | None]:
    """Codes of the whole tensor from this rank's tokens x `[T / t, K]`: by rows `[T, K]`, and if asked by columns
    `[K, padded(T)]`."""
    if recipe.granularity is Granularity.TENSOR:
        codes, scale = ops.cast_tensor(x, reduced_amax(x, axis), dtype)
        rows = Codes(all_gather(codes, axis), scale)
        return rows, Codes(ops.transpose_codes(_padded(rows.codes)), scale) if columns else None
    codes, scale = ops.cast_rows(x, dtype)
    rows = Codes(all_gather(codes, axis), all_gather(scale, axis))
    return rows, Codes(*ops.columns_from_rows(*rows)) if columns else None


def _padded(codes: Tensor) -> Tensor:
    """Codes `[T, K]` with zeros after them up to the next multiple of 16 tokens."""
    missing = -codes.shape[0] % T_MULTIPLE
    return pad(codes.view(torch.uint8), (0, 0, 0, missing)).view(codes.dtype) if missing else codes


def gather_quantized(x: Tensor, recipe: Float8Recipe, axis: Axis, *, columns: bool) -> QuantizedActivation:
    """The input of column-parallel linears of one recipe, from this rank's tokens x `[..., T / t, K]`.

    Returns:
        an activation of the value `[1, T, K]`, which exists as codes alone; its gradient is summed over the ranks and
        scattered.
    """
    later = columns and not torch.compiler.is_compiling() and is_recomputed_later()
    local = as_matrix(x.detach())
    rows, made = gather_codes(local, recipe, recipe.input_dtype, axis, columns=columns and not later)
    if later:
        made = columns_placeholder(rows.codes, recipe)
    value = _GatheredValue.apply(x, axis)
    return QuantizedActivation(value, rows, made, recipe)


class _GatheredValue(torch.autograd.Function):
    """What autograd sees of a gathered activation that exists as codes alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        """x `[..., T / t, K]` -> a value `[1, T, K]` of x's dtype that takes no memory."""
        ctx.axis, ctx.shape = axis, x.shape
        tokens = x.numel() // x.shape[-1]
        return value_of(None, (1, axis.size * tokens, x.shape[-1]), like=x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return reduce_scatter(as_matrix(grad), ctx.axis).view(ctx.shape), None


def _as_one_row(x: Tensor) -> Tensor:
    """`[T, K]` as `[1, T, K]`, not a view for autograd: FSDP hooks the outputs of modules."""
    return torch.ops.aten._unsafe_view.default(x, [1, *x.shape])


class GatherTokens(torch.autograd.Function):
    """The ranks' tokens one after the other; in backward each gets the sum of the gradients of its own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        """`[..., T / t, K]` -> `[1, T, K]`."""
        ctx.axis, ctx.shape = axis, x.shape
        return _as_one_row(all_gather(as_matrix(x), axis))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return reduce_scatter(as_matrix(grad), ctx.axis).view(ctx.shape), None


class ScatterSum(torch.autograd.Function):
    """This rank's tokens of the sum over the ranks; in backward the gradients of all tokens."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        """`[..., T, N]` -> `[1, T / t, N]`, T the product of the leading dimensions."""
        ctx.axis, ctx.shape = axis, x.shape
        return _as_one_row(reduce_scatter(as_matrix(x), axis))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return all_gather(as_matrix(grad), ctx.axis).view(ctx.shape), None


def cast_gradient(
    grad: Tensor, recipe: Float8Recipe, parallel: TensorParallel | None, *, rows: bool, columns: bool
) -> tuple[Tensor, Codes | None, Codes | None]:
    """A linear's output gradient as its two gradient products take it.

    Args:
        grad: `[T, N]`; column parallel `[T, N / t]`; row parallel, or of a whole weight, this rank's tokens,
            `[T / t, N]`.
        rows, columns: the layouts that are needed.

    Returns:
        the gradient in high precision of all tokens `[T, ...]`, which row parallel are gathered, where it exists, else
        `grad` itself; its codes by rows and by columns, None where not asked for.
    """
    dtype = recipe.grad_output_dtype
    axis = None if parallel is None else parallel.axis
    if parallel is not None and axis is not None and parallel.split is Split.ROW:
        if gathers_codes(recipe):
            gathered, made = gather_codes(grad, recipe, dtype, axis, columns=columns)
            return grad, gathered if rows else None, made
        grad, axis = all_gather(grad, axis), None
    if not (rows or columns):
        return grad, None, None
    return grad, *cast_activation(grad, recipe, dtype, rows=rows, columns=columns, axis=axis)


_LOCAL_WEIGHT = "_titan_fp8_local_weight"
"""Where a module of a compiled block finds what its rank holds of its weight."""


@contextmanager
def local_weights_outside(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Take the local tensors out of the modules' weights here, so that code compiled around `local_weight` inside the
    context has plain tensors as inputs and no DTensor; their gradients reach the parameters all the same."""
    for module in modules:
        module.__dict__[_LOCAL_WEIGHT] = local_tensor(module.weight)  # pyright: ignore[reportArgumentType]
    try:
        yield
    finally:
        for module in modules:
            module.__dict__[_LOCAL_WEIGHT] = None  # it holds a graph


def local_weight(module: nn.Module) -> Tensor:
    """What this rank holds of a module's weight; the gradient goes to the parameter."""
    taken = module.__dict__.get(_LOCAL_WEIGHT)
    return local_tensor(module.weight) if taken is None else taken  # pyright: ignore[reportArgumentType]


def local_tensor(parameter: Tensor) -> Tensor:
    """What this rank holds of a parameter; the gradient goes back to the parameter."""
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter
