"""Float8 casts: `reference.py` says what they compute, `kernel.py` computes it on a GPU in as few passes as it can.

Each function here checks its input and takes the Triton kernel for CUDA tensors where Triton is installed, otherwise
the reference. Both give the same bits. Inputs are 2-D bf16, fp16 or fp32 tensors of any strides; outputs are
contiguous.

T tokens (rows), K features (columns). Names: `rows` is the codes in the input's own layout `[T, K]`, `columns` the
transposed layout `[K, padded(T)]` in which T is contiguous (see `reference.py` for scales, padding and NaN).
"""

import functools
import importlib
import importlib.util
from types import ModuleType

import torch
from torch import Tensor

from titan_fp8.kernels.float8 import reference
from titan_fp8.kernels.float8.reference import E4M3, E5M2, FP8_MAX, padded

__all__ = [
    "E4M3",
    "E5M2",
    "FP8_MAX",
    "amax",
    "cast_columns",
    "cast_rows",
    "cast_rows_and_columns",
    "cast_tensor",
    "check_input",
    "columns_from_rows",
    "has_triton",
    "padded",
    "tensor_columns_from_rows",
    "transpose_codes",
    "uses_kernel",
]

_INPUT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@functools.cache
def has_triton() -> bool:
    """Whether the Triton kernels can be used in this process."""
    return importlib.util.find_spec("triton") is not None


@functools.cache
def _kernel() -> ModuleType:
    return importlib.import_module("titan_fp8.kernels.float8.kernel")


@functools.cache
def _transpose_kernel() -> ModuleType:
    return importlib.import_module("titan_fp8.kernels.float8.transpose")


def uses_kernel(x: Tensor) -> bool:
    """Whether a cast of x takes the Triton kernel."""
    return x.is_cuda and x.numel() > 0 and has_triton()


def check_input(x: Tensor, dtype: torch.dtype | None = None) -> None:
    """Raise ValueError unless x is something to cast, and `dtype`, if given, something to cast it to."""
    if x.dim() != 2 or x.dtype not in _INPUT_DTYPES:
        raise ValueError(f"expected a 2-D bf16, fp16 or fp32 tensor, got {x.dtype} of shape {list(x.shape)}")
    if dtype is not None and dtype not in FP8_MAX:
        raise ValueError(f"expected torch.float8_e4m3fn or torch.float8_e5m2, got {dtype}")


def amax(x: Tensor) -> Tensor:
    """Largest |x| of a 2-D tensor as the bits of an fp32 number: int32, shape []."""
    check_input(x)
    return _kernel().amax(x) if uses_kernel(x) else reference.amax_bits(x)


def cast_tensor(
    x: Tensor, amax: Tensor, dtype: torch.dtype, *, rows: bool, columns: bool
) -> tuple[Tensor | None, Tensor | None, Tensor]:
    """Cast x `[T, K]` with the one scale that `amax` (int32 bits, shape []) gives, from one read of x.

    Returns:
        codes `[T, K]` if `rows`, codes_t `[K, padded(T)]` if `columns` (otherwise None), and the fp32 scale, shape [].
    """
    check_input(x, dtype)
    implementation = _kernel() if uses_kernel(x) else reference
    return implementation.cast_tensor(x, amax, dtype, rows=rows, columns=columns)


def cast_rows(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cast x `[T, K]` with a power-of-two scale a row: `(codes [T, K], scale [T, 1])`."""
    check_input(x, dtype)
    return (_kernel() if uses_kernel(x) else reference).cast_rows(x, dtype)


def cast_columns(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cast x `[T, K]` with a power-of-two scale a column: `(codes_t [K, padded(T)], scale_t [K, 1])`."""
    check_input(x, dtype)
    return (_kernel() if uses_kernel(x) else reference).cast_columns(x, dtype)


def cast_rows_and_columns(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`cast_rows` and `cast_columns` of one tensor: `(codes, scale, codes_t, scale_t)`."""
    check_input(x, dtype)
    if uses_kernel(x):
        return _kernel().cast_rows_and_columns(x, dtype)
    return *reference.cast_rows(x, dtype), *reference.cast_columns(x, dtype)


def columns_from_rows(codes: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Column codes from row codes `[T, K]` and their power-of-two `scale [T, 1]`: `(codes_t [K, padded(T)], scale_t
    [K, 1])`; exact but for subnormals."""
    _check_row_codes(codes, scale)
    return (_kernel() if uses_kernel(codes) else reference).columns_from_rows(codes, scale)


def tensor_columns_from_rows(codes: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Column codes with one scale from row codes `[N, K]` and their power-of-two `scale [N, 1]`: `(codes_t [K, N],
    scale [])`; exact but for subnormals. N and K are multiples of 16."""
    _check_row_codes(codes, scale)
    _check_multiples(codes)
    return (_transpose_kernel() if uses_kernel(codes) else reference).tensor_columns_from_rows(codes, scale)


def transpose_codes(codes: Tensor) -> Tensor:
    """Float8 codes `[N, K]` as contiguous `[K, N]`, the same bytes. N and K are multiples of 16."""
    if codes.dim() != 2 or codes.dtype not in FP8_MAX:
        raise ValueError(f"expected float8 codes [N, K], got {codes.dtype} {list(codes.shape)}")
    _check_multiples(codes)
    return (_transpose_kernel() if uses_kernel(codes) else reference).transpose_codes(codes)


def _check_row_codes(codes: Tensor, scale: Tensor) -> None:
    if codes.dim() != 2 or codes.dtype not in FP8_MAX or scale.shape != (codes.shape[0], 1):
        raise ValueError(
            f"expected float8 codes [T, K] and scale [T, 1], got {codes.dtype} {list(codes.shape)}, {list(scale.shape)}"
        )


def _check_multiples(codes: Tensor) -> None:
    if any(size % reference.T_MULTIPLE for size in codes.shape):
        raise ValueError(f"expected sizes in multiples of {reference.T_MULTIPLE}, got codes {list(codes.shape)}")
