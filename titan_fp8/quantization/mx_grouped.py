"""Experts in MXFP8: the gated feed-forward of rows that are sorted by expert, with all its products of blocks.

    product      left operand, blocks along        right operand, blocks along
    gate, up     x           [M, K]   K            w1, w3       [E, H, K]   K
    output       hidden      [M, H]   H            w2           [E, K, H]   H
    grad hidden  grad        [M, K]   K            w2           [E, K, H]   K
    grad w2      grad        [M, K]   M            hidden       [M, H]      M
    grad x       grad gate, up [M, H] H            w1, w3       [E, H, K]   H      the two products are added
    grad w1, w3  grad gate, up [M, H] M            x            [M, K]      M

Blocks along M are of one expert's rows, since groups are whole blocks. Every operand is quantized from high
precision. Kept for backward are gate and up, and x: its codes along M on tensor cores that multiply blocks, x itself
where products are emulated; hidden is made again.

Where the hidden features of each expert are divided over ranks, a rank has whole blocks of them, so that nothing
differs from one process but the order of sums. Where the weights' operands come from is told in `mx_weight.py`.

M rows, K features of the stream, H hidden features, E experts.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from titan_fp8.quantization import mx_grouped_ops as ops
from titan_fp8.quantization.function import differentiable_once
from titan_fp8.quantization.mx_ops import TRITON, weight_gradient_dtype
from titan_fp8.quantization.mx_weight import Cast, Made, column_operand, row_operand

_Operand = Sequence[Tensor]
"""Codes and swizzled scale; or, emulated, what they stand for."""


@dataclass(frozen=True)
class MXGroupedConfig:
    """How experts compute.

    Attributes:
        mode: how scales are rounded, one of `titan_fp8.kernels.mx.MODES`.
        emulate: multiply what the codes stand for, on any device.
    """

    mode: str
    emulate: bool = False

    @property
    def weight_cast(self) -> Cast:
        """How weights are cast."""
        return Cast(self.mode, TRITON, self.emulate)


_CAST_NOW = (Made(), Made(), Made())


def mx_grouped_feed_forward(
    x: Tensor, weights: Sequence[Tensor], ends: Tensor, config: MXGroupedConfig, made: Sequence[Made] = _CAST_NOW
) -> Tensor:
    """`w2(silu(w1 x) * w3 x)` for each expert's rows.

    Args:
        x: `[M, K]`, sorted by expert, groups multiples of 32 rows; zero where a group's row holds nothing.
        weights: w1 and w3 `[E, H, K]` and w2 `[E, K, H]` in high precision.
        ends: int32 `[E]`, the row behind each expert's rows.
        config: how to compute.
        made: what there is of each weight's operands.

    Returns:
        `[M, K]` in x's dtype; rows behind the last group may be anything.
    """
    tensors = [tensor for each in made for tensor in each[:4]]
    plain = [each.plain for each in made]
    return _GroupedFeedForward.apply(x, *weights, *tensors, ends, plain, config, torch.is_grad_enabled())


class _GroupedFeedForward(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        w1: Tensor,
        w3: Tensor,
        w2: Tensor,
        *others: Any,
    ) -> Tensor:
        # Four tensors of what is made of each weight; then what is no weight.
        *tensors, ends, plain, config, with_grad = others
        weights = w1, w3, w2
        of_each = zip((tensors[:4], tensors[4:8], tensors[8:]), plain, strict=True)
        made = [Made(t[0], t[1], t[2], t[3], is_plain) for t, is_plain in of_each]
        needs_columns = with_grad and (w1.requires_grad or w3.requires_grad)
        rows, columns = _input(x, ends, config, needs_columns)
        gate, up = (_by_rows(rows, _along(weights[i], made[i], config), ends, x.dtype) for i in (0, 1))
        hidden = _hidden(gate, up)
        output = _by_rows(_rows(hidden, ends, config), _along(w2, made[2], config), ends, x.dtype)
        kept = [w if each.columns is None else None for w, each in zip(weights, made, strict=True)]
        ctx.save_for_backward(*columns, gate, up, ends, *kept, *(t for each in made for t in each[2:4]))
        ctx.config, ctx.plain, ctx.dtypes = config, plain, [w.dtype for w in weights]
        return output

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, x_scale, gate, up, ends, *saved = ctx.saved_tensors
        weights, of_each = saved[:3], zip(saved[3::2], saved[4::2], ctx.plain, strict=True)
        made = [Made(None, None, columns, scale, is_plain) for columns, scale, is_plain in of_each]
        config: MXGroupedConfig = ctx.config
        needs_x, *needs = ctx.needs_input_grad[:4]
        dtype, grad = gate.dtype, grad.contiguous()
        g_rows, g_columns = _either(grad, ends, config, rows=needs_x or needs[0] or needs[1], columns=needs[2])
        grads: list[Tensor | None] = [None] * 3
        of_x: Tensor | None = None
        if needs[2]:
            hidden = _columns(_hidden(gate, up), ends, config, grad)
            grads[2] = _by_columns(g_columns, hidden, ends, weight_gradient_dtype(dtype))
        if not g_rows:
            return None, *_in_dtypes(grads, ctx.dtypes), *[None] * 16
        grad_hidden = _by_rows(g_rows, _across(weights[2], made[2], config, grad), ends, dtype)
        of_gate, of_up = _gradients(grad_hidden, gate, up)
        for number, each in enumerate((of_gate, of_up)):
            each_rows, each_columns = _either(each, ends, config, rows=needs_x, columns=needs[number])
            if needs_x:
                part = _by_rows(each_rows, _across(weights[number], made[number], config, grad), ends, dtype)
                of_x = part if of_x is None else of_x + part
            if needs[number]:
                kept = _columns(x, ends, config, grad) if x_scale is None else (x, x_scale)
                grads[number] = _by_columns(each_columns, kept, ends, weight_gradient_dtype(dtype))
        return of_x, *_in_dtypes(grads, ctx.dtypes), *[None] * 16


def _in_dtypes(grads: Sequence[Tensor | None], dtypes: Sequence[torch.dtype]) -> list[Tensor | None]:
    return [grad if grad is None else grad.to(dtype) for grad, dtype in zip(grads, dtypes, strict=True)]


def _hidden(gate: Tensor, up: Tensor) -> Tensor:
    """`silu(gate) * up`, rounded once, so that it is the same whether a compiler fuses it or not."""
    return (F.silu(gate.float()) * up.float()).to(gate.dtype)


def _gradients(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Those of gate and up for that of `_hidden`, rounded once."""
    g, s = gate.float(), gate.float().sigmoid()
    of_gate = grad.float() * up.float() * (s * (1 + g * (1 - s)))
    return of_gate.to(gate.dtype), (grad.float() * (g * s)).to(gate.dtype)


def _input(
    x: Tensor, ends: Tensor, config: MXGroupedConfig, needs_columns: bool
) -> tuple[_Operand, tuple[Tensor | None, Tensor | None]]:
    """x by rows, and what to keep of it for the weights' gradients."""
    if config.emulate or not needs_columns:
        return _rows(x, ends, config), (x if needs_columns else None, None)
    codes, scale, codes_t, scale_t = ops.group_both(x, ends, config.mode)
    return (codes, scale), (codes_t, scale_t)


def _rows(x: Tensor, ends: Tensor, config: MXGroupedConfig) -> _Operand:
    """x `[M, K]` by blocks along K."""
    if config.emulate:
        return (ops.row_values(x, ends, config.mode),)
    return ops.group_rows(x, ends, config.mode)


def _columns(x: Tensor, ends: Tensor, config: MXGroupedConfig, after: Tensor) -> _Operand:
    """x `[M, K]` by blocks along M."""
    if config.emulate:
        return (ops.column_values(x, ends, config.mode, after),)
    return ops.group_columns(x, ends, config.mode, after)


def _either(
    x: Tensor, ends: Tensor, config: MXGroupedConfig, *, rows: bool, columns: bool
) -> tuple[_Operand, _Operand]:
    """x by blocks along K, and along M, as far as they are asked for, from one read; nothing for the other."""
    if not columns:
        return _rows(x, ends, config) if rows else (), ()
    if not rows:
        return (), _columns(x, ends, config, x)
    if config.emulate:
        by_rows, by_columns = ops.values(x, ends, config.mode)
        return (by_rows,), (by_columns,)
    codes, scale, codes_t, scale_t = ops.group_both(x, ends, config.mode)
    return (codes, scale), (codes_t, scale_t)


def _along(w: Tensor, made: Made, config: MXGroupedConfig) -> _Operand:
    """A weight `[E, N, K]` as the right operand of a product that sums over K."""
    codes, scale = row_operand(w, made, config.weight_cast)
    return (codes.transpose(1, 2),) if scale is None else (codes, scale)


def _across(w: Tensor | None, made: Made, config: MXGroupedConfig, after: Tensor) -> _Operand:
    """A weight `[E, N, K]` as the right operand of a product that sums over N; after: as for `column_operand`."""
    codes, scale = column_operand(w, made, config.weight_cast, after)
    return (codes,) if scale is None else (codes, scale)


def _by_rows(a: _Operand, w: _Operand, ends: Tensor, dtype: torch.dtype) -> Tensor:
    """The product of rows with the weights of their experts."""
    if len(a) == 1:
        return ops.multiply_rows(a[0], w[0], ends, dtype)
    return ops.scaled_mm_rows(a[0], w[0], a[1], w[1], ends, dtype)


def _by_columns(a: _Operand, b: _Operand, ends: Tensor, dtype: torch.dtype) -> Tensor:
    """`a.T @ b` over the rows of each expert, `[E, N, K]`; of an expert without rows zero."""
    if len(a) == 1:
        return ops.multiply_columns(a[0], b[0], ends, dtype)
    return ops.scaled_mm_columns(a[0], b[0], a[1], b[1], ends, dtype)
