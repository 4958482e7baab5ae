"""Clipping and a skipped fused step on a GPU never wait for it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import nn

from titan_fp8.optim import build_optimizer, clip_grad_norm_
from titan_fp8.optim.config import OptimizerSection

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
