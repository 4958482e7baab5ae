"""What the autograd functions of all fused producers need: how to cast, and what to hand to the linears.

T tokens, K features.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from titan_fp8.kernels.producers import Cast
from titan_fp8.quantization import producer_ops
from titan_fp8.quantization.activation import QuantizedActivation, columns_placeholder, is_recomputed_later
from titan_fp8.quantization.recipes import Float8Recipe


def input_cast(recipe: Float8Recipe, *, columns: bool, emit: bool) -> Cast:
    """How a producer casts what linears of `recipe` read. In a first pass under activation checkpointing the columns
    are left to the recomputation."""
    later = columns and not torch.compiler.is_compiling() and is_recomputed_later()
    power_of_two = recipe.power_of_two_scales
    return Cast(recipe.granularity.value, recipe.input_dtype, power_of_two, True, columns and not later, emit)


def quantized(
    value: Tensor, tensors: tuple[Tensor, ...], cast: Cast, recipe: Float8Recipe, *, columns: bool
) -> QuantizedActivation:
    """What linears read, from the value that autograd sees and a producer's codes; with a placeholder for columns that
    the recomputation will make."""
    _, rows, made = producer_ops.forms(iter(tensors), cast._replace(emit=False))
    assert rows is not None
    if columns and made is None:
        made = columns_placeholder(value.reshape(-1, value.shape[-1]), recipe)
    return QuantizedActivation(value, rows, made, recipe)


def values_of(shape: Sequence[int], count: int, *, like: Tensor) -> tuple[Tensor, ...]:
    """`value_of` without an output, several times, for readers of which each gives a gradient."""
    nan = like.new_full((), torch.nan)
    return tuple(nan.expand(shape) for _ in range(count))


def value_of(output: Tensor | None, shape: Sequence[int], *, like: Tensor) -> Tensor:
    """What autograd sees of an output of this shape: the output, or NaN of the dtype of `like` that takes no memory."""
    return like.new_full((), torch.nan).expand(shape) if output is None else output.view(shape)
