"""Float8Linear: accuracy of the output and every gradient, bit-equality of eager and compiled, and its odd cases."""

import copy
import re

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from tests.tolerances import BIAS_GRAD_SQNR_DB, SQNR_DB, sqnr_db
from tests.unit.quantization.test_ops import CountCalls
from titan_fp8.quantization import ops
from titan_fp8.quantization.function import Float8Config
from titan_fp8.quantization.linear import Float8Linear
from titan_fp8.quantization.recipes import RECIPES

ALL_RECIPES = pytest.mark.parametrize("recipe", RECIPES)
FULLY_FLOAT8 = pytest.mark.parametrize("recipe", [name for name, r in RECIPES.items() if r.grad_weight_in_float8])
K, N = 128, 256


def make(recipe: str, k: int = K, n: int = N, *, bias: bool = False, **config) -> Float8Linear:
    torch.manual_seed(0)
    return Float8Linear.from_linear(nn.Linear(k, n, bias=bias), Float8Config(RECIPES[recipe], emulate=True, **config))


def run(module: nn.Module, x: Tensor, grad_output: Tensor | None = None) -> dict[str, Tensor]:
    """Output and every gradient by name."""
    x = x.detach().clone().requires_grad_()
    module.zero_grad()
    output = module(x)
    output.backward(torch.ones_like(output) if grad_output is None else grad_output)
    gradients = {f"grad_{name}": p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}
    assert x.grad is not None
    return {"output": output.detach(), "grad_input": x.grad, **gradients}


@pytest.mark.parametrize("input_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("recipe", "weights"), SQNR_DB)
def test_output_and_every_gradient_are_as_exact_as_the_recipe_allows(
    recipe: str, weights: str, input_dtype: torch.dtype
) -> None:
    torch.manual_seed(1)
    linear = make(recipe, 256, 128, bias=True, grad_weight_dtype=torch.float32)
    with torch.no_grad():
        linear.weight.normal_() if weights == "normal" else linear.weight.uniform_(-(2.0**-6), 2.0**-6)
    x, grad_output = torch.randn(2, 100, 256).to(input_dtype), torch.randn(2, 100, 128).to(input_dtype)
    result = run(linear, x, grad_output)
    exact = nn.Linear(256, 128).double()
    exact.load_state_dict(linear.state_dict())
    expected = run(exact, x.double(), grad_output.double())
    minimum = SQNR_DB[recipe, weights]
    assert sqnr_db(expected["output"], result["output"]) > minimum.output
    assert sqnr_db(expected["grad_input"], result["grad_input"]) > minimum.grad_input
    assert sqnr_db(expected["grad_weight"], result["grad_weight"]) > minimum.grad_weight
    assert sqnr_db(expected["grad_bias"], result["grad_bias"]) > BIAS_GRAD_SQNR_DB
    assert result["output"].dtype == result["grad_input"].dtype == input_dtype
    assert result["grad_weight"].dtype == result["grad_bias"].dtype == torch.float32


@ALL_RECIPES
@pytest.mark.parametrize(
    ("backend", "dtype"),
    [("aot_eager", torch.bfloat16), ("inductor", torch.bfloat16), ("inductor", torch.float32)],
    ids=["aot_eager", "inductor", "inductor_fp32"],
)
def test_compiled_equals_eager_bit_for_bit(recipe: str, backend: str, dtype: torch.dtype) -> None:
    torch._dynamo.reset()
    linear = make(recipe, bias=True)
    x, grad_output = torch.randn(3, 7, K).to(dtype), torch.randn(3, 7, N).to(dtype)
    eager = run(linear, x, grad_output)
    compiled = run(torch.compile(linear, backend=backend, fullgraph=True), x, grad_output)
    for name, value in eager.items():
        assert torch.equal(compiled[name.replace("grad_", "grad__orig_mod.") if name not in compiled else name], value)


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("compiled", [False, True])
def test_a_product_in_high_precision_obeys_no_autocast(compiled: bool, inside: bool) -> None:
    torch._dynamo.reset()
    linear = make("rowwise_with_gw_hp", grad_weight_dtype=torch.float32)
    called = torch.compile(linear, backend="aot_eager") if compiled else linear
    x, grad_output = torch.randn(24, K), torch.randn(24, N).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = called(x)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=inside):
        output.backward(grad_output)
    assert linear.weight.grad is not None
    exact = grad_output.double().t() @ x.bfloat16().double()
    assert sqnr_db(exact, linear.weight.grad.double()) > 120


@ALL_RECIPES
def test_varying_token_counts_compile_twice_at_most(recipe: str) -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    linear = make(recipe)
    compiled = torch.compile(linear, backend=counter, fullgraph=True)
    for tokens in (8, 17, 33, 50):
        x = torch.randn(tokens, K)
        assert torch.equal(compiled(x), linear(x))
    assert counter.frame_count <= 2


@ALL_RECIPES
def test_leading_dimensions_do_not_matter(recipe: str) -> None:
    linear = make(recipe)
    x = torch.randn(24, K)
    flat = run(linear, x)
    for shape in ((2, 12), (2, 3, 4), (1, 24, 1)):
        result = run(linear, x.view(*shape, K))
        assert result["output"].shape == (*shape, N)
        assert torch.equal(result["output"].view(24, N), flat["output"])
        assert torch.equal(result["grad_input"].view(24, K), flat["grad_input"])
        assert torch.equal(result["grad_weight"], flat["grad_weight"])
    assert linear(x[0]).shape == (N,)
    for shape in ((4, 64), ()):
        message = (
            rf"in_features=128 got input {re.escape(str([*shape]))}; expected one or more dimensions, \[..., 128\]"
        )
        with pytest.raises(ValueError, match=message):
            linear(torch.randn(shape))


@ALL_RECIPES
@pytest.mark.parametrize("tokens", [1, 15, 17])
def test_token_counts_that_are_no_multiple_of_16_equal_zero_padding(recipe: str, tokens: int) -> None:
    linear = make(recipe)
    x, grad_output = torch.randn(tokens, K), torch.randn(tokens, N)
    result = run(linear, x, grad_output)
    padding = 128 - tokens
    padded = run(linear, torch.cat([x, torch.zeros(padding, K)]), torch.cat([grad_output, torch.zeros(padding, N)]))
    torch.testing.assert_close(padded["output"][:tokens], result["output"])
    torch.testing.assert_close(padded["grad_input"][:tokens], result["grad_input"])
    torch.testing.assert_close(padded["grad_weight"], result["grad_weight"])


@ALL_RECIPES
@pytest.mark.parametrize("shape", [(0, K), (2, 0, K)])
def test_an_empty_input_gives_an_empty_output_and_a_zero_weight_gradient(recipe: str, shape: tuple[int, ...]) -> None:
    linear = make(recipe, bias=True)
    result = run(linear, torch.empty(shape))
    assert result["output"].shape == (*shape[:-1], N)
    assert result["grad_input"].shape == shape
    assert (result["grad_weight"] == 0).all()
    assert (result["grad_bias"] == 0).all()


@ALL_RECIPES
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_nan_and_inf_in_the_input_reach_the_output_and_the_weight_gradient(recipe: str, bad: float) -> None:
    linear = make(recipe)
    x = torch.randn(20, K)
    x[3, 5] = bad
    result = run(linear, x)
    assert not result["output"][3].isfinite().any()
    assert not result["grad_weight"][:, 5].isfinite().any()


@ALL_RECIPES
@pytest.mark.parametrize("bad", [torch.nan, -torch.inf])
def test_nan_and_inf_in_gradient_and_weight_reach_every_product(recipe: str, bad: float) -> None:
    linear = make(recipe)
    x, grad_output = torch.randn(20, K), torch.randn(20, N)
    grad_output[4, 7] = bad
    result = run(linear, x, grad_output)
    assert not result["grad_input"][4].isfinite().any()
    assert not result["grad_weight"][7].isfinite().any()
    with torch.no_grad():
        linear.weight[9, 2] = bad
    result = run(linear, x)
    assert not result["output"][:, 9].isfinite().any()
    assert not result["grad_input"][:, 2].isfinite().any()


@ALL_RECIPES
def test_zeros_in_give_zeros_out(recipe: str) -> None:
    linear = make(recipe)
    result = run(linear, torch.zeros(16, K), torch.zeros(16, N))
    assert all((value == 0).all() for value in result.values())


@FULLY_FLOAT8
@pytest.mark.parametrize("what", ["no_grad", "frozen weight", "eval"])
def test_columns_of_the_input_are_cast_only_for_a_weight_gradient(recipe: str, what: str) -> None:
    linear = make(recipe)
    x = torch.randn(16, K, requires_grad=True)
    linear.train(what != "eval")
    linear.weight.requires_grad_(what != "frozen weight")
    with torch.set_grad_enabled(what != "no_grad"), CountCalls() as counter:
        linear(x)
    columns = {ops.cast_tensor_both, ops.cast_rows_and_columns, ops.cast_block_both} & set(counter.calls)
    assert bool(columns) == (what == "eval")


@ALL_RECIPES
def test_no_gradient_costs_a_product_that_nobody_asked_for(recipe: str) -> None:
    linear = make(recipe, bias=True)
    linear.weight.requires_grad_(False)
    with CountCalls() as counter:
        linear(torch.randn(16, K)).sum().backward()
    assert counter.calls[ops.scaled_mm] + counter.calls[ops.scaled_mm_blockwise] == 1
    assert torch.equal(linear.bias.grad, torch.full((N,), 16.0))


def saved_by(linear: Float8Linear, x: Tensor) -> list[Tensor]:
    """What the forward pass of `linear` keeps for backward."""
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        linear(x)
    return saved


@FULLY_FLOAT8
def test_float8_codes_are_saved_for_backward_and_not_the_input(recipe: str) -> None:
    saved = saved_by(make(recipe), torch.randn(64, K).bfloat16().requires_grad_())
    codes = [t for t in saved if t.element_size() == 1]
    assert sorted(t.numel() for t in codes) == sorted([K * max(64, RECIPES[recipe].dim_multiple), N * K])
    assert sum(t.nbytes for t in saved if t.element_size() > 1) <= 4 * (K + N)


def test_a_weight_gradient_in_high_precision_saves_the_input_and_is_exact_to_its_products() -> None:
    linear = make("rowwise_with_gw_hp", grad_weight_dtype=torch.float32)
    x, grad_output = torch.randn(64, K).bfloat16(), torch.randn(64, N).bfloat16()
    saved = saved_by(linear, x.requires_grad_())
    assert any(t.data_ptr() == x.data_ptr() for t in saved)
    assert torch.equal(run(linear, x, grad_output)["grad_weight"], grad_output.float().t() @ x.detach().float())


@ALL_RECIPES
def test_recomputing_the_weight_saves_only_the_parameter_and_changes_no_bit(recipe: str) -> None:
    x, grad_output = torch.randn(24, K), torch.randn(24, N)
    kept, recomputed = make(recipe), make(recipe, recompute_weight_in_backward=True)
    saved = saved_by(recomputed, x.clone().requires_grad_())
    assert any(t is recomputed.weight for t in saved)
    assert not any(t.element_size() == 1 and t.shape == (N, K) for t in saved)
    expected = run(kept, x, grad_output)
    for name, value in run(recomputed, x, grad_output).items():
        assert torch.equal(value, expected[name]), name


@pytest.mark.parametrize(
    ("recipe", "expected"),
    [("tensorwise", torch.float8_e5m2), ("rowwise", torch.float8_e4m3fn), ("blockwise", torch.float8_e4m3fn)],
)
@pytest.mark.parametrize("fast_in_backward", [False, True])
def test_products_use_the_formats_and_accumulation_of_the_recipe(
    recipe: str, expected: torch.dtype, fast_in_backward: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[torch.dtype, torch.dtype, bool]] = []
    name = "scaled_mm_blockwise" if recipe == "blockwise" else "scaled_mm"
    product = getattr(ops, name)

    def record(a: Tensor, b: Tensor, *rest) -> Tensor:
        calls.append((a.dtype, b.dtype, rest[4]))
        return product(a, b, *rest)

    monkeypatch.setattr(ops, name, record)
    run(make(recipe, fast_accum_in_backward=fast_in_backward), torch.randn(16, K))
    e4m3 = torch.float8_e4m3fn
    assert calls == [(e4m3, e4m3, True), (expected, e4m3, fast_in_backward), (expected, e4m3, fast_in_backward)]


def test_a_tensorwise_gradient_of_wide_range_is_not_flushed_to_zero() -> None:
    """e5m2 keeps what is 1e7 below the largest; e4m3 with one scale would not."""
    x, grad_output = torch.eye(16, K), torch.zeros(16, N)
    grad_output[:, 0], grad_output[0, 1] = 1e-6, 10.0
    assert (run(make("tensorwise"), x, grad_output)["grad_weight"][0, 1:16] > 0).all()


@ALL_RECIPES
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_weight_gradient_leaves_its_product_in_the_dtype_asked_for(recipe: str, dtype: torch.dtype) -> None:
    gradient = run(make(recipe, grad_weight_dtype=dtype), torch.randn(40, K))["grad_weight"]
    assert gradient.dtype == torch.float32
    assert torch.equal(gradient.bfloat16().float(), gradient) == (dtype == torch.bfloat16)


@ALL_RECIPES
def test_strides_of_input_and_gradient_do_not_matter(recipe: str) -> None:
    linear = make(recipe, bias=True)
    x, grad_output = torch.randn(K, 33), torch.randn(N, 33)
    expected = run(linear, x.t().contiguous(), grad_output.t().contiguous())
    for name, value in run(linear, x.t(), grad_output.t()).items():
        assert torch.equal(value, expected[name]), name


@ALL_RECIPES
def test_autocast_casts_the_input_and_quantizes_the_stored_weight(recipe: str) -> None:
    linear = make(recipe, bias=True)
    x = torch.randn(8, K)
    expected = run(linear, x.bfloat16())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = run(linear, x)
    assert result["output"].dtype == torch.bfloat16
    for name in ("output", "grad_weight", "grad_bias"):
        assert torch.equal(result[name], expected[name]), name
    assert torch.equal(result["grad_input"], expected["grad_input"].float())


@ALL_RECIPES
def test_the_weight_is_quantized_from_its_master_and_not_through_bf16(recipe: str) -> None:
    linear = make(recipe)
    rounded = copy.deepcopy(linear)
    with torch.no_grad():
        rounded.weight.copy_(rounded.weight.bfloat16())
    x = torch.randn(64, K).bfloat16()
    assert not torch.equal(linear(x), rounded(x))


def test_parameters_hooks_and_names_are_those_of_the_original() -> None:
    original = nn.Linear(32, 48)
    calls: list[str] = []
    original.register_forward_hook(lambda *_: calls.append("hook"))
    optimizer = torch.optim.SGD(original.parameters(), lr=0.1)
    linear = Float8Linear.from_linear(original.eval(), Float8Config(RECIPES["rowwise"], emulate=True))
    assert linear.weight is original.weight
    assert linear.bias is original.bias
    assert list(linear.state_dict()) == ["weight", "bias"]
    assert not linear.training
    before = linear.weight.detach().clone()
    linear(torch.randn(4, 32)).sum().backward()
    optimizer.step()
    assert calls == ["hook"]
    assert not torch.equal(linear.weight, before)
    linear.bias = None
    assert original.bias is not None
    assert "rowwise, emulated" in repr(linear)


def test_a_weight_tied_to_an_embedding_trains_through_both() -> None:
    embedding = nn.Embedding(48, 32)
    head = nn.Linear(32, 48, bias=False)
    head.weight = embedding.weight
    linear = Float8Linear.from_linear(head, Float8Config(RECIPES["tensorwise"], emulate=True))
    linear(embedding(torch.arange(6))).sum().backward()
    assert linear.weight is embedding.weight
    assert (embedding.weight.grad[40:] != 0).any()


@pytest.mark.parametrize(("k", "n"), [(30, 32), (32, 20)])
def test_dimensions_that_are_no_multiple_of_16_are_refused_by_name(k: int, n: int) -> None:
    with pytest.raises(ValueError, match=f"features={30 if k == 30 else 20} is not a multiple of 16, which tensorwise"):
        Float8Linear.from_linear(nn.Linear(k, n), Float8Config(RECIPES["tensorwise"]))


def test_differentiating_twice_is_an_error() -> None:
    x = torch.randn(4, K, requires_grad=True)
    output = make("tensorwise")(x).square().sum()
    (gradient,) = torch.autograd.grad(output, x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@ALL_RECIPES
@pytest.mark.parametrize("shape", [(16, K), (2, 8, K)], ids=str)
def test_the_output_may_be_changed_in_place(recipe: str, shape: tuple[int, ...]) -> None:
    """As FSDP's hooks and residual additions do; a view made inside an autograd function could not."""
    linear, x = make(recipe), torch.randn(shape)
    plain = run(linear, x, torch.full((*shape[:-1], N), 2.0))
    changed = run(nn.Sequential(linear, Doubling()), x)
    assert torch.equal(changed["output"], 2 * plain["output"])
    assert torch.equal(changed["grad_input"], plain["grad_input"])
    assert torch.equal(changed["grad_0.weight"], plain["grad_weight"])


class Doubling(nn.Module):
    """Doubles its input in place."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mul_(2)
