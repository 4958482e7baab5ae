"""The scaled matrix product of float8 codes: on tensor cores, or emulated with the same codes and scales.

    result [M, N] = (a [M, K] codes @ b [N, K] codes .T) * scale_a * scale_b + bias [N]

Both operands have the summed dimension K contiguous, which is what Hopper's tensor cores take, so that every caller
passes ordinary row-major tensors. A scale has shape [] (one for the tensor), or [M, 1] and [N, 1] (one a row).

Emulated, the codes are multiplied as exact fp32 numbers with fp32 accumulation and the scales applied after. TF32 and
the reduced-precision modes of CPUs are off in it, whatever the process has set: they would round the sums.
"""

import contextlib
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from titan_fp8.kernels.float8 import reference

_MATMUL = "matmul"  # an attribute that torch sets on its module at run time, which type checkers do not see


def scaled_mm(
    a: Tensor,
    b: Tensor,
    scale_a: Tensor,
    scale_b: Tensor,
    bias: Tensor | None,
    out_dtype: torch.dtype,
    fast_accum: bool,
    emulate: bool,
) -> Tensor:
    """Product of a `[M, K]` and b `[N, K]`, both float8 and contiguous: `[M, N]` in `out_dtype`.

    Args:
        a: float8 codes `[M, K]`, K a multiple of 16.
        b: float8 codes `[N, K]`, N a multiple of 16; a and b are not both e5m2.
        scale_a: fp32, [] or `[M, 1]`.
        scale_b: fp32, [] or `[N, 1]`.
        bias: `[N]` of any float type, added in fp32, or None.
        out_dtype: type of the result.
        fast_accum: let the tensor cores accumulate in their fast, less exact mode.
        emulate: multiply in fp32 instead of on tensor cores.

    Raises:
        RuntimeError: if `emulate` is false and the tensors are not on a CUDA device.
    """
    m, n = a.shape[0], b.shape[0]
    if m == 0 or a.shape[1] == 0:
        result = torch.zeros(m, n, dtype=out_dtype, device=a.device)
    elif emulate:
        result = _emulated(a, b, scale_a, scale_b, out_dtype)
    elif a.is_cuda:
        result = _native(a, b, scale_a, scale_b, out_dtype, fast_accum)
    else:
        raise RuntimeError(
            f"a float8 linear converted with emulate=False got tensors on {a.device.type}, which has no FP8 tensor "
            'cores; move the model to a GPU that has, or convert with emulate=True or emulate="auto"'
        )
    if bias is not None:
        result.add_(bias)  # in fp32, rounded once
    return result


def _emulated(a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, out_dtype: torch.dtype) -> Tensor:
    with _exact_fp32(a.device.type):
        product = reference.to_float(a) @ reference.to_float(b).t()
    return product.mul_(scale_a).mul_(scale_b.t()).to(out_dtype)


def _native(a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, out_dtype: torch.dtype, fast_accum: bool) -> Tensor:
    scaled_mm = torch.ops.aten._scaled_mm.default  # (a, b, scale_a, scale_b, bias, scale_result, out_dtype, fast)
    if scale_a.dim() == 0 or _takes_row_scales(a, out_dtype):
        return scaled_mm(a, b.t(), scale_a, scale_b.t(), None, None, out_dtype, fast_accum)
    # Row scales are powers of two, so applying them to the fp32 sums changes no bit of the result.
    one = torch.ones((), dtype=torch.float32, device=a.device)
    product = scaled_mm(a, b.t(), one, one, None, None, torch.float32, fast_accum)
    return product.mul_(scale_a).mul_(scale_b.t()).to(out_dtype)


def _takes_row_scales(a: Tensor, out_dtype: torch.dtype) -> bool:
    """Whether `torch._scaled_mm` takes a scale a row here: results other than bf16 need cuBLAS's kernel; and a scale of
    one element is read as one for the tensor, which a single row's is not."""
    if a.shape[0] == 1:
        return False
    return out_dtype == torch.bfloat16 or _cublas_takes_row_scales(a.device)


@functools.cache
def _cublas_takes_row_scales(device: torch.device) -> bool:
    """cuBLAS has such a kernel since CUDA 12.9, for SM90 alone; elsewhere PyTorch's own one runs."""
    cuda = tuple(int(part) for part in (torch.version.cuda or "0").split("."))
    return cuda >= (12, 9) and torch.cuda.get_device_capability(device) == (9, 0)


@contextlib.contextmanager
def _exact_fp32(device_type: str) -> Iterator[None]:
    """fp32 products are exact fp32 inside: no autocast, no TF32, no bf16 passes."""
    backends: list[Any] = [torch.backends.cuda.matmul, getattr(torch.backends.mkldnn, _MATMUL)]
    saved = [backend.fp32_precision for backend in backends]
    inexact = any(precision not in ("ieee", "none") for precision in saved)
    try:
        if inexact:
            _set_precision(backends, ["ieee", "ieee"])
        with torch.autocast(device_type, enabled=False):
            yield
    finally:
        if inexact:
            _set_precision(backends, saved)


def _set_precision(backends: Sequence[Any], precisions: Sequence[str]) -> None:
    for backend, precision in zip(backends, precisions, strict=True):
        backend.fp32_precision = precision
