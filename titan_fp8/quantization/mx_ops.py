"""The custom operators of MX linears, `torch.ops.titan_fp8.mx_*`; opaque to the compiler as those of `ops.py`.

On tensor cores that multiply blocks, operands are codes and swizzled scales:

    mx_rows      [T, K] by 1x32 blocks along K                mx_both   both from one read
    mx_columns   [K, padded(T)] by blocks along T, transposed
    mx_scaled_mm the product of two of them

Elsewhere operands are what these stand for (`mx_values`), and an ordinary product multiplies them: bf16 holds
e4m3 times a power of two exactly but for the outermost exponents, and tensor cores add in fp32. On a CPU they are fp32.

T tokens, K in features, N out features; `padded(T)` is T rounded up to a multiple of 32.
"""

import torch
from torch import Tensor
from torch.nn.functional import ScalingType, SwizzleType

from titan_fp8.kernels import mx
from titan_fp8.kernels.mx.layout import padded_shape
from titan_fp8.quantization.gemm import exact_fp32
from titan_fp8.runtime.operators import register_operator

TRITON = "triton"
"""The kernel that casts in both orientations at once."""


def _codes(x: Tensor, rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """What codes `[rows, columns]` and their swizzled scales look like."""
    scale_shape = padded_shape(rows, columns // mx.BLOCK)
    return x.new_empty((rows, columns), dtype=torch.float8_e4m3fn), x.new_empty(scale_shape, dtype=mx.E8M0)


def _fake_rows(x: Tensor, mode: str) -> tuple[Tensor, Tensor]:
    return _codes(x, x.shape[0], x.shape[1])


def _fake_columns(x: Tensor, mode: str, kernel: str, after: Tensor | None = None) -> tuple[Tensor, Tensor]:
    return _codes(x, x.shape[1], mx.padded(x.shape[0]))


def _both(x: Tensor, mode: str, kernel: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if kernel == TRITON:
        return mx.cast_both(x, mode, swizzled=True)
    return *mx.cast_rows(x, mode, swizzled=True), *mx.cast_columns(x, mode, swizzled=True, kernel=kernel)


def values_dtype(device: torch.device) -> torch.dtype:
    """Of emulated operands: what the device multiplies with sums in fp32."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def _values(x: Tensor, mode: str, kernel: str, after: Tensor | None = None) -> tuple[Tensor, Tensor]:
    dtype = values_dtype(x.device)
    if kernel == TRITON and dtype == torch.bfloat16:
        by_rows, by_columns = mx.quantize_dequantize(x, mode)
        assert by_rows is not None
        assert by_columns is not None
        return by_rows, by_columns
    return _row_values(x, mode), _column_values(x, mode, kernel)


def _row_values(x: Tensor, mode: str, after: Tensor | None = None) -> Tensor:
    dtype = values_dtype(x.device)
    if dtype == torch.bfloat16:
        values, _ = mx.quantize_dequantize(x, mode, columns=False)
        assert values is not None
        return values
    codes, scale = mx.cast_rows(x, mode)
    return mx.from_mx(scale, codes, dtype)


def _column_values(x: Tensor, mode: str, kernel: str, after: Tensor | None = None) -> Tensor:
    dtype = values_dtype(x.device)
    if kernel == TRITON and dtype == torch.bfloat16:
        _, values = mx.quantize_dequantize(x, mode, rows=False)
        assert values is not None
        return values
    codes_t, scale_t = mx.cast_columns(x, mode, kernel=kernel)
    return mx.from_mx(scale_t, codes_t, dtype)[:, : x.shape[0]].t().contiguous()


def _like_values(x: Tensor) -> Tensor:
    return x.new_empty(x.shape, dtype=values_dtype(x.device))


def scaled_mm(a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, out_dtype: torch.dtype) -> Tensor:
    """Product of MX operands a `[M, K]` and b `[N, K]` on tensor cores that multiply blocks: `[M, N]` in `out_dtype`.

    Args:
        a, b: e4m3 codes, K a multiple of 32.
        scale_a, scale_b: e8m0, swizzled, of a block along K each.
        out_dtype: bf16, fp16 or fp32.
    """
    written = torch.float32 if out_dtype == torch.float16 else out_dtype
    kind, swizzle = ScalingType.BlockWise1x32, SwizzleType.SWIZZLE_32_4_4
    result = torch.nn.functional.scaled_mm(
        a, b.t(), scale_a, kind, scale_b, kind, swizzle_a=swizzle, swizzle_b=swizzle, output_dtype=written
    )
    return result.to(out_dtype)


def weight_gradient_dtype(dtype: torch.dtype) -> torch.dtype:
    """In which the gradient of a weight leaves its product of codes where activations are in `dtype`: sums over many
    tokens can be beyond the range of fp16."""
    return torch.bfloat16 if dtype == torch.float16 else dtype


def multiply_values(a: Tensor, b: Tensor, out_dtype: torch.dtype) -> Tensor:
    """`a [M, K] @ b [K, N]` of emulated operands in `out_dtype`, added in fp32; on a GPU as any bf16 product is."""
    if not a.is_cuda:
        return emulated_mm(a, b, out_dtype)
    return a @ b if a.dtype == out_dtype else torch.mm(a, b, out_dtype=torch.float32).to(out_dtype)


def _emulated_mm(a: Tensor, b: Tensor, out_dtype: torch.dtype) -> Tensor:
    with exact_fp32(a.device.type):
        return (a @ b).to(out_dtype)


emulated_mm = register_operator(
    "mx_emulated_mm(Tensor a, Tensor b, ScalarType out_dtype) -> Tensor",
    _emulated_mm,
    lambda a, b, out_dtype: a.new_empty((a.shape[0], b.shape[1]), dtype=out_dtype),
)
"""`mx_emulated_mm(a fp32 [M, K], b fp32 [K, N], out_dtype)` -> [M, N], exact products and sums in fp32."""

rows = register_operator(
    "mx_rows(Tensor x, str mode) -> (Tensor, Tensor)",
    lambda x, mode: mx.cast_rows(x, mode, swizzled=True),
    _fake_rows,
)
"""`mx_rows(x [T, K], mode)` -> codes [T, K], swizzled scale."""

columns = register_operator(
    "mx_columns(Tensor x, str mode, str kernel, Tensor? after=None) -> (Tensor, Tensor)",
    lambda x, mode, kernel, after=None: mx.cast_columns(x, mode, swizzled=True, kernel=kernel),
    _fake_columns,
)
"""`mx_columns(x [T, K], mode, kernel, after)` -> codes_t [K, padded(T)], swizzled scale; `after`: as in `ops.py`."""

both = register_operator(
    "mx_both(Tensor x, str mode, str kernel) -> (Tensor, Tensor, Tensor, Tensor)",
    _both,
    lambda x, mode, kernel: (*_fake_rows(x, mode), *_fake_columns(x, mode, kernel)),
)
"""`mx_both(x [T, K], mode, kernel)` -> what `mx_rows` and `mx_columns` give."""

row_values = register_operator(
    "mx_row_values(Tensor x, str mode, Tensor? after=None) -> Tensor",
    _row_values,
    lambda x, mode, after=None: _like_values(x),
)
"""`mx_row_values(x [T, K], mode, after)` -> [T, K], what `mx_rows` stands for."""

column_values = register_operator(
    "mx_column_values(Tensor x, str mode, str kernel, Tensor? after=None) -> Tensor",
    _column_values,
    lambda x, mode, kernel, after=None: _like_values(x),
)
"""`mx_column_values(x [T, K], mode, kernel, after)` -> [T, K], what `mx_columns` stands for, as x lies."""

values = register_operator(
    "mx_values(Tensor x, str mode, str kernel, Tensor? after=None) -> (Tensor, Tensor)",
    _values,
    lambda x, mode, kernel, after=None: (_like_values(x), _like_values(x)),
)
"""`mx_values(x [T, K], mode, kernel, after)` -> what `mx_row_values` and `mx_column_values` give."""

scaled_mm_op = register_operator(
    "mx_scaled_mm(Tensor a, Tensor b, Tensor scale_a, Tensor scale_b, ScalarType out_dtype) -> Tensor",
    scaled_mm,
    lambda a, b, scale_a, scale_b, out_dtype: a.new_empty((a.shape[0], b.shape[0]), dtype=out_dtype),
)
"""`mx_scaled_mm(a [M, K], b [N, K], scale_a, scale_b, out_dtype)` -> [M, N]; see `scaled_mm`."""

plain_rows = register_operator(
    "mx_plain_rows(Tensor x, str mode) -> (Tensor, Tensor)",
    mx.cast_rows,
    lambda x, mode: (
        x.new_empty(x.shape, dtype=torch.float8_e4m3fn),
        x.new_empty((x.shape[0], x.shape[1] // mx.BLOCK), dtype=mx.E8M0),
    ),
)
"""`mx_plain_rows(x [T, K], mode)` -> codes [T, K], scale [T, K/32], not swizzled."""

values_of_plain = register_operator(
    "mx_values_of_plain(Tensor codes, Tensor scale, ScalarType dtype) -> Tensor",
    lambda codes, scale, dtype: mx.from_mx(scale, codes, dtype),
    lambda codes, scale, dtype: codes.new_empty(codes.shape, dtype=dtype),
)
"""`mx_values_of_plain(codes [T, K], scale [T, K/32], dtype)` -> [T, K], what they stand for."""
