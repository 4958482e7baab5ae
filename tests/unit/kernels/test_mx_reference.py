"""The MXFP8 format: bytes worked out from the OCP specification with integers and fractions, and its properties."""

from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import titan_fp8
from titan_fp8.kernels import mx
from titan_fp8.kernels.float8 import E4M3
from titan_fp8.kernels.mx import reference

BLOCK = 32
NAN_CODE = 0x7F
ALL_MODES = pytest.mark.parametrize("mode", mx.MODES)
DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])

# OFP8, table 1: e4m3 has bias 7; exponent field 0 is subnormal, the code 0x7F is NaN.
E4M3_VALUES = [Fraction(code % 8, 8) * Fraction(1, 64) for code in range(8)]
E4M3_VALUES += [(1 + Fraction(code % 8, 8)) * Fraction(2) ** (code // 8 - 7) for code in range(8, 0x7F)]


def bytes_of(t: Tensor) -> list[int]:
    return t.contiguous().view(torch.uint8).flatten().tolist()


def block_with(amax: float, dtype: torch.dtype = torch.float32) -> Tensor:
    """A block whose largest magnitude is this, of a negative number."""
    block = torch.zeros(1, BLOCK, dtype=dtype)
    block[0, 7] = -amax
    return block


def exact_code(value: Fraction) -> int:
    """The e4m3 code of a number: nearest, ties to even codes, saturated."""
    magnitude = min(abs(value), E4M3_VALUES[-1])
    nearest = min(range(len(E4M3_VALUES)), key=lambda code: (abs(E4M3_VALUES[code] - magnitude), code % 2))
    return nearest | (0x80 if value < 0 else 0)


def floor_log2(value: Fraction) -> int:
    """The exponent e of 2^e <= value < 2^(e + 1)."""
    exponent = value.numerator.bit_length() - value.denominator.bit_length()
    return exponent if value >= Fraction(2) ** exponent else exponent - 1


def exact_exponent(amax: Fraction, mode: str) -> int:
    """A block's exponent as the modes are defined, in exact numbers."""
    if amax == 0:
        return -127
    exponent = floor_log2(amax)
    mantissa = amax / Fraction(2) ** exponent
    if mode == "ceil":
        exponent += mantissa != 1
    if mode == "even":
        exponent += int(mantissa * 8 + Fraction(1, 2)) == 16
    exponent -= 8
    if mode == "rceil":
        exponent = floor_log2(amax / 448)
        exponent += Fraction(2) ** exponent < amax / 448
    return max(-127, min(127, exponent))


# (largest magnitude, bytes of the scale in the order floor, ceil, even, rceil); 127 is 2^0.
SCALES = {
    "zero": (0.0, (0, 0, 0, 0)),
    "one": (1.0, (119, 119, 119, 119)),
    "just above one": (1 + 2.0**-23, (119, 120, 119, 119)),
    "1.5": (1.5, (119, 120, 119, 119)),
    "1.75": (1.75, (119, 120, 119, 119)),
    "just above 1.75": (1.75 + 2.0**-23, (119, 120, 119, 120)),
    "just below the middle of 1.875 and 2": (1.9375 - 2.0**-23, (119, 120, 119, 120)),
    "the middle of 1.875 and 2": (1.9375, (119, 120, 120, 120)),
    "just below 2": (2 - 2.0**-23, (119, 120, 120, 120)),
    "448": (448.0, (127, 128, 127, 127)),
    "just above 448": (448 + 2.0**-15, (127, 128, 127, 128)),
    "480": (480.0, (127, 128, 127, 128)),
    "496": (496.0, (127, 128, 128, 128)),
    "512": (512.0, (128, 128, 128, 128)),
    "2^-118": (2.0**-118, (1, 1, 1, 1)),
    "just below 2^-118": (2.0**-118 * (1 - 2.0**-24), (0, 1, 1, 1)),
    "2^-119": (2.0**-119, (0, 0, 0, 0)),
    "just above 2^-119": (2.0**-119 * (1 + 2.0**-23), (0, 1, 0, 0)),
    "just above 1.75 * 2^-119": (2.0**-119 * (1.75 + 2.0**-23), (0, 1, 0, 1)),
    "2^-126": (2.0**-126, (0, 0, 0, 0)),
    "largest subnormal": (2.0**-126 - 2.0**-149, (0, 0, 0, 0)),
    "smallest subnormal": (2.0**-149, (0, 0, 0, 0)),
    "1.75 * 2^127": (1.75 * 2.0**127, (246, 247, 246, 246)),
    "largest": (2.0**128 - 2.0**104, (246, 247, 247, 247)),
    "inf": (float("inf"), (255, 255, 255, 255)),
    "nan": (float("nan"), (255, 255, 255, 255)),
}


@pytest.mark.parametrize("name", SCALES)
def test_scale_bytes_of_largest_magnitudes(name: str) -> None:
    amax, expected = SCALES[name]
    found = tuple(bytes_of(mx.to_mx(block_with(amax), scaling_mode=mode)[0])[0] for mode in mx.MODES)
    assert mx.MODES == ("floor", "ceil", "even", "rceil")
    assert found == expected


# (values, scale byte, codes) by mode.
CODES = {
    "floor": ([448.0, 1.0, -2.0, 3.0, 0.3, -0.0, 2.0**-9], 127, [0x7E, 0x38, 0xC0, 0x44, 0x2A, 0x80, 0x01]),
    "floor, saturated": ([500.0, -511.0, 1.0], 127, [0x7E, 0xFE, 0x38]),
    "ceil": ([500.0, -511.0, 1.0], 128, [0x78, 0xF8, 0x30]),
    "even": ([500.0, -464.0, 1.0], 128, [0x78, 0xF6, 0x30]),
    "even, saturated": ([480.0, -449.0, 1.0], 127, [0x7E, 0xFE, 0x38]),
    "rceil": ([449.0, 448.0, 1.0], 128, [0x76, 0x76, 0x30]),
    "rceil, as it is": ([-448.0, 432.0, 1.0], 127, [0xFE, 0x7E, 0x38]),
    "rceil, small": ([2.0**-140, -(2.0**-149), 2.0**-133], 0, [0x00, 0x80, 0x08]),
    "rceil, halves of the smallest code": ([256.0, 2.0**-10, 3 * 2.0**-10, 1.5 * 2.0**-9], 127, [0x78, 0, 2, 2]),
    "floor, nan": ([1.0, float("-nan"), 0.0], 255, [NAN_CODE] * 32),
    "rceil, inf": ([1.0, float("-inf"), 0.0], 255, [NAN_CODE] * 32),
}


@pytest.mark.parametrize("name", CODES)
def test_codes_of_a_block(name: str) -> None:
    values, byte, codes = CODES[name]
    block = torch.zeros(BLOCK)
    block[: len(values)] = torch.tensor(values)
    scale, data = titan_fp8.to_mx(block, scaling_mode=name.split(",")[0])
    assert (scale.dtype, data.dtype) == (torch.float8_e8m0fnu, torch.float8_e4m3fn)
    assert (scale.shape, data.shape) == ((1,), (32,))
    assert bytes_of(scale) == [byte]
    assert bytes_of(data) == codes + [0] * (BLOCK - len(codes))


FINITE = st.one_of(
    st.floats(width=32, allow_nan=False, allow_infinity=False),
    st.floats(-1000, 1000, width=32),
    # On both sides of where the modes round up.
    st.builds(
        lambda mantissa, steps, exponent: (mantissa + steps * 2.0**-23) * 2.0**exponent,
        st.sampled_from([1.0, 1.75, 1.875, 1.9375]),
        st.integers(-1, 1),
        st.integers(-130, 126),
    ).map(lambda value: torch.tensor(value, dtype=torch.float32).item()),
)


@ALL_MODES
@settings(max_examples=60)
@given(values=st.lists(FINITE, min_size=1, max_size=8))
def test_a_block_is_what_exact_arithmetic_gives(mode: str, values: list[float]) -> None:
    block = torch.zeros(BLOCK)
    block[: len(values)] = torch.tensor(values)
    scale, data = mx.to_mx(block, scaling_mode=mode)
    exact = [Fraction(value) for value in block[: len(values)].tolist()]
    exponent = exact_exponent(max(map(abs, exact)), mode)
    assert bytes_of(scale) == [exponent + 127]
    expected = [exact_code(value / Fraction(2) ** exponent) for value in exact]
    signs = [0x80 if torch.signbit(value) else 0 for value in block[: len(values)]]  # a fraction has no -0.0
    assert [code & 0x7F for code in bytes_of(data)[: len(values)]] == [code & 0x7F for code in expected]
    assert [code & 0x80 for code in bytes_of(data)[: len(values)]] == signs


def test_rceil_is_the_fp32_quotient_rounded_up_for_every_mantissa() -> None:
    amax = torch.arange(1 << 23, dtype=torch.int32) + (130 << 23)
    quotient = (amax.view(torch.float32) / torch.full((1,), 448.0)).view(torch.int32)
    rounded_up = (quotient >> 23) + ((quotient & 0x7FFFFF) != 0).int()
    assert torch.equal(reference.scale_of(amax, "rceil").view(torch.uint8).int(), rounded_up)


def numbers(seed: int, shape: tuple[int, ...], spread: float = 2.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator) * (torch.randn(shape, generator=generator) * spread).exp()


def values(*shape: int, seed: int = 0) -> Tensor:
    """Of another magnitude in every row and column, with a column of zeros and values where the modes step."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator) * torch.randn(*shape[:-1], 1, generator=generator).mul(3).exp()
    x[..., 1] = 0.0
    x[..., ::3, 4] = torch.tensor([1.75, 1.7578125, 1.9375, 1.0])[torch.arange(x[..., ::3, 4].shape[-1]) % 4] * 64
    return x


SEEDS = st.integers(0, 2**31)


@ALL_MODES
@DTYPES
@settings(max_examples=20)
@given(seed=SEEDS)
def test_the_round_trip_is_within_half_a_step_or_saturates(mode: str, dtype: torch.dtype, seed: int) -> None:
    t = numbers(seed, (4, 96)).to(dtype)
    scale, data = mx.to_mx(t, scaling_mode=mode)
    result = mx.from_mx(scale, data, torch.float32)
    step = reference.scale_values(scale).repeat_interleave(BLOCK, 1)
    exact = t.float()
    within = (result - exact).abs() <= torch.maximum(exact.abs() * 2.0**-4, step * 2.0**-10)
    saturated = result.abs() == 448 * step
    assert (within | saturated).all()
    if mode in ("ceil", "rceil"):
        assert within.all(), "modes that round up lose nothing at the top"


@ALL_MODES
@settings(max_examples=30)
@given(seed=SEEDS)
def test_what_is_cast_is_cast_to_itself(mode: str, seed: int) -> None:
    t = numbers(seed, (2, 64), spread=8.0)
    once = mx.from_mx(*mx.to_mx(t, scaling_mode=mode), torch.float32)
    assert torch.equal(mx.from_mx(*mx.to_mx(once, scaling_mode=mode), torch.float32), once)


@ALL_MODES
@settings(max_examples=30)
@given(seed=SEEDS, shift=st.integers(-60, 60))
def test_a_power_of_two_moves_the_exponent_and_no_code(mode: str, seed: int, shift: int) -> None:
    t = numbers(seed, (2, 64))
    scale, data = mx.to_mx(t, scaling_mode=mode)
    moved, same = mx.to_mx(t * 2.0**shift, scaling_mode=mode)
    assert bytes_of(same) == bytes_of(data)
    assert bytes_of(moved) == [byte + shift for byte in bytes_of(scale)]


@ALL_MODES
@settings(max_examples=20)
@given(seed=SEEDS, bad=st.sampled_from([torch.nan, torch.inf, -torch.inf]), place=st.integers(0, 127))
def test_a_bad_value_makes_its_own_block_nan_and_no_other(mode: str, seed: int, bad: float, place: int) -> None:
    t = numbers(seed, (1, 128))
    scale, data = mx.to_mx(t, scaling_mode=mode)
    t[0, place] = bad
    spoiled, codes = mx.to_mx(t, scaling_mode=mode)
    own = torch.arange(4) == place // BLOCK
    assert bytes_of(spoiled) == torch.where(own, 255, scale.view(torch.uint8)[0]).tolist()
    assert bytes_of(codes) == torch.where(own.repeat_interleave(BLOCK), NAN_CODE, data.view(torch.uint8)[0]).tolist()
    assert torch.equal(mx.from_mx(spoiled, codes, torch.bfloat16).isnan()[0], own.repeat_interleave(BLOCK))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_subnormal_numbers_are_not_flushed(dtype: torch.dtype) -> None:
    smallest = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    block = torch.zeros(BLOCK, dtype=dtype)
    block[:3] = torch.tensor([2.0**-126, 2.0**-130, smallest])
    scale, data = mx.to_mx(block)
    assert bytes_of(scale) == [0]
    assert bytes_of(data)[:2] == [exact_code(Fraction(2)), exact_code(Fraction(1, 8))]
    assert mx.from_mx(scale, data, torch.float32)[:2].tolist() == [2.0**-126, 2.0**-130]


@DTYPES
@ALL_MODES
def test_a_dtype_is_cast_as_the_numbers_it_holds(dtype: torch.dtype, mode: str) -> None:
    t = numbers(0, (3, 64)).to(dtype)
    results, expected = mx.to_mx(t, scaling_mode=mode), mx.to_mx(t.float(), scaling_mode=mode)
    assert [bytes_of(r) for r in results] == [bytes_of(e) for e in expected]


@pytest.mark.parametrize(
    ("shape", "dim"),
    [((64, 96), 0), ((64, 96), -2), ((3, 64, 40), 1), ((3, 64, 40), -2), ((96, 2, 5), 0), ((2, 3, 64), 2)],
)
def test_blocks_lie_along_any_dimension(shape: tuple[int, ...], dim: int) -> None:
    t = numbers(1, shape)
    scale, data = mx.to_mx(t, dim=dim)
    expected_scale, expected = mx.to_mx(t.movedim(dim, -1).contiguous())
    assert data.shape == shape
    assert data.movedim(dim, -1).is_contiguous()
    assert bytes_of(data.movedim(dim, -1)) == bytes_of(expected)
    assert bytes_of(scale.movedim(dim, -1)) == bytes_of(expected_scale)
    result = mx.from_mx(scale, data, torch.float32)
    assert torch.equal(result.movedim(dim, -1), mx.from_mx(expected_scale, expected, torch.float32))


@pytest.mark.parametrize("shape", [(0, 64), (4, 0), (0,), (2, 0, 32)])
def test_nothing_is_cast_to_nothing(shape: tuple[int, ...]) -> None:
    scale, data = mx.to_mx(torch.empty(shape))
    assert data.shape == shape
    assert scale.shape == (*shape[:-1], shape[-1] // BLOCK)
    assert mx.from_mx(scale, data, torch.bfloat16).shape == shape


def test_dequantizing_rounds_the_exact_product_once() -> None:
    scale = torch.tensor([0, 127, 250, 255], dtype=torch.uint8).view(mx.E8M0)
    codes = torch.tensor([0x01, 0x38, 0x7E, 0x00] * 32, dtype=torch.uint8).view(4, 32).t().flatten()
    data = codes.sort().values.view(E4M3)  # blocks of 0x00, 0x01, 0x38 and 0x7E
    values = mx.from_mx(scale, data, torch.float32).view(4, 32)[:, 0]
    assert values[:3].tolist() == [0.0, 2.0**-9, 2.0**123]
    assert values[3].isnan()
    tiny = mx.from_mx(scale[:1], data[32:64], torch.float32)[0].item()
    assert tiny == 2.0**-136
    assert mx.from_mx(scale[:1], data[32:64], torch.bfloat16)[0] == 0  # below half of bf16's smallest, 2^-133
    assert mx.from_mx(scale[2:3], data[96:], torch.float32)[0] == torch.inf
    assert mx.from_mx(scale[2:3], data[64:96], torch.float16)[0] == torch.inf


@ALL_MODES
def test_a_column_cast_is_the_row_cast_of_the_padded_transpose(mode: str) -> None:
    x = numbers(2, (77, 64))
    x[70, 3] = torch.nan
    codes_t, scale_t = mx.cast_columns(x, mode)
    whole = torch.zeros(96, 64)
    whole[:77] = x
    expected, expected_scale = mx.cast_rows(whole.t().contiguous(), mode)
    expected.view(torch.uint8)[3, 77:] = 0  # of padding, also beside a NaN
    assert (bytes_of(codes_t), bytes_of(scale_t)) == (bytes_of(expected), bytes_of(expected_scale))
    assert scale_t[3, 2].isnan()


def test_each_expert_is_cast_by_itself() -> None:
    weight = numbers(3, (3, 64, 96))
    codes, scale, codes_t, scale_t = mx.cast_experts(weight, "rceil")
    for swizzled in (False, True):
        both = mx.cast_experts(weight, "rceil", swizzled=swizzled)
        apart = (
            *mx.cast_expert_rows(weight, "rceil", swizzled=swizzled),
            *mx.cast_expert_columns(weight, "rceil", swizzled=swizzled),
        )
        assert all(
            torch.equal(one.view(torch.uint8), other.view(torch.uint8)) for one, other in zip(both, apart, strict=True)
        )
    for e in range(3):
        alone = mx.cast_both(weight[e], "rceil")
        assert [bytes_of(r[e]) for r in (codes, scale, codes_t, scale_t)] == [bytes_of(a) for a in alone]


def test_each_group_is_cast_by_itself_and_what_is_behind_the_last_is_zero() -> None:
    x, ends = numbers(4, (256, 64)), torch.tensor([64, 64, 160, 192], dtype=torch.int32)
    x[192:] = torch.nan
    codes, scale, codes_t, scale_t = mx.cast_group_both(x, ends, "rceil")
    for begin, end in ((0, 64), (64, 160), (160, 192)):
        alone = mx.cast_both(x[begin:end], "rceil")
        blocks = slice(begin // BLOCK, end // BLOCK)
        parts = codes[begin:end], scale[begin:end], codes_t[:, begin:end], scale_t[:, blocks]
        assert [bytes_of(part) for part in parts] == [bytes_of(a) for a in alone]
    for behind in (codes[192:], scale[192:], codes_t[:, 192:], scale_t[:, 6:]):
        assert not any(bytes_of(behind))


@ALL_MODES
def test_quantize_dequantize_is_the_cast_and_back(mode: str) -> None:
    x, ends = numbers(5, (64, 96)).bfloat16(), torch.tensor([32, 32], dtype=torch.int32)
    by_rows, by_columns = mx.quantize_dequantize(x[:50], mode)
    expected = mx.from_mx(*mx.to_mx(x[:50], scaling_mode=mode), torch.bfloat16)
    padded = torch.cat([x[:50], torch.zeros(14, 96)]).bfloat16()
    assert torch.equal(by_rows, expected)
    scale, data = mx.to_mx(padded, scaling_mode=mode, dim=0)
    assert torch.equal(by_columns, mx.from_mx(scale, data, torch.bfloat16)[:50])
    assert by_columns.is_contiguous()
    of_groups = mx.quantize_dequantize_groups(x, ends, mode)
    for result, alone in zip(of_groups, mx.quantize_dequantize(x[:32], mode), strict=True):
        assert torch.equal(result[:32], alone)
        assert not result[32:].any()
    assert mx.quantize_dequantize(x, mode, rows=False)[0] is None
    assert mx.quantize_dequantize(x, mode, columns=False)[1] is None


X = torch.ones(64, 64)
ENDS = torch.tensor([32, 64], dtype=torch.int32)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: mx.to_mx(torch.ones(2, 40)), r"size along dim -1 of 40 is not a multiple of 32.*\[2, 40\].*pad"),
        (lambda: mx.to_mx(torch.ones(40, 32), dim=0), r"size along dim 0 of 40 is not a multiple of 32"),
        (lambda: mx.to_mx(X, 16), "block_size=16: blocks of MXFP8 hold 32.*leave it at 32"),
        (lambda: mx.to_mx(X, scaling_mode="up"), "scaling mode 'up' is not one of 'floor', 'ceil', 'even', 'rceil'"),
        (lambda: mx.to_mx(X.double()), "float64"),
        (lambda: mx.to_mx(X, dim=2), "dim=2 is not one of the 2 dimensions"),
        (lambda: mx.to_mx(torch.tensor(1.0)), "dim=-1 is not one of the 0 dimensions"),
        (lambda: mx.cast_rows(torch.ones(4, 48), "floor"), "features of 48 is not a multiple of 32"),
        (lambda: mx.cast_columns(torch.ones(2, 4, 32), "floor"), r"2-D tensor \[T, K\].*flatten"),
        (lambda: mx.cast_both(X, "nearest"), "'nearest'"),
        (lambda: mx.cast_columns(X, "floor", kernel="c++"), "kernel='c\\+\\+' is not one of 'triton', 'cuda', 'torch'"),
        (lambda: mx.cast_experts(torch.ones(2, 48, 32), "floor"), r"N and K multiples of 32, got shape \[2, 48, 32\]"),
        (lambda: mx.cast_group_both(torch.ones(40, 32), ENDS, "floor"), r"rows in a multiple of 32.*\[40, 32\].*pad"),
        (lambda: mx.cast_group_rows(X, ENDS.long(), "floor"), "int32 ends of their groups, got .*int64"),
        (lambda: mx.cast_group_columns(X, ENDS[:0], "floor"), r"int32 \[0\]"),
        (lambda: mx.from_mx(X, X.to(E4M3), torch.float32), "expected scale in torch.float8_e8m0fnu.*got torch.float32"),
        (lambda: mx.from_mx(*mx.to_mx(X), torch.float64), "float64"),
        (lambda: mx.from_mx(mx.to_mx(X)[0][:32], mx.to_mx(X)[1], torch.float32), r"scale \[32, 2\].*data \[64, 64\]"),
        (lambda: mx.from_mx(mx.swizzle(mx.to_mx(X)[0]), mx.to_mx(X)[1], torch.float32), "unswizzle"),
    ],
)  # fmt: skip
def test_wrong_arguments_are_refused(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_the_public_names_are_these_functions() -> None:
    assert (titan_fp8.to_mx, titan_fp8.from_mx) == (mx.to_mx, mx.from_mx)
