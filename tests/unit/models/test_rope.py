"""Rotary embedding: rotations, their gradients, frequency scaling, tables that survive moves and casts."""

import math

import pytest
import torch
from torch import Tensor

from titan_fp8.models import rope
from titan_fp8.models.decoder import Decoder
from titan_fp8.models.dims import ModelDims, RopeScaling
from titan_fp8.models.initialization import initialize
from titan_fp8.models.loss import cross_entropy_sum
from titan_fp8.models.rope import RotaryEmbedding, apply_rope, rope_frequencies, rotate_queries_and_keys

CPU = torch.device("cpu")
LLAMA31 = RopeScaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position=8192)


def test_rotation_is_multiplication_by_a_unit_complex_number_of_neighbouring_features() -> None:
    x = torch.randn(2, 7, 3, 8, generator=torch.Generator().manual_seed(0))
    tables = RotaryEmbedding(8, 7, theta=100.0)(7, CPU)
    angles = torch.outer(torch.arange(7.0), rope_frequencies(8, 100.0).float())
    expected = torch.view_as_complex(x.unflatten(-1, (4, 2))) * torch.polar(torch.ones(7, 4), angles)[:, None, :]
    torch.testing.assert_close(apply_rope(x, tables), torch.view_as_real(expected).flatten(-2))


def test_scores_depend_on_the_distance_alone() -> None:
    q, k = torch.randn(2, 1, 1, 1, 16, generator=torch.Generator().manual_seed(0)).expand(2, 1, 40, 1, 16)
    tables = RotaryEmbedding(16, 40, theta=10000.0)(40, CPU)
    scores = apply_rope(q, tables)[0, :, 0] @ apply_rope(k, tables)[0, :, 0].T
    torch.testing.assert_close(scores[10, 3], scores[37, 30], rtol=1e-4, atol=1e-4)
    assert not math.isclose(scores[10, 3], scores[10, 4], rel_tol=1e-3)


def test_scaling_stretches_long_wavelengths_and_keeps_short_ones() -> None:
    plain, scaled = rope_frequencies(128, 500000.0), rope_frequencies(128, 500000.0, LLAMA31)
    wavelengths = 2 * math.pi / plain
    short, long = wavelengths < 8192 / 4, wavelengths > 8192
    assert torch.equal(scaled[short], plain[short])
    torch.testing.assert_close(scaled[long], plain[long] / 8)
    between = ~short & ~long
    assert between.any()
    assert ((scaled < plain) & (scaled > plain / 8))[between].all()


def test_result_has_the_dtype_of_the_input_and_is_rounded_once() -> None:
    x = torch.randn(1, 5, 2, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    tables = RotaryEmbedding(8, 5, theta=100.0)(5, CPU)
    assert torch.equal(apply_rope(x, tables), apply_rope(x.float(), tables).bfloat16())


def test_tables_are_right_after_materialization_and_stay_float32_under_a_cast() -> None:
    expected = RotaryEmbedding(8, 6, theta=100.0)
    with torch.device("meta"):
        rope = RotaryEmbedding(8, 6, theta=100.0)
    assert rope.cos.is_meta
    rope.to_empty(device="cpu").to(torch.bfloat16)
    assert rope.cos.dtype == torch.float32
    assert torch.equal(rope.cos, expected.cos)
    assert torch.equal(rope.sin, expected.sin)
    assert not rope.state_dict()


def test_more_tokens_than_positions_are_refused() -> None:
    with pytest.raises(ValueError, match="9 tokens is longer than the model's 8 positions"):
        RotaryEmbedding(8, 8, theta=100.0)(9, CPU)


@pytest.fixture
def by_operator(monkeypatch: pytest.MonkeyPatch) -> None:
    """Queries and keys take the way they take on a GPU."""
    monkeypatch.setattr(rope, "_is_for_kernel", lambda x: True)


def _queries_and_keys(dtype: torch.dtype, head_dim: int) -> tuple[Tensor, Tensor]:
    """Leaves `[2, 7, H, head_dim]` and `[2, 7, G, head_dim]`, and not contiguous."""
    generator = torch.Generator().manual_seed(1)
    wide = torch.randn(2, 7, 5 * head_dim + 4, generator=generator).to(dtype)
    q, k = wide[..., : 3 * head_dim].unflatten(-1, (3, -1)), wide[..., 3 * head_dim : -4].unflatten(-1, (2, -1))
    return q.requires_grad_(), k.requires_grad_()


@pytest.mark.usefixtures("by_operator")
@pytest.mark.parametrize("head_dim", [6, 96, 128])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_operator_and_its_gradients_are_those_of_the_plain_rotation(dtype: torch.dtype, head_dim: int) -> None:
    tables = RotaryEmbedding(head_dim, 7, theta=100.0)(7, CPU)
    results = []
    for function in (rotate_queries_and_keys, lambda q, k, tables: (apply_rope(q, tables), apply_rope(k, tables))):
        q, k = _queries_and_keys(dtype, head_dim)
        turned_q, turned_k = function(q, k, tables)
        generator = torch.Generator().manual_seed(2)
        grads = [torch.randn(y.shape, generator=generator).to(dtype) for y in (turned_q, turned_k)]
        torch.autograd.backward((turned_q, turned_k), grads)
        results.append({"q": turned_q, "k": turned_k, "grad_q": q.grad, "grad_k": k.grad})
    for name, expected in results[1].items():
        assert torch.equal(results[0][name], expected), name


@pytest.mark.usefixtures("by_operator")
def test_the_operators_gradients_are_those_in_float64_rounded_once() -> None:
    tables = RotaryEmbedding(16, 7, theta=100.0)(7, CPU)
    turn = torch.complex(tables.cos.double(), tables.sin.double())[:, None, :]
    inputs = _queries_and_keys(torch.bfloat16, 16)
    outputs = rotate_queries_and_keys(*inputs, tables)
    for x, output in zip(inputs, outputs, strict=True):
        exact = x.detach().double().requires_grad_()
        turned = torch.view_as_real(torch.view_as_complex(exact.unflatten(-1, (-1, 2))) * turn).flatten(-2)
        grad = torch.randn(output.shape, generator=torch.Generator().manual_seed(2)).bfloat16()
        for one, its_grad in ((output, grad), (turned, grad.double())):
            one.backward(its_grad, retain_graph=True)
        half_a_unit = 2**-8  # in the last place, relative
        torch.testing.assert_close(output.double(), turned, rtol=half_a_unit, atol=1e-6)
        torch.testing.assert_close(x.grad.double(), exact.grad, rtol=half_a_unit, atol=1e-6)


@pytest.mark.usefixtures("by_operator")
def test_the_operator_is_registered_as_it_behaves() -> None:
    tables = RotaryEmbedding(8, 7, theta=100.0)(7, CPU)
    q, k = (x.detach() for x in _queries_and_keys(torch.bfloat16, 8))
    torch.library.opcheck(rope.rotate_op, ([q, k], tables.cos, tables.sin, True))


@pytest.mark.usefixtures("by_operator")
def test_the_operator_keeps_the_tables_alone() -> None:
    tables = RotaryEmbedding(8, 7, theta=100.0)(7, CPU)
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        rotate_queries_and_keys(*_queries_and_keys(torch.bfloat16, 8), tables)
    assert {tensor.data_ptr() for tensor in kept} == {tables.cos.data_ptr(), tables.sin.data_ptr()}


def _loss_and_grads() -> dict[str, Tensor]:
    dims = ModelDims(dim=48, n_layers=2, n_heads=3, n_kv_heads=1, ffn_dim=80, vocab_size=67, max_seq_len=16)
    model = Decoder(dims, compute_dtype=torch.bfloat16)
    initialize(model, seed=3)
    tokens = torch.randint(67, (2, 17), generator=torch.Generator().manual_seed(0))
    loss = cross_entropy_sum(model(tokens[:, :-1]), tokens[:, 1:])
    loss.backward()
    return {"loss": loss.detach()} | {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def test_a_models_loss_and_gradients_are_the_same_bits_by_operator(request: pytest.FixtureRequest) -> None:
    plain = _loss_and_grads()
    request.getfixturevalue("by_operator")
    for name, value in _loss_and_grads().items():
        assert torch.equal(value, plain[name]), name
