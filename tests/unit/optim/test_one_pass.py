"""Adam and AdamW in one pass: torch's update to a few units in the last place, with the clipping inside."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from tests.tolerances import ADAM_ULPS, ulps
from titan_fp8.kernels import adam, float8
from titan_fp8.optim import build_optimizer, clip_grad_norm_
from titan_fp8.optim.clipping import clip_factor
from titan_fp8.optim.config import OptimizerSection
from titan_fp8.optim.one_pass import OnePassAdam, OnePassAdamW
from titan_fp8.quantization.casts import cast_weight
from titan_fp8.quantization.recipes import RECIPES
from titan_fp8.quantization.shard_cast import ShardAxis
from titan_fp8.quantization.sharded_weight import ShardableFloat8Weight, refresh
from titan_fp8.quantization.weight_state import Float8WeightState
from titan_fp8.quantization.weights import mark_stepped

PAIRS = [(OnePassAdam, torch.optim.Adam), (OnePassAdamW, torch.optim.AdamW)]
OPTIONS: dict[str, Any] = {"lr": 0.03, "betas": (0.85, 0.97), "eps": 1e-7, "weight_decay": 0.1}


def _parameters(dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    torch.manual_seed(0)
    return [nn.Parameter(torch.randn(shape).to(dtype)) for shape in ((33, 7), (5,), (), (64, 3))]


def _give_gradients(parameters: list[nn.Parameter], seed: int) -> None:
    torch.manual_seed(seed)
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter) * 10.0 ** (seed % 5 - 2)


@pytest.mark.parametrize(("ours", "theirs"), PAIRS)
def test_a_step_is_torchs_to_a_few_ulps_at_every_count(ours: type, theirs: type) -> None:
    left, right = _parameters(), _parameters()
    optimizer, expected = ours(left, **OPTIONS), theirs(right, **OPTIONS, foreach=False)
    for seed in range(30):
        for p, q in zip(left, right, strict=True):  # so that differences of earlier steps do not add up
            p.data.copy_(q)
            for key, value in expected.state[q].items():
                optimizer.state[p][key].copy_(value)
        before = [{"weight": q.detach().clone(), **copy.deepcopy(expected.state[q])} for q in right]
        for parameters, each in ((left, optimizer), (right, expected)):
            _give_gradients(parameters, seed)
            each.step()
        for p, q, old in zip(left, right, before, strict=True):
            assert ulps(p, q, old["weight"]) <= ADAM_ULPS
            assert optimizer.state[p].keys() == expected.state[q].keys()
            for key, value in expected.state[q].items():
                assert optimizer.state[p][key].dtype == value.dtype
                assert ulps(optimizer.state[p][key], value, old.get(key, value)) <= ADAM_ULPS


@pytest.mark.parametrize("ours", [OnePassAdam, OnePassAdamW])
def test_bf16_weights_are_those_of_fp32_rounded_once(ours: type) -> None:
    half, whole = _parameters(torch.bfloat16), [nn.Parameter(p.detach().float()) for p in _parameters(torch.bfloat16)]
    optimizers = ours(half, **OPTIONS), ours(whole, **OPTIONS)
    _give_gradients(half, 3)
    for p, q in zip(half, whole, strict=True):
        q.grad = p.grad.float()
    for each in optimizers:
        each.step()
    for p, q in zip(half, whole, strict=True):
        assert torch.equal(p, q.bfloat16())


def test_a_learning_rate_may_be_a_tensor_and_constants_belong_to_the_group() -> None:
    left, right = _parameters(), _parameters()
    plain = [{"params": right[:2], "lr": 0.5}, {"params": right[2:], "betas": (0.5, 0.6)}]
    groups = [{"params": left[:2], "lr": torch.tensor(0.5)}, {"params": left[2:], "betas": (0.5, 0.6)}]
    for parameters, each in (
        (left, OnePassAdamW(groups, **OPTIONS)),
        (right, torch.optim.AdamW(plain, **OPTIONS, foreach=False)),
    ):
        _give_gradients(parameters, 1)
        each.step()
    before = _parameters()
    assert max(ulps(p, q, old) for p, q, old in zip(left, right, before, strict=True)) <= ADAM_ULPS


def test_the_clip_factor_is_that_of_one_step_and_leaves_gradients_alone() -> None:
    left, right = _parameters(), _parameters()
    optimizer, expected = OnePassAdamW(left, **OPTIONS), torch.optim.AdamW(right, **OPTIONS, foreach=False)
    for seed in (3, 4):
        _give_gradients(left, seed)
        _give_gradients(right, seed)
        before, gradients = [p.detach().clone() for p in left], [p.grad.clone() for p in left]
        if seed == 3:
            norm = clip_grad_norm_(right, 0.5)
            assert norm > 0.5
            optimizer.clip = clip_factor(norm, 0.5)
        optimizer.step()
        expected.step()
        assert optimizer.clip is None
        assert all(torch.equal(p.grad, g) for p, g in zip(left, gradients, strict=True))
        assert max(ulps(p, q, old) for p, q, old in zip(left, right, before, strict=True)) <= ADAM_ULPS


def _containers() -> list[tuple[list[nn.Module], Any]]:
    """A model and its optimizers, in one pass and torch's own."""
    made = []
    for implementation in ("one_pass", "fused"):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 3))
        made.append((model, build_optimizer([model], OptimizerSection(lr=0.1, implementation=implementation))))
    return made


@pytest.mark.parametrize("max_norm", [0.0, 0.01, 100.0])
def test_a_container_clips_in_the_step(max_norm: float) -> None:
    (left, ours), (right, theirs) = _containers()
    for seed in range(3):
        norms = []
        for model, optimizers in ((left, ours), (right, theirs)):
            torch.manual_seed(seed)
            model(torch.randn(4, 6)).square().sum().backward()
            norms.append(optimizers.clip_grad_norm(max_norm))
            optimizers.step(skip=~norms[-1].isfinite())
            optimizers.zero_grad()
        torch.testing.assert_close(*norms)
    for p, q in zip(left.parameters(), right.parameters(), strict=True):
        torch.testing.assert_close(p, q)
    with pytest.raises(ValueError, match="must be at least 0"):
        ours.clip_grad_norm(-1.0)


def test_gradients_that_are_dropped_take_their_clip_factor_along() -> None:
    (model, ours), _ = _containers()
    model(torch.ones(4, 6)).sum().backward()
    ours.clip_grad_norm(1e-6)
    assert ours._clip is not None
    ours.zero_grad()
    assert ours._clip is None


def test_the_state_of_torchs_optimizer_carries_over_and_back() -> None:
    (left, ours), (right, theirs) = _containers()
    for source, optimizers, target, others in ((right, theirs, left, ours), (left, ours, right, theirs)):
        source(torch.ones(4, 6)).sum().backward()
        optimizers.step()
        target.load_state_dict(source.state_dict())
        others.load_state_dict({key: value.clone() for key, value in optimizers.state_dict().items()})
        for model, each in ((source, optimizers), (target, others)):
            each.zero_grad()
            model(torch.linspace(-1, 1, 24).view(4, 6)).square().sum().backward()
            each.step()
            each.zero_grad()
        for key, value in optimizers.state_dict().items():
            torch.testing.assert_close(others.state_dict()[key], value)


def test_a_weight_made_for_the_float8_all_gather_is_seen_to_change() -> None:
    state = Float8WeightState(RECIPES["tensorwise"], caches=True)
    weight = nn.Parameter(ShardableFloat8Weight(torch.randn(16, 16), state))
    optimizer = OnePassAdamW([weight], **OPTIONS)
    weight.grad = torch.randn(16, 16)
    before, contents = weight.tensor.clone(), weight.contents.value
    optimizer.step()
    assert not torch.equal(weight.tensor, before)
    assert weight.contents.value is not contents


def _float8_weight(recipe: str = "tensorwise") -> tuple[ShardableFloat8Weight, OnePassAdamW]:
    torch.manual_seed(0)
    parameter = nn.Parameter(
        ShardableFloat8Weight(torch.randn(16, 32), Float8WeightState(RECIPES[recipe], caches=True))
    )
    parameter.grad = torch.randn(16, 32)
    assert isinstance(parameter, ShardableFloat8Weight)
    return parameter, OnePassAdamW([parameter], **OPTIONS)


def _cast(weight: ShardableFloat8Weight) -> list[Tensor]:
    refresh([weight], [weight.shape], ShardAxis(None, 0, 1), ahead=True)
    assert weight.state.codes is not None
    assert weight.state.scale is not None
    return [weight.state.codes.clone(), weight.state.scale.clone()]


@pytest.mark.parametrize("skip", [None, 0.0, 1.0])
def test_the_cast_after_a_step_is_told_the_largest_value(monkeypatch: pytest.MonkeyPatch, skip: float | None) -> None:
    weight, optimizer = _float8_weight()
    for _ in range(2):
        if skip is not None:
            optimizer.found_inf = torch.tensor(skip)
        optimizer.step()
        expected = cast_weight(weight.tensor, weight.state.recipe)
        with monkeypatch.context() as patched:
            patched.setattr(float8, "amax", None)  # nobody reads the weight for it
            codes, scale = _cast(weight)
        assert torch.equal(codes, expected.codes.view(torch.uint8))
        assert torch.equal(scale, expected.scale)


WRITES: dict[str, Callable[[ShardableFloat8Weight], Any]] = {
    "operator": lambda weight: weight.mul_(3),
    "data": lambda weight: weight.data.mul_(3),
    "plain tensor": lambda weight: weight.tensor.mul_(3),
    "unseen": lambda weight: (weight.tensor.numpy().__imul__(3), weight.state.mark_stale()),
    "another optimizer": lambda weight: torch.optim.SGD([weight], lr=3.0).step(),
}


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("is_cast_between", [False, True])
def test_what_was_told_is_forgotten_with_the_next_write(write: str, is_cast_between: bool) -> None:
    weight, optimizer = _float8_weight()
    optimizer.step()
    before = _cast(weight)[1] if is_cast_between else None
    with torch.no_grad():
        WRITES[write](weight)
    expected = cast_weight(weight.tensor, weight.state.recipe)
    codes, scale = _cast(weight)
    assert torch.equal(codes, expected.codes.view(torch.uint8))
    assert torch.equal(scale, expected.scale)
    assert before is None or not torch.equal(scale, before)


def test_a_gather_that_comes_later_looks_for_itself() -> None:
    weight, optimizer = _float8_weight()
    optimizer.step()
    weight.tensor.numpy().__imul__(3)  # seen by nothing
    refresh([weight], [weight.shape], ShardAxis(None, 0, 1), ahead=False)
    expected = cast_weight(weight.tensor, weight.state.recipe)
    assert weight.state.scale is not None
    assert torch.equal(weight.state.scale, expected.scale)


@pytest.mark.parametrize("is_told", [False, True])
def test_marking_after_a_step_forgets_all_but_what_that_step_told(is_told: bool) -> None:
    weight, optimizer = _float8_weight()
    linear = nn.Linear(32, 16, bias=False)
    linear.weight, linear.fsdp_weight_state = weight, weight.state
    optimizer.step()
    if not is_told:
        mark_stepped([linear])
        _cast(weight)
    mark_stepped([linear])
    assert (weight.state.amax_of(weight) is not None) == is_told
    assert not weight.state.is_fresh(weight)


@pytest.mark.parametrize("recipe", ["rowwise", "blockwise"])
def test_weights_with_more_scales_than_one_are_told_nothing(recipe: str) -> None:
    weight, optimizer = _float8_weight(recipe)
    optimizer.step()
    assert weight.state.amax_of(weight) is None


def test_hooks_of_optimizers_run() -> None:
    (parameter, *_) = _parameters()
    optimizer = OnePassAdamW([parameter], **OPTIONS)
    calls = []
    optimizer.register_step_post_hook(lambda *_: calls.append("own"))
    handle = register_optimizer_step_post_hook(lambda *_: calls.append("global"))
    try:
        assert optimizer.step(lambda: 3.0) == 3.0
    finally:
        handle.remove()
    assert sorted(calls) == ["global", "own"]


def test_shapes_and_strides_that_do_not_fit_are_refused() -> None:
    good, factors = torch.zeros(4, 6), torch.zeros(4)
    constants = adam.Constants(0.9, 0.95, 1e-8, 0.1, decoupled=True)
    for bad in (torch.zeros(6, 4), torch.zeros(6, 4).t()):
        with pytest.raises(ValueError, match="expected contiguous tensors of one shape"):
            adam.update(good, bad, good, good, factors, constants)
    with pytest.raises(ValueError, match="expected tensors with elements"):
        adam.square_sum([torch.zeros(0)])


@pytest.mark.parametrize(
    ("parameter", "options", "words"),
    [
        (torch.zeros(3, 3), {"maximize": True}, "maximize"),
        (torch.zeros(3, 3), {"amsgrad": True}, "amsgrad"),
        (torch.zeros(3, 3, dtype=torch.float64), {}, "float64"),
        (torch.zeros(3, 4).t(), {}, "contiguous"),
    ],
)
def test_what_the_update_cannot_do_is_refused_at_once(parameter: Tensor, options: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        OnePassAdamW([nn.Parameter(parameter)], **options)


def test_step_counts_of_another_implementation_come_to_the_device_of_the_weight() -> None:
    left, right = _parameters(), _parameters()
    ours, theirs = OnePassAdamW(left, **OPTIONS), torch.optim.AdamW(right, **OPTIONS, foreach=False)
    for parameters, each in ((left, ours), (right, theirs)):
        _give_gradients(parameters, 1)
        each.step()
    ours.load_state_dict(theirs.state_dict())
    _give_gradients(left, 2)
    ours.step()
    assert {state["step"].device for state in ours.state.values()} == {left[0].device}
    assert not ours._step_supports_amp_scaling, "a scaler divides the gradients itself"


def test_scalars_of_another_form_are_refused() -> None:
    good, factors = torch.zeros(4, 6), torch.zeros(4)
    constants = adam.Constants(0.9, 0.95, 1e-8, 0.1, decoupled=True)
    with pytest.raises(ValueError, match="expected clip in float32"):
        adam.update(good, good, good, good, factors, constants, clip=torch.ones((), dtype=torch.float64))
