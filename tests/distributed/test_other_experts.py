"""Float8 in experts of other people's models under FSDP2: results and gradients of the whole weights, and plain
checkpoints."""

import pytest
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from tests.distributed.harness import run_distributed
from tests.unit.converters.test_other_experts import RAGGED, Layer, Looping, Stacked, convert, converted, inputs, run
from titan_fp8.runtime.errors import UserError


def _sharded(layer: Layer, units: str, dtype: torch.dtype | None, *, reshard: bool = True) -> Layer:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for module in (layer.experts, layer) if units == "experts" else (layer,):
        fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=reshard)
    return layer


def _of_all(rank: int, ranks: int, units: str, dtype: torch.dtype | None, compiled: bool) -> None:
    torch._dynamo.reset()
    plain, sharded = converted(), _sharded(converted(), units, dtype, reshard=units == "experts")
    cases = []
    for source in range(ranks):
        x, ends, grad = inputs([size + source for size in RAGGED], torch.bfloat16)
        cases.append((x, ends, grad))
    each = [run(plain, *case) for case in cases]
    model = torch.compile(sharded, backend="aot_eager") if compiled else sharded
    result = run(model, *cases[rank], experts=sharded.experts)
    for name in ("output", "x"):
        assert torch.equal(result[name], each[rank][name]), name
    for name in ("w1", "w2", "w3"):
        grad = result[name]
        assert isinstance(grad, DTensor)
        assert grad.dtype == torch.float32
        torch.testing.assert_close(grad.full_tensor(), sum(one[name] for one in each) / ranks, rtol=1e-5, atol=1e-6)
    torch.optim.SGD(sharded.parameters(), lr=0.1).step()
    assert not torch.equal(sharded(*cases[rank][:2]), result["output"])


@pytest.mark.parametrize("units", ["experts", "layer"])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_sharded_experts_give_what_whole_ones_do(units: str, dtype: torch.dtype | None) -> None:
    """These round their weights to bf16 in any case, whether FSDP does or not."""
    run_distributed(_of_all, 2, units, dtype, False)


def test_sharded_experts_may_be_compiled() -> None:
    run_distributed(_of_all, 2, "experts", None, True)


def _checkpoints(rank: int, ranks: int) -> None:
    sharded = _sharded(converted(), "experts", None)
    for name, value in sharded.state_dict().items():
        assert type(value) is DTensor, name
        assert type(value.to_local()) is torch.Tensor, name
    options = StateDictOptions(full_state_dict=True)
    state = get_model_state_dict(sharded, options=options)
    if rank == 0:
        expected = Layer().state_dict()
        assert list(state) == list(expected)
        assert all(torch.equal(value, expected[name]) for name, value in state.items())


def test_checkpoints_are_those_of_a_model_without_float8() -> None:
    run_distributed(_checkpoints, 2)


def _loop(rank: int, ranks: int) -> None:
    sharded = _sharded(converted(Looping()), "experts", None)
    x, ends, _ = inputs(RAGGED)
    with pytest.raises(UserError, match="has called neither"):
        sharded(x, ends)


def test_sharded_experts_without_a_grouped_product_are_refused_when_they_run() -> None:
    run_distributed(_loop, 2)


def _after(rank: int, ranks: int) -> None:
    layer = _sharded(Layer(Stacked()), "experts", None)
    convert(layer)
    x, ends, grad = inputs(RAGGED, torch.bfloat16)
    result, expected = run(layer, x, ends, grad), run(converted(), x, ends, grad)
    for name in ("output", "x"):
        assert torch.equal(result[name], expected[name]), name


def test_experts_that_are_sharded_already_may_be_converted() -> None:
    run_distributed(_after, 2)
