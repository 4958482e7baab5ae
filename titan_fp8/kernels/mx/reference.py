"""MXFP8 in plain PyTorch: the specification that the kernels equal bit for bit.

32 values that follow each other along the dimension that a product sums over are a *block*. A block is 32 codes in
e4m3 (largest value 448 = 1.75 * 2^8) and one scale in e8m0, a byte that stands for the power of two 2^(byte - 127):

    amax  = max |t|
    scale = 2^exponent                       # the byte is exponent + 127, from 0 to 254
    codes = saturate(t * 2^-exponent)        # to nearest, ties to even
    t    ~= codes * scale

The exponent follows from amax in one of four ways (`MODES`). With amax = m * 2^a, 1 <= m < 2:

    floor   a - 8                            what the specification suggests; values above 448 * 2^(a - 8) saturate
    ceil    a - 8, or a - 7 if m > 1
    even    as floor, after m is rounded to the 3 bits of an e4m3 mantissa, half up
    rceil   that of the smallest power of two not below amax / 448: a - 8, or a - 7 if m > 1.75

Each is computed with integers: add a number to the bits of amax that carries into the exponent exactly where the mode
rounds up (`CARRY`), and read the exponent. A logarithm is wrong just below a power of two, and a quotient in fp32 is
inexact below 2^-126. Otherwise `rceil` is the quotient in fp32, rounded up to e8m0, which is how hardware computes it.

The exponent is at least -127 (byte 0), which blocks of zeros and of subnormals have, and at most 120, as amax is below
2^128. NaN or Inf in a block make its scale NaN (byte 255) and each of its codes NaN (0x7F).

2^-exponent is a normal number in fp32, so scaling is exact but for results below 2^-126, whose code is zero. Back,
`codes * scale` is exact in fp32 but for products of 2^128 and more, which are Inf: a mode that rounds up gives the
largest fp32 numbers the code 256 and the exponent 120.

Source: OCP Microscaling Formats (MX) Specification v1.0, sections 5.2 (MXFP8), 5.4.1 (E8M0), 6.3 (conversion).

T tokens (rows), K features (columns), E experts or groups, N rows of an expert's weight.
"""

import torch
from torch import Tensor

from titan_fp8.kernels.float8 import reference as float8

BLOCK = 32
"""Values that share a scale."""
E8M0 = torch.float8_e8m0fnu
CARRY = {"floor": 0, "ceil": 0x7FFFFF, "even": 0x080000, "rceil": 0x1FFFFF}
"""What a mode adds to the bits of amax. It carries into the exponent never, if the mantissa is above 1, if 3 bits round
it up to 2, and if it is above 1.75."""
MODES = tuple(CARRY)
EMAX = 8
"""Exponent of the largest e4m3 value, 1.75 * 2^8."""
NAN_BYTE = 255
_BIAS = 127
_MANTISSA_BITS = 23
_INF_BITS = 0x7F800000


def padded(tokens: int) -> int:
    """`tokens` rounded up to a multiple of 32. Works on symbolic sizes."""
    return (tokens + BLOCK - 1) // BLOCK * BLOCK


def scale_of(amax: Tensor, mode: str) -> Tensor:
    """Scales in e8m0 of blocks whose amax is given as the bits of an fp32 number, int32."""
    byte = ((amax + CARRY[mode]) >> _MANTISSA_BITS) - EMAX
    return torch.where(amax >= _INF_BITS, NAN_BYTE, byte.clamp(min=0)).to(torch.uint8).view(E8M0)


def scale_values(scale: Tensor) -> Tensor:
    """The fp32 numbers that scales in e8m0 stand for."""
    byte = scale.view(torch.uint8).int()
    bits = torch.where(byte == 0, 1 << (_MANTISSA_BITS - 1), byte << _MANTISSA_BITS)  # 2^-127 is subnormal
    return torch.where(byte == NAN_BYTE, torch.nan, bits.view(torch.float32))


def inverse_values(scale: Tensor) -> Tensor:
    """The fp32 reciprocals of scales in e8m0."""
    byte = scale.view(torch.uint8).int()
    bits = (2 * _BIAS - byte) << _MANTISSA_BITS
    return torch.where(byte == NAN_BYTE, torch.nan, bits.view(torch.float32))


def cast_last(x: Tensor, mode: str) -> tuple[Tensor, Tensor]:
    """Cast x `[..., K]` by blocks along its last dimension: `(codes [..., K], scale [..., K/32])`, contiguous."""
    split = x.unflatten(-1, (x.shape[-1] // BLOCK, BLOCK))
    scale = scale_of(float8.amax_bits(split, dim=split.dim() - 1), mode)
    codes = float8.to_codes(split, inverse_values(scale).unsqueeze(-1), float8.E4M3)
    return codes.view(x.shape), scale


def values_last(codes: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The numbers that codes `[..., K]` and scale `[..., K/32]` stand for: exact products, rounded once to `dtype`."""
    exact = float8.to_float(codes).view(*scale.shape, BLOCK) * scale_values(scale).unsqueeze(-1)
    # One NaN: what a conversion makes of it differs between devices.
    return torch.where(exact.isnan(), torch.nan, exact.to(dtype)).view(codes.shape)


def cast_rows(x: Tensor, mode: str) -> tuple[Tensor, Tensor]:
    """Cast x `[T, K]` by 1x32 blocks along K: `(codes [T, K], scale [T, K/32])`."""
    return cast_last(x, mode)


def cast_columns(x: Tensor, mode: str) -> tuple[Tensor, Tensor]:
    """Cast x `[T, K]` by 32x1 blocks along T, transposed: `(codes_t [K, padded(T)], scale_t [K, padded(T)/32])`. The
    codes of padding are zero, and it takes no part in any amax. scale_t lies as x does, K contiguous."""
    tokens = x.shape[0]
    whole = torch.nn.functional.pad(x, (0, 0, 0, padded(tokens) - tokens))
    codes_t, scale_t = cast_last(whole.t(), mode)
    codes_t.view(torch.uint8)[:, tokens:] = 0  # even where the scale is NaN
    return codes_t, _lying_as_x(scale_t)


def quantize_dequantize(x: Tensor, mode: str) -> tuple[Tensor, Tensor]:
    """What the codes of `cast_rows` and of `cast_columns` stand for, in bf16 and as x lies: two `[T, K]`."""
    by_rows = values_last(*cast_rows(x, mode), torch.bfloat16)
    by_columns = values_last(*cast_columns(x, mode), torch.bfloat16)
    return by_rows, by_columns[:, : x.shape[0]].t().contiguous()


def cast_experts(weight: Tensor, mode: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Both casts of each `weight[e]` of `[E, N, K]`: `(codes [E, N, K], scale [E, N, K/32], codes_t [E, K, N], scale_t
    [E, K, N/32])`, scale_t with K contiguous."""
    codes_t, scale_t = cast_last(weight.transpose(1, 2), mode)
    return *cast_last(weight, mode), codes_t, _lying_as_x(scale_t)


def _lying_as_x(scale_t: Tensor) -> Tensor:
    """The same scales `[..., K, blocks]` with K contiguous."""
    scale = scale_t.view(torch.uint8).transpose(-2, -1).clone(memory_format=torch.contiguous_format)
    return scale.view(E8M0).transpose(-2, -1)


def without_tail(x: Tensor, ends: Tensor) -> Tensor:
    """x `[M, K]` with zeros in the rows behind the last group, whatever was there."""
    in_a_group = torch.arange(x.shape[0], device=x.device) < ends[-1]
    return torch.where(in_a_group.unsqueeze(1), x, 0)
