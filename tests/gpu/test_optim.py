"""Clipping and a skipped fused step on a GPU never wait for it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import nn

from tests.tolerances import ADAM_ULPS, ulps
from titan_fp8.kernels import adam
from titan_fp8.optim import build_optimizer, clip_grad_norm_
from titan_fp8.optim.clipping import clip_factor
from titan_fp8.optim.config import OptimizerSection
from titan_fp8.optim.one_pass import OnePassAdam, OnePassAdamW

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype feature:UserWarning"),
]


@contextmanager
def _waiting_is_an_error() -> Iterator[None]:
    try:
        torch.cuda.set_sync_debug_mode("error")
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("name", ["Adam", "AdamW"])
def test_fused_step_is_skipped_on_the_device(name: str) -> None:
    torch.manual_seed(0)
    model = nn.Linear(33, 65).cuda()
    optimizers = build_optimizer([model], OptimizerSection(name=name, lr=0.1))
    norm = torch.zeros((), device="cuda")
    for _ in range(2):
        model(torch.randn(4, 33, device="cuda")).square().sum().backward()
        norm = clip_grad_norm_(model.parameters(), 1.0)
        optimizers.step(skip=~norm.isfinite())
        optimizers.zero_grad()
    before = {k: v.detach().clone() for k, v in {**model.state_dict(), **optimizers.state_dict()}.items()}
    (model(torch.randn(4, 33, device="cuda")).square().sum() * float("nan")).backward()
    with _waiting_is_an_error():
        norm = clip_grad_norm_(model.parameters(), 1.0)
        optimizers.step(skip=~norm.isfinite())
    for key, value in {**model.state_dict(), **optimizers.state_dict()}.items():
        assert torch.equal(value, before[key]), key
    assert optimizers.state_dict()["state.weight.step"] == 2


SHAPES = [(4096, 1024), (129, 77), (5,), (1,), (2049,)]


@pytest.mark.parametrize("name", ["Adam", "AdamW"])
@pytest.mark.parametrize("max_norm", [0.0, 1.0])
def test_the_update_in_one_pass_is_torchs_to_a_few_ulps(name: str, max_norm: float) -> None:
    torch.manual_seed(0)
    ours = nn.ParameterList([torch.randn(shape, device="cuda") for shape in SHAPES])
    theirs = nn.ParameterList([p.detach().clone() for p in ours])
    optimizers = build_optimizer([ours], OptimizerSection(name=name, lr=0.01, implementation="one_pass"))
    (optimizer,) = optimizers
    assert isinstance(optimizer, OnePassAdam | OnePassAdamW)
    expected = getattr(torch.optim, name)(theirs.parameters(), lr=0.01, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    for count in range(1, 6):
        before = [(q.detach().clone(), {k: v.clone() for k, v in expected.state[q].items()}) for q in theirs]
        for p, q in zip(ours, theirs, strict=True):
            p.data.copy_(q)
            for key, value in expected.state.get(q, {}).items():
                optimizer.state[p][key].copy_(value)
            p.grad = torch.randn_like(p) * 3
            if name == "Adam":  # which adds the decay to the gradient: they may not cancel
                p.grad = p.grad.abs() * q.detach().sign()
            q.grad = p.grad.clone()
        norm = optimizers.clip_grad_norm(max_norm)
        wanted = torch.nn.utils.clip_grad_norm_(theirs.parameters(), float("inf"))
        torch.testing.assert_close(norm, wanted, rtol=1e-6, atol=0)
        for q in theirs:  # by the same factor, whatever the rounding of the norm
            q.grad *= clip_factor(norm, max_norm) if max_norm else 1
        with _waiting_is_an_error():
            optimizers.step(skip=~norm.isfinite())
        expected.step()
        for p, q, (weight, old) in zip(ours, theirs, before, strict=True):
            state, wanted_state = optimizer.state[p], expected.state[q]
            assert torch.equal(state["step"], wanted_state["step"])
            for key in ("exp_avg", "exp_avg_sq"):
                assert ulps(state[key], wanted_state[key], old.get(key, wanted_state[key])) <= ADAM_ULPS, (count, key)
            mean = torch.maximum(wanted_state["exp_avg"].abs(), old.get("exp_avg", wanted_state["exp_avg"]).abs())
            # How far the larger of the terms of the mean would have moved the weight.
            move = 0.01 / (1 - 0.9**count) * mean / ((wanted_state["exp_avg_sq"] / (1 - 0.95**count)).sqrt() + 1e-8)
            assert ulps(p, q, weight, move) <= ADAM_ULPS, count


@pytest.mark.parametrize("name", ["Adam", "AdamW"])
def test_means_in_bf16_are_rounded_after_the_weights_have_used_them(name: str) -> None:
    torch.manual_seed(0)
    half = nn.ParameterList([torch.randn(shape, device="cuda") for shape in SHAPES])
    whole = nn.ParameterList([p.detach().clone() for p in half])
    sections = (OptimizerSection(name=name, lr=0.01, state_dtype="bfloat16"), OptimizerSection(name=name, lr=0.01))
    (ours,), (theirs,) = (build_optimizer([each], s) for each, s in zip((half, whole), sections, strict=True))
    assert isinstance(theirs, OnePassAdam | OnePassAdamW)
    for _ in range(6):
        for p, q in zip(half, whole, strict=True):
            p.grad = torch.randn_like(p) * 3
            q.grad = p.grad.clone()
        ours.step()
        theirs.step()
        for p, q in zip(half, whole, strict=True):
            assert torch.equal(p, q)
            for key in ("exp_avg", "exp_avg_sq"):
                rounded = theirs.state[q][key].bfloat16()
                assert ours.state[p][key].dtype == torch.bfloat16
                assert torch.equal(ours.state[p][key], rounded)
                theirs.state[q][key].copy_(rounded)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("skip", [0.0, 1.0])
def test_an_update_finds_the_largest_value_to_the_bit(shape: tuple[int, ...], dtype: torch.dtype, skip: float) -> None:
    torch.manual_seed(0)
    w, g, m = (torch.randn(shape, device="cuda", dtype=dtype) for _ in range(3))
    constants = adam.Constants(0.9, 0.95, 1e-8, 0.1, decoupled=True)
    factors = adam.step_factors([torch.ones((), device="cuda")], 0.1, constants)[0]
    amax = torch.zeros((), dtype=torch.int32, device="cuda")
    adam.update(w, g, m, m.square(), factors, constants, skip=torch.tensor(skip, device="cuda"), amax=amax)
    assert amax == w.float().abs().max().view(torch.int32)


def test_sums_of_squares_repeat_to_the_bit_and_see_what_is_not_finite() -> None:
    torch.manual_seed(0)
    tensors = [torch.randn(shape, device="cuda") for shape in SHAPES]
    first = adam.square_sum(tensors)
    torch.testing.assert_close(first, sum(t.double().square().sum() for t in tensors).float(), rtol=1e-6, atol=0)
    assert all(torch.equal(adam.square_sum(tensors), first) for _ in range(3))
    for bad in (float("inf"), float("nan")):
        tensors[0].view(-1)[-1] = bad
        assert not adam.square_sum(tensors).isfinite()


@pytest.mark.parametrize("foreach", [None, False])
def test_clipping_equals_torch(foreach: bool | None) -> None:
    torch.manual_seed(0)
    ours = [nn.Parameter(torch.zeros(n, device="cuda")) for n in (1, 1000, 70_000)]
    theirs = [nn.Parameter(torch.zeros_like(p)) for p in ours]
    for left, right in zip(ours, theirs, strict=True):
        left.grad = torch.randn_like(left)
        right.grad = left.grad.clone()
    torch.testing.assert_close(clip_grad_norm_(ours, 0.5, foreach=foreach), torch.nn.utils.clip_grad_norm_(theirs, 0.5))
    for left, right in zip(ours, theirs, strict=True):
        torch.testing.assert_close(left.grad, right.grad)
