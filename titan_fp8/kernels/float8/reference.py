"""The float8 casts in plain PyTorch: the specification that the Triton kernels equal bit for bit.

A float8 code holds 4 exponent and 3 mantissa bits (e4m3, largest value 448) or 5 and 2 (e5m2, 57344). That is far too
little range for a tensor as it is, so values are multiplied by a factor that brings the largest one to the format's
largest, and the factor's reciprocal, the *scale*, is kept in fp32 beside the codes:

    amax      = max |t|
    inv_scale = max_of_format / max(amax, 1e-12)    # correctly rounded; for a power of two its mantissa is cleared
    scale     = 1 / inv_scale
    codes     = saturate(t * inv_scale)             # to nearest, ties to even
    t        ~= codes * scale

The values that share a scale are a *group*: a whole tensor, a row, or a column. A column cast is always written
transposed, because its only use is as the operand of a product that sums over T, and Hopper's tensor cores want both
operands with the summed dimension contiguous. T is padded there to a multiple of 16 with zero codes.

NaN and Inf stay visible. `amax` is an integer: the largest bit pattern of |t| in fp32, which orders exactly like the
numbers do, with Inf above every number and NaN above Inf, and which no MAX in a kernel or a collective drops. A group
whose amax is not finite has scale NaN and every code NaN (0x7F in both formats).

T tokens (rows), K features (columns). Sources: OCP 8-bit floating point specification (OFP8) for the formats.
"""

from typing import cast

import torch
from torch import Tensor

E4M3 = torch.float8_e4m3fn
E5M2 = torch.float8_e5m2
FP8_MAX = {E4M3: 448.0, E5M2: 57344.0}
AMAX_FLOOR = 1e-12
"""Smallest amax a scale is computed from, so that an all-zero group has a finite one."""
T_MULTIPLE = 16
"""Tensor cores want the summed dimension in multiples of 16."""
NAN_CODE = 0x7F
_ABS_MASK = 0x7FFFFFFF
_EXPONENT_MASK = 0x7F800000
_NAN_BITS = 0x7FC00000


def padded(tokens: int) -> int:
    """`tokens` rounded up to a multiple of 16. Works on symbolic sizes."""
    return (tokens + T_MULTIPLE - 1) // T_MULTIPLE * T_MULTIPLE


def amax_bits(x: Tensor, dim: int | None = None) -> Tensor:
    """Largest |x| as the bit pattern of an fp32 number, int32: of the whole tensor (shape []), or along `dim`.

    `result.view(torch.float32)` is the number. An empty tensor has amax 0. A NaN is 0x7FC00000, whatever its bits were:
    conversions between formats keep them on one device and not on another.
    """
    if x.dtype == torch.bfloat16:  # bf16 is the upper half of fp32
        bits, shift = x.view(torch.int16) & 0x7FFF, 16
    else:
        bits, shift = x.float().view(torch.int32) & _ABS_MASK, 0
    if dim is None:
        largest = bits.max() if bits.numel() else torch.zeros((), dtype=torch.int32, device=x.device)
    elif bits.shape[dim] == 0:
        largest = torch.zeros(bits.shape[1 - dim], dtype=torch.int32, device=x.device)
    else:
        largest = bits.amax(dim)
    largest = largest.to(torch.int32) << shift
    return with_one_nan(largest)


def with_one_nan(largest: Tensor) -> Tensor:
    """Bits of magnitudes, int32, in which every NaN is the same one."""
    return torch.where(largest > _EXPONENT_MASK, _NAN_BITS, largest)


def scales(amax: Tensor, dtype: torch.dtype, power_of_two: bool) -> tuple[Tensor, Tensor]:
    """`(inv_scale, scale)` in fp32 for amax given as bits; NaN where amax is not finite."""
    value = amax.view(torch.float32)
    clamped = torch.where(value < AMAX_FLOOR, AMAX_FLOOR, value)
    # Tensor by tensor: torch turns `448.0 / tensor` into a product with an inexact reciprocal.
    inv_scale = torch.full_like(clamped, FP8_MAX[dtype]) / clamped
    if power_of_two:
        inv_scale = (inv_scale.view(torch.int32) & _EXPONENT_MASK).view(torch.float32)
    inv_scale = torch.where(amax >= _EXPONENT_MASK, torch.nan, inv_scale)
    return inv_scale, torch.ones_like(inv_scale) / inv_scale


def to_codes(x: Tensor, inv_scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Codes of x `[T, K]` times `inv_scale` (broadcast against x): saturated, nearest even, 0x7F for NaN."""
    limit = FP8_MAX[dtype]
    scaled = x.float().contiguous() * inv_scale
    codes = scaled.clamp(-limit, limit).to(dtype).view(torch.uint8)
    # The sign of a NaN differs between devices; here it has none.
    return torch.where(scaled.isnan(), NAN_CODE, codes).view(dtype)


def to_float(codes: Tensor) -> Tensor:
    """The exact fp32 values of float8 codes."""
    if codes.device.type != "cpu":
        return codes.float()
    # The CPU converts float8 one value at a time; looking the 256 values up is five times as fast.
    table = torch.arange(256, dtype=torch.uint8).view(codes.dtype).float()
    return table.index_select(0, codes.reshape(-1).view(torch.uint8).int()).view(codes.shape)


def transposed(codes: Tensor) -> Tensor:
    """Codes `[T, K]` as contiguous `[K, padded(T)]`, the padding zero."""
    tokens, features = codes.shape
    result = torch.zeros(features, padded(tokens), dtype=torch.uint8, device=codes.device)
    result[:, :tokens] = codes.view(torch.uint8).t()
    return result.view(codes.dtype)


def cast_tensor(
    x: Tensor, amax: Tensor, dtype: torch.dtype, *, rows: bool, columns: bool
) -> tuple[Tensor | None, Tensor | None, Tensor]:
    """Cast x `[T, K]` with one scale: `(codes [T, K], codes_t [K, padded(T)], scale [])`; None for a layout not
    asked."""
    inv_scale, scale = scales(amax, dtype, power_of_two=False)
    codes = to_codes(x, inv_scale, dtype)
    return codes if rows else None, transposed(codes) if columns else None, scale


def cast_rows(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cast x `[T, K]` with a power-of-two scale a row: `(codes [T, K], scale [T, 1])`."""
    inv_scale, scale = scales(amax_bits(x, dim=1).unsqueeze(1), dtype, power_of_two=True)
    return to_codes(x, inv_scale, dtype), scale


def cast_columns(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cast x `[T, K]` with a power-of-two scale a column, transposed: `(codes_t [K, padded(T)], scale_t [K, 1])`."""
    inv_scale, scale = scales(amax_bits(x, dim=0).unsqueeze(0), dtype, power_of_two=True)
    return transposed(to_codes(x, inv_scale, dtype)), scale.view(-1, 1)


def columns_from_rows(codes: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Column codes of a tensor that exists as row codes `[T, K]` with power-of-two `scale [T, 1]`.

    Both scales are powers of two, so this is a transpose and a shift of exponents: a code changes its value only where
    the shift takes it into the subnormals. A weight's two layouts are made this way on every path, so that
    one that gathered codes and one that holds the weight itself compute the same.

    Returns:
        `(codes_t [K, padded(T)], scale_t [K, 1])`.
    """
    return cast_columns(to_float(codes) * scale, cast(torch.dtype, codes.dtype))


def transpose_codes(codes: Tensor) -> Tensor:
    """Codes `[N, K]` as contiguous `[K, N]`, the same bytes."""
    result = torch.empty(codes.shape[1], codes.shape[0], dtype=torch.uint8, device=codes.device)
    return result.copy_(codes.view(torch.uint8).t()).view(codes.dtype)


def tensor_columns_from_rows(codes: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Column codes with one scale, of a tensor that exists as row codes `[N, K]` with power-of-two `scale [N, 1]`.

    The one scale is the largest of the rows', so, as in `columns_from_rows`, this is a transpose and a shift of
    exponents, and no code can overflow. One row whose scale is NaN makes everything NaN.

    Returns:
        `(codes_t [K, N], scale [])`.
    """
    largest = amax_bits(scale).view(torch.float32)
    shift = scale * (torch.ones_like(largest) / largest)
    return transpose_codes(to_codes(to_float(codes), shift, cast(torch.dtype, codes.dtype))), largest
