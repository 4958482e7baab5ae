"""bf16 is rounded to e4m3 without codes: the arithmetic of `_dequantized_pairs`, which the interpreter does not run,
step by step in PyTorch for every bf16 number and every scale."""

import pytest
import torch
from torch import Tensor

from titan_fp8.kernels.mx import reference

pytestmark = pytest.mark.filterwarnings("ignore")
NUMBERS = torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.bfloat16)
SIGN = torch.tensor(-(2**15), dtype=torch.int16)


def to_bfloat16(exact: Tensor) -> Tensor:
    """fp64 rounded to bf16 once: through fp32 with the last bit set where that is inexact."""
    near = exact.float()
    is_inexact = (near.double() != exact) & near.isfinite()
    bits = near.view(torch.int32) - (is_inexact & (near.double().abs() > exact.abs())).int()
    return torch.where(is_inexact, bits | 1, bits).view(torch.float32).to(torch.bfloat16)


def of_bits(bits: int) -> Tensor:
    return torch.tensor(bits, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).double()


def rounded(x: Tensor, byte: int, saturates: bool) -> Tensor:
    """The bits of what x is with a scale, as the instructions find them; each rounds once."""
    inverse = of_bits(0x7FFF if byte == reference.NAN_BYTE else (254 - byte) << 7)
    s = to_bfloat16(x.double() * inverse)
    if saturates:
        s = torch.where(s.isnan(), s, torch.copysign(s.abs().clamp(max=448), s))
    magnitude = torch.where(s.isnan(), 0, s).abs().clamp(min=2.0**-6)
    power = (magnitude.view(torch.int16) & 0x7F80).view(torch.bfloat16).double()
    total = to_bfloat16(18 * power + s.double())
    result = to_bfloat16(to_bfloat16(total.double() - 18 * power).double() * of_bits(max(byte << 7, 0x40)))
    bits = torch.where(result.isnan(), 0x7FFF, result.view(torch.int16)).to(torch.int16)
    sign = torch.where(s.isnan(), 0, s.view(torch.int16) & SIGN).to(torch.int16)
    return (bits & (0x7FC0 if byte == reference.NAN_BYTE else 0x7FFF)) | sign


@pytest.mark.parametrize("saturates", [False, True])
def test_two_sums_round_every_bfloat16_number_to_e4m3(saturates: bool) -> None:
    for byte in range(256):
        scale = torch.tensor([byte], dtype=torch.uint8).view(reference.E8M0)
        inverse = reference.inverse_values(scale)
        is_ordinary = NUMBERS.isfinite() | (byte == reference.NAN_BYTE)  # others have the scale NaN
        if not saturates and byte != reference.NAN_BYTE:
            is_ordinary &= (NUMBERS.double() * inverse.double()).abs() <= 448
        x = NUMBERS[is_ordinary]
        codes = reference.float8.to_codes(x.float(), inverse, reference.float8.E4M3)
        exact = reference.float8.to_float(codes) * reference.scale_values(scale)
        expected = torch.where(exact.isnan(), torch.nan, exact.to(torch.bfloat16)).view(torch.int16)
        assert torch.equal(rounded(x, byte, saturates), expected), byte
