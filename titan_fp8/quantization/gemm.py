"""The scaled matrix product of float8 codes: on tensor cores, or emulated with the same codes and scales.

    result [M, N] = (a [M, K] codes @ b [N, K] codes .T) * scale_a * scale_b + bias [N]

Both operands have the summed dimension K contiguous, which is what Hopper's tensor cores take, so that every caller
passes ordinary row-major tensors. A scale has shape [] (one for the tensor), or [M, 1] and [N, 1] (one a row); the two
need not be of one kind.

With one scale a block of 128 summed values, each block's part of the sum has factors of its own:

    result [M, N] = sum over blocks j of (a[:, j] codes @ b[:, j] codes .T) * scale_a[:, j] * scale_b[:, j] + bias

Emulated, the codes are multiplied as exact fp32 numbers with fp32 accumulation and the scales applied after, in an
order in which a product overflows, or the part of a block, only if that is beyond fp32 with its scales. TF32 and the
reduced-precision modes of CPUs are off in it, whatever the process has set: they would round the sums.
"""

import contextlib
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import ScalingType, pad

from titan_fp8.kernels.blockwise import BLOCK
from titan_fp8.kernels.float8 import reference

SCALE_MULTIPLE = 4
"""cuBLAS reads fp32 scales 16 bytes at a time: the contiguous size of a scale comes in multiples of so many."""
_scaled_mm = torch._scaled_mm  # pyright: ignore[reportPrivateImportUsage]
"""`_scaled_mm(a, b_t, scale_a, scale_b, bias, scale_result, out_dtype, fast_accum)`"""
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
    out: Tensor | None = None,
) -> Tensor:
    """Product of a `[M, K]` and b `[N, K]`, both float8 and contiguous: `[M, N]` in `out_dtype`.

    Args:
        a: float8 codes `[M, K]`, K a multiple of 16.
        b: float8 codes `[N, K]`, N a multiple of 16; a and b are not both e5m2.
        scale_a: fp32, [] or `[M, 1]`.
        scale_b: fp32, [] or `[N, 1]`.
        bias: `[N]` of any float type, added in fp32 to the product in `out_dtype`, or None.
        out_dtype: type of the result.
        fast_accum: let the tensor cores accumulate in their fast, less exact mode.
        emulate: multiply in fp32 instead of on tensor cores.
        out: `[M, N]` in `out_dtype` and contiguous, to be written to and returned; None: a new tensor.

    Raises:
        RuntimeError: if `emulate` is false and the tensors are not on a CUDA device.
    """
    if a.numel() == 0:
        result = torch.zeros(a.shape[0], b.shape[0], dtype=out_dtype, device=a.device)
    elif emulate:
        result = _emulated(a, b, scale_a, scale_b, out_dtype)
    elif a.is_cuda:
        result = _native(a, b, scale_a, scale_b, out_dtype, fast_accum, out)
    else:
        raise RuntimeError(
            f"a float8 linear converted with emulate=False got tensors on {a.device.type}, which has no FP8 tensor "
            'cores; move the model to a GPU that has, or convert with emulate=True or emulate="auto"'
        )
    if bias is not None:
        # In fp32, though the product is rounded already: cuBLAS adds to the sums only a bias that is rounded itself.
        result.add_(bias)
    return result if out is None or result is out else out.copy_(result)


def scaled_mm_blockwise(
    a: Tensor,
    b: Tensor,
    scale_a: Tensor,
    scale_b: Tensor,
    bias: Tensor | None,
    out_dtype: torch.dtype,
    fast_accum: bool,
    emulate: bool,
) -> Tensor:
    """Product of block-scaled a `[M, K]` and b `[N, K]`, both e4m3 and contiguous: `[M, N]` in `out_dtype`.

    Args:
        a: codes `[M, K]`, K a multiple of 128.
        b: codes `[N, K]`, N a multiple of 128.
        scale_a: fp32 `[M, K/128]` with strides (1, M).
        scale_b: fp32, `[N/128, K/128]` (tiles of 128x128) or `[N, K/128]` with strides (1, N) (1x128).
        bias: `[N]` of any float type, added in fp32 to the product in `out_dtype`, or None.
        out_dtype: type of the result.
        fast_accum: without effect: cuBLAS has one kernel, which adds each block's sum in fp32.
        emulate: multiply in fp32 instead of on tensor cores.

    Raises:
        RuntimeError: if `emulate` is false and the device has no such product.
        ValueError: for sizes or scales of another shape.
    """
    tiles = _check_blocks(a, b, scale_a, scale_b)
    m, n = a.shape[0], b.shape[0]
    if m == 0 or n == 0 or a.shape[1] == 0:
        result = torch.zeros(m, n, dtype=out_dtype, device=a.device)
    elif emulate:
        result = _emulated_blockwise(a, b, scale_a, scale_b, tiles, out_dtype)
    elif blockwise_is_native(a.device):
        result = _native_blockwise(a, b, scale_a, scale_b, tiles, out_dtype)
    else:
        raise RuntimeError(
            f"a blockwise float8 linear converted with emulate=False got tensors on {_described(a.device)}; its "
            "products need a GPU of compute capability 9.0 and CUDA 12.9; convert with emulate=True or "
            'emulate="auto", or take another recipe'
        )
    if bias is not None:
        result.add_(bias)
    return result


def blockwise_is_native(device: torch.device) -> bool:
    """Whether `scaled_mm_blockwise` runs on this device's tensor cores: cuBLAS has it since CUDA 12.9, for SM90
    alone."""
    return device.type == "cuda" and _has_cublas_scales(device)


def _described(device: torch.device) -> str:
    if device.type != "cuda":
        return device.type
    major, minor = torch.cuda.get_device_capability(device)
    return f"a GPU of compute capability {major}.{minor} with CUDA {torch.version.cuda}"


def _check_blocks(a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor) -> bool:
    """Whether b is scaled by 128x128 tiles, not by 1x128."""
    (m, k), n = a.shape, b.shape[0]
    count = k // BLOCK
    tiles = scale_b.shape == (n // BLOCK, count)
    if k % BLOCK or n % BLOCK or scale_a.shape != (m, count) or not (tiles or scale_b.shape == (n, count)):
        raise ValueError(
            f"expected sizes K and N in multiples of {BLOCK} and scales [M, K/128] and [N/128, K/128] or [N, K/128]; "
            f"got codes {list(a.shape)} and {list(b.shape)}, scales {list(scale_a.shape)} and {list(scale_b.shape)}"
        )
    return tiles


def _emulated(a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, out_dtype: torch.dtype) -> Tensor:
    with exact_fp32(a.device.type):
        product = reference.to_float(a) @ reference.to_float(b).t()
    return apply_scales(product, scale_a, scale_b.t()).to(out_dtype)


def apply_scales(product: Tensor, scale_a: Tensor, scale_b: Tensor) -> Tensor:
    """`product * scale_a * scale_b` in place, Inf only where that is beyond fp32. Scales broadcast against it.

    What shrinks comes before what enlarges: a product of codes shrunk by a scale is far from the subnormals, and what
    two scales have enlarged is no larger before the second one. Where scale_a is 1 or more, scale_b comes first.
    """
    return product.mul_(scale_a.clamp(max=1)).mul_(scale_b).mul_(scale_a.clamp(min=1))


def _emulated_blockwise(
    a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, tiles: bool, out_dtype: torch.dtype
) -> Tensor:
    result = torch.zeros(a.shape[0], b.shape[0], dtype=torch.float32, device=a.device)
    of_columns = scale_b.repeat_interleave(BLOCK, 0) if tiles else scale_b
    with exact_fp32(a.device.type):
        for j in range(a.shape[1] // BLOCK):
            block = slice(j * BLOCK, (j + 1) * BLOCK)
            part = reference.to_float(a[:, block]) @ reference.to_float(b[:, block]).t()
            result.add_(apply_scales(part, scale_a[:, j, None], of_columns[:, j]))
    return result.to(out_dtype)


def _native(
    a: Tensor,
    b: Tensor,
    scale_a: Tensor,
    scale_b: Tensor,
    out_dtype: torch.dtype,
    fast_accum: bool,
    out: Tensor | None = None,
) -> Tensor:
    """The product, in `out` where the tensor cores' result is what is asked for."""
    written = {} if out is None else {"out": out}
    if scale_a.dim() == scale_b.dim() == 0:
        return _scaled_mm(a, b.t(), scale_a, scale_b, None, None, out_dtype, fast_accum, **written)
    if scale_a.dim() != scale_b.dim():
        # One for the tensor beside one a row is one a row that is the same for all.
        scale_a, scale_b = (
            scale.expand(codes.shape[0], 1).contiguous() for scale, codes in ((scale_a, a), (scale_b, b))
        )
    if _takes_row_scales(a, out_dtype):
        return _scaled_mm(a, b.t(), scale_a, scale_b.t(), None, None, out_dtype, fast_accum, **written)
    # Row scales are powers of two, so applying them to the fp32 sums changes no bit of the result.
    one = torch.ones((), dtype=torch.float32, device=a.device)
    product = _scaled_mm(a, b.t(), one, one, None, None, torch.float32, fast_accum)
    return apply_scales(product, scale_a, scale_b.t()).to(out_dtype)


def _takes_row_scales(a: Tensor, out_dtype: torch.dtype) -> bool:
    """Whether `torch._scaled_mm` takes a scale a row here: results other than bf16 need cuBLAS's kernel; and a scale of
    one element is read as one for the tensor, which a single row's is not."""
    if a.shape[0] == 1:
        return False
    return out_dtype == torch.bfloat16 or _has_cublas_scales(a.device)


@functools.cache
def _has_cublas_scales(device: torch.device) -> bool:
    """Whether cuBLAS takes a scale a row, or a block: since CUDA 12.9, for SM90 alone. Elsewhere PyTorch has a product
    of its own for rows, and none for blocks."""
    cuda = tuple(int(part) for part in (torch.version.cuda or "0").split("."))
    return cuda >= (12, 9) and torch.cuda.get_device_capability(device) == (9, 0)


def _native_blockwise(
    a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, tiles: bool, out_dtype: torch.dtype
) -> Tensor:
    m, count = scale_a.shape
    rows_after, blocks_after = -m % SCALE_MULTIPLE, -count % SCALE_MULTIPLE
    if rows_after:
        a = pad(a.view(torch.uint8), (0, 0, 0, rows_after)).view(a.dtype)
        scale_a = pad(scale_a.t(), (0, rows_after)).t()
    if tiles:
        scale_b = (pad(scale_b, (0, blocks_after)) if blocks_after else scale_b).t()
    # bf16 and fp32 are what the kernel is known to write.
    written = torch.float32 if out_dtype == torch.float16 else out_dtype
    block_1x128, block_128x128 = ScalingType.BlockWise1x128, ScalingType.BlockWise128x128
    result = torch.nn.functional.scaled_mm(
        a, b.t(), scale_a, block_1x128, scale_b, block_128x128 if tiles else block_1x128, output_dtype=written
    )
    return (result.narrow(0, 0, m) if rows_after else result).to(out_dtype)


@contextlib.contextmanager
def exact_fp32(device_type: str) -> Iterator[None]:
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
