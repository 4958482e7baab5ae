"""The custom operators of experts in MXFP8, opaque to the compiler as those of `ops.py`; two sets as in `mx_ops.py`.

On tensor cores that multiply blocks, codes and swizzled scales of groups (`kernels/mx/layout.py`); elsewhere what these
stand for, bf16 on a GPU, where PyTorch's grouped product multiplies it, and fp32 on a CPU. On a GPU results leave their
products in bf16, whatever they are then cast to.

M rows sorted by expert, groups multiples of 32; K in features, N out features, E experts. `ends` int32 [E]: the row
behind each expert's rows.
"""

import functools
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import ScalingType, SwizzleType

from titan_fp8.kernels import mx
from titan_fp8.kernels.mx.layout import padded_shape, rounded_up, rows_of_groups
from titan_fp8.quantization.gemm import exact_fp32
from titan_fp8.quantization.mx_ops import values_dtype
from titan_fp8.runtime.operators import register_operator

scaled_grouped_mm: Any = getattr(torch.nn.functional, "scaled_grouped_mm")  # noqa: B009 - type checkers lack it
BLOCK_SCALES, SWIZZLED = ScalingType.BlockWise1x32, SwizzleType.SWIZZLE_32_4_4


def _values(x: Tensor, ends: Tensor, mode: str) -> tuple[Tensor, Tensor]:
    if x.is_cuda:
        by_rows, by_columns = mx.quantize_dequantize_groups(x, ends, mode)
        assert by_rows is not None
        assert by_columns is not None
        return by_rows, by_columns
    return _row_values(x, ends, mode), _column_values(x, ends, mode)


def _row_values(x: Tensor, ends: Tensor, mode: str) -> Tensor:
    if x.is_cuda:
        values, _ = mx.quantize_dequantize_groups(x, ends, mode, columns=False)
        assert values is not None
        return values
    codes, scale = mx.cast_group_rows(x, ends, mode)
    return mx.from_mx(scale, codes, values_dtype(x.device))


def _column_values(x: Tensor, ends: Tensor, mode: str, after: Tensor | None = None) -> Tensor:
    if x.is_cuda:
        _, values = mx.quantize_dequantize_groups(x, ends, mode, rows=False)
        assert values is not None
        return values
    codes_t, scale_t = mx.cast_group_columns(x, ends, mode)
    return mx.from_mx(scale_t, codes_t, values_dtype(x.device)).t().contiguous()


def _weight_values(w: Tensor, mode: str, rows: bool, after: Tensor | None = None) -> Tensor:
    # N is a multiple of a block, so that no block holds rows of two experts.
    flat, dtype = w.reshape(-1, w.shape[-1]), values_dtype(w.device)
    if w.is_cuda:
        both = mx.quantize_dequantize(flat, mode, rows=rows, columns=not rows)
        values = both[0] if rows else both[1]
        assert values is not None
        return values.view(w.shape)
    codes, scale = mx.cast_rows(flat, mode) if rows else mx.cast_columns(flat, mode)
    values = mx.from_mx(scale, codes, dtype)
    return (values if rows else values.t().contiguous()).view(w.shape)


def _like_values(x: Tensor) -> Tensor:
    return x.new_empty(x.shape, dtype=values_dtype(x.device))


def _groups(ends: Tensor) -> Iterator[tuple[int, slice]]:
    known = ends.tolist()
    if any(end % mx.BLOCK for end in known):
        raise ValueError(f"expected groups of multiples of {mx.BLOCK} rows, and they end at {known}")
    for expert, (begin, end) in enumerate(pairwise([0, *known])):
        yield expert, slice(begin, end)


def _multiply_rows(a: Tensor, b: Tensor, ends: Tensor, out_dtype: torch.dtype) -> Tensor:
    if a.is_cuda:
        return torch.nn.functional.grouped_mm(a, b, offs=ends).to(out_dtype)
    result = torch.zeros(a.shape[0], b.shape[2], dtype=out_dtype, device=a.device)
    with exact_fp32(a.device.type):
        for expert, rows in _groups(ends):
            result[rows] = (a[rows] @ b[expert]).to(out_dtype)
    return result


def _multiply_columns(a: Tensor, b: Tensor, ends: Tensor, out_dtype: torch.dtype) -> Tensor:
    if a.is_cuda:
        return torch.nn.functional.grouped_mm(a.t(), b, offs=ends).to(out_dtype)
    with exact_fp32(a.device.type):
        return torch.stack([(a[rows].t() @ b[rows]).to(out_dtype) for _, rows in _groups(ends)])


def _fake_rows(x: Tensor, ends: Tensor, mode: str) -> tuple[Tensor, Tensor]:
    (rows, features), experts = x.shape, ends.shape[0]
    shape = rows_of_groups(rows, experts), rounded_up(features // mx.BLOCK, 4)
    return x.new_empty(x.shape, dtype=torch.float8_e4m3fn), x.new_empty(shape, dtype=mx.E8M0)


def _fake_columns(x: Tensor, ends: Tensor, mode: str, after: Tensor | None = None) -> tuple[Tensor, Tensor]:
    (rows, features), experts = x.shape, ends.shape[0]
    shape = rounded_up(features, 128), rows_of_groups(rows, experts) // mx.BLOCK
    return x.new_empty((features, rows), dtype=torch.float8_e4m3fn), x.new_empty(shape, dtype=mx.E8M0)


def _experts(w: Tensor, mode: str, rows: bool, after: Tensor | None = None) -> tuple[Tensor, Tensor]:
    return (mx.cast_expert_rows if rows else mx.cast_expert_columns)(w, mode, swizzled=True)


def _fake_experts(w: Tensor, mode: str, rows: bool, after: Tensor | None = None) -> tuple[Tensor, Tensor]:
    experts, *dims = w.shape
    across, along = dims if rows else dims[::-1]
    padded_rows, padded_columns = padded_shape(across, along // mx.BLOCK)
    codes = w.new_empty((experts, across, along), dtype=torch.float8_e4m3fn)
    return codes, w.new_empty((experts, padded_rows * padded_columns), dtype=mx.E8M0)


def scaled_rows(a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, ends: Tensor, out_dtype: torch.dtype) -> Tensor:
    """MX codes a `[M, K]` by those of experts b `[E, N, K]`, on tensor cores that multiply blocks: `[M, N]`; rows
    behind the last group may be anything. Scales are swizzled: of row groups, and of experts."""
    return _scaled(a, b.transpose(-2, -1), scale_a, scale_b, ends).to(out_dtype)


def scaled_columns(
    a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, ends: Tensor, out_dtype: torch.dtype
) -> Tensor:
    """MX codes a `[N, M]` by b `[K, M]` over the rows of each expert, likewise: `[E, N, K]`, of an expert without rows
    zero. Scales are swizzled, of column groups."""
    result = _scaled(a, b.t(), scale_a, scale_b, ends)
    # The product writes nothing where nothing is summed.
    has_rows = ends.diff(prepend=ends.new_zeros(1)) > 0
    return result.masked_fill_(~has_rows.view(-1, 1, 1), 0.0).to(out_dtype)


def _scaled(a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, ends: Tensor) -> Tensor:
    return scaled_grouped_mm(
        a,
        b,
        scale_a,
        BLOCK_SCALES,
        scale_b,
        BLOCK_SCALES,
        swizzle_a=SWIZZLED,
        swizzle_b=SWIZZLED,
        offs=ends,
        output_dtype=torch.bfloat16,
    )


@functools.cache
def missing_grouped_product() -> str | None:
    """What PyTorch says that it lacks for grouped products of blocks on the device at hand, or None: found out by a
    small one. Without a device nothing is found out."""
    if not torch.cuda.is_available():
        return None
    rows, experts, features = 128, 2, 128
    ends = torch.tensor([rows // 2, rows], dtype=torch.int32, device="cuda")
    x, w = torch.zeros(rows, features, device="cuda"), torch.zeros(experts, features, features, device="cuda")
    codes, scale = mx.cast_group_rows(x, ends, "rceil", swizzled=True)
    w_codes, w_scale = mx.cast_expert_rows(w, "rceil", swizzled=True)
    try:
        scaled_rows(codes, w_codes, scale, w_scale, ends, torch.bfloat16)
    except (RuntimeError, ValueError, NotImplementedError) as error:
        return str(error).partition("\n")[0]
    return None


values = register_operator(
    "mx_group_values(Tensor x, Tensor ends, str mode) -> (Tensor, Tensor)",
    _values,
    lambda x, ends, mode: (_like_values(x), _like_values(x)),
)
"""`mx_group_values(x [M, K], ends, mode)` -> what x is by blocks along K, and by blocks along M, both as x lies."""

row_values = register_operator(
    "mx_group_row_values(Tensor x, Tensor ends, str mode) -> Tensor",
    _row_values,
    lambda x, ends, mode: _like_values(x),
)
"""The first of `mx_group_values`."""

column_values = register_operator(
    "mx_group_column_values(Tensor x, Tensor ends, str mode, Tensor? after=None) -> Tensor",
    _column_values,
    lambda x, ends, mode, after=None: _like_values(x),
)
"""The second of `mx_group_values`; `after`, here and below: as in `ops.py`."""

weight_values = register_operator(
    "mx_expert_values(Tensor w, str mode, bool rows, Tensor? after=None) -> Tensor",
    _weight_values,
    lambda w, mode, rows, after=None: _like_values(w),
)
"""`mx_expert_values(w [E, N, K], mode, rows, after)` -> what w is by blocks along K if `rows`, else along N."""

multiply_rows = register_operator(
    "mx_grouped_values_mm_rows(Tensor a, Tensor b, Tensor ends, ScalarType out_dtype) -> Tensor",
    _multiply_rows,
    lambda a, b, ends, out_dtype: a.new_empty((a.shape[0], b.shape[2]), dtype=out_dtype),
)
"""`mx_grouped_values_mm_rows(a [M, K], b [E, K, N], ends, out_dtype)` -> [M, N]; rows behind the last group may be
anything."""

multiply_columns = register_operator(
    "mx_grouped_values_mm_columns(Tensor a, Tensor b, Tensor ends, ScalarType out_dtype) -> Tensor",
    _multiply_columns,
    lambda a, b, ends, out_dtype: a.new_empty((ends.shape[0], a.shape[1], b.shape[1]), dtype=out_dtype),
)
"""`mx_grouped_values_mm_columns(a [M, N], b [M, K], ends, out_dtype)` -> [E, N, K]: `a.T @ b` of each group."""

group_rows = register_operator(
    "mx_group_rows(Tensor x, Tensor ends, str mode) -> (Tensor, Tensor)",
    lambda x, ends, mode: mx.cast_group_rows(x, ends, mode, swizzled=True),
    _fake_rows,
)
"""`mx_group_rows(x [M, K], ends, mode)` -> codes [M, K], swizzled scale of row groups."""

group_columns = register_operator(
    "mx_group_columns(Tensor x, Tensor ends, str mode, Tensor? after=None) -> (Tensor, Tensor)",
    lambda x, ends, mode, after=None: mx.cast_group_columns(x, ends, mode, swizzled=True),
    _fake_columns,
)
"""`mx_group_columns(x [M, K], ends, mode, after)` -> codes_t [K, M], swizzled scale of column groups."""

group_both = register_operator(
    "mx_group_both(Tensor x, Tensor ends, str mode) -> (Tensor, Tensor, Tensor, Tensor)",
    lambda x, ends, mode: mx.cast_group_both(x, ends, mode, swizzled=True),
    lambda x, ends, mode: (*_fake_rows(x, ends, mode), *_fake_columns(x, ends, mode)),
)
"""`mx_group_rows` and `mx_group_columns` from one read."""

experts = register_operator(
    "mx_experts(Tensor w, str mode, bool rows, Tensor? after=None) -> (Tensor, Tensor)", _experts, _fake_experts
)
"""`mx_experts(w [E, N, K], mode, rows, after)` -> codes [E, N, K] by blocks along K if `rows`, else [E, K, N] by blocks
along N, and their swizzled scale."""

scaled_mm_rows = register_operator(
    "mx_scaled_grouped_mm_rows(Tensor a, Tensor b, Tensor scale_a, Tensor scale_b, Tensor ends, ScalarType out_dtype) "
    "-> Tensor",
    scaled_rows,
    lambda a, b, scale_a, scale_b, ends, out_dtype: a.new_empty((a.shape[0], b.shape[1]), dtype=out_dtype),
)
"""See `scaled_rows`."""

scaled_mm_columns = register_operator(
    "mx_scaled_grouped_mm_columns(Tensor a, Tensor b, Tensor scale_a, Tensor scale_b, Tensor ends, "
    "ScalarType out_dtype) -> Tensor",
    scaled_columns,
    lambda a, b, scale_a, scale_b, ends, out_dtype: a.new_empty(
        (ends.shape[0], a.shape[0], b.shape[0]), dtype=out_dtype
    ),
)
"""See `scaled_columns`."""
