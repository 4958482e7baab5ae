"""Where our casts and torchao's must agree: the same codes and the same scales, bit for bit."""

import pytest
import torch
from torch import Tensor

from tests.peer.side_by_side import peer_codes
from titan_fp8.kernels import float8
from titan_fp8.kernels.float8 import E4M3, E5M2
from titan_fp8.kernels.float8.reference import AMAX_FLOOR, scales

pytestmark = pytest.mark.peer


def wide_values(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """Both signs, exponents over 2^-20 ... 2^12, some zeros, and a row and a column of zeros."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(rows, columns, generator=generator)
    x *= torch.exp2(torch.randint(-20, 13, (rows, columns), generator=generator).float())
    x[torch.rand(rows, columns, generator=generator) < 0.05] = 0.0
    x[rows // 2] = 0.0
    x[:, columns // 3] = 0.0
    return x.to(dtype)


def assert_same_bits(ours: Tensor, theirs: Tensor) -> None:
    assert ours.dtype == theirs.dtype
    assert ours.shape == theirs.shape
    assert torch.equal(ours.flatten().view(torch.uint8), theirs.flatten().view(torch.uint8))


@pytest.mark.parametrize("code_dtype", [E4M3, E5M2], ids=["e4m3", "e5m2"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_one_scale_for_the_tensor_gives_the_same_codes_and_scale(dtype, code_dtype):
    x = wide_values(63, 100, dtype)
    codes, codes_t, scale = float8.cast_tensor(x, float8.amax(x), code_dtype, rows=True, columns=True)
    peer, peer_scale = peer_codes(x, code_dtype)
    assert_same_bits(codes, peer)
    assert_same_bits(codes_t[:, :63], peer.t())
    assert_same_bits(scale, peer_scale.reciprocal())


@pytest.mark.parametrize("code_dtype", [E4M3, E5M2], ids=["e4m3", "e5m2"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_power_of_two_scales_by_row_and_by_column_give_the_same_codes_and_scales(dtype, code_dtype):
    x = wide_values(63, 100, dtype)
    for (codes, scale), dim in ((float8.cast_rows(x, code_dtype), -1), (float8.cast_columns(x, code_dtype), 0)):
        peer, peer_scale = peer_codes(x, code_dtype, dim=dim)
        assert_same_bits(codes if dim else codes[:, :63], peer if dim else peer.t())
        assert_same_bits(scale.flatten(), peer_scale.reciprocal().flatten())


def test_a_tensor_of_zeros_gives_the_same_codes_and_scale():
    x = torch.zeros(16, 32, dtype=torch.bfloat16)
    codes, _, scale = float8.cast_tensor(x, float8.amax(x), E4M3, rows=True, columns=False)
    peer, peer_scale = peer_codes(x, E4M3)
    assert_same_bits(codes, peer)
    assert_same_bits(scale, peer_scale.reciprocal())


@pytest.mark.parametrize("code_dtype", [E4M3, E5M2], ids=["e4m3", "e5m2"])
def test_every_finite_amax_gives_the_same_scale(code_dtype):
    """Theirs is an fp64 quotient rounded to fp32, ours the correctly rounded fp32 one; the second rounding never
    shows."""
    from torchao.float8.float8_utils import amax_to_scale

    generator = torch.Generator().manual_seed(4)
    bits = torch.randint(0, 0x7F800000, (500_000,), dtype=torch.int32, generator=generator)
    floor = torch.tensor(AMAX_FLOOR).view(torch.int32)
    bits = torch.cat([bits, floor + torch.arange(-9, 10, dtype=torch.int32)])
    inv_scale, _ = scales(bits, code_dtype, power_of_two=False)
    assert_same_bits(inv_scale, amax_to_scale(bits.view(torch.float32), code_dtype))
