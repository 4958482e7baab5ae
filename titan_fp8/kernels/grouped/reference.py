"""Float8 casts of rows that are sorted into groups, in plain PyTorch.

By rows a group makes no difference. By columns each group is a tensor of its own: a column has one scale, a power of
two, in each group. Rows behind the last group have no scale, and codes of zero.

M rows, K columns, E groups (experts), N out features of an expert. `ends` int32 [E]: the row behind each group.
"""

import torch
from torch import Tensor

from titan_fp8.kernels.float8 import reference as float8
from titan_fp8.kernels.producers import reference as producers


def group_of_rows(ends: Tensor, rows: int) -> Tensor:
    """The group of each row, int64 `[M]`; E behind the last."""
    return torch.bucketize(torch.arange(rows, device=ends.device, dtype=torch.int32), ends, right=True)


def column_amax(x: Tensor, ends: Tensor) -> Tensor:
    """The bits of the largest |x| of each column in each group, int32 `[E, K]`; zero of a group without rows."""
    magnitudes = x.float().view(torch.int32) & 0x7FFFFFFF
    group = group_of_rows(ends, x.shape[0]).unsqueeze(1).expand_as(magnitudes)
    largest = magnitudes.new_zeros(ends.shape[0] + 1, x.shape[1]).scatter_reduce_(0, group, magnitudes, "amax")
    return float8.with_one_nan(largest)[:-1]


def cast_columns(x: Tensor, ends: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """See `titan_fp8.kernels.grouped.cast_columns`."""
    inv_scale, scale = float8.scales(column_amax(x, ends), dtype, power_of_two=True)
    group = group_of_rows(ends, x.shape[0])
    is_somewhere = (group < ends.shape[0]).unsqueeze(1)
    codes = float8.to_codes(x, inv_scale[group.clamp(max=ends.shape[0] - 1)], dtype).view(torch.uint8)
    return float8.transposed(torch.where(is_somewhere, codes, 0).view(dtype)), scale


def swiglu_backward(
    grad: Tensor, gate: Tensor, up: Tensor, ends: Tensor, dtype: torch.dtype
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...], tuple[Tensor, Tensor]]:
    """See `titan_fp8.kernels.grouped.swiglu_backward`."""
    of_gate, of_up = (
        (*float8.cast_rows(each, dtype), *cast_columns(each, ends, dtype))
        for each in producers.swiglu_gradients(grad, gate, up)
    )
    return of_gate, of_up, cast_columns(producers.swiglu_output(gate, up), ends, dtype)


def columns_of_experts(codes: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """See `titan_fp8.kernels.grouped.columns_of_experts`."""
    each = [float8.columns_from_rows(codes[e], scale[e].unsqueeze(1)) for e in range(codes.shape[0])]
    return torch.stack([c.view(torch.uint8) for c, _ in each]).view(codes.dtype), torch.cat([s.t() for _, s in each])
