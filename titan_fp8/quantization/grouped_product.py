"""One product of rows that are sorted by expert with the experts' weights, in float8, forward and backward.

    product        left operand                right operand              scales of the left, the right
    output         x rows          [M, K]      w rows      [E, N, K]      a row; a row of each expert
    grad_input     grad rows       [M, N]      w columns   [E, K, N]      a row; a column of each expert
    grad_weight    grad columns    [N, M]      x columns   [K, M]         a column in each group

All are e4m3 with power-of-two scales, as in `grouped.py`, which is for experts whose whole feed-forward is known. This
is for those of which nothing is known but that they call a grouped product.

In grad_weight a group's rows are summed over, and the tensor cores want 16 of them at a time. Where groups end
anywhere, rows are moved to groups that are multiples of 16 while they are cast, and results are moved back. The device
alone knows where groups end, so these lie in as many rows as any ends could need, `T + 15 (E + 1)`, and nobody waits
for it.

T rows as they come, M rows of the groups, K in features, N out features, E experts.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from titan_fp8.kernels.grouped import ALIGNMENT
from titan_fp8.kernels.moe.functions import Rows, plan, unpermute
from titan_fp8.quantization import grouped_ops as ops
from titan_fp8.quantization.function import differentiable_once
from titan_fp8.quantization.grouped import Float8GroupedConfig, by_columns, by_rows, cast_experts, cast_sorted


@dataclass(frozen=True)
class GroupLayout:
    """Where the products have the rows of groups.

    Attributes:
        ends: int32 `[E]`, the row behind each group, multiples of 16.
        position: int32 `[T, 1]`, where each row went; None: all are where they came.
        source: int32 `[M]`, the row that is there, or -1; None likewise.
    """

    ends: Tensor
    position: Tensor | None = None
    source: Tensor | None = None

    def rows_of(self, x: Tensor) -> Tensor | Rows:
        """Rows `[T, K]`, or what moves them to where the products have them."""
        if self.position is None or self.source is None:
            return x
        return Rows(x, None, self.position, self.source)

    def bring_back(self, y: Tensor) -> Tensor:
        """`[M, N]` -> `[T, N]`; without a derivative."""
        return y if self.position is None else unpermute(y, self.position, None)


def lay_out(ends: Tensor, rows: int, *, aligned: bool) -> GroupLayout:
    """Where products have groups of `rows` rows with these ends, int32 `[E]`, ascending.

    Args:
        ends: what is behind the last one belongs to nobody.
        rows: T.
        aligned: ends and T are multiples of 16, so that rows can stay where they are. For ends on a GPU nobody looks
            whether they are; casts on the CPU raise a ValueError.

    Raises:
        ValueError: T is none.
    """
    if aligned:
        if rows % ALIGNMENT:
            raise ValueError(f"{rows} rows in groups that are said to be multiples of {ALIGNMENT} rows")
        return GroupLayout(ends)
    group = torch.bucketize(torch.arange(rows, dtype=ends.dtype, device=ends.device), ends, right=True)
    # What is behind the last group is one more, which no product reads.
    _, padded, position, source = plan(group.unsqueeze(1), ends.shape[0] + 1, ALIGNMENT)
    return GroupLayout(padded[:-1], position, source)


Cast = Sequence[Tensor | None]
"""Codes and scale by rows, and by columns of groups or None twice: what `cast_sorted` gives."""


def cast_rows_of(x: Tensor, layout: GroupLayout, *, columns: bool) -> Cast:
    """x `[T, K]` as operand of products, with or without columns, which gradients of weights need."""
    return cast_sorted(layout.rows_of(x.detach()), layout.ends, columns=columns)


def grouped_product(
    x: Tensor, weight: Tensor, layout: GroupLayout, cast: Cast, config: Float8GroupedConfig, out_dtype: torch.dtype
) -> Tensor:
    """`x[rows of e] @ weight[e].T` for each expert e.

    Args:
        x: `[T, K]`, sorted by expert; a floating dtype.
        weight: `[E, N, K]` in high precision, K and N multiples of 16.
        layout: from `lay_out`.
        cast: x, from `cast_rows_of`; with columns if the weight needs a gradient.
        config: how to compute.
        out_dtype: of the result.

    Returns:
        `[T, N]`; rows behind the last group may be anything, and so may their gradients.
    """
    codes = cast_experts(weight)
    places = layout.ends, layout.position, layout.source
    return _GroupedProduct.apply(x, weight, *places, config, out_dtype, *cast, *codes)


class _GroupedProduct(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        ends: Tensor,
        position: Tensor | None,
        source: Tensor | None,
        config: Float8GroupedConfig,
        out_dtype: torch.dtype,
        x_codes: Tensor,
        x_scale: Tensor,
        x_codes_t: Tensor | None,
        x_scale_t: Tensor | None,
        w_codes: Tensor,
        w_scale: Tensor,
    ) -> Tensor:
        output = by_rows((x_codes, x_scale), (w_codes, w_scale), ends, out_dtype, config, fast=True)
        of_x, of_weight = ctx.needs_input_grad[:2]
        columns = (x_codes_t, x_scale_t) if of_weight else (None, None)
        ctx.save_for_backward(ends, position, source, *columns, *((w_codes, w_scale) if of_x else (None, None)))
        ctx.config, ctx.dtypes = config, (x.dtype, weight.dtype)
        return GroupLayout(ends, position, source).bring_back(output)

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        *places, x_codes_t, x_scale_t, w_codes, w_scale = ctx.saved_tensors
        layout, config = GroupLayout(*places), ctx.config
        of_x, of_weight = ctx.needs_input_grad[:2]
        *rows, codes_t, scale_t = cast_rows_of(grad.contiguous(), layout, columns=of_weight)
        grad_input = grad_weight = None
        if of_x:
            w_columns = ops.columns_of_experts(w_codes, w_scale, grad)
            made = by_rows(rows, w_columns, layout.ends, ctx.dtypes[0], config, fast=config.fast_accum_in_backward)
            grad_input = layout.bring_back(made)
        if of_weight:
            grad_weight = by_columns((codes_t, scale_t), (x_codes_t, x_scale_t), layout.ends, config).to(ctx.dtypes[1])
        return grad_input, grad_weight, *[None] * 11
