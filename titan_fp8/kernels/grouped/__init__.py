"""Float8 casts of rows that are sorted into groups, one group an expert: what grouped products consume.

`reference.py` says what they compute; the kernels compute the same bits on a GPU.

M rows, a multiple of 16, K columns, E groups, N out features of an expert. `ends` int32 [E]: the row behind each group,
ascending, multiples of 16. Codes are in float8_e4m3fn, gradients too.
"""

import functools
import importlib
from types import ModuleType

import torch
from torch import Tensor

from titan_fp8.kernels import float8, moe, producers
from titan_fp8.kernels.grouped import reference

__all__ = [
    "ALIGNMENT",
    "cast_both",
    "cast_columns",
    "columns_of_experts",
    "gather",
    "mm_columns",
    "mm_rows",
    "multiplies",
    "swiglu_backward",
    "swiglu_rows",
]

_HOPPER = 9
"""Compute capability of the GPUs whose tensor cores the products are for."""
ALIGNMENT = 16
"""Rows that a group is a multiple of: 16 bytes of codes, where rows are the dimension that is summed over."""


def cast_columns(x: Tensor, ends: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cast x `[M, K]` with a power-of-two scale for each column of each group, transposed: `(codes_t [K, M], scale_t
    [E, K])`. Codes behind the last group are zero."""
    _check(x, ends, dtype)
    if not float8.uses_kernel(x):
        return reference.cast_columns(x, ends, dtype)
    codes_t, scale_t = _kernel().cast(_dense(x), ends, dtype, rows=False)
    return codes_t, scale_t


def cast_both(x: Tensor, ends: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`float8.cast_rows` and `cast_columns` of one tensor: `(codes [M, K], scale [M, 1], codes_t, scale_t)`. Codes by
    rows behind the last group may be anything."""
    _check(x, ends, dtype)
    if float8.uses_kernel(x):
        return _kernel().cast(_dense(x), ends, dtype, rows=True)
    return *float8.cast_rows(x, dtype), *reference.cast_columns(x, ends, dtype)


def gather(
    x: Tensor, source: Tensor, scores: Tensor | None, top_k: int, ends: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`cast_both` of rows that are tokens of x.

    Args:
        x: `[T, K]`.
        source, scores, top_k: as for `titan_fp8.kernels.moe.permute`, which makes the rows `[M, K]`.
        ends: int32 `[E]`.
        dtype: of the codes.

    Returns:
        `cast_both(permute(x, source, scores, top_k), ends, dtype)`.
    """
    _check_format(x, dtype)
    if not float8.uses_kernel(x) or not source.numel():
        return cast_both(moe.permute(x, source, scores, top_k), ends, dtype)
    factors = None if scores is None else scores.contiguous()
    return _gather_kernel().gather(_dense(x), source, factors, top_k, ends, dtype)


def swiglu_rows(gate: Tensor, up: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """`silu(gate) * up` of gate and up `[M, K]`, rounded to their dtype, by rows: `(codes [M, K], scale [M, 1])`."""
    made = producers.swiglu(gate, up, producers.Cast(producers.ROW, dtype))
    assert made.codes is not None
    assert made.scale is not None
    return made.codes, made.scale


def swiglu_backward(
    grad: Tensor, gate: Tensor, up: Tensor, ends: Tensor, dtype: torch.dtype
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...], tuple[Tensor, Tensor]]:
    """For the gradient `[M, K]` of `silu(gate) * up`: the gradients of gate and up as `cast_both` gives them, and
    `silu(gate) * up` as `cast_columns` does."""
    _check(grad, ends, dtype)
    if float8.uses_kernel(grad):
        return _swiglu_kernel().swiglu_backward(_dense(grad), _dense(gate), _dense(up), ends, dtype)
    return reference.swiglu_backward(grad, gate, up, ends, dtype)


def columns_of_experts(codes: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Column codes of each expert's weight from its row codes `[E, N, K]` and their power-of-two scale `[E, N]`:
    `(codes_t [E, K, N], scale_t [E, K])`; exact but for subnormals. N and K are multiples of 16."""
    if codes.dim() != 3 or scale.shape != codes.shape[:2] or any(size % ALIGNMENT for size in codes.shape[1:]):
        raise ValueError(
            f"expected codes [E, N, K], N and K multiples of {ALIGNMENT}, and scale [E, N], got {list(codes.shape)}, "
            f"{list(scale.shape)}"
        )
    if codes.dtype != float8.E4M3:
        raise ValueError(f"codes of groups are in {float8.E4M3}, not in {codes.dtype}")
    if not float8.uses_kernel(codes):
        return reference.columns_of_experts(codes, scale)
    return _experts_kernel().columns_of_experts(codes.contiguous(), scale)


def multiplies(x: Tensor) -> bool:
    """Whether the products here are for the device of x: a GPU of compute capability 9."""
    return float8.uses_kernel(x) and torch.version.hip is None and _capability(x.device)[0] == _HOPPER


def mm_rows(
    a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, ends: Tensor, out_dtype: torch.dtype, fast_accum: bool
) -> Tensor:
    """Codes a `[M, K]`, scale_a `[M, 1]`, b `[E, N, K]`, scale_b `[E, N]` -> the product of each group's rows with its
    b, `[M, N]` in `out_dtype`; rows behind the last group may be anything. Without `fast_accum` summed in fp32."""
    return _gemm_kernel().grouped_mm_rows(a, b, scale_a, scale_b, ends, out_dtype, fast_accum)


def mm_columns(a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, ends: Tensor, out_dtype: torch.dtype) -> Tensor:
    """Codes a `[N, M]`, scale_a `[E, N]`, b `[K, M]`, scale_b `[E, K]` -> the product over each group's rows,
    `[E, N, K]` in `out_dtype`, summed in fp32; zero of a group without rows."""
    return _gemm_kernel().grouped_mm_columns(a, b, scale_a, scale_b, ends, out_dtype)


def _dense(x: Tensor) -> Tensor:
    return x if x.stride(1) == 1 else x.contiguous()


@functools.cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


@functools.cache
def _kernel() -> ModuleType:
    return importlib.import_module("titan_fp8.kernels.grouped.kernel")


@functools.cache
def _gemm_kernel() -> ModuleType:
    return importlib.import_module("titan_fp8.kernels.grouped.gemm_kernel")


@functools.cache
def _experts_kernel() -> ModuleType:
    return importlib.import_module("titan_fp8.kernels.grouped.experts_kernel")


@functools.cache
def _gather_kernel() -> ModuleType:
    return importlib.import_module("titan_fp8.kernels.grouped.gather_kernel")


@functools.cache
def _swiglu_kernel() -> ModuleType:
    return importlib.import_module("titan_fp8.kernels.grouped.swiglu_kernel")


def _check_format(x: Tensor, dtype: torch.dtype) -> None:
    float8.check_input(x, dtype)
    if dtype != float8.E4M3:
        raise ValueError(f"codes of groups are in {float8.E4M3}, not in {dtype}")


def _check(x: Tensor, ends: Tensor, dtype: torch.dtype) -> None:
    _check_format(x, dtype)
    if x.shape[0] % ALIGNMENT or ends.dim() != 1 or ends.dtype != torch.int32 or not len(ends):
        raise ValueError(
            f"expected rows in a multiple of {ALIGNMENT} and the int32 ends of their groups, got {list(x.shape)} and "
            f"{ends.dtype} {list(ends.shape)}"
        )
    # On a GPU the answer would have to be waited for.
    if ends.device.type == "cpu" and bool((ends % ALIGNMENT).any()):
        raise ValueError(f"expected groups of multiples of {ALIGNMENT} rows, and they end at {ends.tolist()}")
