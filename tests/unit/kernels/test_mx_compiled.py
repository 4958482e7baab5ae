"""MXFP8 in compiled code: `to_mx` and `from_mx` give the bits, and the places in memory, of eager mode."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

import titan_fp8
from titan_fp8.kernels import mx

CASTS = [("floor", torch.bfloat16), ("ceil", torch.float16), ("even", torch.float32), ("rceil", torch.bfloat16)]


def values(*shape: int) -> Tensor:
    """Numbers of very different magnitudes, NaN and Inf among them."""
    generator = torch.Generator().manual_seed(len(shape))
    t = torch.randn(shape, generator=generator) * torch.randn(shape, generator=generator).mul(20).exp2()
    t.view(-1)[[0, 40, 90]] = torch.tensor([torch.nan, torch.inf, 0.0])
    return t


def what_lies_where(results: tuple[Tensor, ...]) -> list[Any]:
    return [(r.dtype, r.shape, r.stride(), r.contiguous().view(torch.uint8).tolist()) for r in results]


@pytest.mark.parametrize(("mode", "dtype"), CASTS)
@pytest.mark.parametrize(("shape", "dim"), [((96,), 0), ((3, 64), -1), ((64, 3), 0), ((2, 32, 5), 1), ((2, 3, 64), 2)])
def test_compiled_casts_equal_eager_ones_bit_for_bit(
    shape: tuple[int, ...], dim: int, mode: str, dtype: torch.dtype
) -> None:
    def cast(t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        scale, data = titan_fp8.to_mx(t, scaling_mode=mode, dim=dim)
        return scale, data, titan_fp8.from_mx(scale, data, dtype)

    torch._dynamo.reset()
    t = values(*shape).to(dtype)
    assert what_lies_where(torch.compile(cast, fullgraph=True)(t)) == what_lies_where(cast(t))


def test_a_size_that_varies_compiles_twice_at_most() -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("inductor")
    compiled = torch.compile(titan_fp8.to_mx, backend=counter, fullgraph=True)
    for tokens in (3, 5, 8, 9):
        t = values(tokens, 64)
        assert what_lies_where(compiled(t)) == what_lies_where(titan_fp8.to_mx(t))
    assert counter.frame_count <= 2


def test_a_compiled_cast_has_no_derivative_as_an_eager_one_has_none() -> None:
    torch._dynamo.reset()
    t = values(4, 64).requires_grad_()
    compiled = torch.compile(lambda t: (*titan_fp8.to_mx(t), t * 2), fullgraph=True)
    *found, double = compiled(t)
    assert what_lies_where(tuple(found)) == what_lies_where(titan_fp8.to_mx(t.detach()))
    assert [r.requires_grad for r in (*found, double)] == [False, False, True]


def test_wrong_arguments_are_refused_in_compiled_code_too() -> None:
    torch._dynamo.reset()
    with pytest.raises(Exception, match=r"size along dim -1 of 40 is not a multiple of 32"):
        torch.compile(titan_fp8.to_mx)(torch.ones(2, 40))


@pytest.mark.parametrize("dim", [0, 1])
def test_fake_implementation_and_schema_agree_with_the_operator(dim: int) -> None:
    utils = ("test_faketensor",)  # the schema check does arithmetic on results, which float8 tensors do not have
    t = values(32, 64)
    torch.library.opcheck(mx.to_mx_op, (t, "rceil", dim), test_utils=utils)
    torch.library.opcheck(mx.from_mx_op, (*mx.to_mx(t, dim=dim), torch.bfloat16, dim), test_utils=utils)
