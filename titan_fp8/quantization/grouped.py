"""Experts in float8: the gated feed-forward of rows that are sorted by expert, with all its products by rows.

    product      left operand                       right operand                    scales of the left, the right
    gate, up     x rows             [M, K]          w1, w3 rows       [E, H, K]      a row; a row of each expert
    output       hidden rows        [M, H]          w2 rows           [E, K, H]
    grad hidden  grad rows          [M, K]          w2 columns        [E, H, K]      a row; a column of each expert
    grad w2      grad columns       [K, M]          hidden columns    [H, M]         a column in each group
    grad x       grad gate, up rows [M, H]          w1, w3 columns    [E, K, H]      the two products are added
    grad w1, w3  grad gate, up cols [H, M]          x columns         [K, M]

All are e4m3 with power-of-two scales, as in the recipe `rowwise` of a linear. Kept for backward are the columns of x, 8
bits a value, gate and up; hidden is made again from these. Of the weights their row codes are kept, from which backward
derives the columns. Where the rows are tokens' (`Rows`), tokens are cast as they are brought together, the output is
brought back here, and its gradient is cast as it is brought together: as rows neither exists in high precision. With
factors of the output, which get a gradient, the output's rows are kept too.

Where the hidden features of each expert are divided over ranks, a rank computes all of this with its H. What is summed
or scaled along K is that of one process; what has a scale along H (hidden and gradients of gate and up by rows, w2 by
rows, w1 and w3 by columns) has each rank's own powers of two, as row-parallel linears have it (`tensor_parallel.py`).

M rows, K features of the stream, H hidden features, E experts.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from titan_fp8.kernels.moe.functions import Rows, permute, permute_backward, row_products, unpermute
from titan_fp8.quantization import grouped_ops as ops
from titan_fp8.quantization.casts import Codes
from titan_fp8.quantization.function import differentiable_once
from titan_fp8.quantization.ops import cast_rows
from titan_fp8.quantization.recipes import RECIPES
from titan_fp8.quantization.weights import StepWatch, WeightCache

E4M3 = torch.float8_e4m3fn


@dataclass(frozen=True)
class Float8GroupedConfig:
    """How experts compute.

    Attributes:
        emulate: multiply the codes in fp32, on any device.
        fast_accum_in_backward: fast accumulation in the products for gradients of activations; outputs always have it,
            gradients of weights never.
    """

    emulate: bool = False
    fast_accum_in_backward: bool = False


class ExpertCache(WeightCache):
    """The row codes of one weight of experts `[E, N, K]`, valid from one change of the weight to the next."""

    def __init__(self, *, watch: StepWatch | None = None) -> None:
        super().__init__(RECIPES["rowwise"], keep_columns=False, watch=watch)

    def cast(self, weight: Tensor) -> None:
        """Cast `weight`."""
        self.rows = Codes(*ops.cast_experts(weight, E4M3))

    def __deepcopy__(self, memo: dict[int, Any]) -> "ExpertCache":
        return ExpertCache(watch=self._watch)

    def __reduce__(self) -> tuple[Any, ...]:
        return ExpertCache, ()


def cast_experts(weight: Tensor) -> Codes:
    """A weight of experts `[E, N, K]` by rows: codes `[E, N, K]`, scale `[E, N]`."""
    return Codes(*ops.cast_experts(weight.detach(), E4M3))


def grouped_feed_forward(
    x: Tensor | Rows,
    weights: Sequence[Tensor],
    codes: Sequence[Codes],
    ends: Tensor,
    config: Float8GroupedConfig,
) -> Tensor:
    """`w2(silu(w1 x) * w3 x)` for each expert's rows.

    Args:
        x: `[M, K]`, sorted by expert, groups multiples of 16 rows; zero where a group's row holds nothing. Or what
            makes them of tokens: then they are cast as they are brought together, and exist in high precision nowhere.
        weights: w1 and w3 `[E, H, K]` and w2 `[E, K, H]` in high precision, which gradients are for.
        codes: these by rows, from `cast_experts` or a cache.
        ends: int32 `[E]`, the row behind each expert's rows.
        config: how to compute.

    Returns:
        `[M, K]` in x's dtype; rows behind the last group may be anything. Of what makes rows: tokens again, `[T, K]`.
    """
    tensors = [tensor for each in codes for tensor in each]
    # Under no_grad autograd still says that a parameter needs a gradient.
    needs_columns = torch.is_grad_enabled() and any(weight.requires_grad for weight in weights[:2])
    rows = (x, None, None, None, None) if isinstance(x, Tensor) else x
    return _GroupedFeedForward.apply(*rows, *weights, ends, config, needs_columns, *tensors)


class _GroupedFeedForward(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        scores: Tensor | None,
        position: Tensor | None,
        source: Tensor | None,
        factors: Tensor | None,
        w1: Tensor,
        w3: Tensor,
        w2: Tensor,
        ends: Tensor,
        config: Float8GroupedConfig,
        needs_columns: bool,
        *codes: Tensor,
    ) -> Tensor:
        made = x if position is None or source is None else Rows(x, scores, position, source)
        *x_rows, x_codes_t, x_scale_t = cast_sorted(made, ends, columns=needs_columns)
        weights = [codes[0:2], codes[2:4], codes[4:6]]
        gate, up = (by_rows(x_rows, w, ends, x.dtype, config, fast=True) for w in weights[:2])
        hidden = ops.swiglu_group_rows(gate, up, E4M3)
        output = by_rows(hidden, weights[2], ends, x.dtype, config, fast=True)
        needs = ctx.needs_input_grad
        kept = codes if needs[0] or needs[1] or any(needs[5:8]) else [None] * 6
        # The tokens themselves are needed for the gradient of their scores alone, and the output for its factors'.
        of_rows = x if needs[1] else None, scores, position
        of_output = output if needs[4] else None, factors, position, source
        ctx.save_for_backward(x_codes_t, x_scale_t, gate, up, ends, *of_rows, *of_output, *kept)
        ctx.config, ctx.dtypes = config, (x.dtype, w1.dtype, w3.dtype, w2.dtype)
        return output if position is None else unpermute(output, position, factors)

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x_codes_t, x_scale_t, gate, up, ends, *others = ctx.saved_tensors
        of_rows, of_output, weights = others[:3], others[3:7], others[7:]
        config: Float8GroupedConfig = ctx.config
        dtype, *weight_dtypes = ctx.dtypes
        fast = config.fast_accum_in_backward
        needs_rows, needs = any(ctx.needs_input_grad[:2]), ctx.needs_input_grad[5:8]
        (*g_rows, g_codes_t, g_scale_t), of_factors = _of_output(grad, ends, *of_output)
        if not needs_rows and not any(needs):
            return *[None] * 4, of_factors, *[None] * 12
        w2_columns = ops.columns_of_experts(*weights[4:6], grad)
        grad_hidden = by_rows(g_rows, w2_columns, ends, dtype, config, fast=fast)
        *made, hidden_t, hidden_scale_t = ops.swiglu_group_backward(grad_hidden, gate, up, ends, E4M3)
        of_gate, of_up = made[:4], made[4:]
        grads: list[Tensor | None] = [None] * 3
        of_x: tuple[Tensor | None, Tensor | None] = None, None
        if needs_rows:
            parts = (
                by_rows(each[:2], ops.columns_of_experts(*w, grad), ends, dtype, config, fast=fast)
                for each, w in ((of_gate, weights[:2]), (of_up, weights[2:4]))
            )
            of_x = _of_tokens(next(parts).add_(next(parts)), *of_rows)
        x_columns, hidden_columns = (x_codes_t, x_scale_t), (hidden_t, hidden_scale_t)
        products = (of_gate[2:], x_columns), (of_up[2:], x_columns), ((g_codes_t, g_scale_t), hidden_columns)
        for number, (each, weight_dtype) in enumerate(zip(products, weight_dtypes, strict=True)):
            if needs[number]:
                # As it leaves where FSDP gathers weights in bf16: a mesh computes what one process does.
                out_dtype = dtype if dtype == torch.bfloat16 else weight_dtype
                grads[number] = by_columns(*each, ends, out_dtype, config).to(weight_dtype)
        return *of_x, None, None, of_factors, *grads, *[None] * 9


def cast_sorted(x: Tensor | Rows, ends: Tensor, *, columns: bool) -> Sequence[Tensor | None]:
    """Rows `[M, K]` sorted by expert, or what makes them: codes `[M, K]` and scale `[M, 1]`; and by columns of groups
    codes `[K, M]` and scale `[E, K]`, or None twice."""
    if not columns:
        made = x if isinstance(x, Tensor) else permute(x.x, x.source, x.scores, x.position.shape[1])
        return *cast_rows(made, E4M3), None, None
    if isinstance(x, Tensor):
        return ops.cast_group_both(x, ends, E4M3)
    return ops.gather_group_both(x.x, x.source, x.scores, x.position.shape[1], ends, E4M3)


def _of_output(
    grad: Tensor,
    ends: Tensor,
    output: Tensor | None,
    factors: Tensor | None,
    position: Tensor | None,
    source: Tensor | None,
) -> tuple[Sequence[Tensor], Tensor | None]:
    """The gradient of the output's rows, as `cast_group_both` gives it, and that of the factors, for that of what was
    brought back: the rows, if nothing has a position."""
    if position is None or source is None:
        return ops.cast_group_both(grad.contiguous(), ends, E4M3), None
    cast = ops.gather_group_both(grad, source, factors, position.shape[1], ends, E4M3)
    return cast, None if output is None else row_products(grad, output, position)


def _of_tokens(
    grad: Tensor, x: Tensor | None, scores: Tensor | None, position: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """The gradients of tokens and of scores for that of rows `[M, K]`, which are the tokens if nothing has a
    position."""
    if position is None:
        return grad, None
    if x is None:
        return unpermute(grad, position, scores), None
    assert scores is not None
    return permute_backward(grad, x, position, scores)


def by_rows(a: Any, w: Any, ends: Tensor, dtype: torch.dtype, config: Float8GroupedConfig, *, fast: bool) -> Tensor:
    """The product of (codes, scale) `[M, K]` with those of `[E, N, K]`: `[M, N]`."""
    return ops.grouped_mm_rows(a[0], w[0], a[1], w[1], ends, dtype, fast, config.emulate)


def by_columns(a: Any, b: Any, ends: Tensor, dtype: torch.dtype, config: Float8GroupedConfig) -> Tensor:
    """The product of (codes, scale) `[N, M]` with those of `[K, M]` in each group: `[E, N, K]`."""
    return ops.grouped_mm_columns(a[0], b[0], a[1], b[1], ends, dtype, config.emulate)
