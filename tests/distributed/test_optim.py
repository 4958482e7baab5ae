"""Optimizer and gradient clipping on sharded parameters: every rank sees what one process would."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from tests.distributed.harness import run_distributed
from titan_fp8.optim import build_optimizer, clip_grad_norm_
from titan_fp8.optim.config import OptimizerSection
from titan_fp8.runtime.errors import UserError


def _model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 3), nn.Linear(3, 5), nn.Linear(5, 1))  # dims that four ranks share unevenly


def _shard(model: nn.Sequential, layout: str) -> nn.Module:
    world_size = torch.distributed.get_world_size()
    if layout == "ddp":
        return DistributedDataParallel(model)
    if layout == "hsdp":
        mesh = init_device_mesh("cpu", (2, world_size // 2), mesh_dim_names=("replicate", "shard"))
    else:
        mesh = init_device_mesh("cpu", (world_size,))
    # "mixed": the last layer stays plain, whole on every rank
    for layer in model[:2] if layout == "mixed" else model:
        fully_shard(layer, mesh=mesh)
    return model


def _backward(model: nn.Module, scale: float = 1.0) -> None:
    torch.manual_seed(1)
    (model(torch.randn(4, 6)).square().sum() * scale).backward()  # the same batch on all ranks


def _whole(tensor: Any) -> torch.Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def _clip(_rank: int, _world_size: int, layout: str, max_norm: float, foreach: bool | None) -> tuple[float, list[Any]]:
    model = _shard(_model(), layout)
    _backward(model)
    norm = clip_grad_norm_(model.parameters(), max_norm, foreach=foreach)
    assert type(norm) is torch.Tensor
    assert norm.dtype == torch.float32
    return norm.item(), [_whole(p.grad).numpy() for p in model.parameters()]


@pytest.mark.parametrize("foreach", [None, False])
@pytest.mark.parametrize("max_norm", [0.0, 0.5])
@pytest.mark.parametrize("layout", ["fsdp", "hsdp", "mixed", "ddp"])
def test_clipping_of_sharded_gradients_equals_one_process(layout: str, max_norm: float, foreach: bool | None) -> None:
    model = _model()
    _backward(model)
    expected = torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm or float("inf"))
    results = run_distributed(_clip, 4, layout, max_norm, foreach)
    assert len({norm for norm, _ in results}) == 1
    assert results[0][0] == pytest.approx(expected.item(), rel=1e-6)
    for _, grads in results:
        for grad, parameter in zip(grads, model.parameters(), strict=True):
            torch.testing.assert_close(torch.from_numpy(grad), parameter.grad)


def _clip_non_finite(rank: int, _world_size: int) -> float:
    model = _shard(_model(), "fsdp")
    _backward(model)
    if rank == 1:
        next(model.parameters()).grad.to_local().fill_(float("nan"))
    return clip_grad_norm_(model.parameters(), 1.0).item()


def test_nan_on_one_rank_reaches_the_norm_of_all() -> None:
    assert all(norm != norm for norm in run_distributed(_clip_non_finite, 4))


def _steps(
    _rank: int, _world_size: int, implementation: str, early: bool, state_dtype: str | None = None
) -> tuple[list[Any], list[Any]]:
    model = _shard(_model(), "fsdp")
    config = OptimizerSection(
        lr=0.1, implementation=implementation, early_step_in_backward=early, state_dtype=state_dtype
    )
    optimizers = build_optimizer([model], config)
    for scale in (1.0, float("nan"), 2.0):
        skip = None if early else torch.tensor(scale != scale)
        if early and scale != scale:
            continue
        _backward(model, scale)
        optimizers.step(skip=skip)
        optimizers.zero_grad()
    keys = sorted(optimizers.state_dict())
    state = [_whole(optimizers.state_dict()[key]) for key in keys]
    assert state_dtype is None or {value.dtype for value in state if value.dim()} == {getattr(torch, state_dtype)}
    state = [value.float().numpy() for value in state]
    return [_whole(p.detach()).numpy() for p in model.parameters()], state


def _steps_alone(config: OptimizerSection) -> tuple[nn.Module, list[torch.Tensor]]:
    """The model and the state, in fp32, of one process without the skipped step."""
    model = _model()
    optimizers = build_optimizer([model], config)
    for scale in (1.0, 2.0):
        _backward(model, scale)
        optimizers.step()
        optimizers.zero_grad()
    return model, [optimizers.state_dict()[key].float() for key in sorted(optimizers.state_dict())]


@pytest.mark.parametrize("early", [False, True])
@pytest.mark.parametrize("implementation", ["for-loop", "foreach", "fused", "one_pass"])
def test_sharded_steps_with_one_skipped_equal_one_process_without_it(implementation: str, early: bool) -> None:
    model, expected = _steps_alone(OptimizerSection(lr=0.1, implementation="for-loop"))
    for parameters, state in run_distributed(_steps, 2, implementation, early):
        for ours, theirs in zip(parameters, model.parameters(), strict=True):
            torch.testing.assert_close(torch.from_numpy(ours), theirs.detach())
        for ours, theirs in zip(state, expected, strict=True):
            torch.testing.assert_close(torch.as_tensor(ours), theirs)


def test_sharded_means_in_bf16_are_those_of_one_process() -> None:
    model, expected = _steps_alone(OptimizerSection(lr=0.1, state_dtype="bfloat16"))
    for parameters, state in run_distributed(_steps, 2, "fused", False, "bfloat16"):
        for ours, theirs in zip(parameters, model.parameters(), strict=True):
            torch.testing.assert_close(torch.from_numpy(ours), theirs.detach())
        for ours, theirs in zip(state, expected, strict=True):
            # Where gradients differ in their last bits a mean may be rounded to its other neighbour.
            torch.testing.assert_close(torch.as_tensor(ours), theirs, rtol=2**-7, atol=1e-8)


def _early_with_ddp(_rank: int, _world_size: int) -> str:
    try:
        build_optimizer([_shard(_model(), "ddp")], OptimizerSection(early_step_in_backward=True))
    except UserError as error:
        return str(error)
    return "no error"


def test_stepping_in_backward_is_refused_with_ddp() -> None:
    assert "DistributedDataParallel" in run_distributed(_early_with_ddp, 2)[0]
