"""The operands of a linear's three products: what a recipe makes of an activation, a gradient and a weight.

    operand                  tensorwise     rowwise           blockwise
    x, grad by rows          one scale      one a row         one a 1 x 128 block of a row
    x, grad by columns       one scale      one a column      one a 128 x 1 block of a column
    weight by rows           one scale      one a row         one a 128 x 128 tile
    weight by columns        derived from the row codes: transposed, and where the scale changes, exponents shifted

Rows lie as the tensor does, `[T, K]`; columns are transposed, `[K, padded(T)]`, since a product wants the dimension it
sums over contiguous. Each function picks the operators of `ops.py` that make what is asked in the fewest reads.

T tokens, K in features, N out features.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from titan_fp8.quantization import ops
from titan_fp8.quantization.recipes import Float8Recipe, Granularity
from titan_fp8.runtime.collectives import Axis, all_reduce


class Codes(NamedTuple):
    """Float8 codes and the scale that turns them back: [], or one a row, or one a block of `codes`."""

    codes: Tensor
    scale: Tensor


def as_matrix(x: Tensor) -> Tensor:
    """`[..., K]` as `[T, K]`."""
    return x if x.dim() == 2 else x.reshape(-1, x.shape[-1])


def reduced_amax(x: Tensor, axis: Axis | None) -> Tensor:
    """`ops.amax` of x and of what the other ranks of the axis hold of the same tensor."""
    amax = ops.amax(x)
    return amax if axis is None else all_reduce(amax, axis, "max")


def cast_activation(
    x: Tensor,
    recipe: Float8Recipe,
    dtype: torch.dtype,
    *,
    rows: bool,
    columns: bool,
    axis: Axis | None = None,
    amax: Tensor | None = None,
    after: Tensor | None = None,
) -> tuple[Codes | None, Codes | None]:
    """Cast x `[T, K]` into the layouts asked for: rows `[T, K]` and columns `[K, padded(T)]`; None for the other.

    axis: ranks that hold other parts of the same tensor, which has one scale where a tensor has one.
    amax: the bits of a bound on the whole tensor, from which that one scale is computed; None: it is measured.
    after: a gradient; columns alone, the compiler then does not make in the forward pass to keep (`producer_ops.py`).
    """
    match recipe.granularity:
        case Granularity.TENSOR:
            return _cast_tensor(x, dtype, rows, columns, reduced_amax(x, axis) if amax is None else amax, after)
        case Granularity.ROW:
            return _cast_rows(x, dtype, rows, columns, after)
        case Granularity.BLOCK:
            return _cast_blocks(x, dtype, recipe.power_of_two_scales, rows, columns, after)


def _cast_tensor(
    x: Tensor, dtype: torch.dtype, rows: bool, columns: bool, amax: Tensor, after: Tensor | None
) -> tuple[Codes | None, Codes | None]:
    if rows and columns:
        codes, codes_t, scale = ops.cast_tensor_both(x, amax, dtype)
        return Codes(codes, scale), Codes(codes_t, scale)
    if rows:
        return Codes(*ops.cast_tensor(x, amax, dtype)), None
    return None, Codes(*ops.cast_tensor_columns(x, amax, dtype, after))


def _cast_rows(
    x: Tensor, dtype: torch.dtype, rows: bool, columns: bool, after: Tensor | None
) -> tuple[Codes | None, Codes | None]:
    if rows and columns:
        codes, scale, codes_t, scale_t = ops.cast_rows_and_columns(x, dtype)
        return Codes(codes, scale), Codes(codes_t, scale_t)
    if rows:
        return Codes(*ops.cast_rows(x, dtype)), None
    return None, Codes(*ops.cast_columns(x, dtype, after))


def _cast_blocks(
    x: Tensor, dtype: torch.dtype, power_of_two: bool, rows: bool, columns: bool, after: Tensor | None
) -> tuple[Codes | None, Codes | None]:
    if rows and columns:
        codes, scale, codes_t, scale_t = ops.cast_block_both(x, dtype, power_of_two)
        return Codes(codes, scale), Codes(codes_t, scale_t)
    if rows:
        return Codes(*ops.cast_block_rows(x, dtype, power_of_two)), None
    return None, Codes(*ops.cast_block_columns(x, dtype, power_of_two, after))


def cast_weight(weight: Tensor, recipe: Float8Recipe, axis: Axis | None = None, after: Tensor | None = None) -> Codes:
    """The weight `[N, K]` by rows, for `output`: the one quantization of it, from which all else is derived. axis,
    after: as in `cast_activation`."""
    dtype = recipe.weight_dtype
    match recipe.granularity:
        case Granularity.TENSOR:
            return Codes(*ops.cast_tensor(weight, reduced_amax(weight, axis), dtype, after))
        case Granularity.ROW:
            return Codes(*ops.cast_rows(weight, dtype, after))
        case Granularity.BLOCK:
            return Codes(*ops.cast_blocks(weight, dtype, recipe.power_of_two_scales, after))


def weight_columns(rows: Codes, recipe: Float8Recipe, after: Tensor | None = None) -> Codes:
    """The weight by columns, `[K, N]`, for `grad_input`, from its row codes `[N, K]` as `cast_weight` made them. after:
    as in `cast_activation`."""
    match recipe.granularity:
        case Granularity.TENSOR:
            return Codes(ops.transpose_codes(rows.codes, after), rows.scale)
        case Granularity.ROW if recipe.one_scale_for_weight_columns:
            return Codes(*ops.tensor_columns_from_rows(*rows, after))
        case Granularity.ROW:
            return Codes(*ops.columns_from_rows(*rows, after))
        case Granularity.BLOCK:
            return Codes(ops.transpose_codes(rows.codes, after), rows.scale.t().contiguous())


def cast_weight_both(weight: Tensor, recipe: Float8Recipe) -> tuple[Codes, Codes]:
    """`cast_weight` and its `weight_columns`; tensorwise from one read of the weight."""
    if recipe.granularity is Granularity.TENSOR:
        codes, codes_t, scale = ops.cast_tensor_both(weight, ops.amax(weight), recipe.weight_dtype)
        return Codes(codes, scale), Codes(codes_t, scale)
    rows = cast_weight(weight, recipe)
    return rows, weight_columns(rows, recipe)


def product(
    a: Codes, b: Codes, bias: Tensor | None, out_dtype: torch.dtype, *, blockwise: bool, fast_accum: bool, emulate: bool
) -> Tensor:
    """`a [M, K] @ b [N, K].T + bias`, `[M, N]` in `out_dtype`; see `gemm.py`."""
    multiply = ops.scaled_mm_blockwise if blockwise else ops.scaled_mm
    return multiply(a.codes, b.codes, a.scale, b.scale, bias, out_dtype, fast_accum, emulate)
