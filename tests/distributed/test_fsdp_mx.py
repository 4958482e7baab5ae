"""Weights in MXFP8 that FSDP2 gathers as codes: the bits of the whole weights in both orientations, bytes on the wire,
one cast an optimizer step, and what cannot be cut."""

from functools import partial
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard

from tests.distributed.float8_linears import Wire
from tests.distributed.harness import run_distributed
from titan_fp8.converters.grouped_experts import ORDER
from titan_fp8.converters.mx_grouped import MXFP8Experts, convert_mx_grouped
from titan_fp8.models.dims import ModelDims
from titan_fp8.models.initialization import initialize
from titan_fp8.models.moe import MoE
from titan_fp8.parallel.expert import _local_weights
from titan_fp8.parallel.fsdp import _precision
from titan_fp8.quantization import mx_sharded
from titan_fp8.quantization.fsdp_weight import precompute_float8_dynamic_scale_for_fsdp, wrap_mx_weights_for_fsdp
from titan_fp8.quantization.mx_linear import MXConfig, MXFP8Linear
from titan_fp8.quantization.mx_recipes import MX_RECIPES
from titan_fp8.quantization.mx_sharded import GatheredMXWeight, MXCodes, cast_weight
from titan_fp8.quantization.mx_weight import MXWeightCache
from titan_fp8.quantization.weights import mark_stale
from titan_fp8.runtime.device import detect_device
from titan_fp8.runtime.errors import UserError

SHAPES = [(256, 32), (128, 96)]
"""Whole blocks in each of 2 and 4 shards."""
RECIPE = MX_RECIPES["mxfp8_cublas"]


class Linears(nn.Module):
    """MX linears beside each other, each with an input of its own, and a norm, in one unit."""

    def __init__(self, *, gathers_codes: bool, cache: bool = True, shapes: Any = SHAPES, bias: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        config = MXConfig(RECIPE, emulate=True)
        self.linears = nn.ModuleList(MXFP8Linear.from_linear(nn.Linear(k, n, bias=bias), config) for n, k in shapes)
        self.norm = nn.LayerNorm(32)
        if gathers_codes:
            named = {f"linears.{i}": linear for i, linear in enumerate(self.linears)}
            wrap_mx_weights_for_fsdp(named, RECIPE.mode, kernel="torch", cache=cache)

    def forward(self, seed: int = 0) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        total = self.norm(torch.ones(1, 32, dtype=self.norm.weight.dtype)).float().square().sum()
        for linear in self.linears:
            x = torch.randn(48, linear.in_features, generator=generator, requires_grad=True)
            total = total + linear(x).square().mean()
        return total

    def shard(self, axes: tuple[int, ...], dtype: torch.dtype | None = None, **keys: Any) -> "Linears":
        mesh = init_device_mesh("cpu", axes, mesh_dim_names=("replicate", "shard")[-len(axes) :])
        policy = MixedPrecisionPolicy(dtype, torch.float32, cast_forward_inputs=False)
        fully_shard(self, mesh=mesh, mp_policy=policy, **keys)
        return self

    def weights(self) -> list[Tensor]:
        return [linear.weight for linear in self.linears]  # pyright: ignore[reportReturnType]


def assert_codes(gathered: Tensor, wanted: MXCodes) -> None:
    assert isinstance(gathered, GatheredMXWeight)
    for found, whole in zip(gathered.made, wanted, strict=True):
        assert found.shape == whole.shape
        assert torch.equal(found.view(torch.uint8), whole.view(torch.uint8))


# ---- linears


def _two_steps(rank: int, ranks: int, axes: tuple[int, ...], bias: bool = False) -> None:
    """Beside one that gathers the masters: the same initial weights, losses, gradients and updates, bit for bit."""
    plain = Linears(gathers_codes=False, bias=bias).shard(axes)
    coded = Linears(gathers_codes=True, bias=bias)
    if bias:
        # The trainer's rule, asked for bf16: without biases all but codes would travel in it.
        assert _travels_in(Linears(gathers_codes=True)) == torch.bfloat16
        coded.shard(axes, _travels_in(coded))
    else:
        coded.shard(axes)
    assert isinstance(coded, FSDPModule)
    for step in range(2):
        whole = [weight.full_tensor() for weight in plain.weights()]  # pyright: ignore
        coded.unshard()
        for weight, master in zip(coded.weights(), whole, strict=True):
            assert_codes(weight, cast_weight(master, RECIPE.mode))
        coded.reshard()
        losses = [model(ranks * step + rank) for model in (plain, coded)]
        assert torch.equal(*losses)
        for model, loss in zip((plain, coded), losses, strict=True):
            loss.backward()
            model.grads = [parameter.grad.to_local() for parameter in model.parameters()]
            torch.optim.AdamW(model.parameters(), lr=0.1).step()
        assert {type(grad) for grad in coded.grads} == {Tensor}
        assert all(torch.equal(*pair) for pair in zip(plain.grads, coded.grads, strict=True))
    for name, value in coded.state_dict().items():
        assert type(value.to_local()) is Tensor, name
        assert torch.equal(value.to_local(), plain.state_dict()[name].to_local()), name


@pytest.mark.parametrize("axes", [(2,), (4,), (2, 2)])
def test_gathered_codes_are_those_of_the_whole_weight_and_training_has_the_same_bits(axes: tuple[int, ...]) -> None:
    run_distributed(_two_steps, 2 if axes == (2,) else 4, axes)


def _travels_in(model: Linears) -> torch.dtype | None:
    return _precision([model], torch.bfloat16, torch.float32, travels_by_peers=False).param_dtype


def test_biases_are_gathered_in_full_beside_codes_and_training_has_the_same_bits() -> None:
    run_distributed(_two_steps, 2, (2,), True)


def _bytes(rank: int, ranks: int) -> list[list[tuple[str, int]]]:
    model = Linears(gathers_codes=True).shard((ranks,), torch.bfloat16)
    passes = []
    with Wire() as wire:
        precompute_float8_dynamic_scale_for_fsdp(model)
    passes.append(wire.sent)
    with Wire() as wire:
        loss = model()
    passes.append(wire.sent)
    with Wire() as wire:
        loss.backward()
    passes.append(wire.sent)
    return passes


def test_a_value_travels_as_two_codes_and_two_thirtyseconds_of_a_scale() -> None:
    values, of_norm = sum(n * k for n, k in SHAPES), 64
    gather = ("all_gather", (values * 2 * 33 // 32 + 2 * of_norm) // 2)
    for ahead, forward, backward in run_distributed(_bytes, 2):
        assert ahead == [], "blocks lie in one shard"
        assert forward == [gather]
        assert backward == [("reduce_scatter", 4 * (values + of_norm) // 2)], "a root stays gathered"


def _count_casts(rank: int, ranks: int, cache: bool, ahead: bool) -> list[int]:
    model = Linears(gathers_codes=True, cache=cache).shard((ranks,))
    assert isinstance(model, FSDPModule)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    counts = []
    for _ in range(2):
        with mock.patch.object(mx_sharded, "cast_weight", wraps=mx_sharded.cast_weight) as cast:
            if ahead:
                precompute_float8_dynamic_scale_for_fsdp(model)
            for _ in range(3):
                model().backward()
                model.reshard()
            counts.append(cast.call_count)
        optimizer.step()
    return counts


@pytest.mark.parametrize(("cache", "ahead"), [(True, False), (False, True), (False, False)])
def test_a_shard_is_cast_once_a_step_if_it_may_be_kept(cache: bool, ahead: bool) -> None:
    each = len(SHAPES) * (1 if cache or ahead else 3)
    assert run_distributed(_count_casts, 2, cache, ahead) == [[each, each]] * 2


def _change_weights(rank: int, ranks: int) -> None:
    def write(model: Linears) -> None:
        for parameter in model.weights():
            parameter.data.add_(0.25)

    def load(model: Linears) -> None:
        model.load_state_dict({name: value * 2 + 1 for name, value in model.state_dict().items()})

    def write_unseen(model: Linears) -> None:
        for parameter in model.weights():
            parameter.to_local().tensor.numpy()[:] += 0.25  # pyright: ignore
        mark_stale(model)

    for change in (write, load, write_unseen):
        model = Linears(gathers_codes=True).shard((ranks,))
        model().backward()
        assert isinstance(model, FSDPModule)
        model.reshard()
        change(model)
        whole = [weight.full_tensor() for weight in model.weights()]  # pyright: ignore
        model.unshard()
        for weight, master in zip(model.weights(), whole, strict=True):
            assert_codes(weight, cast_weight(master.detach(), RECIPE.mode))


def test_no_stale_code_is_gathered_after_a_weight_has_changed() -> None:
    run_distributed(_change_weights, 2)


def _refused(rank: int, ranks: int, shape: tuple[int, int]) -> str:
    model = Linears(gathers_codes=True, shapes=[shape]).shard((ranks,))
    with pytest.raises(UserError) as error:
        model()
    return str(error.value)


def test_a_shard_that_is_no_whole_blocks_is_refused_by_name_on_every_rank() -> None:
    for message in run_distributed(_refused, 2, (96, 32)):
        assert "linears.0.weight: a weight [96, 32]" in message
        assert "96 rows in 2 shards are not whole blocks of 32 rows" in message
        assert "96 is not a multiple of 64" in message
        assert "turn enable_fsdp_mxfp8_all_gather off" in message


# ---- experts

DIM, HIDDEN = 64, 128
CUTS = {"by experts": (2, 4, 0), "each expert by rows": (2, 3, 1), "one shard": (1, 3, 0)}
"""Ranks, experts, dimension."""


def _experts(n_experts: int, *, gathers_codes: bool) -> MXFP8Experts:
    sizes: dict[str, Any] = {"dim": DIM, "n_layers": 1, "n_heads": 2, "vocab_size": 64, "moe_ffn_dim": HIDDEN}
    layer = MoE(ModelDims(**sizes, n_experts=n_experts, top_k=2, first_dense_layers=0), residual_std=0.02)
    initialize(layer, seed=0)
    convert_mx_grouped(
        layer, ["experts"], detect_device(), emulate=True, gathers_codes=gathers_codes, cache_weights=gathers_codes
    )
    assert isinstance(layer.experts, MXFP8Experts)
    return layer.experts


def _sharded(n_experts: int, dim: int, *, gathers_codes: bool) -> Any:
    experts = _experts(n_experts, gathers_codes=gathers_codes)
    fully_shard(
        experts,
        mesh=init_device_mesh("cpu", (dist.get_world_size(),)),
        shard_placement_fn=lambda parameter: Shard(dim),
        mp_policy=MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False),
    )
    return experts


def _rows(n_experts: int, rank: int) -> tuple[Tensor, Tensor]:
    """Rows of a rank, and where those of each expert end; the last expert has none."""
    generator = torch.Generator().manual_seed(rank)
    ends = [32 * min(expert + 1, n_experts - 1) for expert in range(n_experts)]
    return torch.randn(ends[-1], DIM, generator=generator), torch.tensor(ends, dtype=torch.int32)


def _two_steps_of_experts(rank: int, ranks: int, n_experts: int, dim: int) -> None:
    plain = _sharded(n_experts, dim, gathers_codes=False)
    coded = _sharded(n_experts, dim, gathers_codes=True)
    x, ends = _rows(n_experts, rank)
    for _ in range(2):
        whole = {name: getattr(plain, name).full_tensor().detach() for name in ORDER}
        coded.unshard()
        for name in ORDER:
            assert_codes(getattr(coded, name), cast_weight(whole[name], "rceil"))
        coded.reshard()
        results = []
        for model in (plain, coded):
            of_x = x.clone().requires_grad_()
            output = model(of_x, ends)
            output.square().sum().backward()
            grads = [getattr(model, name).grad for name in ORDER]
            assert all(isinstance(grad, DTensor) for grad in grads)
            results.append([output, of_x.grad, *(grad.to_local() for grad in grads)])
            torch.optim.SGD(model.parameters(), lr=0.5).step()
            model.zero_grad()
        for expected, actual in zip(*results, strict=True):
            assert torch.equal(expected, actual)


@pytest.mark.parametrize("cut", CUTS)
def test_gathered_experts_are_the_whole_ones_and_training_has_the_same_bits(cut: str) -> None:
    ranks, n_experts, dim = CUTS[cut]
    run_distributed(_two_steps_of_experts, ranks, n_experts, dim)


def _experts_that_stay(rank: int, ranks: int) -> list[int]:
    """As expert parallelism leaves them: DTensors, of which each rank multiplies its own part."""
    experts, (x, ends), mesh = _experts(3, gathers_codes=False), _rows(3, 0), init_device_mesh("cpu", (1,))
    expected = experts(x, ends)
    experts.weight_caches = {name: MXWeightCache(experts.config.weight_cast) for name in ORDER}
    for name in ORDER:
        part = DTensor.from_local(getattr(experts, name).detach(), mesh, [Shard(0)])
        setattr(experts, name, nn.Parameter(part))
    experts.weights = partial(_local_weights, experts)
    counts = []
    with mock.patch.object(MXWeightCache, "cast", autospec=True, side_effect=MXWeightCache.cast) as cast:
        for _ in range(2):
            assert torch.equal(experts(x, ends), expected)
            counts.append(cast.call_count)
        experts(x, ends).sum().backward()
        torch.optim.SGD(experts.parameters(), lr=0.5).step()
        assert not torch.equal(experts(x, ends), expected)
        counts.append(cast.call_count)
    return counts


def test_experts_that_stay_on_their_rank_are_cast_once_an_optimizer_step() -> None:
    assert run_distributed(_experts_that_stay, 1) == [[3, 3, 6]]


def _refused_experts(rank: int, ranks: int, n_experts: int, dim: int) -> str:
    model = _sharded(n_experts, dim, gathers_codes=True)
    with pytest.raises(UserError) as error:
        model(*_rows(n_experts, rank))
    return str(error.value)


@pytest.mark.parametrize(
    ("ranks", "n_experts", "dim", "reason"),
    [
        (3, 4, 0, "experts.w1: a weight [4, 128, 64] is to be gathered as MXFP8 codes, and 4 experts do not come out"),
        (4, 3, 1, "experts.w2: a weight [3, 64, 128] is to be gathered as MXFP8 codes, and 64 rows in 4 shards are"),
    ],
)
def test_experts_that_shards_do_not_divide_are_refused(ranks: int, n_experts: int, dim: int, reason: str) -> None:
    assert all(reason in message for message in run_distributed(_refused_experts, ranks, n_experts, dim))
