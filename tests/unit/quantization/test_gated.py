"""The gated half of a feed-forward in one function: its codes, and every gradient, are those of its parts."""

import pytest
import torch
from torch import Tensor

from tests.unit.quantization.test_linear import make
from titan_fp8.kernels.producers import reference
from titan_fp8.quantization.casts import cast_activation
from titan_fp8.quantization.gated import gated_hidden
from titan_fp8.quantization.linear import Float8Linear
from titan_fp8.quantization.recipes import RECIPES

FULLY_FLOAT8 = pytest.mark.parametrize("recipe", [name for name, r in RECIPES.items() if r.grad_weight_in_float8])
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
K, H = 128, 256


def linears(recipe: str, **config) -> tuple[Float8Linear, Float8Linear]:
    w1, w3 = (make(recipe, K, H, **config) for _ in range(2))
    with torch.no_grad():
        w3.weight.copy_(w3.weight.flip(0))
    return w1, w3


def leaf(dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_()


@FULLY_FLOAT8
@DTYPES
def test_codes_are_the_plain_cast_of_swiglu(recipe: str, dtype: torch.dtype) -> None:
    w1, w3 = linears(recipe)
    x = leaf(dtype, 2, 9, K)
    result = gated_hidden(x, w1, w3, columns=True)
    hidden = reference.swiglu_output(w1(x).view(18, H), w3(x).view(18, H)).detach()
    rows, columns = cast_activation(hidden, RECIPES[recipe], RECIPES[recipe].input_dtype, rows=True, columns=True)
    assert rows is not None
    assert columns is not None
    assert result.columns is not None
    assert result.value.shape == (2, 9, H)
    assert result.value.dtype == dtype
    for ours, theirs in zip((*result.rows, *result.columns), (*rows, *columns), strict=True):
        assert torch.equal(ours.float(), theirs.float())


@FULLY_FLOAT8
@DTYPES
@pytest.mark.parametrize("settings", [{}, {"grad_weight_dtype": torch.float32}, {"recompute_weight_in_backward": True}])
def test_every_gradient_is_what_the_two_linears_make_of_swiglus(
    recipe: str, dtype: torch.dtype, settings: dict
) -> None:
    w1, w3 = linears(recipe, **settings)
    x = leaf(dtype, 2, 9, K)
    grad = torch.randn(2, 9, H).to(dtype)
    result = torch.autograd.grad(gated_hidden(x, w1, w3, columns=True).value, (x, w1.weight, w3.weight), grad)
    gate, up = w1(x), w3(x)
    grads = reference.swiglu_gradients(grad, gate.detach(), up.detach())
    expected = torch.autograd.grad((gate, up), (x, w1.weight, w3.weight), grads)
    for ours, theirs, wanted in zip(result, expected, (x, w1.weight, w3.weight), strict=True):
        assert ours.dtype == wanted.dtype
        assert torch.equal(ours, theirs)


@FULLY_FLOAT8
@pytest.mark.parametrize("tokens", [0, 1, 17])
def test_any_number_of_tokens(recipe: str, tokens: int) -> None:
    w1, w3 = linears(recipe)
    x = leaf(torch.bfloat16, tokens, K)
    result = gated_hidden(x, w1, w3, columns=True)
    result.value.backward(torch.ones(tokens, H).bfloat16())
    assert result.rows.codes.shape == (tokens, H)
    for tensor in (x, w1.weight, w3.weight):
        assert tensor.grad is not None
        assert tensor.grad.isfinite().all()


@FULLY_FLOAT8
def test_strides_of_the_gradient_do_not_matter(recipe: str) -> None:
    w1, w3 = linears(recipe)
    x = leaf(torch.bfloat16, 20, K)
    results = []
    for grad in (torch.ones(20, H).bfloat16(), torch.ones(1).bfloat16().expand(20, H)):
        results.append(torch.autograd.grad(gated_hidden(x, w1, w3, columns=True).value, (x, w1.weight), grad))
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


def test_differentiating_twice_is_an_error() -> None:
    w1, w3 = linears("rowwise")
    x = leaf(torch.float32, 20, K)
    value = gated_hidden(x, w1, w3, columns=True).value
    (gradient,) = torch.autograd.grad(value, x, torch.ones(20, H, requires_grad=True), create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()
