"""The weight cache: one cast an optimizer step, and never a stale code, by whatever means a weight changes."""

import copy
import gc
import pickle
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.optim import optimizer
from torch.utils.checkpoint import checkpoint

from tests.unit.quantization.test_linear import ALL_RECIPES, K, N, make, run
from tests.unit.quantization.test_ops import CountCalls
from titan_fp8.quantization import ops
from titan_fp8.quantization.linear import Float8Linear
from titan_fp8.quantization.weights import Freshness, cache_weights, mark_stale

WEIGHT_CASTS = (ops.cast_tensor, ops.cast_tensor_both, ops.cast_rows, ops.cast_blocks)


def cached(recipe: str, **config) -> nn.Sequential:
    model = nn.Sequential(make(recipe, **config))
    cache_weights(model, [model[0]])
    return model


def casts_of(shape: tuple[int, ...], call: Callable[[], object]) -> int:
    """How often `call` casts a tensor of this shape."""
    count = 0

    class Count(CountCalls):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal count
            count += func in WEIGHT_CASTS and tuple(args[0].shape) == shape
            return func(*args, **(kwargs or {}))

    with Count():
        call()
    return count


def test_the_columns_are_kept_unless_they_are_to_be_recomputed() -> None:
    for recompute in (False, True):
        model = cached("rowwise", recompute_weight_in_backward=recompute)
        model(torch.randn(4, K))
        assert (model[0].weight_cache.columns is None) == recompute


@ALL_RECIPES
@pytest.mark.parametrize("recompute", [False, True])
def test_a_cached_weight_changes_no_bit(recipe: str, recompute: bool) -> None:
    x, grad_output = torch.randn(24, K), torch.randn(24, N)
    expected = run(make(recipe), x, grad_output)
    result = run(cached(recipe, recompute_weight_in_backward=recompute), x, grad_output)
    for (name, value), other in zip(result.items(), expected.values(), strict=True):
        assert torch.equal(value, other), name


@ALL_RECIPES
def test_a_weight_is_cast_once_a_step_however_often_it_is_used(recipe: str) -> None:
    model = cached(recipe)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def microbatches() -> None:
        for _ in range(3):
            x = torch.randn(24, K, requires_grad=True)
            checkpoint(model, x, use_reentrant=False).sum().backward()
        with torch.no_grad():
            model.eval()(torch.randn(24, K))

    assert casts_of((N, K), microbatches) == 1
    optimizer.step()
    assert casts_of((N, K), microbatches) == 1


def _optimizer(**kwargs) -> Callable[[nn.Module], None]:
    def change(model: nn.Module) -> None:
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, **kwargs)
        model[0].weight.grad = torch.ones_like(model[0].weight)
        optimizer.step()

    return change


def _compiled_step(model: nn.Module) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=torch.tensor(0.1))
    model[0].weight.grad = torch.ones_like(model[0].weight)
    torch.compile(optimizer.step, backend="aot_eager")()


def _data(model: nn.Module) -> None:
    model[0].weight.data.mul_(2)
    mark_stale(model)


def _new_data(model: nn.Module) -> None:
    model[0].weight.data = model[0].weight.data * 2


def _in_place(model: nn.Module) -> None:
    with torch.no_grad():
        model[0].weight.mul_(2)


def _load(model: nn.Module) -> None:
    model.load_state_dict({"0.weight": torch.randn(N, K)})


def _assign(model: nn.Module) -> None:
    model.load_state_dict({"0.weight": torch.randn(N, K)}, assign=True)


def _new_parameter(model: nn.Module) -> None:
    model[0].weight = nn.Parameter(torch.randn(N, K))


CHANGES = {
    "for-loop": _optimizer(foreach=False),
    "foreach": _optimizer(foreach=True),
    "fused": _optimizer(fused=True),
    "compiled": _compiled_step,
    ".data and mark_stale": _data,
    "new .data": _new_data,
    "in place": _in_place,
    "load_state_dict": _load,
    "load_state_dict assign": _assign,
    "new parameter": _new_parameter,
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("compiled", [False, True])
def test_a_changed_weight_is_never_used_stale(change: Callable[[nn.Module], None], compiled: bool) -> None:
    torch._dynamo.reset()
    model = cached("rowwise")
    if compiled:
        model[0].forward = torch.compile(model[0].forward, backend="aot_eager", fullgraph=True)
    x = torch.randn(24, K)
    before = model(x)
    change(model)
    fresh = make("rowwise")
    fresh.load_state_dict({"weight": model[0].weight.detach().clone()})
    after = model(x)
    assert torch.equal(after, fresh(x))
    assert not torch.equal(after, before)


def test_new_memory_at_the_address_of_a_weight_that_has_gone_is_not_taken_for_it() -> None:
    model, x = cached("rowwise"), torch.randn(24, K)
    weight = model[0].weight.detach().clone()
    with torch.no_grad():
        outputs = [torch.func.functional_call(model, {"0.weight": weight * 2.0**n}, (x,)) for n in range(6)]
    for n, output in enumerate(outputs):
        assert torch.equal(output, outputs[0] * 2.0**n)


def test_no_new_storage_is_taken_for_that_of_a_parameter_that_has_gone() -> None:
    freshness, parameter = Freshness(), nn.Parameter(torch.zeros(4, 4))
    freshness.record(parameter)
    gone = parameter.untyped_storage()._cdata
    del parameter
    assert gone not in [storage._cdata for storage in [torch.zeros(4, 4).untyped_storage() for _ in range(1000)]]


def test_a_model_that_was_in_another_dtype_meanwhile_is_not_stale() -> None:
    model, x = cached("rowwise"), torch.randn(24, K)
    for _ in range(6):
        _in_place(model)
        model(x)
        model.bfloat16().float()
        fresh = make("rowwise")
        fresh.load_state_dict({"weight": model[0].weight.detach()})
        assert torch.equal(model(x), fresh(x))


@ALL_RECIPES
@pytest.mark.parametrize("compiled", [False, True])
def test_codes_that_are_cast_in_inference_mode_serve_a_training(recipe: str, compiled: bool) -> None:
    torch._dynamo.reset()
    model, x = cached(recipe), torch.randn(24, K, requires_grad=True)
    called = torch.compile(model, backend="aot_eager") if compiled else model
    with torch.inference_mode():
        expected = called(x)
    result = called(x)
    result.sum().backward()
    assert torch.equal(result, expected)
    assert x.grad is not None


def test_a_compiled_part_that_is_called_before_its_model_says_so() -> None:
    torch._dynamo.reset()
    model = cached("rowwise")
    with pytest.raises(RuntimeError, match="call that model, not a compiled part of it"):
        torch.compile(model[0], backend="aot_eager", fullgraph=True)(torch.randn(24, K))


def _step(model: nn.Module) -> None:
    torch.optim.SGD(model.parameters(), lr=0.1, fused=True).step()


def _step_through_a_view(model: nn.Module) -> None:
    flat = nn.Parameter(model[0].weight.data.view(-1))
    flat.grad = torch.ones_like(flat)
    torch.optim.SGD([flat], lr=0.1).step()


def _load(model: nn.Module) -> None:
    model.load_state_dict({name: value * 2 for name, value in model.state_dict().items()})


@pytest.mark.parametrize("change", [_step, _step_through_a_view, _load, mark_stale])
def test_a_compiled_part_that_is_called_after_a_change_before_its_model_says_so(change: Callable) -> None:
    torch._dynamo.reset()
    model, x = cached("rowwise"), torch.randn(24, K)
    part = torch.compile(model[0], backend="aot_eager", fullgraph=True)
    model(x).sum().backward()
    assert torch.equal(part(x), model(x))
    change(model)
    with pytest.raises(RuntimeError, match="call that model, not a compiled part of it"):
        part(x)
    expected = model(x)
    assert torch.equal(part(x), expected)


@pytest.mark.parametrize("change", [_step, _step_through_a_view, _load, mark_stale])
def test_a_compiled_part_that_may_break_its_graph_casts_after_a_change(change: Callable) -> None:
    torch._dynamo.reset()
    model, x = cached("rowwise"), torch.randn(24, K)
    part = torch.compile(model[0], backend="aot_eager")
    model(x).sum().backward()
    for _ in range(2):
        change(model)
        found = part(x)
        assert torch.equal(found, model(x))


@pytest.mark.parametrize("beside", [False, True])
def test_a_step_of_other_weights_does_not_stop_a_compiled_part(beside: bool) -> None:
    torch._dynamo.reset()
    model, x = cached("rowwise"), torch.randn(24, K)
    part = torch.compile(model[0], backend="aot_eager", fullgraph=True)
    other = nn.Linear(4, 4, bias=False)
    if beside:  # as a framework lays weights out that keeps them in one buffer
        weights = model[0].weight, other.weight
        memory = torch.cat([each.data.flatten() for each in weights])
        for weight, values in zip(weights, memory.split([each.numel() for each in weights]), strict=True):
            weight.data = values.view(weight.shape)
    expected = model(x)
    other.weight.grad = torch.ones(4, 4)
    torch.optim.SGD(other.parameters(), lr=0.1).step()
    assert torch.equal(part(x), expected)


def test_caches_without_a_watch_of_their_own_share_one() -> None:
    pickled = pickle.dumps(cached("rowwise"))
    copies = [pickle.loads(pickled)]
    before = len(optimizer._global_optimizer_post_hooks)
    copies += [pickle.loads(pickled) for _ in range(3)]
    assert len(optimizer._global_optimizer_post_hooks) == before
    for model in copies:
        x = torch.randn(24, K)
        model(x).sum().backward()
        _step(model)
        fresh = make("rowwise")
        fresh.load_state_dict({"weight": model[0].weight.detach()})
        assert torch.equal(model(x), fresh(x))


def test_a_compiled_model_casts_outside_of_the_graph_and_is_never_stale() -> None:
    torch._dynamo.reset()
    model = cached("tensorwise")
    compiled = torch.compile(model, backend="aot_eager")
    x = torch.randn(24, K)
    for _ in range(3):
        _in_place(model)
        fresh = make("tensorwise")
        fresh.load_state_dict({"weight": model[0].weight.detach()})
        assert torch.equal(compiled(x), fresh(x))


def test_refreshing_does_not_recompile() -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    model = nn.Sequential(*(make("tensorwise", K, K) for _ in range(3)))
    cache_weights(model, model)
    for linear in model:
        linear.forward = torch.compile(linear.forward, backend=counter, fullgraph=True)
    for _ in range(4):
        model(torch.randn(24, K)).sum().backward()
        _in_place(model)
    assert counter.frame_count <= 2


def test_a_backward_pass_uses_the_weight_of_its_forward_pass() -> None:
    model = cached("rowwise")
    x = torch.randn(24, K, requires_grad=True)
    output = model(x)
    expected = torch.autograd.grad(output.sum(), x, retain_graph=True)[0]
    mark_stale(model)
    model(x.detach())
    assert torch.equal(torch.autograd.grad(output.sum(), x)[0], expected)


def test_linears_that_share_a_weight_share_its_codes() -> None:
    a, b = make("rowwise"), make("rowwise")
    b.weight = a.weight
    model = nn.ModuleList([a, b])
    cache_weights(model, [a, b])
    assert casts_of((N, K), lambda: (a(torch.randn(4, K)), b(torch.randn(4, K)))) == 1


def test_a_copy_of_a_model_has_codes_of_its_own_weight() -> None:
    model = cached("rowwise")
    x = torch.randn(4, K)
    model(x)
    other = copy.deepcopy(model)
    for change in (_in_place, CHANGES["fused"]):
        other(x)
        change(other)
        fresh = make("rowwise")
        fresh.load_state_dict({"weight": other[0].weight.detach()})
        assert torch.equal(other(x), fresh(x))
        assert not torch.equal(other(x), model(x))
    assert isinstance(other[0], Float8Linear)


def test_a_pickled_model_is_never_stale_either() -> None:
    model = pickle.loads(pickle.dumps(cached("rowwise")))
    x = torch.randn(4, K)
    model(x)
    CHANGES["fused"](model)
    fresh = make("rowwise")
    fresh.load_state_dict({"weight": model[0].weight.detach()})
    assert torch.equal(model(x), fresh(x))


def test_hooks_on_optimizers_go_with_the_model() -> None:
    gc.collect()
    before = len(optimizer._global_optimizer_post_hooks)
    model = cached("rowwise")
    assert len(optimizer._global_optimizer_post_hooks) == before + 1
    del model
    gc.collect()
    assert len(optimizer._global_optimizer_post_hooks) == before


def test_a_model_with_cached_weights_is_freed() -> None:
    model = cached("rowwise")
    model(torch.randn(4, K))
    alive = weakref.ref(model[0].weight_cache)
    del model
    gc.collect()
    assert alive() is None


def test_gradients_of_a_cached_weight_are_those_of_the_parameter() -> None:
    model = cached("tensorwise")
    x = torch.randn(24, K)
    result: dict[str, Tensor] = run(model, x)
    assert result["grad_0.weight"].shape == (N, K)
