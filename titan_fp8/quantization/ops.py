"""The custom operators `torch.ops.titan_fp8.*`: casts, amax and the scaled product.

They are opaque on purpose. The compiler neither looks into them nor fuses into them, so a tensor gets the same codes
whether a model runs eagerly or compiled (a cast that Inductor fused with the norm before it would see unrounded fp32,
and 3 % of the codes would differ). What eager and compiled code share is therefore everything.

None has a derivative: `function.py` calls them inside its autograd function. Selective activation checkpointing finds
the products to keep in `GEMM_OPS`.

T tokens, K in features, N out features; `padded(T)` is T rounded up to a multiple of 16, `padded128(T)` of 128.
"""

import torch
from torch import Tensor
from torch._ops import OpOverload

from titan_fp8.kernels import blockwise, float8
from titan_fp8.kernels.blockwise import blocks
from titan_fp8.kernels.float8 import padded
from titan_fp8.quantization import gemm
from titan_fp8.runtime.operators import register_operator


def _rows(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.new_empty(x.shape, dtype=dtype)


def _columns(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.new_empty((x.shape[1], padded(x.shape[0])), dtype=dtype)


def _scale(x: Tensor, *shape: int) -> Tensor:
    return x.new_empty(shape, dtype=torch.float32)


def _transposed(x: Tensor) -> Tensor:
    return x.new_empty((x.shape[1], x.shape[0]))


def _block_columns(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.new_empty((x.shape[1], blockwise.padded(x.shape[0])), dtype=dtype)


def _block_row_scale(x: Tensor) -> Tensor:
    return _scale(x, blocks(x.shape[1]), x.shape[0]).t()  # strides (1, T)


def _block_column_scale(x: Tensor) -> Tensor:
    return _scale(x, blocks(x.shape[0]), x.shape[1]).t()  # strides (1, K)


def _product(a: Tensor, b: Tensor, out_dtype: torch.dtype) -> Tensor:
    return a.new_empty((a.shape[0], b.shape[0]), dtype=out_dtype)


def _cast_tensor(x: Tensor, amax: Tensor, dtype: torch.dtype, after: Tensor | None = None) -> tuple[Tensor, Tensor]:
    codes, _, scale = float8.cast_tensor(x, amax, dtype, rows=True, columns=False)
    assert codes is not None
    return codes, scale


def _cast_tensor_columns(
    x: Tensor, amax: Tensor, dtype: torch.dtype, after: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    _, codes_t, scale = float8.cast_tensor(x, amax, dtype, rows=False, columns=True)
    assert codes_t is not None
    return codes_t, scale


def _cast_tensor_both(x: Tensor, amax: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    codes, codes_t, scale = float8.cast_tensor(x, amax, dtype, rows=True, columns=True)
    assert codes is not None
    assert codes_t is not None
    return codes, codes_t, scale


def _high_precision_mm(grad_output: Tensor, x: Tensor, out_dtype: torch.dtype) -> Tensor:
    with torch.autocast(x.device.type, enabled=False):
        if x.is_cuda and out_dtype == torch.float32:
            return torch.mm(grad_output.t(), x, out_dtype=out_dtype)
        return (grad_output.t().float() @ x.float()).to(out_dtype)


def _sum_rows(x: Tensor) -> Tensor:
    # The order of a sum depends on strides, which eager and compiled code need not share.
    return x.contiguous().sum(0, dtype=torch.float32)


amax = register_operator("amax(Tensor x) -> Tensor", float8.amax, lambda x: x.new_empty((), dtype=torch.int32))
"""`amax(x [T, K])` -> int32 []: the bits of max |x| in fp32."""

cast_tensor = register_operator(
    "cast_tensor(Tensor x, Tensor amax, ScalarType dtype, Tensor? after=None) -> (Tensor, Tensor)",
    _cast_tensor,
    lambda x, amax, dtype, after=None: (_rows(x, dtype), _scale(x)),
)
"""`cast_tensor(x [T, K], amax [], dtype, after)` -> codes [T, K], scale []; `after`, here and below, is not read: see
`producer_ops.py`."""

cast_tensor_columns = register_operator(
    "cast_tensor_columns(Tensor x, Tensor amax, ScalarType dtype, Tensor? after=None) -> (Tensor, Tensor)",
    _cast_tensor_columns,
    lambda x, amax, dtype, after=None: (_columns(x, dtype), _scale(x)),
)
"""`cast_tensor_columns(x [T, K], amax [], dtype, after)` -> codes_t [K, padded(T)], scale []."""

cast_tensor_both = register_operator(
    "cast_tensor_both(Tensor x, Tensor amax, ScalarType dtype) -> (Tensor, Tensor, Tensor)",
    _cast_tensor_both,
    lambda x, amax, dtype: (_rows(x, dtype), _columns(x, dtype), _scale(x)),
)
"""`cast_tensor_both(x [T, K], amax [], dtype)` -> codes [T, K], codes_t [K, padded(T)], scale []; one read of x."""

cast_rows = register_operator(
    "cast_rows(Tensor x, ScalarType dtype, Tensor? after=None) -> (Tensor, Tensor)",
    lambda x, dtype, after=None: float8.cast_rows(x, dtype),
    lambda x, dtype, after=None: (_rows(x, dtype), _scale(x, x.shape[0], 1)),
)
"""`cast_rows(x [T, K], dtype, after)` -> codes [T, K], scale [T, 1], powers of two."""

cast_columns = register_operator(
    "cast_columns(Tensor x, ScalarType dtype, Tensor? after=None) -> (Tensor, Tensor)",
    lambda x, dtype, after=None: float8.cast_columns(x, dtype),
    lambda x, dtype, after=None: (_columns(x, dtype), _scale(x, x.shape[1], 1)),
)
"""`cast_columns(x [T, K], dtype, after)` -> codes_t [K, padded(T)], scale_t [K, 1], powers of two."""

cast_rows_and_columns = register_operator(
    "cast_rows_and_columns(Tensor x, ScalarType dtype) -> (Tensor, Tensor, Tensor, Tensor)",
    float8.cast_rows_and_columns,
    lambda x, dtype: (_rows(x, dtype), _scale(x, x.shape[0], 1), _columns(x, dtype), _scale(x, x.shape[1], 1)),
)
"""`cast_rows_and_columns(x [T, K], dtype)` -> codes [T, K], scale [T, 1], codes_t [K, padded(T)], scale_t [K, 1]."""

columns_from_rows = register_operator(
    "columns_from_rows(Tensor codes, Tensor scale, Tensor? after=None) -> (Tensor, Tensor)",
    lambda codes, scale, after=None: float8.columns_from_rows(codes, scale),
    lambda codes, scale, after=None: (_columns(codes, codes.dtype), _scale(codes, codes.shape[1], 1)),
)
"""`columns_from_rows(codes [T, K], scale [T, 1], after)` -> codes_t [K, padded(T)], scale_t [K, 1]."""

tensor_columns_from_rows = register_operator(
    "tensor_columns_from_rows(Tensor codes, Tensor scale, Tensor? after=None) -> (Tensor, Tensor)",
    lambda codes, scale, after=None: float8.tensor_columns_from_rows(codes, scale),
    lambda codes, scale, after=None: (_transposed(codes), _scale(codes)),
)
"""`tensor_columns_from_rows(codes [N, K], scale [N, 1], after)` -> codes_t [K, N], scale [], a power of two."""

transpose_codes = register_operator(
    "transpose_codes(Tensor codes, Tensor? after=None) -> Tensor",
    lambda codes, after=None: float8.transpose_codes(codes),
    lambda codes, after=None: _transposed(codes),
)
"""`transpose_codes(codes [N, K], after)` -> [K, N], the same bytes."""

cast_block_rows = register_operator(
    "cast_block_rows(Tensor x, ScalarType dtype, bool power_of_two) -> (Tensor, Tensor)",
    blockwise.cast_block_rows,
    lambda x, dtype, power_of_two: (_rows(x, dtype), _block_row_scale(x)),
)
"""`cast_block_rows(x [T, K], dtype, power_of_two)` -> codes [T, K], scale [T, K/128] with strides (1, T)."""

cast_block_columns = register_operator(
    "cast_block_columns(Tensor x, ScalarType dtype, bool power_of_two, Tensor? after=None) -> (Tensor, Tensor)",
    lambda x, dtype, power_of_two, after=None: blockwise.cast_block_columns(x, dtype, power_of_two),
    lambda x, dtype, power_of_two, after=None: (_block_columns(x, dtype), _block_column_scale(x)),
)
"""`cast_block_columns(x [T, K], dtype, power_of_two, after)` -> codes_t [K, padded128(T)], scale_t
[K, padded128(T)/128] with strides (1, K)."""

cast_block_both = register_operator(
    "cast_block_both(Tensor x, ScalarType dtype, bool power_of_two) -> (Tensor, Tensor, Tensor, Tensor)",
    blockwise.cast_block_both,
    lambda x, dtype, power_of_two: (
        _rows(x, dtype),
        _block_row_scale(x),
        _block_columns(x, dtype),
        _block_column_scale(x),
    ),
)
"""`cast_block_both(x [T, K], dtype, power_of_two)` -> codes, scale, codes_t, scale_t as above, one read."""

cast_blocks = register_operator(
    "cast_blocks(Tensor w, ScalarType dtype, bool power_of_two, Tensor? after=None) -> (Tensor, Tensor)",
    lambda w, dtype, power_of_two, after=None: blockwise.cast_blocks(w, dtype, power_of_two),
    lambda w, dtype, power_of_two, after=None: (_rows(w, dtype), _scale(w, blocks(w.shape[0]), blocks(w.shape[1]))),
)
"""`cast_blocks(w [N, K], dtype, power_of_two, after)` -> codes [N, K], scale [N/128, K/128]; one read of w."""

scaled_mm = register_operator(
    "scaled_mm(Tensor a, Tensor b, Tensor scale_a, Tensor scale_b, Tensor? bias, ScalarType out_dtype, "
    "bool fast_accum, bool emulate) -> Tensor",
    gemm.scaled_mm,
    lambda a, b, scale_a, scale_b, bias, out_dtype, fast_accum, emulate: _product(a, b, out_dtype),
)
"""`scaled_mm(a [M, K], b [N, K], scale_a, scale_b, bias, out_dtype, fast_accum, emulate)` -> [M, N]; see `gemm.py`."""

scaled_mm_blockwise = register_operator(
    "scaled_mm_blockwise(Tensor a, Tensor b, Tensor scale_a, Tensor scale_b, Tensor? bias, ScalarType out_dtype, "
    "bool fast_accum, bool emulate) -> Tensor",
    gemm.scaled_mm_blockwise,
    lambda a, b, scale_a, scale_b, bias, out_dtype, fast_accum, emulate: _product(a, b, out_dtype),
)
"""`scaled_mm_blockwise(a [M, K], b [N, K], scale_a [M, K/128], scale_b, bias, out_dtype, fast_accum, emulate)` -> [M,
N]; scale_b is [N/128, K/128] or [N, K/128]; see `gemm.py`."""

high_precision_mm = register_operator(
    "high_precision_mm(Tensor grad_output, Tensor x, ScalarType out_dtype) -> Tensor",
    _high_precision_mm,
    lambda grad_output, x, out_dtype: x.new_empty((grad_output.shape[1], x.shape[1]), dtype=out_dtype),
)
"""`high_precision_mm(grad_output [T, N], x [T, K], out_dtype)` -> grad_output.T @ x [N, K], in a dtype that is not
theirs. If it were an ordinary product that is rounded and then made wider again, the compiler would not round."""

sum_rows = register_operator(
    "sum_rows(Tensor x) -> Tensor", _sum_rows, lambda x: x.new_empty((x.shape[1],), dtype=torch.float32)
)
"""`sum_rows(x [T, N])` -> fp32 [N]: a bias's gradient."""

GEMM_OPS: tuple[OpOverload, ...] = (scaled_mm, scaled_mm_blockwise)
"""The matrix products of quantized linears, for the save lists of selective activation checkpointing."""
