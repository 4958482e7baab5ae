"""Grouped products of float8 codes with a scale a row: on tensor cores, or emulated with the same codes and scales.

    by rows      result[rows of e] = (a[rows of e] codes @ b[e] codes .T) * scale_a * scale_b[e]        [M, N]
    by columns   result[e] = (a[:, rows of e] codes @ b[:, rows of e] codes .T) * scale_a[e] * scale_b[e]   [E, N, K]

Both operands have the summed dimension contiguous. Hopper has kernels of our own, other devices PyTorch's. Emulated,
the codes are multiplied as exact fp32 numbers; that reads the groups' ends, so it waits for the device.

M rows, K in features, N out features, E experts. `ends` int32 [E]: the row behind each expert's rows.
"""

from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor

from titan_fp8.kernels import grouped
from titan_fp8.kernels.float8 import reference
from titan_fp8.quantization.gemm import apply_scales, exact_fp32

_scaled_grouped_mm = torch._scaled_grouped_mm  # pyright: ignore[reportPrivateImportUsage]


def grouped_mm_rows(
    a: Tensor,
    b: Tensor,
    scale_a: Tensor,
    scale_b: Tensor,
    ends: Tensor,
    out_dtype: torch.dtype,
    fast_accum: bool,
    emulate: bool,
) -> Tensor:
    """a `[M, K]`, scale_a `[M, 1]`, b `[E, N, K]`, scale_b `[E, N]` -> `[M, N]` in `out_dtype`; rows behind the last
    group may be anything."""
    _check_device(a, emulate)
    if not emulate and a.numel():
        if grouped.multiplies(a):
            return grouped.mm_rows(a, b, scale_a, scale_b, ends, out_dtype, fast_accum)
        scales = scale_a.view(-1), scale_b
        result = _scaled_grouped_mm(
            a, b.transpose(-2, -1), *scales, offs=ends, out_dtype=torch.bfloat16, use_fast_accum=fast_accum
        )
        return result.to(out_dtype)
    result = torch.zeros(a.shape[0], b.shape[1], dtype=out_dtype, device=a.device)
    with exact_fp32(a.device.type):
        for expert, rows in _groups(ends):
            product = reference.to_float(a[rows]) @ reference.to_float(b[expert]).t()
            result[rows] = apply_scales(product, scale_a[rows], scale_b[expert]).to(out_dtype)
    return result


def grouped_mm_columns(
    a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, ends: Tensor, out_dtype: torch.dtype, emulate: bool
) -> Tensor:
    """a `[N, M]`, scale_a `[E, N]`, b `[K, M]`, scale_b `[E, K]` -> `[E, N, K]` in `out_dtype`; zero of an expert
    without rows."""
    _check_device(a, emulate)
    if not emulate and a.numel():
        if grouped.multiplies(a):
            return grouped.mm_columns(a, b, scale_a, scale_b, ends, out_dtype)
        scales = scale_a.flatten(), scale_b.flatten()
        result = _scaled_grouped_mm(a, b.t(), *scales, offs=ends, out_dtype=torch.bfloat16, use_fast_accum=False)
        return result.to(out_dtype)
    result = torch.zeros(ends.shape[0], a.shape[0], b.shape[0], dtype=out_dtype, device=a.device)
    with exact_fp32(a.device.type):
        for expert, rows in _groups(ends):
            product = reference.to_float(a[:, rows]) @ reference.to_float(b[:, rows]).t()
            result[expert] = apply_scales(product, scale_a[expert].unsqueeze(1), scale_b[expert]).to(out_dtype)
    return result


def _groups(ends: Tensor) -> Iterator[tuple[int, slice]]:
    """(expert, its rows) of each expert that has any."""
    for expert, (begin, end) in enumerate(pairwise([0, *ends.tolist()])):
        if begin < end:
            yield expert, slice(begin, end)


def _check_device(a: Tensor, emulate: bool) -> None:
    if not emulate and not a.is_cuda:
        raise RuntimeError(
            f"experts converted to float8 with emulate=False got tensors on {a.device.type}, which has no FP8 tensor "
            'cores; move the model to a GPU that has, or convert with emulate=True or emulate="auto"'
        )
