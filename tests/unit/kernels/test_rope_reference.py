"""The rotary embedding as the reference computes it, and what is refused."""

import pytest
import torch
from torch import Tensor

from titan_fp8.kernels.rope import rotate


def inputs(
    *head_counts: int, width: int = 8, dtype: torch.dtype = torch.float32
) -> tuple[list[Tensor], Tensor, Tensor]:
    """One tensor `[2, 7, H, width]` for each count of heads; cosines and sines `[7, width / 2]`."""
    generator = torch.Generator().manual_seed(0)
    xs = [torch.randn(2, 7, heads, width, generator=generator).to(dtype) for heads in head_counts]
    angles = torch.rand(7, width // 2, generator=generator, dtype=torch.float64) * 20
    return xs, angles.cos().float(), angles.sin().float()


def exact(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """In float64: `[B, S, H, D]`."""
    turn = torch.complex(cos.double(), sin.double())[:, None, :]
    turned = torch.view_as_complex(x.double().unflatten(-1, (-1, 2)).contiguous()) * turn
    return torch.view_as_real(turned).flatten(-2)


# Half a unit in the last place; for fp32, the rounding of two products and their sum.
ROUNDING = {torch.bfloat16: 2**-8, torch.float16: 2**-11, torch.float32: 2**-22}


@pytest.mark.parametrize("width", [2, 6, 96, 128])
@pytest.mark.parametrize("dtype", ROUNDING)
def test_a_rotation_and_its_inverse_are_those_in_float64_rounded_once(dtype: torch.dtype, width: int) -> None:
    xs, cos, sin = inputs(3, 1, width=width, dtype=dtype)
    for inverse in (False, True):
        for x, y in zip(xs, rotate(xs, cos, sin, inverse=inverse), strict=True):
            assert y.dtype == dtype
            expected = exact(x, cos, -sin if inverse else sin)
            torch.testing.assert_close(y.double(), expected, rtol=ROUNDING[dtype], atol=1e-6)


def test_the_inverse_undoes_a_rotation_which_preserves_norms() -> None:
    (x,), cos, sin = inputs(5, width=16)
    (turned,) = rotate([x], cos, sin)
    pairs, turned_pairs = (t.unflatten(-1, (-1, 2)).norm(dim=-1) for t in (x, turned))
    torch.testing.assert_close(turned_pairs, pairs)
    torch.testing.assert_close(rotate([turned], cos, sin, inverse=True)[0], x)
    assert not torch.allclose(turned, x)


def test_results_are_contiguous_whatever_the_strides() -> None:
    (wide,), cos, sin = inputs(6)
    q, k = wide[:, :, :4], wide[:, :, 4:].transpose(0, 1).contiguous().transpose(0, 1)
    for x, y in zip((q, k), rotate([q, k], cos, sin), strict=True):
        assert not x.is_contiguous()
        assert y.is_contiguous()
        assert torch.equal(y, rotate([x.contiguous()], cos, sin)[0])


@pytest.mark.parametrize("shape", [(0, 7, 3, 8), (2, 0, 3, 8), (2, 7, 0, 8), (2, 7, 3, 0)])
def test_empty_tensors_stay_empty(shape: tuple[int, ...]) -> None:
    angles = torch.ones(shape[1], shape[3] // 2)
    assert [y.shape for y in rotate([torch.ones(shape)], angles, angles)] == [shape]


def test_what_does_not_fit_is_refused() -> None:
    (q, k), cos, sin = inputs(3, 1)
    wrong: list[tuple[list[Tensor], Tensor, Tensor]] = [
        ([q, k, k], cos, sin),
        ([q, k.half()], cos, sin),
        ([q, k[:1]], cos, sin),
        ([q, k[..., :4]], cos, sin),
        ([q[0], k[0]], cos, sin),
        ([q[..., :7]], cos[:, :3], sin[:, :3]),
        ([q.double()], cos, sin),
        ([q], cos.bfloat16(), sin),
        ([q], cos, sin[:5]),
    ]
    for xs, cosines, sines in wrong:
        with pytest.raises(ValueError, match="expected one or two tensors"):
            rotate(xs, cosines, sines)
