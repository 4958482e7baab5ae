"""Weights of experts that FSDP2 gathers as float8 codes: the codes, results and gradients of the whole weights, however
they are cut, cast once an optimizer step."""

from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard

from tests.distributed.harness import run_distributed
from titan_fp8.converters.float8_grouped import ExpertWeights, convert_grouped
from titan_fp8.converters.grouped_experts import ORDER, Float8Experts
from titan_fp8.models.dims import ModelDims
from titan_fp8.models.initialization import initialize
from titan_fp8.models.moe import MoE
from titan_fp8.quantization import sharded_weight
from titan_fp8.quantization.casts import Codes
from titan_fp8.quantization.fsdp_weight import cast_ahead
from titan_fp8.quantization.gathered_weight import GatheredFloat8Weight
from titan_fp8.quantization.grouped import cast_experts
from titan_fp8.quantization.sharded_weight import ShardableFloat8Weight
from titan_fp8.runtime.device import detect_device

DIM, HIDDEN = 32, 48
CUTS = {
    "by experts": (2, 4, 0),
    "each expert by rows": (2, 3, 1),
    "more shards than experts": (4, 2, 1),
    "by experts, unevenly": (3, 4, 0),
    "by experts, some without": (4, 3, 0),
    "one shard": (1, 3, 0),
}
"""Ranks, experts, dimension."""


def _experts(n_experts: int) -> Float8Experts:
    """The same in each call, in float8 and ready for FSDP."""
    sizes: dict[str, Any] = {"dim": DIM, "n_layers": 1, "n_heads": 2, "vocab_size": 64, "moe_ffn_dim": HIDDEN}
    layer = MoE(ModelDims(**sizes, n_experts=n_experts, top_k=2, first_dense_layers=0), residual_std=0.02)
    initialize(layer, seed=0)
    convert_grouped(layer, ["experts"], detect_device(), emulate=True, weights=ExpertWeights.GATHERED)
    assert isinstance(layer.experts, Float8Experts)
    return layer.experts


def _sharded(n_experts: int, dim: int, dtype: torch.dtype | None = None) -> Any:
    experts = _experts(n_experts)
    fully_shard(
        experts,
        mesh=init_device_mesh("cpu", (dist.get_world_size(),)),
        shard_placement_fn=lambda parameter: Shard(dim),
        mp_policy=MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False),
    )
    assert isinstance(experts, FSDPModule)
    experts.set_gradient_divide_factor(1.0)
    experts.set_force_sum_reduction_for_comms(True)
    return experts


def _rows(n_experts: int, rank: int) -> tuple[Tensor, Tensor]:
    """Rows of a rank, and where those of each expert end; the last expert has none."""
    generator = torch.Generator().manual_seed(rank)
    ends = [16 * min(expert + 1, n_experts - 1) for expert in range(n_experts)]
    return torch.randn(ends[-1], DIM, generator=generator), torch.tensor(ends, dtype=torch.int32)


def _assert_gathered(sharded: Any, whole: dict[str, Codes], dtype: torch.dtype) -> None:
    """What FSDP gathers has the bits of the whole weight's codes and scales."""
    sharded.unshard()
    for name, codes in whole.items():
        gathered = getattr(sharded, name)
        assert isinstance(gathered, GatheredFloat8Weight)
        assert gathered.dtype == dtype, "that of its gradient"
        assert torch.equal(gathered.codes.view(torch.uint8), codes.codes.view(torch.uint8)), name
        assert torch.equal(gathered.scale, codes.scale), name
        assert torch.equal(gathered.dequantize(), codes.codes.float() * codes.scale.unsqueeze(-1)), name
    sharded.reshard()


def _codes_of(experts: Float8Experts) -> dict[str, Codes]:
    return {name: cast_experts(getattr(experts, name)) for name in ORDER}


def _two_steps(rank: int, ranks: int, n_experts: int, dim: int) -> None:
    plain, sharded = _experts(n_experts), _sharded(n_experts, dim)
    for _ in range(2):
        _assert_gathered(sharded, _codes_of(plain), torch.float32)
        _assert_same_gradients(plain, sharded, rank, ranks)
        for module in (plain, sharded):
            torch.optim.SGD(module.parameters(), lr=0.5, foreach=True).step()
            module.zero_grad()
    _assert_gathered(sharded, _codes_of(plain), torch.float32)


def _assert_same_gradients(plain: Float8Experts, sharded: Any, rank: int, ranks: int) -> None:
    """Those of weights are the sums over what each rank computes with its own rows."""
    for source in range(ranks):
        x, ends = _rows(len(plain.w1), source)
        expected_x = x.clone().requires_grad_()
        expected = plain(expected_x, ends)
        expected.square().sum().backward()
        if source == rank:
            actual_x = x.clone().requires_grad_()
            actual = sharded(actual_x, ends)
            actual.square().sum().backward()
            assert torch.equal(actual, expected)
            assert torch.equal(actual_x.grad, expected_x.grad)
    for name in ORDER:
        grad = getattr(sharded, name).grad
        assert isinstance(grad, DTensor)
        torch.testing.assert_close(grad.full_tensor(), getattr(plain, name).grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("cut", CUTS)
def test_gathered_experts_are_the_whole_ones(cut: str) -> None:
    ranks, n_experts, dim = CUTS[cut]
    run_distributed(_two_steps, ranks, n_experts, dim)


def _in_16_bits(rank: int, ranks: int, n_experts: int, dim: int) -> None:
    plain, sharded = _experts(n_experts), _sharded(n_experts, dim, torch.bfloat16)
    _assert_gathered(sharded, _codes_of(plain), torch.bfloat16)
    x, ends = _rows(n_experts, rank)
    result = sharded(x.bfloat16().requires_grad_(), ends)
    assert torch.equal(result, plain(x.bfloat16(), ends))
    result.float().square().sum().backward()
    assert all(
        parameter.grad is not None and parameter.grad.dtype == torch.float32 for parameter in sharded.parameters()
    )


@pytest.mark.parametrize("cut", CUTS)
def test_codes_are_the_same_beside_what_travels_in_16_bits(cut: str) -> None:
    ranks, n_experts, dim = CUTS[cut]
    run_distributed(_in_16_bits, ranks, n_experts, dim)


def _count_casts(rank: int, ranks: int) -> None:
    experts = _sharded(4, 0)
    x, ends = _rows(4, rank)
    optimizer = torch.optim.SGD(experts.parameters(), lr=0.1)
    for ahead in (True, False, True):
        with mock.patch.object(sharded_weight, "cast_shards", wraps=sharded_weight.cast_shards) as cast:
            if ahead:
                cast_ahead([experts])
                assert [len(call.args[0]) for call in cast.call_args_list] == [3], "with one collective"
            for _ in range(2):
                experts(x, ends).sum().backward()
            assert sum(len(call.args[0]) for call in cast.call_args_list) == 3, "for all passes"
        optimizer.step()


def test_experts_are_cast_once_an_optimizer_step() -> None:
    run_distributed(_count_casts, 2)


def _state_dicts(rank: int, ranks: int) -> None:
    plain, sharded = _experts(4), _sharded(4, 0)
    whole = get_model_state_dict(sharded, options=StateDictOptions(full_state_dict=True))
    for name, value in whole.items():
        assert type(value) is Tensor, name
        assert torch.equal(value, getattr(plain, name).detach().tensor), name
    x, ends = _rows(4, rank)
    before = sharded(x, ends)
    state = {name: value.detach().clone() for name, value in sharded.state_dict().items()}
    assert not any(isinstance(value.to_local(), ShardableFloat8Weight) for value in state.values())
    with torch.no_grad():
        for parameter in sharded.parameters():
            parameter.mul_(3.0)
    assert not torch.equal(sharded(x, ends), before)
    sharded.load_state_dict(state)
    assert torch.equal(sharded(x, ends), before)


def test_state_dicts_hold_plain_tensors_and_what_is_loaded_is_cast() -> None:
    run_distributed(_state_dicts, 2)
