"""MXFP8 beside torchao's `to_mx`: the same bytes but for four differences, each shown with what it does.

Of ours: NaN or Inf make a block's scale and all its codes NaN, scaling is by the reciprocal of the scale that is stored
(also for byte 0, 2^-127), and `rceil` rounds up the quotient amax / 448, not a product with an inexact 1 / 448.
"""

import pytest
import torch
from torch import Tensor

from titan_fp8.kernels import mx
from titan_fp8.kernels.float8 import E4M3

pytestmark = pytest.mark.peer
ALL_MODES = pytest.mark.parametrize("mode", mx.MODES)
BLOCK = 32


def peer(x: Tensor, mode: str) -> tuple[Tensor, Tensor]:
    """Bytes of torchao's scales `[blocks]` and codes `[blocks, 32]`."""
    from torchao.prototype.mx_formats.config import ScaleCalculationMode
    from torchao.prototype.mx_formats.mx_tensor import to_mx

    scale, data = to_mx(x, E4M3, BLOCK, ScaleCalculationMode(mode))
    return scale.view(torch.uint8).flatten(), data.view(torch.uint8).view(-1, BLOCK)


def ours(x: Tensor, mode: str) -> tuple[Tensor, Tensor]:
    scale, data = mx.to_mx(x, scaling_mode=mode)
    return scale.view(torch.uint8).flatten(), data.view(torch.uint8).view(-1, BLOCK)


@ALL_MODES
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_random_blocks_have_the_same_bytes(dtype: torch.dtype, mode: str) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, 256, generator=generator) * (torch.randn(64, 256, generator=generator) * 3).exp()
    x[3], x[4, :32], x[5, 7] = 0.0, -0.0, 0.0
    for result, expected in zip(ours(x.to(dtype), mode), peer(x.to(dtype), mode), strict=True):
        assert torch.equal(result, expected)


@ALL_MODES
def test_largest_magnitudes_at_every_step_have_the_same_scale_but_for_two_known_differences(mode: str) -> None:
    """Each exponent, with the mantissas at which one of the modes steps."""
    mantissas = torch.tensor([0, 1, 0x600000, 0x600001, 0x6FFFFF, 0x700000, 0x77FFFF, 0x780000, 0x7FFFFF])
    amax = ((torch.arange(1, 255).unsqueeze(1) << 23) + mantissas).int().flatten()
    x = amax.view(torch.float32).unsqueeze(1) * 2.0 ** -torch.arange(BLOCK)
    (scale, codes), (peer_scale, peer_codes) = ours(x, mode), peer(x, mode)

    # Just above 448 * 2^k their quotient may be 2^k, and ours is above it.
    is_just_above = (amax & 0x7FFFFF) == 0x600001
    steps = scale.int() - peer_scale.int()
    assert bool(steps.any()) == (mode == "rceil")
    assert not steps[~is_just_above].any()
    assert set(steps.tolist()) <= {0, 1}

    # A scale of byte 0 has other codes: theirs are scaled by less than 2^127.
    differs = (codes != peer_codes).any(1)
    assert not (differs & (scale > 0) & (steps == 0)).any()
    assert differs[scale == 0].any()
    assert (codes & 0x7F)[scale == 0].int().sum() > (peer_codes & 0x7F)[scale == 0].int().sum()


@ALL_MODES
@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan])
def test_a_bad_value_makes_our_whole_block_nan(bad: float, mode: str) -> None:
    x = torch.ones(1, BLOCK)
    x[0, 3] = bad
    scale, codes = ours(x, mode)
    assert scale.tolist() == [255]
    assert (codes == 0x7F).all()

    peer_scale, peer_codes = peer(x, mode)
    assert (peer_scale == 255).all() == (bad != bad), "an Inf has a finite scale there"
    assert (peer_codes != 0x7F).sum() >= BLOCK - 1
