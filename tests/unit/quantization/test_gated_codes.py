"""A gated feed-forward that keeps gate and up as codes: the same output, the gradients of what they stand for."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tests.unit.converters.fused_models import build, run, same_bits
from tests.unit.quantization.test_gated import DTYPES, FULLY_FLOAT8, H, K, leaf
from tests.unit.quantization.test_linear import make
from titan_fp8.converters.fusion import Float8FeedForward, fuse_producers
from titan_fp8.kernels import float8
from titan_fp8.kernels.float8 import E4M3
from titan_fp8.kernels.producers import reference
from titan_fp8.models.decoder import Decoder
from titan_fp8.quantization import gated
from titan_fp8.quantization.gated import gated_feed_forward
from titan_fp8.quantization.linear import Float8Linear


def linears(recipe: str, *, keeps: bool, **config) -> tuple[Float8Linear, Float8Linear, Float8Linear]:
    made = make(recipe, K, H, **config), make(recipe, K, H, **config), make(recipe, H, K, **config)
    for linear in made:
        linear.config = replace(linear.config, keeps_gate_up_in_float8=keeps)
    with torch.no_grad():
        made[1].weight.copy_(5 * made[1].weight.flip(0))  # the scales of gate and up differ
    return made


def weights(w1: Float8Linear, w3: Float8Linear, w2: Float8Linear) -> tuple[Tensor, Tensor, Tensor]:
    return w1.weight, w3.weight, w2.weight


def rounded(value: Tensor) -> Tensor:
    """What the codes of a tensor stand for."""
    codes, scale = float8.cast_rows(value.detach(), E4M3)
    return (codes.float() * scale).to(value.dtype)


@FULLY_FLOAT8
@DTYPES
@pytest.mark.parametrize("settings", [{}, {"grad_weight_dtype": torch.float32}, {"recompute_weight_in_backward": True}])
def test_output_is_unchanged_and_gradients_are_those_of_rounded_gate_and_up(
    recipe: str, dtype: torch.dtype, settings: dict
) -> None:
    w1, w3, w2 = linears(recipe, keeps=True, **settings)
    x, grad = leaf(dtype, 2, 9, K), torch.randn(2, 9, K).to(dtype)
    output = gated_feed_forward(x, w1, w3, w2)
    result = torch.autograd.grad(output, (x, *weights(w1, w3, w2)), grad)

    assert torch.equal(output, gated_feed_forward(x, *linears(recipe, keeps=False, **settings)))
    gate, up = w1(x), w3(x)
    kept = rounded(gate.view(18, H)), rounded(up.view(18, H))
    hidden = reference.swiglu_output(*kept).requires_grad_()
    of_hidden, of_w2 = torch.autograd.grad(w2(hidden), (hidden, w2.weight), grad.view(18, K))
    grads = [each.view(2, 9, H) for each in reference.swiglu_gradients(of_hidden, *kept)]
    expected = (*torch.autograd.grad((gate, up), (x, w1.weight, w3.weight), grads), of_w2)
    for ours, theirs in zip(result, expected, strict=True):
        assert torch.equal(ours, theirs)


@FULLY_FLOAT8
def test_rounding_gate_and_up_adds_less_to_the_error_of_gradients_than_float8_has(recipe: str) -> None:
    x, grad = leaf(torch.bfloat16, 512, K), torch.randn(512, K).bfloat16()
    results = []
    for keeps in (False, True):
        made = linears(recipe, keeps=keeps)
        results.append(torch.autograd.grad(gated_feed_forward(x, *made), (x, *weights(*made)), grad))
    value, of_w1, of_w3, of_w2 = (t.detach().double().requires_grad_() for t in (x, *weights(*made)))
    output = (torch.nn.functional.silu(value @ of_w1.t()) * (value @ of_w3.t())) @ of_w2.t()
    exact = torch.autograd.grad(output, (value, of_w1, of_w3, of_w2), grad.double())
    for plain, coded, true in zip(*results, exact, strict=True):
        assert (coded - true).norm() < 2**0.5 * (plain - true).norm()


@FULLY_FLOAT8
@pytest.mark.parametrize("tokens", [0, 1, 17])
def test_any_number_of_tokens(recipe: str, tokens: int) -> None:
    made = linears(recipe, keeps=True)
    x = leaf(torch.bfloat16, tokens, K)
    gated_feed_forward(x, *made).backward(torch.ones(tokens, K).bfloat16())
    for tensor in (x, *weights(*made)):
        assert tensor.grad is not None
        assert tensor.grad.isfinite().all()


@FULLY_FLOAT8
def test_w2_alone_may_have_a_gradient(recipe: str) -> None:
    w1, w3, w2 = linears(recipe, keeps=True)
    w1.weight.requires_grad_(False)
    w3.weight.requires_grad_(False)
    x, grad = leaf(torch.bfloat16, 18, K).detach(), torch.randn(18, K).bfloat16()
    (result,) = torch.autograd.grad(gated_feed_forward(x, w1, w3, w2), (w2.weight,), grad)
    hidden = reference.swiglu_output(rounded(w1(x)), rounded(w3(x)))
    (expected,) = torch.autograd.grad(w2(hidden), (w2.weight,), grad)
    assert torch.equal(result, expected)


@FULLY_FLOAT8
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_not_finite_reaches_the_gradients(recipe: str, bad: float) -> None:
    made = linears(recipe, keeps=True)
    x = leaf(torch.bfloat16, 18, K)
    with torch.no_grad():
        x[3, 5] = bad
    gated_feed_forward(x, *made).backward(torch.ones(18, K).bfloat16())
    for weight in weights(*made):
        assert weight.grad is not None
        assert not weight.grad.isfinite().all()


@FULLY_FLOAT8
def test_without_gradients_nothing_is_cast_to_be_kept(recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made, x, cast = linears(recipe, keeps=True), leaf(torch.bfloat16, 18, K), []
    cast_rows = gated.ops.cast_rows
    monkeypatch.setattr(gated.ops, "cast_rows", lambda t, *rest: cast.append(t.shape) or cast_rows(t, *rest))
    with torch.no_grad():
        gated_feed_forward(x, *made)
    assert (18, H) not in cast
    gated_feed_forward(x, *made)
    assert cast.count((18, H)) == 2


def decoder(recipe: str, **dims) -> Decoder:
    """A fused decoder whose feed-forwards keep codes."""
    model = build(recipe, fused=False, **dims)
    for module in model.layers.modules():
        if isinstance(module, Float8Linear):
            module.config = replace(module.config, keeps_gate_up_in_float8=True)
    fuse_producers(model)
    assert isinstance(model.layers["0"].feed_forward, Float8FeedForward)
    return model


@FULLY_FLOAT8
def test_compiled_equals_eager_bit_for_bit(recipe: str) -> None:
    torch._dynamo.reset()
    model = decoder(recipe, n_layers=2)
    eager = run(model)
    assert same_bits(eager, run(build(recipe, fused=True, n_layers=2))) != []
    for block in model.layers.values():
        block.compile(backend="aot_eager", fullgraph=True)
    assert same_bits(run(model), eager) == []


@FULLY_FLOAT8
@pytest.mark.parametrize("compiled", [False, True])
def test_what_is_kept_of_gate_and_up_is_a_byte_a_value(recipe: str, compiled: bool) -> None:
    torch._dynamo.reset()
    block = decoder(recipe).layers["0"]
    forward = block.feed_forward
    if compiled:
        forward = torch.compile(forward, fullgraph=True, backend="aot_eager_decomp_partition")
    kept: dict[int, tuple[int, torch.dtype]] = {}

    def keep(t: Tensor) -> Tensor:
        if t.numel() == 300 * 256:
            kept[t.untyped_storage().data_ptr()] = (t.untyped_storage().nbytes(), t.dtype)
        return t

    x = torch.randn(300, 128).bfloat16().requires_grad_() * 1.0
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        forward(x)
    assert list(kept.values()) == [(300 * 256, E4M3)] * 2
