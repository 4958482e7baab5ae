"""RMSNorm straight to codes: the codes of the norm's own output, and every gradient of the norm and of the residual."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from titan_fp8.quantization.casts import cast_activation
from titan_fp8.quantization.norm import add_rms_norm, rms_norm
from titan_fp8.quantization.recipes import RECIPES

EPS = 1e-5
ALL_RECIPES = pytest.mark.parametrize("recipe", RECIPES)
FULLY_FLOAT8 = pytest.mark.parametrize("recipe", [name for name, r in RECIPES.items() if r.grad_weight_in_float8])


def inputs(dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, Tensor, Tensor]:
    """x and branch [2, 9, 128], and an fp32 weight, all of which want gradients."""
    generator = torch.Generator().manual_seed(0)
    x, branch = (torch.randn(2, 9, 128, generator=generator).to(dtype).requires_grad_() for _ in range(2))
    return x, branch, (1 + torch.randn(128, generator=generator) / 8).requires_grad_()


@FULLY_FLOAT8
@pytest.mark.parametrize("adds", [False, True])
def test_codes_are_those_that_a_linear_makes_of_the_norm(recipe: str, adds: bool) -> None:
    x, branch, weight = inputs()
    if adds:
        total, result = add_rms_norm(x, branch, weight, EPS, RECIPES[recipe], columns=True, emit=True)
        assert torch.equal(total, x + branch)
    else:
        total, result = x, rms_norm(x, weight, EPS, RECIPES[recipe], columns=True, emit=True)
    normed = F.rms_norm(total, (128,), weight.to(x.dtype), EPS)
    assert torch.equal(result.value, normed)
    rows, columns = cast_activation(
        normed.detach().view(18, 128), RECIPES[recipe], RECIPES[recipe].input_dtype, rows=True, columns=True
    )
    assert rows is not None
    assert columns is not None
    assert result.columns is not None
    for ours, theirs in zip((*result.rows, *result.columns), (*rows, *columns), strict=True):
        assert torch.equal(ours.float(), theirs.float())
        assert ours.stride() == theirs.stride()


@ALL_RECIPES
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_gradient_is_that_of_the_plain_expression(recipe: str, dtype: torch.dtype) -> None:
    x, branch, weight = inputs(dtype)
    grad_sum, grad = (torch.randn(2, 9, 128).to(dtype) for _ in range(2))
    total, normed = add_rms_norm(x, branch, weight, EPS, RECIPES[recipe], columns=False, emit=False)
    results = torch.autograd.grad((total, normed.value), (x, branch, weight), (grad_sum, grad))
    doubles = [t.detach().double().requires_grad_() for t in (x, branch, weight)]
    exact_total = doubles[0] + doubles[1]
    exact = torch.autograd.grad(
        (exact_total, F.rms_norm(exact_total, (128,), doubles[2], EPS)), doubles, (grad_sum.double(), grad.double())
    )
    tolerance = 1e-5 if dtype == torch.float32 else 0.05
    for result, expected, leaf in zip(results, exact, (x, branch, weight), strict=True):
        assert result.dtype == leaf.dtype
        torch.testing.assert_close(result.double(), expected, rtol=tolerance, atol=tolerance)


def test_a_gradient_of_one_output_alone_is_enough() -> None:
    x, branch, weight = inputs()
    both = [torch.randn(2, 9, 128).bfloat16() for _ in range(2)]

    def gradients(use_sum: bool, use_norm: bool) -> tuple[Tensor | None, ...]:
        outputs = add_rms_norm(x, branch, weight, EPS, RECIPES["rowwise"], columns=False, emit=False)
        chosen = [(outputs[0], both[0])] * use_sum + [(outputs[1].value, both[1])] * use_norm
        differentiated, grads = zip(*chosen, strict=True)
        return torch.autograd.grad(differentiated, (x, branch, weight), grads, allow_unused=True)

    of_sum, of_norm, of_both = gradients(True, False), gradients(False, True), gradients(True, True)
    assert torch.equal(of_sum[0], both[0])
    assert of_sum[2] is None
    assert torch.equal(of_both[1], of_sum[1] + of_norm[1])
    assert torch.equal(of_both[2], of_norm[2])


@FULLY_FLOAT8
def test_leading_dimensions_do_not_matter(recipe: str) -> None:
    x, _, weight = inputs()
    expected = rms_norm(x.view(18, 128), weight, EPS, RECIPES[recipe], columns=True, emit=False)
    for shape in ((2, 3, 3, 128), (1, 18, 128)):
        result = rms_norm(x.view(shape), weight, EPS, RECIPES[recipe], columns=True, emit=False)
        assert result.value.shape == shape
        assert torch.equal(result.rows.codes.float(), expected.rows.codes.float())


def test_a_frozen_stream_still_gives_the_weight_its_gradient() -> None:
    x, branch, weight = inputs()
    _, result = add_rms_norm(x.detach(), branch.detach(), weight, EPS, RECIPES["rowwise"], columns=False, emit=False)
    result.value.backward(torch.ones(2, 9, 128).bfloat16())
    assert weight.grad is not None
    assert weight.grad.abs().sum() > 0


def test_only_one_of_stream_and_branch_may_want_a_gradient() -> None:
    x, branch, weight = inputs()
    outputs = add_rms_norm(x.detach(), branch, weight, EPS, RECIPES["rowwise"], columns=False, emit=False)
    expected = add_rms_norm(x, branch, weight, EPS, RECIPES["rowwise"], columns=False, emit=False)
    grads = [torch.randn(2, 9, 128).bfloat16() for _ in range(2)]
    (result,) = torch.autograd.grad((outputs[0], outputs[1].value), branch, grads)
    assert torch.equal(result, torch.autograd.grad((expected[0], expected[1].value), x, grads)[0])
