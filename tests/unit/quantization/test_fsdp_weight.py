"""Weights made for FP8 all-gather, in one process: the bits of cast shards, what is a weight and what a plain tensor,
when codes are stale, checkpoints, refusals. `tests/distributed/test_fsdp_float8.py` gathers them."""

import copy
import io
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from titan_fp8.parallel.apply import materialize
from titan_fp8.quantization import shard_cast
from titan_fp8.quantization.casts import Codes, cast_weight
from titan_fp8.quantization.fsdp_weight import precompute_float8_dynamic_scale_for_fsdp, wrap_weights_for_fsdp
from titan_fp8.quantization.function import Float8Config
from titan_fp8.quantization.gathered_weight import GatheredFloat8Weight
from titan_fp8.quantization.linear import Float8Linear
from titan_fp8.quantization.recipes import RECIPES
from titan_fp8.quantization.shard_cast import CastShard, Shard, ShardAxis, cast_shard, cast_shards, chunk_length
from titan_fp8.quantization.sharded_weight import ShardableFloat8Weight, refresh
from titan_fp8.quantization.weight_state import Float8WeightState
from titan_fp8.quantization.weights import mark_stale
from titan_fp8.runtime.errors import UserError

ALONE = ShardAxis(None, 0, 1)
N, K = 256, 128
NAN, INF = float("nan"), float("inf")


def make(
    recipe: str = "tensorwise", *, cache: bool = True, keep_codes: bool = True, bias: bool = False, device: str = "cpu"
) -> Float8Linear:
    torch.manual_seed(0)
    linear = Float8Linear.from_linear(
        nn.Linear(K, N, bias=bias, device=device), Float8Config(RECIPES[recipe], emulate=True)
    )
    wrap_weights_for_fsdp([linear], cache=cache, keep_codes=keep_codes)
    return linear


def weight_of(linear: nn.Module) -> ShardableFloat8Weight:
    assert isinstance(linear.weight, ShardableFloat8Weight)
    assert isinstance(linear.weight, nn.Parameter)
    return linear.weight


def cast(weight: ShardableFloat8Weight) -> Codes:
    """The codes and scale that a gather would find, cast now if they must be."""
    if not weight.state.serves(weight):
        refresh([weight], [weight.shape], ALONE, ahead=False)
    assert weight.state.codes is not None
    assert weight.state.scale is not None
    return Codes(weight.state.codes.clone(), weight.state.scale.clone())


def assert_current(weight: ShardableFloat8Weight) -> None:
    codes, scale = cast(weight)
    wanted = cast_weight(weight.tensor, weight.state.recipe)
    assert torch.equal(codes, wanted.codes.view(torch.uint8))
    assert torch.equal(scale, wanted.scale)


class FakeGroup:
    """An all-reduce among ranks that run one after the other: twice, first to hear what each has to say."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[Tensor] = []
        self.total: Tensor | None = None
        monkeypatch.setattr(shard_cast.dist, "all_reduce", self._all_reduce)

    def _all_reduce(self, buffer: Tensor, op: object, group: object) -> None:
        assert op == torch.distributed.ReduceOp.MAX
        assert buffer.dtype == torch.int32
        assert group is self
        self.calls.append(buffer.clone())
        if self.total is not None:
            buffer.copy_(self.total)

    def cast(self, weights: list[Tensor], recipe: str, ranks: int, later: bool) -> list[list[Codes]]:
        """For each rank, the codes and scale of its shard of each weight. later: codes are made from the statistics."""
        shards = []
        for rank in range(ranks):
            axis = ShardAxis(None, rank, ranks)
            parts = []
            for weight in weights:
                first = min(rank * chunk_length(len(weight), ranks), len(weight))
                part = weight[first : first + chunk_length(len(weight), ranks)]
                parts.append(Shard.of(part, RECIPES[recipe], weight.shape, axis, casts=not later))
            shards.append(parts)
        self.calls, self.total = [], None
        for parts in shards:
            cast_shards(parts, self)  # pyright: ignore[reportArgumentType]
        self.total = torch.stack(self.calls).amax(0)
        cast = [cast_shards(parts, self) for parts in shards]  # pyright: ignore[reportArgumentType]
        return [[_codes_of(*each) for each in zip(*pair, strict=True)] for pair in zip(shards, cast, strict=True)]


def _codes_of(shard: Shard, made: CastShard) -> Codes:
    assert (made.codes is None) is not shard.casts
    return Codes(cast_shard(shard, made.statistics) if made.codes is None else made.codes, made.scale)


# ---- the bits


@pytest.mark.parametrize("later", [False, True])
@pytest.mark.parametrize("ranks", [1, 2, 3, 5, 14])
@pytest.mark.parametrize("recipe", RECIPES)
def test_cast_shards_are_the_rows_of_the_cast_weight(
    recipe: str, ranks: int, later: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(ranks)
    # Uneven for 3 and 5 ranks, tiles of 128 rows cut anywhere; rank 13 of 14 has no row of the last two.
    shapes = [(384, 256), (128, 128)] if recipe == "blockwise" else [(48, 64), (272, 32), (16, 128)]
    weights = [torch.randn(shape) * 10 ** torch.empty(shape[0], 1).uniform_(-3, 3) for shape in shapes]
    weights += [weights[0].bfloat16(), torch.zeros(shapes[1])]
    group = FakeGroup(monkeypatch)
    by_rank = group.cast(weights, recipe, ranks, later)
    assert len(group.calls) == 2 * ranks, "one all-reduce for all weights"
    for number, weight in enumerate(weights):
        wanted = cast_weight(weight, RECIPES[recipe])
        codes = torch.cat([parts[number].codes.view(torch.uint8) for parts in by_rank])
        assert torch.equal(codes, wanted.codes.view(torch.uint8))
        for parts in by_rank:
            assert torch.equal(parts[number].scale, wanted.scale)
            assert parts[number].scale.stride() == wanted.scale.stride()


@pytest.mark.parametrize("later", [False, True])
@pytest.mark.parametrize("value", [NAN, -NAN, INF, -INF])
@pytest.mark.parametrize("recipe", RECIPES)
def test_what_is_not_finite_in_one_shard_shows_in_the_scale_on_every_rank(
    recipe: str, value: float, later: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = torch.randn(N, K)
    weight[200, 5] = value
    by_rank = FakeGroup(monkeypatch).cast([weight], recipe, 3, later)
    wanted = cast_weight(weight, RECIPES[recipe])
    assert wanted.scale.isnan().any()
    for (part,) in by_rank:
        assert torch.equal(part.scale.view(torch.int32), wanted.scale.view(torch.int32))
    codes = torch.cat([part.codes.view(torch.uint8) for (part,) in by_rank])
    assert torch.equal(codes, wanted.codes.view(torch.uint8))


def test_codes_of_a_short_shard_are_padded_with_zeros() -> None:
    state = Float8WeightState(RECIPES["rowwise"], caches=True)
    weight = ShardableFloat8Weight(torch.randn(90, K), state)
    for _ in range(2):
        refresh([weight], [(272, K)], ShardAxis(None, 2, 3), ahead=False)
        assert state.codes is not None
        assert state.codes.shape == (91, K)
        assert torch.equal(state.codes[:90], cast_weight(weight.tensor, state.recipe).codes.view(torch.uint8))
        assert not state.codes[90:].any()
        weight.mul_(2)


# ---- a wrapped weight is the tensor that it wraps


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_wrapped_linear_that_nobody_shards_computes_as_it_did(recipe: str) -> None:
    wrapped = make(recipe, bias=True)
    plain = Float8Linear.from_linear(nn.Linear(K, N), wrapped.config)
    plain.load_state_dict(wrapped.state_dict())
    x = torch.randn(3, 7, K)
    for linear in (wrapped, plain):
        linear(x).square().sum().backward()
    assert torch.equal(wrapped(x), plain(x))
    for name, parameter in plain.named_parameters():
        grad = wrapped.get_parameter(name).grad
        assert type(grad) is Tensor
        assert torch.equal(grad, parameter.grad)  # pyright: ignore[reportArgumentType]


def test_a_wrapped_linear_that_nobody_shards_compiles() -> None:
    torch._dynamo.reset()
    linear, x = make(), torch.randn(8, K)
    eager = linear(x)
    compiled = torch.compile(linear, backend="aot_eager", fullgraph=True)(x)
    compiled.sum().backward()
    assert torch.equal(compiled, eager)
    assert linear.weight.grad is not None


@pytest.mark.parametrize("kind", ["fused", "foreach", "for-loop"])
def test_adamw_updates_wrapped_weights_as_plain_ones_and_keeps_plain_moments(kind: str) -> None:
    linear, plain = make(), nn.Parameter(make().weight.tensor.clone())  # pyright: ignore[reportAttributeAccessIssue]
    keys = {"fused": kind == "fused", "foreach": kind == "foreach"}
    optimizers = [torch.optim.AdamW([parameter], lr=0.1, **keys) for parameter in (linear.weight, plain)]
    for _ in range(3):
        grad = torch.randn(N, K)
        linear.weight.grad, plain.grad = grad.clone(), grad
        torch.nn.utils.clip_grad_norm_([linear.weight], 1.0)
        torch.nn.utils.clip_grad_norm_([plain], 1.0)
        for optimizer in optimizers:
            optimizer.step()
    assert torch.equal(weight_of(linear).tensor, plain)
    assert {type(moment) for moment in optimizers[0].state[linear.weight].values()} == {Tensor}


def test_results_of_operations_are_plain_and_views_are_weights() -> None:
    weight = weight_of(make())
    assert type(weight + 1) is type(torch.zeros_like(weight)) is type(weight.sum()) is Tensor
    for view in (weight.detach(), weight.view(-1), weight.t(), weight[3], *weight.chunk(3)):
        assert isinstance(view, ShardableFloat8Weight)
        assert view.state is weight.state
    assert not isinstance(weight @ torch.randn(K, 2), ShardableFloat8Weight)


@pytest.mark.parametrize("requires_grad", [True, False])
def test_a_weight_on_the_meta_device_is_wrapped_and_materialized(requires_grad: bool) -> None:
    linear = Float8Linear.from_linear(
        nn.Linear(K, N, bias=False, device="meta").requires_grad_(requires_grad), Float8Config(RECIPES["rowwise"])
    )
    wrap_weights_for_fsdp([linear])
    state = linear.fsdp_weight_state
    materialize(linear, torch.device("cpu"))
    assert weight_of(linear).state is state
    assert weight_of(linear).tensor.device.type == "cpu"
    assert linear.weight.requires_grad is requires_grad


def test_linears_that_share_a_weight_go_on_sharing_it() -> None:
    linears = [make() for _ in range(2)]
    first, second = (Float8Linear.from_linear(nn.Linear(K, N, bias=False), linears[0].config) for _ in range(2))
    second.weight = first.weight
    wrap_weights_for_fsdp([first, second])
    assert first.weight is second.weight
    assert first.fsdp_weight_state is second.fsdp_weight_state


def test_linears_of_two_recipes_that_share_a_weight_are_refused() -> None:
    linears = [
        Float8Linear.from_linear(nn.Linear(K, N), Float8Config(RECIPES[name])) for name in ("tensorwise", "rowwise")
    ]
    linears[1].weight = linears[0].weight
    with pytest.raises(UserError, match="recipes tensorwise and rowwise share a weight"):
        wrap_weights_for_fsdp(linears)
    assert type(linears[0].weight) is nn.Parameter
    assert linears[0].fsdp_weight_state is None


@pytest.mark.parametrize("keep_codes", [True, False])
@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_a_copy_of_a_module_has_codes_of_its_own(how: str, keep_codes: bool) -> None:
    linear = make(keep_codes=keep_codes)
    cast(weight_of(linear))
    copied = copy.deepcopy(linear) if how == "deepcopy" else _pickled(linear)
    assert weight_of(copied).state is copied.fsdp_weight_state
    assert weight_of(copied).state is not weight_of(linear).state
    assert weight_of(copied).state.keeps_codes is keep_codes
    with torch.no_grad():
        copied.weight.mul_(3)
    assert_current(weight_of(copied))
    assert_current(weight_of(linear))
    assert not torch.equal(copied.weight, linear.weight)


def _pickled(linear: Float8Linear) -> Float8Linear:
    file = io.BytesIO()
    torch.save(linear, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


# ---- stale and fresh


def _step(implementation: dict[str, bool], compiled: bool = False) -> Callable[[Float8Linear], None]:
    def change(linear: Float8Linear) -> None:
        optimizer = torch.optim.AdamW(linear.parameters(), lr=0.1, **implementation)
        linear.weight.grad = torch.randn(N, K)
        torch._dynamo.reset()
        (torch.compile(optimizer.step, backend="aot_eager") if compiled else optimizer.step)()

    return change


def _write_data(linear: Float8Linear) -> None:
    linear.weight.data.add_(0.5)


def _copy(linear: Float8Linear) -> None:
    with torch.no_grad():
        linear.weight.copy_(torch.randn(N, K))


def _write_into_the_state_dict(linear: Float8Linear) -> None:
    linear.state_dict()["weight"].add_(0.5)


def _load(linear: Float8Linear) -> None:
    linear.load_state_dict({"weight": torch.randn(N, K)})


def _load_in_place_of(linear: Float8Linear) -> None:
    linear.load_state_dict({"weight": torch.randn(N, K)}, assign=True)


def _exchange_rows(linear: Float8Linear) -> None:
    with torch.no_grad():
        linear.weight[: N // 2].copy_(linear.weight.clone()[N // 2 :])


CHANGES = {
    "fused": _step({"fused": True}),
    "foreach": _step({"foreach": True}),
    "for-loop": _step({"foreach": False}),
    "compiled": _step({"foreach": True}, compiled=True),
    "data": _write_data,
    "copy": _copy,
    "rows of itself": _exchange_rows,
    "state dict": _write_into_the_state_dict,
    "load": _load,
    "assign": _load_in_place_of,
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("ahead", [False, True])
def test_codes_are_cast_anew_after_a_change_and_only_then(change: str, ahead: bool) -> None:
    linear = make(cache=not ahead)
    weight = weight_of(linear)
    refresh([weight], [weight.shape], ALONE, ahead=ahead)
    assert weight.state.serves(weight)
    before = cast(weight)
    CHANGES[change](linear)
    weight = weight_of(linear)
    assert not weight.state.serves(weight)
    assert_current(weight)
    assert not torch.equal(weight.state.codes, before.codes)  # pyright: ignore[reportArgumentType]


def test_what_changes_nothing_leaves_codes_fresh() -> None:
    linear = make()
    weight = weight_of(linear)
    cast(weight)
    with torch.no_grad():
        weight.clone().mul_(2)
        (weight * 2).mul_(2)
        moved = weight.new_zeros(N + 3, K)
        moved.narrow(0, 0, N).copy_(weight)  # what FSDP does to pad a shard
    linear.state_dict()
    linear(torch.randn(4, K)).sum().backward()
    assert weight.state.serves(weight)
    assert weight.state.serves(moved)  # pyright: ignore[reportArgumentType]


def test_a_copy_in_another_dtype_needs_codes_of_its_own() -> None:
    linear = make("rowwise")
    cast(weight_of(linear))
    linear.to(torch.bfloat16)
    assert weight_of(linear).dtype == torch.bfloat16
    assert_current(weight_of(linear))


def test_marking_stale_reaches_every_wrapped_weight_and_no_cache_keeps_nothing() -> None:
    model = nn.Sequential(make(), make(cache=False))
    weights = [weight_of(linear) for linear in model]
    for weight in weights:
        cast(weight)
    assert [weight.state.serves(weight) for weight in weights] == [True, False]
    mark_stale(model)
    assert not weights[0].state.is_fresh(weights[0])


def test_scales_are_refreshed_in_place_and_a_backward_pass_with_older_ones_is_an_error() -> None:
    linear = make()
    weight, scale = weight_of(linear), cast(weight_of(linear)).scale
    kept = weight.state.scale
    assert kept is not None
    x = torch.ones((), requires_grad=True)
    old = x * kept
    refresh([weight], [weight.shape], ALONE, ahead=False)  # the same weight: as before
    old.backward(retain_graph=True)
    _write_data(linear)
    cast(weight)
    assert weight.state.scale is kept
    assert not torch.equal(kept, scale)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        old.backward()


def test_precomputing_without_sharded_weights_does_nothing() -> None:
    precompute_float8_dynamic_scale_for_fsdp(nn.Linear(3, 3))
    linear = make()
    precompute_float8_dynamic_scale_for_fsdp(linear)
    assert weight_of(linear).state.codes is None


# ---- checkpoints


def test_a_state_dict_holds_plain_tensors_under_unchanged_names() -> None:
    linear = make(bias=True)
    state = linear.state_dict()
    assert list(state) == ["weight", "bias"]
    assert {type(value) for value in state.values()} == {Tensor}
    assert torch.equal(state["weight"], linear.weight)
    assert nn.Linear(K, N).load_state_dict(state)
    assert linear.state_dict(keep_vars=True)["weight"] is linear.weight


@pytest.mark.parametrize("assign", [False, True])
def test_plain_tensors_load(assign: bool) -> None:
    linear, state = make(), nn.Linear(K, N, bias=False).state_dict()
    before = linear.fsdp_weight_state
    linear.load_state_dict(state, assign=assign)
    assert weight_of(linear).state is before
    assert torch.equal(weight_of(linear).tensor, state["weight"])
    assert linear.weight.requires_grad


# ---- refusals


def test_a_weight_that_is_neither_gathered_nor_wrapped_is_an_error_that_says_what_to_do() -> None:
    linear = make()
    linear.weight = nn.Parameter(torch.randn(N, K))
    with pytest.raises(RuntimeError, match=r"found a Parameter as its weight.*fully_shard"):
        linear(torch.randn(4, K))


def test_an_operation_on_gathered_codes_is_an_error_that_says_what_to_do() -> None:
    recipe = RECIPES["tensorwise"]
    gathered = nn.Parameter(GatheredFloat8Weight(*cast_weight(torch.randn(N, K), recipe), recipe, torch.bfloat16))
    with pytest.raises(NotImplementedError, match="only a Float8Linear can use"):
        gathered.float()
    assert torch.zeros_like(gathered).dtype == torch.bfloat16


@pytest.mark.parametrize("recipe", RECIPES)
def test_gathered_codes_can_be_turned_back_into_numbers(recipe: str) -> None:
    weight = torch.randn(N, K)
    gathered = GatheredFloat8Weight(*cast_weight(weight, RECIPES[recipe]), RECIPES[recipe], torch.bfloat16)
    assert (gathered.dequantize() - weight).norm() < 0.05 * weight.norm()


@pytest.mark.parametrize(
    ("param_dtype", "ranks", "given"),
    [(torch.bfloat16, 2, torch.bfloat16), (None, 2, torch.float32), (torch.bfloat16, 3, torch.uint8)],
)
def test_codes_are_given_out_in_the_dtype_of_the_unit_unless_fsdp_pads(
    param_dtype: torch.dtype | None, ranks: int, given: torch.dtype
) -> None:
    weight = weight_of(make())
    codes, scale = cast(weight)
    mesh: Any = SimpleNamespace(size=lambda: ranks)
    policy = SimpleNamespace(param_dtype=param_dtype)
    (sent,), metadata = weight.fsdp_pre_all_gather(mesh, weight.shape, None, nn.Module(), policy)
    assert sent.dtype == given
    assert torch.equal(sent.view(torch.uint8), codes)
    gathered, _ = weight.fsdp_post_all_gather((sent,), metadata, torch.bfloat16)
    assert torch.equal(gathered.codes.view(torch.uint8), codes)
    assert torch.equal(gathered.scale, scale)
