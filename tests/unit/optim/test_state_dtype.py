"""Running means in a dtype of their own: rounded once a step, and carried over from and to means in fp32."""

import copy
import pickle
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from titan_fp8.optim import build_optimizer
from titan_fp8.optim.config import OptimizerSection
from titan_fp8.optim.one_pass import MEANS, OnePassAdam, OnePassAdamW
from titan_fp8.optim.optimizers import OptimizersContainer
from titan_fp8.quantization.recipes import RECIPES
from titan_fp8.quantization.sharded_weight import ShardableFloat8Weight
from titan_fp8.quantization.weight_state import Float8WeightState

OPTIONS: dict[str, Any] = {"lr": 0.03, "betas": (0.85, 0.95), "eps": 1e-7, "weight_decay": 0.1}
BF16 = torch.bfloat16


def _parameters() -> list[nn.Parameter]:
    torch.manual_seed(0)
    return [nn.Parameter(torch.randn(shape)) for shape in ((33, 7), (5,), (), (64, 3))]


def _give_gradients(parameters: Sequence[nn.Parameter], seed: int) -> None:
    torch.manual_seed(seed)
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter) * 10.0 ** (seed % 5 - 2)


@pytest.mark.parametrize("kind", [OnePassAdam, OnePassAdamW])
def test_a_step_is_that_of_fp32_whose_means_are_rounded_after_it(kind: type) -> None:
    half, whole = _parameters(), _parameters()
    ours, theirs = kind(half, state_dtype=BF16, **OPTIONS), kind(whole, **OPTIONS)
    for seed in range(12):
        for parameters, optimizer in ((half, ours), (whole, theirs)):
            _give_gradients(parameters, seed)
            optimizer.step()
        for p, q in zip(half, whole, strict=True):
            assert torch.equal(p, q)
            for name in MEANS:
                assert ours.state[p][name].dtype == BF16
                rounded = theirs.state[q][name].to(BF16)
                assert torch.equal(ours.state[p][name], rounded)
                theirs.state[q][name].copy_(rounded)


@pytest.mark.parametrize("beta", [0.8, 0.95])
def test_means_in_bf16_follow_noisy_gradients_as_those_in_fp32_do(beta: float) -> None:
    means = []
    for dtype in (torch.float32, BF16):
        parameter = nn.Parameter(torch.zeros(1000))
        optimizer = OnePassAdamW([parameter], state_dtype=dtype, **{**OPTIONS, "betas": (beta, beta)})
        for step in range(600):
            torch.manual_seed(step)
            # Larger at first: means that did not follow would stay there.
            parameter.grad = (torch.randn(1000) + 0.5) * (10 if step < 100 else 1)
            optimizer.step()
        means.append([optimizer.state[parameter][name].float().mean() for name in MEANS])
    for ours, theirs in zip(means[1], means[0], strict=True):
        assert abs(ours / theirs - 1) < 0.01


@pytest.mark.parametrize("beta", [0.9, 0.95])
def test_means_of_gradients_that_do_not_change_stay_as_near_as_said(beta: float) -> None:
    """A step moves them by (1 - beta) of the distance, or not at all where that is less than half of what bf16 numbers
    are apart, 2^-8 of the mean at most."""
    still = 2**-8 / (1 - beta)
    values = torch.linspace(0.5, 2, 500)
    parameter = nn.Parameter(torch.zeros(500))
    optimizer = OnePassAdamW([parameter], state_dtype=BF16, **{**OPTIONS, "betas": (beta, beta)})
    for step in range(800):
        parameter.grad = values * (3 if 300 <= step < 500 else 1)
        optimizer.step()
        if step in (299, 799):
            for name, wanted in zip(MEANS, (values, values.square()), strict=True):
                apart = (optimizer.state[parameter][name].float() / wanted - 1).abs().max()
                assert 0 < apart <= still / (1 - still) + 1e-6


@pytest.mark.parametrize("kind", [OnePassAdam, OnePassAdamW])
def test_decays_that_bf16_does_not_follow_are_refused(kind: type) -> None:
    for betas in ((0.9, 0.999), (0.96, 0.95)):
        with pytest.raises(ValueError, match=r"do not follow the gradients with more than 0\.95"):
            kind(_parameters(), state_dtype=BF16, betas=betas)
    with pytest.raises(ValueError, match="do not follow"):
        kind([{"params": _parameters(), "betas": (0.9, 0.999)}], state_dtype=BF16, betas=(0.9, 0.95))
    kind(_parameters(), state_dtype=torch.float32, betas=(0.9, 0.999))
    kind(_parameters(), state_dtype=BF16, betas=(0.95, 0.95))


def test_decays_are_refused_however_they_come() -> None:
    parameters = _parameters()
    optimizer = OnePassAdamW(parameters[:2], state_dtype=BF16, **OPTIONS)
    with pytest.raises(ValueError, match="do not follow"):
        optimizer.add_param_group({"params": parameters[2:], "betas": (0.9, 0.999)})
    assert len(optimizer.param_groups) == 1
    _give_gradients(parameters, 1)
    optimizer.step()
    before = [p.detach().clone() for p in parameters[:2]]
    with pytest.raises(ValueError, match="do not follow"):
        optimizer.load_state_dict(torch.optim.AdamW(parameters[:2]).state_dict())
    assert optimizer.param_groups[0]["betas"] == OPTIONS["betas"]
    assert optimizer.state[parameters[0]]["step"] == 1
    optimizer.param_groups[0]["betas"] = (0.9, 0.999)
    with pytest.raises(ValueError, match="do not follow"):
        optimizer.step()
    assert all(torch.equal(p, old) for p, old in zip(parameters, before, strict=False))


@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.float64, torch.int8, torch.float8_e4m3fn, torch.bool, "bfloat16"]
)
def test_other_dtypes_are_refused(dtype: Any) -> None:
    with pytest.raises(
        ValueError, match=r"state_dtype = .*: running means are kept in torch\.float32 or torch\.bfloat16"
    ):
        OnePassAdamW(_parameters(), state_dtype=dtype)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda optimizer: pickle.loads(pickle.dumps(optimizer))])
def test_a_copy_keeps_its_means_in_their_dtype(copied: Any) -> None:
    parameters = _parameters()
    optimizer = OnePassAdamW(parameters, state_dtype=BF16, **OPTIONS)
    _give_gradients(parameters, 1)
    optimizer.step()
    other = copied(optimizer)
    other.load_state_dict(optimizer.state_dict())
    assert other.state_dtype == BF16
    assert {state[name].dtype for state in other.state.values() for name in MEANS} == {BF16}


def test_hooks_of_loading_see_the_whole_state() -> None:
    parameters = _parameters()
    source, target = (OnePassAdamW(parameters, state_dtype=BF16, **OPTIONS) for _ in range(2))
    _give_gradients(parameters, 1)
    source.step()
    seen: list[Any] = []

    def doubled(_: Any, state_dict: dict[str, Any]) -> dict[str, Any]:
        states = {key: {**state, "exp_avg": 2 * state["exp_avg"]} for key, state in state_dict["state"].items()}
        return {**state_dict, "state": states}

    target.register_load_state_dict_pre_hook(doubled)
    target.register_load_state_dict_post_hook(lambda optimizer: seen.append(set(optimizer.state[parameters[0]])))
    for _ in range(2):
        target.load_state_dict(source.state_dict())
        assert torch.equal(target.state[parameters[0]]["exp_avg"], 2 * source.state[parameters[0]]["exp_avg"])
    assert seen == [{"step", *MEANS}] * 2


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"implementation": "foreach"}, "in the dtype of the parameters"),
        ({"implementation": "for-loop"}, "in the dtype of the parameters"),
        ({"beta2": 0.96}, "beta2"),
        ({"beta1": 0.96}, "beta1"),
    ],
)
def test_the_section_refuses_what_has_no_such_means(keys: dict[str, Any], words: str) -> None:
    problems = list(OptimizerSection(state_dtype="bfloat16", **keys).problems())
    assert [words in f"{problem.key} {problem.text}" for problem in problems] == [True]
    del keys["implementation" if "implementation" in keys else next(iter(keys))]
    assert not list(OptimizerSection(state_dtype="bfloat16", **keys).problems())
    assert not list(OptimizerSection(beta2=0.999, implementation="foreach").problems())
    assert not list(OptimizerSection(state_dtype="bfloat16", beta1=0.95, beta2=0.95).problems())
    assert not list(OptimizerSection(state_dtype="float32", beta2=0.999).problems())


def _model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 3))


def _build(model: nn.Module, state_dtype: Any = None, **keys: Any) -> OptimizersContainer:
    return build_optimizer([model], OptimizerSection(lr=0.1, state_dtype=state_dtype, **keys))


def _train(model: nn.Module, optimizers: OptimizersContainer, seeds: range) -> None:
    for seed in seeds:
        torch.manual_seed(seed)
        model(torch.randn(4, 6)).square().sum().backward()
        norm = optimizers.clip_grad_norm(1.0)
        optimizers.step(skip=~norm.isfinite())
        optimizers.zero_grad()


def _means(optimizers: OptimizersContainer) -> dict[str, Tensor]:
    return {key: value for key, value in optimizers.state_dict().items() if not key.endswith(".step")}


@pytest.mark.parametrize("keys", [{}, {"implementation": "one_pass"}, {"name": "Adam"}])
def test_a_run_that_goes_on_from_its_state_is_the_run_without_a_break(keys: dict[str, Any]) -> None:
    whole, first, second = _model(), _model(), _model()
    optimizers = _build(whole, "bfloat16", **keys)
    _train(whole, optimizers, range(6))
    before, after = _build(first, "bfloat16", **keys), _build(second, "bfloat16", **keys)
    _train(first, before, range(3))
    second.load_state_dict(first.state_dict())
    after.load_state_dict({key: value.clone() for key, value in before.state_dict().items()})
    _train(second, after, range(3, 6))
    for key, value in optimizers.state_dict().items():
        assert torch.equal(after.state_dict()[key], value), key
    for p, q in zip(whole.parameters(), second.parameters(), strict=True):
        assert torch.equal(p, q)
    assert {value.dtype for value in _means(after).values()} == {BF16}


@pytest.mark.parametrize(("saved", "loaded"), [(None, "bfloat16"), ("bfloat16", None), ("bfloat16", "float32")])
def test_means_are_carried_over_between_dtypes(saved: Any, loaded: Any) -> None:
    model, other = _model(), _model()
    source, target = _build(model, saved), _build(other, loaded)
    _train(model, source, range(3))
    target.load_state_dict({key: value.clone() for key, value in source.state_dict().items()})
    wanted = BF16 if loaded == "bfloat16" else torch.float32
    for key, value in _means(target).items():
        assert value.dtype == wanted
        assert torch.equal(value, _means(source)[key].to(wanted)), key
    assert all(value == 3 for key, value in target.state_dict().items() if key.endswith(".step"))
    _train(other, target, range(3, 4))
    assert {value.dtype for value in _means(target).values()} == {wanted}


def test_state_made_ahead_of_a_step_is_what_the_step_would_make() -> None:
    left, right = _model(), _model()
    ahead, late = _build(left, "bfloat16"), _build(right, "bfloat16")
    ahead.create_state()
    assert {value.dtype for value in _means(ahead).values()} == {BF16}
    for model, optimizers in ((left, ahead), (right, late)):
        _train(model, optimizers, range(2))
    for key, value in ahead.state_dict().items():
        assert torch.equal(value, late.state_dict()[key])


def test_means_in_fp32_beside_parameters_in_bf16() -> None:
    model = _model().to(BF16)
    optimizers = _build(model, "float32")
    model(torch.ones(4, 6, dtype=BF16)).square().sum().backward()
    optimizers.step()
    assert {value.dtype for value in _means(optimizers).values()} == {torch.float32}
    target = _build(_model().to(BF16), "float32")
    target.load_state_dict({key: value.clone() for key, value in optimizers.state_dict().items()})
    for key, value in _means(optimizers).items():
        assert not torch.equal(value, value.bfloat16().float())
        assert torch.equal(_means(target)[key], value), "not by way of the dtype of the parameters"


def test_means_in_the_dtype_of_the_parameters_change_nothing() -> None:
    (optimizer,) = _build(_model(), "float32")
    assert type(optimizer) is torch.optim.AdamW, "PyTorch's kernel, which is faster on a CPU"


def test_stepping_in_backward_keeps_means_in_their_dtype() -> None:
    left, right = _model(), _model()
    early = _build(left, "bfloat16", early_step_in_backward=True)
    late = _build(right, "bfloat16")
    for seed in range(3):
        for model, optimizers in ((left, early), (right, late)):
            torch.manual_seed(seed)
            model(torch.randn(4, 6)).square().sum().backward()
            optimizers.step()
            optimizers.zero_grad()
    assert {value.dtype for value in _means(early).values()} == {BF16}
    for key, value in _means(late).items():
        assert torch.equal(_means(early)[key], value)


def test_a_weight_made_for_the_float8_all_gather_has_plain_means() -> None:
    weight = nn.Parameter(
        ShardableFloat8Weight(torch.randn(16, 16), Float8WeightState(RECIPES["tensorwise"], caches=True))
    )
    optimizer = OnePassAdamW([weight], state_dtype=BF16, **OPTIONS)
    weight.grad = torch.randn(16, 16)
    optimizer.step()
    for name in MEANS:
        assert type(optimizer.state[weight][name]) is Tensor
        assert optimizer.state[weight][name].dtype == BF16
