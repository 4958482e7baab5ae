"""Linears that read one input, as one function: outputs and every gradient are those of the linears called one by one;
after a norm, nothing of the input is kept in codes, and each reader's gradient reaches the norm by itself."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from tests.unit.quantization.test_linear import make
from titan_fp8.quantization import producer_ops
from titan_fp8.quantization.casts import as_matrix
from titan_fp8.quantization.linear import Float8Linear
from titan_fp8.quantization.norm import rms_norm
from titan_fp8.quantization.recipes import RECIPES
from titan_fp8.quantization.shared_input import share_input
from titan_fp8.runtime.deferred import DeferredWeights

FULLY_FLOAT8 = pytest.mark.parametrize("recipe", [name for name, r in RECIPES.items() if r.grad_weight_in_float8])
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
K, SIZES = 128, (256, 128, 128)


def linears(recipe: str, **config) -> list[Float8Linear]:
    made = [make(recipe, K, size, **config) for size in SIZES]
    with torch.no_grad():
        for number, linear in enumerate(made):
            linear.weight.mul_(number + 1)
    return made


def leaf(dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_()


def gradients(dtype: torch.dtype, *shape: int) -> list[Tensor]:
    return [torch.randn(*shape, size).to(dtype) * 10**number for number, size in enumerate(SIZES)]


@FULLY_FLOAT8
@DTYPES
@pytest.mark.parametrize("settings", [{}, {"grad_weight_dtype": torch.float32}, {"recompute_weight_in_backward": True}])
def test_outputs_and_gradients_are_those_of_the_linears_called_one_by_one(
    recipe: str, dtype: torch.dtype, settings: dict
) -> None:
    readers = linears(recipe, **settings)
    x, grads = leaf(dtype, 2, 9, K), gradients(dtype, 2, 9)
    leaves = (x, *(reader.weight for reader in readers))
    together, alone = share_input(x, readers), [reader(x) for reader in readers]
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(together, alone, strict=True))
    ours = torch.autograd.grad(together, leaves, grads)
    theirs = [torch.autograd.grad(output, (x, reader.weight), grad)
              for output, reader, grad in zip(alone, readers, grads, strict=True)]  # fmt: skip
    of_x = [pair[0] for pair in theirs]
    assert torch.equal(ours[0], of_x[0] + of_x[1] + of_x[2])
    for result, (_, expected), reader in zip(ours[1:], theirs, readers, strict=True):
        assert result.dtype == reader.weight.dtype
        assert torch.equal(result, expected)


@FULLY_FLOAT8
@DTYPES
@pytest.mark.parametrize("needed", [(True, True, True), (False, True, False), (False, False, False)])
def test_after_a_norm_the_gradients_of_weights_keep_their_bits(
    recipe: str, dtype: torch.dtype, needed: tuple[bool, bool, bool]
) -> None:
    readers = linears(recipe)
    for reader, is_needed in zip(readers, needed, strict=True):
        reader.weight.requires_grad_(is_needed)
    x, scale, grads = leaf(dtype, 2, 9, K), (torch.rand(K) + 0.5).requires_grad_(), gradients(dtype, 2, 9)
    weights = [reader.weight for reader in readers if reader.weight.requires_grad]
    results = []
    for count in (3, 1):  # made later by one function for all; made at once, each linear by itself
        normed = rms_norm(x, scale, 1e-5, RECIPES[recipe], columns=any(needed), emit=False, readers=count)
        outputs = share_input(normed, readers) if count == 3 else [reader(normed) for reader in readers]
        results.append((outputs, torch.autograd.grad(outputs, (*weights, x, scale), grads)))
    for ours, theirs in zip(results[0][0], results[1][0], strict=True):
        assert torch.equal(ours, theirs)
    of_weights = len(weights)
    for ours, theirs in zip(results[0][1][:of_weights], results[1][1][:of_weights], strict=True):
        assert torch.equal(ours, theirs)
    for ours, theirs in zip(results[0][1][of_weights:], results[1][1][of_weights:], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2**-6, atol=float(theirs.abs().max()) / 200)


@FULLY_FLOAT8
def test_the_norm_sums_what_its_readers_give_before_it_rounds(recipe: str) -> None:
    readers = linears(recipe)
    x, scale, grads = leaf(torch.bfloat16, 18, K), torch.ones(K, requires_grad=True), gradients(torch.bfloat16, 18)
    normed = rms_norm(x, scale, 1e-5, RECIPES[recipe], columns=True, emit=False, readers=3)
    outputs = share_input(normed, readers)
    parts = torch.autograd.grad(outputs, normed.values, grads, retain_graph=True)
    (grad_x,) = torch.autograd.grad(outputs, x, grads)
    exact = x.detach().double().requires_grad_()
    total = torch.stack([part.double() for part in parts]).sum(0)
    (expected,) = torch.autograd.grad(F.rms_norm(exact, (K,), scale.detach().double(), 1e-5), exact, total)
    slack = 2.0**-18 * expected.abs().max()
    assert ((grad_x.double() - expected).abs() <= 2**-8 * expected.abs() + slack).all()


@FULLY_FLOAT8
def test_columns_are_made_once_for_all_readers(recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    op = producer_ops.norm_columns
    monkeypatch.setattr(producer_ops, "norm_columns", lambda *a: calls.append(a) or op(*a))
    readers = linears(recipe)
    x = leaf(torch.bfloat16, 18, K)
    normed = rms_norm(x, torch.ones(K), 1e-5, RECIPES[recipe], columns=True, emit=False, readers=3)
    outputs = share_input(normed, readers)
    assert calls == []
    torch.autograd.backward(outputs, gradients(torch.bfloat16, 18))
    assert len(calls) == 1


@FULLY_FLOAT8
def test_a_linear_by_itself_takes_an_input_whose_columns_come_later(recipe: str) -> None:
    reader, *_ = linears(recipe)
    x, grad = leaf(torch.bfloat16, 18, K), gradients(torch.bfloat16, 18)[0]
    results = []
    for count in (3, 1):
        normed = rms_norm(x, torch.ones(K), 1e-5, RECIPES[recipe], columns=True, emit=False, readers=count)
        results.append(torch.autograd.grad(reader(normed), (x, reader.weight), grad))
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*results, strict=True))


@FULLY_FLOAT8
@pytest.mark.parametrize("used", [(0,), (1, 2)])
def test_outputs_that_nobody_uses_cost_their_weights_nothing(recipe: str, used: tuple[int, ...]) -> None:
    readers, x = linears(recipe), leaf(torch.bfloat16, 18, K)
    outputs, grads = share_input(x, readers), gradients(torch.bfloat16, 18)
    torch.autograd.backward([outputs[number] for number in used], [grads[number] for number in used])
    assert [number for number, reader in enumerate(readers) if reader.weight.grad is not None] == list(used)
    expected = [torch.autograd.grad(readers[number](x), x, grads[number])[0] for number in used]
    assert x.grad is not None
    assert torch.equal(x.grad, sum(expected[1:], expected[0]))


@FULLY_FLOAT8
@pytest.mark.parametrize("tokens", [0, 1, 17])
def test_any_number_of_tokens(recipe: str, tokens: int) -> None:
    readers, x = linears(recipe), leaf(torch.bfloat16, tokens, K)
    normed = rms_norm(x, torch.ones(K), 1e-5, RECIPES[recipe], columns=True, emit=False, readers=3)
    outputs = share_input(normed, readers)
    torch.autograd.backward(outputs, [torch.ones_like(output) for output in outputs])
    assert [output.shape for output in outputs] == [(tokens, size) for size in SIZES]
    for tensor in (x, *(reader.weight for reader in readers)):
        assert tensor.grad is not None
        assert tensor.grad.isfinite().all()


def test_sinks_get_the_products_of_the_weights_gradients() -> None:
    readers, x = linears("rowwise"), leaf(torch.bfloat16, 18, K)
    grads = gradients(torch.bfloat16, 18)
    expected = torch.autograd.grad(share_input(x, readers), [reader.weight for reader in readers], grads)
    queue = DeferredWeights()
    for reader in readers:
        reader.weight_sink = queue.sink_of(reader)
    torch.autograd.backward(share_input(x, readers), grads)
    assert all(reader.weight.grad is None for reader in readers)
    queue.take()()
    queue.flush()
    for reader, gradient in zip(readers, expected, strict=True):
        assert reader.weight.grad is not None
        assert torch.equal(reader.weight.grad, gradient)


def test_differentiating_twice_is_an_error() -> None:
    readers, x = linears("rowwise"), leaf(torch.float32, 20, K)
    outputs = share_input(x, readers)
    ones = [torch.ones_like(output, requires_grad=True) for output in outputs]
    (gradient,) = torch.autograd.grad(outputs, x, ones, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        as_matrix(gradient).sum().backward()


@FULLY_FLOAT8
def test_backward_may_run_twice(recipe: str) -> None:
    readers, x, grads = linears(recipe), leaf(torch.bfloat16, 18, K), gradients(torch.bfloat16, 18)
    normed = rms_norm(x, torch.ones(K), 1e-5, RECIPES[recipe], columns=True, emit=False, readers=3)
    outputs, leaves = share_input(normed, readers), (x, *(reader.weight for reader in readers))
    first = torch.autograd.grad(outputs, leaves, grads, retain_graph=True)
    second = torch.autograd.grad(outputs, leaves, grads)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(first, second, strict=True))
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(outputs, leaves, grads)


@pytest.mark.parametrize("recipe", ["tensorwise", "rowwise"])
def test_the_first_pass_of_checkpointing_keeps_no_largest_values_and_changes_no_bit(recipe: str) -> None:
    readers, x, grads = linears(recipe), leaf(torch.bfloat16, 18, K), gradients(torch.bfloat16, 18)

    def project(x: Tensor) -> tuple[Tensor, ...]:
        normed = rms_norm(x, torch.ones(K), 1e-5, RECIPES[recipe], columns=True, emit=False, readers=3)
        return share_input(normed, readers)

    leaves = (x, *(reader.weight for reader in readers))
    expected = torch.autograd.grad(project(x), leaves, grads)
    results = torch.autograd.grad(checkpoint(project, x, use_reentrant=False), leaves, grads)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(results, expected, strict=True))


@FULLY_FLOAT8
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("after_a_norm", [True, False])
def test_compiled_equals_eager_bit_for_bit(recipe: str, backend: str, after_a_norm: bool) -> None:
    torch._dynamo.reset()
    readers, x, grads = linears(recipe), leaf(torch.bfloat16, 18, K), gradients(torch.bfloat16, 18)
    scale = torch.rand(K) + 0.5

    def project(x: Tensor) -> tuple[Tensor, ...]:
        if not after_a_norm:
            return share_input(x * 2, readers)
        normed = rms_norm(x, scale, 1e-5, RECIPES[recipe], columns=True, emit=False, readers=3)
        return share_input(normed, readers)

    leaves = (x, *(reader.weight for reader in readers))
    expected = torch.autograd.grad(project(x), leaves, grads)
    compiled = torch.compile(project, fullgraph=True, backend=backend)
    results = torch.autograd.grad(compiled(x), leaves, grads)
    if not after_a_norm and backend == "inductor":  # which adds up the parts of a tensor's gradient in fp32
        torch.testing.assert_close(results[0], expected[0], rtol=2**-6, atol=float(expected[0].abs().max()) / 100)
        results, expected = results[1:], expected[1:]
    for ours, theirs in zip(results, expected, strict=True):
        assert torch.equal(ours, theirs)
