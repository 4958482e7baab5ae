"""The optimizer container: implementations agree, bad steps leave no trace, the state is complete and portable."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from titan_fp8.optim import OptimizersContainer, build_optimizer
from titan_fp8.optim.config import OptimizerSection
from titan_fp8.optim.one_pass import OnePassAdamW
from titan_fp8.runtime.errors import UserError

IMPLEMENTATIONS = ["for-loop", "foreach", "fused", "one_pass"]


class TiedModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tok_embeddings = nn.Embedding(6, 4)
        self.norm = nn.LayerNorm(4)
        self.output = nn.Linear(4, 6, bias=False)
        self.output.weight = self.tok_embeddings.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.output(self.norm(self.tok_embeddings(tokens)))


def _model(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 2))


def _build(model: nn.Module, **keys: Any) -> OptimizersContainer:
    return build_optimizer([model], OptimizerSection(lr=0.05, weight_decay=0.1, **keys))


def _backward(model: nn.Module, seed: int) -> None:
    torch.manual_seed(seed)
    model(torch.randn(4, 3)).square().sum().backward()


def _train(model: nn.Module, optimizers: OptimizersContainer, seeds: range) -> None:
    for seed in seeds:
        _backward(model, seed)
        optimizers.step()
        optimizers.zero_grad()


def _snapshot(model: nn.Module, optimizers: OptimizersContainer) -> dict[str, Tensor]:
    return {k: v.detach().clone() for k, v in {**model.state_dict(), **optimizers.state_dict()}.items()}


def _assert_equal(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert left.keys() == right.keys()
    for key in left:
        assert torch.equal(left[key], right[key]), key


@pytest.mark.parametrize(("name", "reference"), [("Adam", torch.optim.Adam), ("AdamW", torch.optim.AdamW)])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_update_is_that_of_torch(name: str, reference: Callable[..., Any], implementation: str) -> None:
    model, plain = _model(), _model()
    optimizers = _build(model, name=name, implementation=implementation, beta1=0.8, beta2=0.9, eps=1e-6)
    expected = reference(plain.parameters(), lr=0.05, betas=(0.8, 0.9), eps=1e-6, weight_decay=0.1, foreach=False)
    for seed in range(3):
        _backward(model, seed)
        optimizers.step()
        optimizers.zero_grad()
        _backward(plain, seed)
        expected.step()
        expected.zero_grad()
    for left, right in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(left, right)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_implementation_is_the_one_asked_for(implementation: str) -> None:
    optimizers = _build(_model(), implementation=implementation)
    group = optimizers.param_groups[0]
    fused = implementation in ("fused", "one_pass")
    assert (group["foreach"], group["fused"]) == (implementation == "foreach", fused)
    assert {isinstance(each, OnePassAdamW) for each in optimizers} == {implementation == "one_pass"}


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", ["Adam", "AdamW"])
def test_skipped_step_changes_neither_parameters_nor_state(name: str, implementation: str) -> None:
    model = _model()
    optimizers = _build(model, name=name, implementation=implementation)
    _train(model, optimizers, range(2))
    before = _snapshot(model, optimizers)
    _backward(model, 2)
    next(model.parameters()).grad.fill_(float("nan"))
    optimizers.step(skip=torch.tensor(True))
    _assert_equal(_snapshot(model, optimizers), before)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_run_with_a_skipped_step_equals_the_run_without_it(implementation: str) -> None:
    model, other = _model(), _model()
    optimizers, others = _build(model, implementation=implementation), _build(other, implementation=implementation)
    _train(model, optimizers, range(1))
    _backward(model, 7)
    optimizers.step(skip=torch.tensor(1.0))
    optimizers.zero_grad()
    for skip in (torch.tensor(False), None):
        _backward(model, 1)
        optimizers.step(skip=skip)
        optimizers.zero_grad()
    _train(other, others, range(1))
    _train(other, others, range(1, 2))
    _train(other, others, range(1, 2))
    _assert_equal(_snapshot(model, optimizers), _snapshot(other, others))


def test_skip_before_the_first_step_leaves_the_step_count_at_zero() -> None:
    model = _model()
    optimizers = _build(model)
    _backward(model, 0)
    optimizers.step(skip=torch.tensor(True))
    assert optimizers.state_dict()["state.0.weight.step"] == 0


def test_post_step_hooks_run_in_order_after_the_update_and_after_a_skip() -> None:
    model = _model()
    optimizers = _build(model)
    seen: list[Any] = []
    optimizers.add_post_step_hook(lambda: seen.append(next(model.parameters()).detach().clone()))
    optimizers.add_post_step_hook(lambda: seen.append("second"))
    before = next(model.parameters()).detach().clone()
    _backward(model, 0)
    optimizers.step()
    optimizers.step(skip=torch.tensor(True))
    assert len(seen) == 4
    assert not torch.equal(seen[0], before)
    assert seen[1] == "second"
    assert torch.equal(seen[2], seen[0])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_stepping_in_backward_gives_the_same_run(implementation: str) -> None:
    model, other = _model(), _model()
    early = _build(model, implementation=implementation, early_step_in_backward=True)
    late = _build(other, implementation=implementation)
    _train(model, early, range(3))
    _train(other, late, range(3))
    assert len(early) == 4
    _assert_equal(_snapshot(model, early), _snapshot(other, late))


def test_gradients_are_freed_during_a_backward_that_steps() -> None:
    model = _model()
    _build(model, early_step_in_backward=True)
    _backward(model, 0)
    assert all(p.grad is None for p in model.parameters())


def test_norm_of_gradients_that_backward_dropped_is_that_of_gradients_that_were_kept() -> None:
    model, other = _model(), _model()
    early, late = _build(model, early_step_in_backward=True), _build(other)
    for seed in range(2):
        _backward(model, seed)
        _backward(other, seed)
        norms = early.clip_grad_norm(0), late.clip_grad_norm(0)
        torch.testing.assert_close(*norms)
        assert norms[0] > 0
        early.step()
        late.step()
        late.zero_grad()


def test_skipping_is_refused_when_backward_has_already_stepped() -> None:
    with pytest.raises(UserError, match="early_step_in_backward"):
        _build(_model(), early_step_in_backward=True).step(skip=torch.tensor(False))


@pytest.mark.parametrize("early", [False, True])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_state_carries_a_run_over_bit_for_bit(implementation: str, early: bool) -> None:
    model = _model()
    optimizers = _build(model, implementation=implementation, early_step_in_backward=early)
    _train(model, optimizers, range(2))
    resumed = _model(seed=9)
    resumed.load_state_dict(copy.deepcopy(model.state_dict()))
    others = _build(resumed, implementation=implementation, early_step_in_backward=not early)
    others.load_state_dict(copy.deepcopy(optimizers.state_dict()))
    _train(model, optimizers, range(2, 4))
    _train(resumed, others, range(2, 4))
    _assert_equal(_snapshot(resumed, others), _snapshot(model, optimizers))


def test_state_before_the_first_step_counts_no_step_and_changes_nothing() -> None:
    model, other = _model(), _model()
    optimizers, others = _build(model), _build(other)
    state = optimizers.state_dict()
    assert all(value.count_nonzero() == 0 for value in state.values())
    _train(model, optimizers, range(2))
    _train(other, others, range(2))
    _assert_equal(_snapshot(model, optimizers), _snapshot(other, others))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_state_made_ahead_of_a_step_is_what_the_step_would_make(implementation: str) -> None:
    model, other = _model(), _model()
    optimizers, others = _build(model, implementation=implementation), _build(other, implementation=implementation)
    optimizers.create_state()
    _backward(other, 0)
    others.step()
    for ahead, made in zip(optimizers, others, strict=True):
        for left, right in zip(ahead.state.values(), made.state.values(), strict=True):
            assert list(left) == list(right)
            for key in left:
                assert (left[key].dtype, left[key].shape) == (right[key].dtype, right[key].shape)


def test_state_names_every_parameter_also_one_that_had_no_gradient_yet() -> None:
    model = _model()
    optimizers = _build(model)
    model[0](torch.ones(1, 3)).sum().backward()
    optimizers.step()
    assert optimizers.state_dict()["state.1.bias.step"] == 0
    assert optimizers.state_dict()["state.0.bias.step"] == 1


def test_hyperparameters_come_from_the_configuration_and_not_from_the_state() -> None:
    optimizers = _build(_model(), implementation="fused")
    other = build_optimizer([_model()], OptimizerSection(lr=0.5, weight_decay=0.2, implementation="foreach"))
    other.load_state_dict(optimizers.state_dict())
    group = other.param_groups[0]
    assert (group["lr"], group["weight_decay"], group["foreach"], group["fused"]) == (0.5, 0.2, True, False)


def test_an_update_that_would_divide_by_zero_is_refused() -> None:
    assert OptimizerSection(eps=1e-30).eps == 1e-30
    with pytest.raises(ValidationError, match="greater than 0"):
        OptimizerSection(eps=0)


def test_tied_weight_is_optimized_once_and_has_one_state() -> None:
    model = TiedModel()
    optimizers = _build(model)
    keys = optimizers.state_dict().keys()
    assert {key for key in keys if key.endswith("exp_avg")} == {
        "state.tok_embeddings.weight.exp_avg",
        "state.norm.weight.exp_avg",
        "state.norm.bias.exp_avg",
    }
    other = _build(TiedModel())
    model(torch.tensor([1, 2])).sum().backward()
    optimizers.step()
    other.load_state_dict(optimizers.state_dict())
    _assert_equal(other.state_dict(), optimizers.state_dict())


def test_frozen_parameters_are_left_out() -> None:
    model = _model()
    model[0].requires_grad_(False)
    assert {key.split(".")[1] for key in _build(model).state_dict()} == {"1"}


def test_two_model_parts_share_one_state() -> None:
    parts = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)})
    first, second = nn.ModuleDict({"a": parts["a"]}), nn.ModuleDict({"b": parts["b"]})
    optimizers = build_optimizer([first, second], OptimizerSection())
    whole = build_optimizer([parts], OptimizerSection())
    assert optimizers.state_dict().keys() == whole.state_dict().keys()
    whole.load_state_dict(optimizers.state_dict())


def test_state_of_another_model_is_refused_with_all_names() -> None:
    optimizers = _build(_model())
    state = optimizers.state_dict()
    state["state.2.weight.exp_avg"] = state.pop("state.1.weight.exp_avg")
    with pytest.raises(UserError, match=r"missing \['state.1.weight.exp_avg'\].*\['state.2.weight.exp_avg'\]"):
        optimizers.load_state_dict(state)


def test_nothing_to_optimize_is_an_error() -> None:
    with pytest.raises(UserError, match="no parameter"):
        _build(_model().requires_grad_(False))
