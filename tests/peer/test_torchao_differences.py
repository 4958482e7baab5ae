"""Where we differ from torchao 0.17 on purpose: one test for each, with what it does in the second half.

`docs/float8.md` lists them. A test that fails because torchao has changed is a line to take out of that list.
"""

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import titan_fp8
from tests.peer.side_by_side import our_layer, peer_codes, peer_layer, random_case, step
from tests.tolerances import sqnr_db
from titan_fp8.kernels import float8
from titan_fp8.kernels.float8 import E4M3
from titan_fp8.quantization.ops import GEMM_OPS

pytestmark = pytest.mark.peer

T = 208
"""Tokens: a number that is no other dimension here, to tell activations from weights by their shapes."""


def test_a_power_of_two_scale_is_never_rounded_up():
    """448 / amax just below 64 is 32 cleared of its mantissa; through a logarithm it becomes 64, which takes the
    largest value past the format's end."""
    amax = torch.nextafter(torch.tensor(7.0), torch.tensor(8.0))
    x = torch.full((1, 16), float(amax))
    _, scale = float8.cast_rows(x, E4M3)
    assert scale.item() == 1 / 32
    assert amax / scale <= 448

    _, peer_inv_scale = peer_codes(x, E4M3, dim=-1)
    assert peer_inv_scale.item() == 64
    assert amax * peer_inv_scale > 448


@pytest.mark.parametrize("granularity", ["tensor", "row"])
def test_inf_makes_the_whole_group_nan_and_not_its_other_values_zero(granularity):
    x = torch.ones(1, 16)
    x[0, 3] = torch.inf
    if granularity == "tensor":
        codes, _, scale = float8.cast_tensor(x, float8.amax(x), E4M3, rows=True, columns=False)
    else:
        codes, scale = float8.cast_rows(x, E4M3)
    assert scale.isnan().all()
    assert (codes.view(torch.uint8) == 0x7F).all()

    peer, peer_inv_scale = peer_codes(x, E4M3, dim=None if granularity == "tensor" else -1)
    assert (peer_inv_scale == 0).all()
    assert (peer.float().nan_to_num() == 0).all()


def test_a_bias_and_its_gradient_are_not_rounded_to_the_activations_dtype():
    linear, x, grad_output = random_case(T, 128, 64, bias=True)
    exact = grad_output.double().sum(0)
    ours, theirs = (step(layer(linear, "rowwise"), x, grad_output) for layer in (our_layer, peer_layer))
    assert sqnr_db(exact, ours.grad_bias) > 120

    assert sqnr_db(exact, theirs.grad_bias) < 70


def saved_activation_bytes(layer: nn.Module, x: Tensor) -> int:
    """Bytes of what autograd keeps of x between forward and backward."""
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if T in tensor.shape:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        layer(x.clone().requires_grad_())
    return sum(kept.values())


@pytest.mark.parametrize("recipe", ["tensorwise", "rowwise"])
def test_backward_keeps_the_activation_in_8_bits(recipe):
    linear, x, _ = random_case(T, 128, 64)
    assert saved_activation_bytes(our_layer(linear, recipe), x) == x.numel()

    assert saved_activation_bytes(peer_layer(linear, recipe), x) == 2 * x.numel()


class CountProducts(TorchDispatchMode):
    """Counts matrix products: our operators, and those of float8 tensors of torchao's."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func in (*GEMM_OPS, torch.ops.aten.mm.default)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("frozen", ["weight", "input"])
def test_a_gradient_that_nobody_asks_for_is_not_computed(frozen):
    linear, x, grad_output = random_case(T, 128, 64)
    linear.weight.requires_grad_(frozen != "weight")
    counts = []
    for layer in (our_layer(linear, "tensorwise"), peer_layer(linear, "tensorwise")):
        with CountProducts() as products:
            step(layer, x, grad_output, needs_grad_input=frozen != "input")
        counts.append(products.count)
    assert counts[0] == 2

    assert counts[1] == 3


def weight_of_many_magnitudes(n: int, k: int) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    rows = torch.exp2(torch.randint(-8, 9, (n, 1), generator=generator).float())
    return torch.randn(n, k, generator=generator) * rows


def test_a_weights_columns_come_from_its_row_codes_and_differ_only_in_subnormals():
    """One quantization of each weight, so that a rank that gathered codes computes what one with the weight does."""
    weight = weight_of_many_magnitudes(64, 128)
    codes, scale = float8.columns_from_rows(*float8.cast_rows(weight, E4M3))
    ours = codes.float() * scale

    peer, peer_inv_scale = peer_codes(weight, E4M3, dim=0)
    theirs = (peer.float() / peer_inv_scale).t()
    smallest_normal = torch.finfo(E4M3).smallest_normal * torch.maximum(scale, peer_inv_scale.reciprocal().t())
    differs = ours != theirs
    assert differs.any()
    assert (ours.abs() <= smallest_normal)[differs].all()
    assert sqnr_db(theirs, ours) > 60


@pytest.mark.parametrize("recipe", ["rowwise", "rowwise_with_gw_hp"])
def test_derived_columns_leave_grad_input_the_same_but_for_subnormals(recipe):
    linear, x, grad_output = random_case(T, 128, 64, dtype=torch.float32)
    with torch.no_grad():
        linear.weight.copy_(weight_of_many_magnitudes(64, 128))
    ours, theirs = (step(layer(linear, recipe), x, grad_output) for layer in (our_layer, peer_layer))
    assert not torch.equal(ours.grad_input, theirs.grad_input)
    assert sqnr_db(theirs.grad_input, ours.grad_input) > 60


def test_codes_come_from_the_master_weight_and_not_from_a_bf16_copy():
    """torchao quantizes what it is handed, which under FSDP's mixed precision is the bf16 copy."""
    weight = random_case(T, 512, 256)[0].weight.detach()
    codes, _ = float8.cast_rows(weight, E4M3)

    peer, _ = peer_codes(weight.bfloat16(), E4M3, dim=-1)
    share = (codes.float() != peer.float()).float().mean().item()
    assert 0.005 < share < 0.05


def test_the_dtype_in_which_grad_weight_leaves_its_product_is_a_setting():
    linear, x, grad_output = random_case(T, 128, 64)
    exact = step(peer_layer(linear, "rowwise"), x.float(), grad_output.float()).grad_weight
    ours = step(our_layer(linear, "rowwise", grad_weight_dtype=torch.float32), x, grad_output).grad_weight
    assert sqnr_db(exact, ours) > 120

    theirs = step(peer_layer(linear, "rowwise"), x, grad_output).grad_weight
    assert sqnr_db(exact, theirs) < 60


def test_no_tokens_are_an_ordinary_input():
    linear, x, grad_output = random_case(0, 128, 64)
    ours = step(our_layer(linear, "tensorwise"), x, grad_output)
    assert ours.output.shape == (0, 64)
    assert (ours.grad_weight == 0).all()

    with pytest.raises(RuntimeError, match="max"):
        step(peer_layer(linear, "tensorwise"), x, grad_output)


def test_real_float8_on_a_device_without_it_is_refused():
    linear, x, grad_output = random_case(T, 128, 64)
    with pytest.raises(RuntimeError, match="emulate"):
        step(our_layer(linear, "tensorwise", emulate=False), x, grad_output)

    assert step(peer_layer(linear, "tensorwise", emulate=False), x, grad_output).output.isfinite().all()


def test_a_filter_matches_whole_components_of_a_name():
    from torchao.float8.float8_linear_utils import _auto_filter_for_recipe

    model = nn.ModuleDict({f"layers_{n}": nn.Linear(4096, 4096, device="meta") for n in (1, 10)})
    titan_fp8.convert_to_float8_training(model, filter_fqns=["layers_1"], emulate=True)
    assert type(model["layers_1"]) is nn.Linear
    assert type(model["layers_10"]) is not nn.Linear

    converts = _auto_filter_for_recipe("tensorwise", ["layers_1"])
    assert not converts(nn.Linear(4096, 4096, device="meta"), "layers_10")
