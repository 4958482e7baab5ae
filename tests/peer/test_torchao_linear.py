"""A whole layer beside torchao's: output and every gradient, on the same parameters, input and gradient."""

import pytest
import torch

from tests.peer.side_by_side import RECIPES, exact_case, our_layer, peer_layer, random_case, step
from tests.tolerances import sqnr_db

pytestmark = pytest.mark.peer

SUMMATION_FP32_DB = 120.0
"""The same codes, but torchao divides each operand by its scale before the product and we scale the sum after it."""
SUMMATION_BF16_DB = 75.0
"""The same, where a last bit of the fp32 sum decides how it is rounded to bf16."""


def assert_close(ours, theirs, limit_db: float) -> None:
    for name in ("output", "grad_input", "grad_weight"):
        mine, peer = getattr(ours, name), getattr(theirs, name)
        assert mine.dtype == peer.dtype, name
        assert mine.shape == peer.shape, name
        assert sqnr_db(peer, mine) > limit_db, f"{name}: {sqnr_db(peer, mine):.1f} dB"


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("tokens", [208, 37])
def test_numbers_whose_sums_are_exact_give_the_same_bits(recipe, tokens):
    linear, x, grad_output = exact_case(tokens, 96, 64)
    ours, theirs = (step(layer(linear, recipe), x, grad_output) for layer in (our_layer, peer_layer))
    assert torch.equal(ours.output, theirs.output)
    assert torch.equal(ours.grad_input, theirs.grad_input)
    assert torch.equal(ours.grad_weight, theirs.grad_weight)


@pytest.mark.parametrize("recipe", RECIPES)
def test_bf16_activations_give_the_same_but_for_the_order_of_rounding(recipe):
    linear, x, grad_output = random_case(201, 512, 256)
    ours, theirs = (step(layer(linear, recipe), x, grad_output) for layer in (our_layer, peer_layer))
    assert_close(ours, theirs, SUMMATION_BF16_DB)


@pytest.mark.parametrize("recipe", RECIPES)
def test_fp32_activations_give_the_same_but_for_the_order_of_rounding(recipe):
    linear, x, grad_output = random_case(64, 256, 128, dtype=torch.float32)
    ours = step(our_layer(linear, recipe, grad_weight_dtype=torch.float32), x, grad_output)
    assert_close(ours, step(peer_layer(linear, recipe), x, grad_output), SUMMATION_FP32_DB)


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_bf16_weight_and_three_leading_dims_give_the_same(recipe):
    linear, x, grad_output = random_case(48, 128, 64)
    x, grad_output = x.view(4, 3, 4, 128), grad_output.view(4, 3, 4, 64)
    linear = linear.bfloat16()
    ours, theirs = (step(layer(linear, recipe), x, grad_output) for layer in (our_layer, peer_layer))
    assert_close(ours, theirs, SUMMATION_BF16_DB)
