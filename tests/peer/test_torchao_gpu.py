"""Beside torchao on a GPU: the same layer on tensor cores, and what differs there on purpose."""

import pytest
import torch
from torch import nn

from tests.peer.side_by_side import RECIPES, our_layer, peer_codes, peer_layer, random_case, step
from tests.tolerances import EMULATED_VS_NATIVE_SQNR_DB, sqnr_db
from titan_fp8.kernels import float8
from titan_fp8.kernels.float8 import E4M3

pytestmark = [pytest.mark.peer, pytest.mark.gpu]


def prototype_layer(linear: nn.Linear) -> nn.Module:
    """torchao's prototype for eager mode; tensorwise alone."""
    from torchao.prototype.float8nocompile.float8nocompile_linear_utils import convert_to_float8_nocompile_training

    return convert_to_float8_nocompile_training(nn.Sequential(linear))[0]


def test_the_kernels_codes_and_scales_equal_torchaos_bit_for_bit():
    x = random_case(1000, 512, 256, device="cuda")[1]
    bits = float8.amax(x)
    codes, codes_t, scale = float8.cast_tensor(x, bits, E4M3, rows=True, columns=True)
    peer, peer_scale = peer_codes(x, E4M3)
    assert torch.equal(codes.view(torch.uint8), peer.view(torch.uint8))
    assert torch.equal(codes_t[:, :1000].view(torch.uint8), peer.t().contiguous().view(torch.uint8))
    assert torch.equal(scale, peer_scale.reciprocal())
    codes, scale = float8.cast_rows(x, E4M3)
    peer, peer_scale = peer_codes(x, E4M3, dim=-1)
    assert torch.equal(codes.view(torch.uint8), peer.view(torch.uint8))
    assert torch.equal(scale, peer_scale.reciprocal())


@pytest.mark.parametrize("recipe", RECIPES)
def test_tensor_cores_give_the_same_but_for_how_they_accumulate(recipe):
    linear, x, grad_output = random_case(1024, 512, 256, device="cuda")
    ours = step(our_layer(linear, recipe, emulate=False), x, grad_output)
    theirs = step(peer_layer(linear, recipe, emulate=False), x, grad_output)
    for name in ("output", "grad_input", "grad_weight"):
        mine, peer = getattr(ours, name), getattr(theirs, name)
        assert sqnr_db(peer, mine) > EMULATED_VS_NATIVE_SQNR_DB, f"{name}: {sqnr_db(peer, mine):.1f} dB"


def test_fp32_activations_of_a_rowwise_layer_are_not_rounded_to_bf16_on_the_way_out():
    linear, x, grad_output = random_case(256, 512, 256, dtype=torch.float32, device="cuda")
    exact = step(our_layer(linear, "rowwise"), x, grad_output).grad_input
    ours = step(our_layer(linear, "rowwise", emulate=False), x, grad_output).grad_input
    theirs = step(peer_layer(linear, "rowwise", emulate=False), x, grad_output).grad_input
    assert sqnr_db(exact, ours) > sqnr_db(exact, theirs) + 10


def test_any_number_of_tokens_runs_on_tensor_cores():
    linear, x, grad_output = random_case(37, 128, 64, device="cuda")
    ours = step(our_layer(linear, "tensorwise", emulate=False), x, grad_output)
    assert sqnr_db(step(our_layer(linear, "tensorwise"), x, grad_output).grad_weight, ours.grad_weight) > 40

    with pytest.raises(RuntimeError):
        step(peer_layer(linear, "tensorwise", emulate=False), x, grad_output)


def test_eager_kernels_keep_the_bias():
    linear, x, _ = random_case(128, 128, 64, bias=True, device="cuda")
    without = our_layer(linear, "tensorwise", emulate=False)
    without.bias = None
    difference = our_layer(linear, "tensorwise", emulate=False)(x) - without(x)
    assert sqnr_db(linear.bias.detach().expand_as(difference), difference.detach()) > 20

    prototype = prototype_layer(linear)
    assert prototype.bias is not None
    assert sqnr_db(without(x).detach(), prototype(x).detach()) > EMULATED_VS_NATIVE_SQNR_DB
