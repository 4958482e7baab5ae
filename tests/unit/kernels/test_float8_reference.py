"""The float8 reference casts: rounding, scales, layouts, and what happens to NaN, Inf and nothing at all."""

import pytest
import torch
from torch import Tensor

from titan_fp8.kernels import float8
from titan_fp8.kernels.float8 import E4M3, E5M2, FP8_MAX, reference

FORMATS = pytest.mark.parametrize("dtype", [E4M3, E5M2], ids=["e4m3", "e5m2"])
DTYPES = pytest.mark.parametrize("input_dtype", [torch.float32, torch.bfloat16, torch.float16])
UNIT_AMAX = {dtype: torch.tensor(limit).view(torch.int32) for dtype, limit in FP8_MAX.items()}
"""The amax for which inv_scale is exactly one."""


def positive_values(dtype: torch.dtype) -> Tensor:
    """All finite values >= 0 of a format in fp64, in the order of their codes."""
    values = torch.arange(128, dtype=torch.uint8).view(dtype).double()
    return values[values.isfinite()]


def nearest_codes(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Codes of finite x by search: the nearest value of the format, the even code on a tie, the largest on overflow."""
    values = positive_values(dtype)
    distance = (x.double().abs().unsqueeze(-1) - values).abs()
    is_nearest = distance == distance.min(-1, keepdim=True).values
    codes = torch.arange(len(values))
    odd_last = codes + 1000 * (codes % 2)
    code = torch.where(is_nearest, odd_last, 10**6).min(-1).values % 1000
    return (code | (x.signbit().int() << 7)).to(torch.uint8)


def awkward_values(dtype: torch.dtype) -> Tensor:
    """Every value of the format, every midpoint, their fp32 neighbours, and values past the largest; both signs."""
    values = positive_values(dtype)
    points = torch.cat([values, (values[1:] + values[:-1]) / 2, values[-1] * torch.tensor([1.01, 1.07, 1.5, 100.0])])
    points = points.float()
    up, down = (torch.nextafter(points, torch.tensor(limit)) for limit in (torch.inf, -torch.inf))
    return torch.cat([points, up, down, -points, -up, -down]).unsqueeze(0)


@FORMATS
def test_codes_are_the_nearest_value_with_ties_to_even_and_saturation(dtype: torch.dtype) -> None:
    x = awkward_values(dtype)
    codes, _, scale = reference.cast_tensor(x, UNIT_AMAX[dtype], dtype, rows=True, columns=False)
    assert scale == 1
    assert torch.equal(codes.view(torch.uint8), nearest_codes(x, dtype))


@FORMATS
@DTYPES
def test_the_largest_value_gets_the_largest_code(dtype: torch.dtype, input_dtype: torch.dtype) -> None:
    x = (torch.randn(40, 32, generator=torch.Generator().manual_seed(0)) * 3).to(input_dtype)
    codes, codes_t, scale = reference.cast_tensor(x, reference.amax_bits(x), dtype, rows=True, columns=True)
    assert codes.float().abs().max() == FP8_MAX[dtype]
    torch.testing.assert_close(codes.float() * scale, x.float(), rtol=0.13, atol=1e-3)
    assert torch.equal(codes_t[:, :40].float(), codes.float().t())


def test_amax_is_the_bit_pattern_of_the_largest_magnitude() -> None:
    x = torch.tensor([[1.0, -3.5], [2.0, 0.0]])
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        amax = reference.amax_bits(x.to(dtype))
        assert amax.dtype == torch.int32
        assert amax.view(torch.float32) == 3.5
        assert reference.amax_bits(x.to(dtype), dim=0).view(torch.float32).tolist() == [2.0, 3.5]
        assert reference.amax_bits(x.to(dtype), dim=1).view(torch.float32).tolist() == [3.5, 2.0]


@pytest.mark.parametrize("bad", [torch.nan, -torch.nan, torch.inf, -torch.inf])
@DTYPES
def test_amax_sees_nan_and_inf(bad: float, input_dtype: torch.dtype) -> None:
    x = torch.ones(3, 16, dtype=input_dtype)
    x[1, 5] = bad
    assert not reference.amax_bits(x).view(torch.float32).isfinite()


def test_every_nan_has_the_same_amax() -> None:
    payloads = [torch.tensor([-1, 0x7F81, 0x7FFF], dtype=torch.int16).view(torch.bfloat16)]
    payloads.append(torch.tensor([-1, 0x7C01, 0x7FFF], dtype=torch.int16).view(torch.float16))
    payloads.append(torch.tensor([-1, 0x7F800001, 0x7FFFFFFF], dtype=torch.int32).view(torch.float32))
    for nans in payloads:
        assert nans.isnan().all()
        assert reference.amax_bits(nans.unsqueeze(1), dim=1).tolist() == [0x7FC00000] * 3
        assert reference.amax_bits(nans.unsqueeze(1)) == 0x7FC00000


@FORMATS
def test_inv_scale_is_the_correctly_rounded_quotient(dtype: torch.dtype) -> None:
    amax = torch.rand(5000, generator=torch.Generator().manual_seed(1)) * 100 + 1e-6
    inv_scale, scale = reference.scales(amax.view(torch.int32), dtype, power_of_two=False)
    # fp64 quotients of fp32 numbers, rounded once more to fp32, are correctly rounded.
    exact = (FP8_MAX[dtype] / amax.double()).float()
    assert torch.equal(inv_scale, exact)
    assert torch.equal(scale, (1 / exact.double()).float())


@FORMATS
def test_power_of_two_scales_round_the_factor_down_and_never_overflow(dtype: torch.dtype) -> None:
    just_below = torch.nextafter(torch.tensor([1.0, 2.0, 448.0, 7.0]), torch.tensor(torch.inf))
    amax = torch.cat([just_below, torch.tensor([1.0, 2.0, 448.0, 7.0, 1e-20, 3e38])])
    inv_scale, scale = reference.scales(amax.view(torch.int32), dtype, power_of_two=True)
    mantissa, _ = torch.frexp(inv_scale)
    assert (mantissa == 0.5).all()
    assert torch.equal(scale * inv_scale, torch.ones_like(scale))
    assert (amax * inv_scale <= FP8_MAX[dtype]).all()
    assert (amax[:-2] * inv_scale[:-2] > FP8_MAX[dtype] / 2).all()


@FORMATS
def test_a_group_with_nan_or_inf_is_nan_throughout_and_leaves_the_others_alone(dtype: torch.dtype) -> None:
    x = torch.ones(4, 16)
    x[1, 3], x[2, 4] = torch.inf, -torch.nan
    codes, scale = reference.cast_rows(x, dtype)
    assert scale.isnan().squeeze(1).tolist() == [False, True, True, False]
    assert (codes[1:3].view(torch.uint8) == reference.NAN_CODE).all()
    assert torch.equal(codes[0].float() * scale[0], x[0])
    codes_t, scale_t = reference.cast_columns(x, dtype)
    assert scale_t.isnan().squeeze(1).nonzero().squeeze(1).tolist() == [3, 4]
    assert (codes_t[3, :4].view(torch.uint8) == reference.NAN_CODE).all()
    whole, _, one = reference.cast_tensor(x, reference.amax_bits(x), dtype, rows=True, columns=False)
    assert one.isnan()
    assert (whole.view(torch.uint8) == reference.NAN_CODE).all()


@FORMATS
def test_a_cast_of_zeros_is_zero_with_a_finite_scale(dtype: torch.dtype) -> None:
    x = torch.zeros(5, 16)
    x[4] = 1.0
    codes, scale = reference.cast_rows(x, dtype)
    assert scale.isfinite().all()
    assert (codes[:4].float() == 0).all()
    codes, _, scale = reference.cast_tensor(x[:4], reference.amax_bits(x[:4]), dtype, rows=True, columns=False)
    assert scale.isfinite()
    assert (codes.float() == 0).all()


def test_each_row_and_column_has_the_scale_of_its_own_amax() -> None:
    x = torch.tensor([[1.0, 10.0], [100.0, 1000.0]])
    _, scale = reference.cast_rows(x, E4M3)
    assert scale.squeeze(1).tolist() == [2.0**-5, 4.0]  # 448/10 -> 32, 448/1000 -> 1/4
    _, scale_t = reference.cast_columns(x, E4M3)
    assert scale_t.squeeze(1).tolist() == [0.25, 4.0]


@pytest.mark.parametrize("tokens", [0, 1, 15, 16, 17])
def test_transposed_codes_are_padded_with_zeros_even_where_the_scale_is_nan(tokens: int) -> None:
    x = torch.ones(tokens, 32)
    x[:, 1] = torch.nan
    codes_t, scale_t = reference.cast_columns(x, E4M3)
    assert codes_t.shape == (32, (tokens + 15) // 16 * 16)
    assert codes_t.is_contiguous()
    assert scale_t.shape == (32, 1)
    assert (codes_t[:, tokens:].view(torch.uint8) == 0).all()


def test_column_codes_from_row_codes_equal_a_column_cast_of_what_the_row_codes_mean() -> None:
    w = torch.randn(48, 64, generator=torch.Generator().manual_seed(2)) * torch.logspace(-2, 2, 48).unsqueeze(1)
    codes, scale = reference.cast_rows(w, E4M3)
    meant = codes.double() * scale.double()
    codes_t, scale_t = reference.columns_from_rows(codes, scale)
    back = (codes_t.double() * scale_t.double()).t()
    normal = (meant / scale_t.double().t()).abs() >= 2.0**-6
    assert normal.any()
    assert not normal.all()
    assert torch.equal(back[normal], meant[normal])
    assert ((back - meant).abs() <= scale_t.double().t() * 2.0**-10)[~normal].all()


@FORMATS
def test_transposed_weight_codes_are_the_same_bytes(dtype: torch.dtype) -> None:
    codes = torch.arange(16 * 48).view(16, 48).to(torch.uint8).view(dtype)
    codes_t = float8.transpose_codes(codes)
    assert codes_t.is_contiguous()
    assert torch.equal(codes_t.view(torch.uint8), codes.view(torch.uint8).t())


def test_column_codes_with_one_scale_mean_what_the_row_codes_mean() -> None:
    w = torch.randn(48, 64, generator=torch.Generator().manual_seed(2)) * torch.logspace(-2, 2, 48).unsqueeze(1)
    codes, scale = float8.cast_rows(w, E4M3)
    codes_t, one = float8.tensor_columns_from_rows(codes, scale)
    assert codes_t.shape == (64, 48)
    assert one.shape == ()
    assert one == scale.max()
    meant, back = codes.double() * scale.double(), (codes_t.double() * one.double()).t()
    normal = (meant / one.double()).abs() >= 2.0**-6
    assert normal.any()
    assert not normal.all()
    assert torch.equal(back[normal], meant[normal])
    assert ((back - meant).abs() <= one.double() * 2.0**-10)[~normal].all()


def test_one_scale_over_rows_of_extreme_scales_loses_only_what_is_too_small() -> None:
    w = torch.ones(32, 16)
    w[3], w[5], w[6] = 3e38, -1e-30, 0.0
    codes_t, one = float8.tensor_columns_from_rows(*float8.cast_rows(w, E4M3))
    values = codes_t.float().t()
    assert one.isfinite()
    assert (values[3] >= 224).all()
    assert (values[[0, 5, 6]] == 0).all()


def test_a_row_with_nan_makes_all_columns_nan_that_share_its_scale() -> None:
    w = torch.ones(16, 32)
    w[3, 5] = -torch.inf
    codes_t, one = float8.tensor_columns_from_rows(*float8.cast_rows(w, E4M3))
    assert one.isnan()
    assert (codes_t.view(torch.uint8) == reference.NAN_CODE).all()


@DTYPES
def test_strides_do_not_matter(input_dtype: torch.dtype) -> None:
    base = torch.randn(32, 96, generator=torch.Generator().manual_seed(3)).to(input_dtype)
    for x in (base.t(), base[::2, ::3], base[:1].expand(32, 96)):
        copy = x.contiguous()
        results = zip(float8.cast_rows_and_columns(x, E4M3), float8.cast_rows_and_columns(copy, E4M3), strict=True)
        for result, expected in results:
            assert torch.equal(result.float(), expected.float())
            assert result.is_contiguous()
        assert float8.amax(x) == float8.amax(copy)


def test_decoding_is_exact_for_every_code() -> None:
    for dtype in (E4M3, E5M2):
        codes = torch.arange(256, dtype=torch.uint8).view(dtype).view(16, 16)
        assert torch.equal(reference.to_float(codes).nan_to_num(7e7), codes.float().nan_to_num(7e7))
        assert torch.equal(reference.to_float(codes.t()).nan_to_num(7e7), codes.t().float().nan_to_num(7e7))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: float8.amax(torch.ones(3)), "2-D"),
        (lambda: float8.cast_rows(torch.ones(3, 4, dtype=torch.float64), E4M3), "float64"),
        (lambda: float8.cast_rows(torch.ones(3, 4), torch.float16), "float8_e4m3fn"),
        (lambda: float8.columns_from_rows(torch.ones(3, 4).to(E4M3), torch.ones(3)), "scale"),
        (lambda: float8.tensor_columns_from_rows(torch.ones(16, 16).to(E4M3), torch.ones(16)), "scale"),
        (lambda: float8.tensor_columns_from_rows(torch.ones(8, 16).to(E4M3), torch.ones(8, 1)), "multiples of 16"),
        (lambda: float8.transpose_codes(torch.ones(16, 24).to(E4M3)), r"multiples of 16.*\[16, 24\]"),
        (lambda: float8.transpose_codes(torch.ones(16, 16)), "float8 codes"),
    ],
)
def test_wrong_arguments_are_refused_by_name(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
