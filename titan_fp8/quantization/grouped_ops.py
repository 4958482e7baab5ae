"""The operators of experts in float8, opaque to the compiler as those of `ops.py` are.

M rows sorted by expert, K in features, N out features, E experts. `ends` int32 [E]: the row behind each expert's rows.
"""

from itertools import pairwise

import torch
from torch import Tensor

from titan_fp8.kernels import float8, grouped
from titan_fp8.quantization import grouped_gemm
from titan_fp8.runtime.errors import UserError
from titan_fp8.runtime.operators import register_operator


def _fp32(x: Tensor, *shape: int) -> Tensor:
    return x.new_empty(shape, dtype=torch.float32)


def _both(x: Tensor, ends: Tensor, dtype: torch.dtype) -> tuple[Tensor, ...]:
    (rows, columns), experts = x.shape, ends.shape[0]
    codes, codes_t = x.new_empty((rows, columns), dtype=dtype), x.new_empty((columns, rows), dtype=dtype)
    return codes, _fp32(x, rows, 1), codes_t, _fp32(x, experts, columns)


def _cast_experts(w: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    codes, scale = float8.cast_rows(w.reshape(-1, w.shape[-1]), dtype)
    return codes.view(w.shape), scale.view(w.shape[:2])


def _checked_ends(ends: Tensor, rows: int, owner: str) -> Tensor:
    given = ends.tolist()
    if any(begin > end for begin, end in pairwise([0, *given, rows])):
        raise UserError(
            f"{owner}: offs = {given} for {rows} rows, and the row behind each expert's rows is never before that of "
            f"the expert before it, 0 at the least and {rows} at the most; give it the cumulative sum of the experts' "
            "numbers of rows"
        )
    return ends.clone()


def _swiglu_backward(grad: Tensor, gate: Tensor, up: Tensor, ends: Tensor, dtype: torch.dtype) -> tuple[Tensor, ...]:
    of_gate, of_up, output = grouped.swiglu_backward(grad, gate, up, ends, dtype)
    return *of_gate, *of_up, *output


checked_ends = register_operator(
    "checked_ends_of_groups(Tensor ends, SymInt rows, str owner) -> Tensor",
    _checked_ends,
    lambda ends, rows, owner: torch.empty_like(ends),
)
"""`checked_ends_of_groups(ends int32 [E], rows, owner)` -> ends. It waits for the device, and raises a UserError that
begins with `owner` unless ends ascend from 0 to `rows`; an operator, since compiled code looks at no values itself."""

cast_group_both = register_operator(
    "cast_group_both(Tensor x, Tensor ends, ScalarType dtype) -> (Tensor, Tensor, Tensor, Tensor)",
    grouped.cast_both,
    _both,
)
"""`cast_group_both(x [M, K], ends, dtype)` -> codes [M, K], scale [M, 1], codes_t [K, M], scale_t [E, K]."""


def _gathered(x: Tensor, source: Tensor, scores: Tensor | None, top_k: int, ends: Tensor, dtype: torch.dtype):
    return _both(x.new_empty((source.shape[0], x.shape[1])), ends, dtype)


gather_group_both = register_operator(
    "gather_group_both(Tensor x, Tensor source, Tensor? scores, int top_k, Tensor ends, ScalarType dtype) -> "
    "(Tensor, Tensor, Tensor, Tensor)",
    grouped.gather,
    _gathered,
)
"""`cast_group_both` of `moe_permute(x [T, K], source, scores, top_k)`."""

cast_group_columns = register_operator(
    "cast_group_columns(Tensor x, Tensor ends, ScalarType dtype) -> (Tensor, Tensor)",
    grouped.cast_columns,
    lambda x, ends, dtype: _both(x, ends, dtype)[2:],
)
"""`cast_group_columns(x [M, K], ends, dtype)` -> codes_t [K, M], scale_t [E, K]."""

cast_experts = register_operator(
    "cast_experts(Tensor w, ScalarType dtype) -> (Tensor, Tensor)",
    _cast_experts,
    lambda w, dtype: (w.new_empty(w.shape, dtype=dtype), _fp32(w, *w.shape[:2])),
)
"""`cast_experts(w [E, N, K], dtype)` -> codes [E, N, K], scale [E, N]: by rows of each expert."""

columns_of_experts = register_operator(
    "columns_of_experts(Tensor codes, Tensor scale, Tensor? after=None) -> (Tensor, Tensor)",
    lambda codes, scale, after=None: grouped.columns_of_experts(codes, scale),
    lambda codes, scale, after=None: (
        codes.new_empty((codes.shape[0], codes.shape[2], codes.shape[1])),
        _fp32(codes, codes.shape[0], codes.shape[2]),
    ),
)
"""`columns_of_experts(codes [E, N, K], scale [E, N], after)` -> codes_t [E, K, N], scale_t [E, K]; `after` as in
`producer_ops.py`."""

swiglu_group_rows = register_operator(
    "swiglu_group_rows(Tensor gate, Tensor up, ScalarType dtype) -> (Tensor, Tensor)",
    grouped.swiglu_rows,
    lambda gate, up, dtype: (torch.empty_like(gate, dtype=dtype), _fp32(gate, gate.shape[0], 1)),
)
"""`swiglu_group_rows(gate [M, N], up [M, N], dtype)` -> codes [M, N], scale [M, 1] of `silu(gate) * up`."""

swiglu_group_backward = register_operator(
    "swiglu_group_backward(Tensor grad, Tensor gate, Tensor up, Tensor ends, ScalarType dtype) -> "
    f"({', '.join(['Tensor'] * 10)})",
    _swiglu_backward,
    lambda grad, gate, up, ends, dtype: (
        *_both(grad, ends, dtype),
        *_both(grad, ends, dtype),
        *_both(grad, ends, dtype)[2:],
    ),
)
"""`swiglu_group_backward(grad [M, N], gate, up, ends, dtype)` -> the gradients of gate and of up, each as
`cast_group_both` gives it, and `silu(gate) * up` as `cast_group_columns` does."""

grouped_mm_rows = register_operator(
    "grouped_scaled_mm_rows(Tensor a, Tensor b, Tensor scale_a, Tensor scale_b, Tensor ends, ScalarType out_dtype, "
    "bool fast_accum, bool emulate) -> Tensor",
    grouped_gemm.grouped_mm_rows,
    lambda a, b, scale_a, scale_b, ends, out_dtype, fast_accum, emulate: a.new_empty(
        (a.shape[0], b.shape[1]), dtype=out_dtype
    ),
)
"""See `grouped_gemm.grouped_mm_rows`."""

grouped_mm_columns = register_operator(
    "grouped_scaled_mm_columns(Tensor a, Tensor b, Tensor scale_a, Tensor scale_b, Tensor ends, ScalarType out_dtype, "
    "bool emulate) -> Tensor",
    grouped_gemm.grouped_mm_columns,
    lambda a, b, scale_a, scale_b, ends, out_dtype, emulate: a.new_empty(
        (ends.shape[0], a.shape[0], b.shape[0]), dtype=out_dtype
    ),
)
"""See `grouped_gemm.grouped_mm_columns`."""
