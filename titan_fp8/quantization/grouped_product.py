"""One product of rows that are sorted by expert with the experts' weights, in 8 bits, forward and backward.

    product        left operand                right operand              float8: scales of the left, the right
    output         x rows          [M, K]      w rows      [E, N, K]      a row; a row of each expert
    grad_input     grad rows       [M, N]      w columns   [E, K, N]      a row; a column of each expert
    grad_weight    grad columns    [N, M]      x columns   [K, M]         a column in each group

Float8 is e4m3 with power-of-two scales, as in `grouped.py`, and MXFP8 is in `mx_grouped_product.py`. Those of
`grouped.py` and `mx_grouped.py` are experts whose whole feed-forward is known. This is for those of which nothing is
known but that they call a grouped product.

In grad_weight a group's rows are summed over, and a format wants A of them at a time: 16 in float8, 32 in MXFP8. Where
groups end anywhere, rows are moved to groups that are multiples of A while they are cast, and results are moved back.
The device alone knows where groups end, so these lie in as many rows as any ends could need, `T + (A - 1) (E + 1)`, and
nobody waits for it.

T rows as they come, M rows of the groups, K in features, N out features, E experts.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

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
        ends: int32 `[E]`, the row behind each group, multiples of A.
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


def lay_out(ends: Tensor, rows: int, alignment: int, *, aligned: bool) -> GroupLayout:
    """Where products have groups of `rows` rows with these ends, int32 `[E]`, ascending.

    Args:
        ends: what is behind the last one belongs to nobody.
        rows: T.
        alignment: A.
        aligned: ends and T are multiples of A, so that rows can stay where they are. For ends on a GPU nobody looks
            whether they are; casts on the CPU raise a ValueError.

    Raises:
        ValueError: T is none.
    """
    if aligned:
        if rows % alignment:
            raise ValueError(f"{rows} rows in groups that are said to be multiples of {alignment} rows")
        return GroupLayout(ends.contiguous())
    group = torch.bucketize(torch.arange(rows, dtype=ends.dtype, device=ends.device), ends, right=True)
    # What is behind the last group is one more, which no product reads.
    _, padded, position, source = plan(group.unsqueeze(1), ends.shape[0] + 1, alignment)
    return GroupLayout(padded[:-1], position, source)


Cast = Sequence[Tensor | None]
"""Four tensors, of rows `[M, K]` as operands by rows and by columns of groups: codes and scale of each; or what they
stand for and None; or None twice, where it is not asked for."""
Operand = Sequence[Any]
"""Codes and scale; or what they stand for and None."""


class GroupedFormat(Protocol):
    """How grouped products compute: a frozen dataclass, since the compiler compares it.

    Attributes:
        name: of the format, for messages.
        alignment: of how many rows groups are multiples, and K and N.
    """

    @property
    def name(self) -> str: ...

    @property
    def alignment(self) -> int: ...

    def cast(self, x: Tensor | Rows, ends: Tensor, *, rows: bool, columns: bool) -> Cast:
        """Rows `[M, K]`, or what makes them, without a derivative: what is asked for, and perhaps more."""
        ...

    def weight_rows(self, weight: Tensor) -> Operand:
        """The right operand of output, from a weight `[E, N, K]`."""
        ...

    def kept_weight(self, weight: Tensor, rows: Operand) -> Operand:
        """What backward makes the other operand from."""
        ...

    def weight_columns(self, kept: Operand, after: Tensor) -> Operand:
        """The right operand of grad_input; after: as in `ops.py`."""
        ...

    def by_rows(self, a: Operand, w: Operand, ends: Tensor, dtype: torch.dtype, *, forward: bool) -> Tensor:
        """output or grad_input, `[M, N]` or `[M, K]`."""
        ...

    def by_columns(self, a: Operand, b: Operand, ends: Tensor, dtype: torch.dtype) -> Tensor:
        """grad_weight, `[E, N, K]`; of an expert without rows zero."""
        ...


@dataclass(frozen=True)
class Float8Products:
    """Grouped products in float8; see `GroupedFormat`."""

    config: Float8GroupedConfig
    name: str = "float8"
    alignment: int = ALIGNMENT

    def cast(self, x: Tensor | Rows, ends: Tensor, *, rows: bool, columns: bool) -> Cast:
        """One read gives both, so that columns come with rows."""
        return cast_sorted(x, ends, columns=columns)

    def weight_rows(self, weight: Tensor) -> Operand:
        """Row codes and scale."""
        return cast_experts(weight)

    def kept_weight(self, weight: Tensor, rows: Operand) -> Operand:
        """The row codes: those by columns follow from them."""
        return rows

    def weight_columns(self, kept: Operand, after: Tensor) -> Operand:
        """Column codes and scale."""
        return ops.columns_of_experts(kept[0], kept[1], after)

    def by_rows(self, a: Operand, w: Operand, ends: Tensor, dtype: torch.dtype, *, forward: bool) -> Tensor:
        """Accumulated fast in output, and in grad_input if asked for."""
        return by_rows(a, w, ends, dtype, self.config, fast=forward or self.config.fast_accum_in_backward)

    def by_columns(self, a: Operand, b: Operand, ends: Tensor, dtype: torch.dtype) -> Tensor:
        """Never accumulated fast."""
        return by_columns(a, b, ends, dtype, self.config)


def cast_rows_of(x: Tensor, layout: GroupLayout, products: GroupedFormat, *, columns: bool) -> Cast:
    """x `[T, K]` as operand of products, with or without columns, which gradients of weights need."""
    return products.cast(layout.rows_of(x.detach()), layout.ends, rows=True, columns=columns)


def grouped_product(
    x: Tensor, weight: Tensor, layout: GroupLayout, cast: Cast, products: GroupedFormat, out_dtype: torch.dtype
) -> Tensor:
    """`x[rows of e] @ weight[e].T` for each expert e.

    Args:
        x: `[T, K]`, sorted by expert; a floating dtype.
        weight: `[E, N, K]` in high precision, K and N multiples of A.
        layout: from `lay_out`.
        cast: x, from `cast_rows_of`; with columns if the weight needs a gradient.
        products: how to compute.
        out_dtype: of the result.

    Returns:
        `[T, N]`; rows behind the last group may be anything, and so may their gradients.
    """
    places = layout.ends, layout.position, layout.source
    rows = products.weight_rows(weight.detach())
    return _GroupedProduct.apply(x, weight, *places, products, out_dtype, *cast, *rows)


class _GroupedProduct(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        ends: Tensor,
        position: Tensor | None,
        source: Tensor | None,
        products: GroupedFormat,
        out_dtype: torch.dtype,
        x_codes: Tensor,
        x_scale: Tensor | None,
        x_codes_t: Tensor | None,
        x_scale_t: Tensor | None,
        w_codes: Tensor,
        w_scale: Tensor | None,
    ) -> Tensor:
        output = products.by_rows((x_codes, x_scale), (w_codes, w_scale), ends, out_dtype, forward=True)
        of_x, of_weight = ctx.needs_input_grad[:2]
        columns = (x_codes_t, x_scale_t) if of_weight else (None, None)
        kept = products.kept_weight(weight, (w_codes, w_scale)) if of_x else (None, None)
        ctx.save_for_backward(ends, position, source, *columns, *kept)
        ctx.products, ctx.dtypes = products, (x.dtype, weight.dtype)
        return GroupLayout(ends, position, source).bring_back(output)

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        *places, x_codes_t, x_scale_t, w_kept, w_scale = ctx.saved_tensors
        layout, products = GroupLayout(*places), ctx.products
        of_x, of_weight = ctx.needs_input_grad[:2]
        rows_of_grad = layout.rows_of(grad.contiguous())
        *rows, codes_t, scale_t = products.cast(rows_of_grad, layout.ends, rows=of_x, columns=of_weight)
        grad_input = grad_weight = None
        if of_x:
            w_columns = products.weight_columns((w_kept, w_scale), grad)
            grad_input = layout.bring_back(products.by_rows(rows, w_columns, layout.ends, ctx.dtypes[0], forward=False))
        if of_weight:
            operands = (codes_t, scale_t), (x_codes_t, x_scale_t)
            grad_weight = products.by_columns(*operands, layout.ends, ctx.dtypes[1])
        return grad_input, grad_weight, *[None] * 11
