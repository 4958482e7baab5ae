"""FSDP2 with FP8 all-gather on real ranks: the same bits on every mesh, bytes on the wire, one cast an optimizer step
and no stale code."""

import contextlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor

from tests.distributed.float8_linears import BLOCK_SHAPES, SHAPES, Linears, Wire, counted_casts
from tests.distributed.harness import run_distributed
from tests.distributed.test_parallel import SEQ_LEN, Case, spread
from titan_fp8.converters.api import convert_to_float8_training, convert_to_mxfp8_training
from titan_fp8.kernels import float8
from titan_fp8.optim.one_pass import OnePassAdamW
from titan_fp8.quantization.fsdp_weight import precompute_float8_dynamic_scale_for_fsdp
from titan_fp8.quantization.linear import Float8Linear
from titan_fp8.quantization.recipes import RECIPES
from titan_fp8.quantization.weights import mark_stale, mark_stepped

# ---- the bits


def _cast_on_ranks(rank: int, world_size: int, dtype: torch.dtype, axes: tuple[int, ...]) -> None:
    mesh = init_device_mesh("cpu", axes, mesh_dim_names=("replicate", "shard")[-len(axes) :])
    for recipe in RECIPES:
        model = Linears(recipe, dtype=dtype).shard(mesh)
        loss = model()  # statistics on the way
        model.assert_current()
        assert all(torch.equal(now, then) for now, then in zip(model.masters(), model.whole, strict=True))
        loss.backward()
        grads = {type(p.grad.to_local()) for p in model.parameters() if p.grad is not None}
        assert grads == {Tensor}
        assert {p.grad.dtype for p in model.parameters() if p.grad is not None} == {dtype}
        torch.optim.SGD(model.parameters(), lr=1.0).step()
        precompute_float8_dynamic_scale_for_fsdp(model)
        model()
        model.assert_current()
        assert not any(torch.equal(now, then) for now, then in zip(model.masters(), model.whole, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("axes", [(2,), (3,), (2, 2)])
def test_gathered_codes_are_those_of_the_whole_weight(axes: tuple[int, ...], dtype: torch.dtype) -> None:
    """On 3 ranks the shards are uneven, and cut through 128x128 tiles; (2, 2) is HSDP."""
    ranks = axes[0] * axes[-1] if len(axes) == 2 else axes[0]
    run_distributed(_cast_on_ranks, ranks, dtype, axes)


def test_a_rank_without_a_row_takes_part() -> None:
    run_distributed(_cast_on_ranks, 5, torch.float32, (5,))  # 16 rows in chunks of 4


# ---- what travels


def _bytes_on_the_wire(rank: int, world_size: int, recipe: str) -> dict[str, list[tuple[str, int]]]:
    model = Linears(recipe).shard(init_device_mesh("cpu", (world_size,)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    result = {}
    for step in ("on the way", "precomputed", "again"):
        with Wire() as forward:
            loss = model()
        with Wire() as backward:
            loss.backward()
        optimizer.step()
        with Wire() as after:
            precompute_float8_dynamic_scale_for_fsdp(model)
        result |= {f"{step}, {name}": wire.sent for name, wire in locals().items() if isinstance(wire, Wire)}
    return result


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_weight_travels_as_one_byte_an_element_and_all_scales_in_one_reduction(recipe: str) -> None:
    shapes = BLOCK_SHAPES if recipe == "blockwise" else SHAPES
    elements, rest = sum(n * k for n, k in shapes), 2 * 32  # beside them, weight and bias of the norm
    statistics = {
        "tensorwise": [4, 4, 4],  # one number, in a slot of four
        "blockwise": [4, 4],
    }.get(recipe, [n for n, _ in shapes])
    gather = ("all_gather", (elements + 2 * rest) // 2)
    scatter = ("reduce_scatter", 4 * (elements + rest) // 2)
    one_by_one = [("all_reduce torch.int32", 4 * size) for size in statistics]
    at_once = [("all_reduce torch.int32", 4 * sum(statistics))]
    for rank in run_distributed(_bytes_on_the_wire, 2, recipe):
        assert rank["on the way, forward"] == [*one_by_one, gather]
        for step in ("precomputed", "again"):
            assert rank[f"{step}, forward"] == [gather]
        for step in ("on the way", "precomputed", "again"):
            assert rank[f"{step}, backward"] == [scatter]  # a root stays gathered
            assert rank[f"{step}, after"] == at_once


def _units_on_the_wire(rank: int, world_size: int, grad_weight_dtype: torch.dtype) -> None:
    case = Case(shard=world_size, float8_recipe="tensorwise", float8_all_gather=True, compute_dtype=torch.bfloat16)
    model, _ = spread(case, grad_weight_dtype=grad_weight_dtype)
    layer = model.layers["1"]  # seven float8 linears, two norms
    codes = sum(p.numel() for p in layer.parameters() if p.dim() == 2)
    norms = sum(p.numel() for p in layer.parameters() if p.dim() == 1)
    with Wire() as wire:
        layer.unshard()
    assert wire.sent[-1] == ("all_gather", (codes + norms * grad_weight_dtype.itemsize) // world_size)
    assert {p.dtype for p in layer.parameters()} == {grad_weight_dtype}


@pytest.mark.parametrize("grad_weight_dtype", [torch.bfloat16, torch.float32])
def test_what_is_gathered_beside_codes_has_the_dtype_of_gradients(grad_weight_dtype: torch.dtype) -> None:
    """The dtype of the activations, or a wider one in which gradients of weights leave their product."""
    run_distributed(_units_on_the_wire, 2, grad_weight_dtype)


def _reductions_of_two_meshes(rank: int, world_size: int) -> list[tuple[str, int]]:
    model = nn.ModuleList([Linears("tensorwise"), Linears("rowwise"), Linears("tensorwise")])
    square = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    for part, mesh in zip(model, (square, init_device_mesh("cpu", (4,)), square), strict=True):
        part.shard(mesh)
    with Wire() as wire:
        precompute_float8_dynamic_scale_for_fsdp(model)
        precompute_float8_dynamic_scale_for_fsdp(model)  # nothing has changed
    for part in model:
        part()
        part.assert_current()
    return wire.sent


def test_each_mesh_has_one_reduction_whatever_the_recipes_on_it() -> None:
    tensorwise, rowwise = 4 * 4 * len(SHAPES), 4 * sum(n for n, _ in SHAPES)
    sent = run_distributed(_reductions_of_two_meshes, 4)[0]
    assert sent == [("all_reduce torch.int32", 2 * tensorwise), ("all_reduce torch.int32", rowwise)]


# ---- one cast an optimizer step


def _casts(rank: int, world_size: int, cache: bool, ahead: bool) -> list[dict[str, int]]:
    case = Case(
        shard=world_size,
        float8_recipe="tensorwise",
        compute_dtype=torch.bfloat16,
        reshard="always",
        activation_checkpoint={"mode": "full"},
    )
    model, _ = spread(case)
    linears = [module for module in model.modules() if isinstance(module, Float8Linear)]
    model = spread(replace(case, float8_all_gather=True))[0]
    for module in model.modules():
        if isinstance(module, Float8Linear):
            assert module.fsdp_weight_state is not None
            module.fsdp_weight_state.caches = cache
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    tokens = torch.randint(case.vocab_size, (2, SEQ_LEN))
    result = []
    for _ in range(2):
        with counted_casts() as counts:
            for _ in range(3):
                model(tokens).sum().backward()
            with torch.no_grad():
                model.eval()(tokens)
                model.train()
            optimizer.step()
            if ahead:
                precompute_float8_dynamic_scale_for_fsdp(model)
        result.append({name: count // len(linears) for name, count in counts.items()})
    return result


@pytest.mark.parametrize(("cache", "ahead"), [(True, False), (False, True), (True, True)])
def test_a_weight_is_cast_once_a_step_however_often_it_is_gathered(cache: bool, ahead: bool) -> None:
    """Three microbatches, each gathering forward and backward, recomputed; and an evaluation."""
    first = {"amax": 1 + ahead, "cast": 1 + ahead}  # the step after which they are cast ahead included
    if ahead and not cache:
        first = {"amax": 7 + ahead, "cast": 7 + ahead}  # until then at every gather
    second = {"amax": 1, "cast": 1}
    assert run_distributed(_casts, 2, cache, ahead) == [[first, second]] * 2


def test_without_a_cache_a_weight_is_cast_at_each_gather() -> None:
    each = {"amax": 7, "cast": 7}
    assert run_distributed(_casts, 2, False, False) == [[each, each]] * 2


def _fused(model: Linears) -> None:
    _step(model, torch.optim.AdamW(model.parameters(), lr=0.1, fused=True))


def _foreach(model: Linears) -> None:
    _step(model, torch.optim.AdamW(model.parameters(), lr=0.1, foreach=True))


def _compiled(model: Linears) -> None:
    torch._dynamo.reset()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    _step(model, optimizer, torch.compile(optimizer.step, backend="aot_eager"))


def _step(model: Linears, optimizer: torch.optim.Optimizer, step: Callable[[], Any] | None = None) -> None:
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter) + parameter.detach()
    (step or optimizer.step)()


def _data(model: Linears) -> None:
    for parameter in model.parameters():
        parameter.data.add_(0.25)


def _copy(model: Linears) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter * 2 + 1)


def _load(model: Linears) -> None:
    model.load_state_dict({name: value * 2 + 1 for name, value in model.state_dict().items()})


def _load_in_place_of(model: Linears) -> None:
    model.load_state_dict({name: value * 2 + 1 for name, value in model.state_dict().items()}, assign=True)


def _load_the_norm_alone(model: Linears) -> None:
    """Changes no weight; but FSDP pads uneven shards anew, on the ranks that have some."""
    model.load_state_dict({"norm.bias": model.state_dict()["norm.bias"]}, strict=False)


def _write_unseen(model: Linears) -> None:
    for linear in model.linears:
        linear.weight.to_local().tensor.numpy()[:] += 0.25
    mark_stale(model)


def _one_pass(model: Linears) -> None:
    _step(model, OnePassAdamW(model.parameters(), lr=0.1))


def _one_pass_and_roll_back(model: Linears) -> None:
    """As dcp.load does: into the tensors of a state dict taken after the step."""
    _one_pass(model)
    for value in model.state_dict().values():
        value.mul_(3.0)


def _one_pass_and_write_to_older_tensors(model: Linears) -> None:
    older = [value.to_local() if isinstance(value, DTensor) else value for value in model.state_dict().values()]
    _one_pass(model)
    for value in older:
        value.mul_(3.0)


_ONE_PASS = [_one_pass, _one_pass_and_roll_back, _one_pass_and_write_to_older_tensors]
_CHANGES = [_fused, _foreach, _compiled, _data, _copy, _load, _load_in_place_of, _load_the_norm_alone, _write_unseen]


def _change_weights(rank: int, world_size: int, ahead: bool, keep_codes: bool) -> None:
    mesh = init_device_mesh("cpu", (world_size,))
    for change in _CHANGES:
        if change is _compiled and world_size > 2:
            continue
        model = Linears("rowwise" if keep_codes else "tensorwise", cache=not ahead, keep_codes=keep_codes).shard(mesh)
        if ahead:
            precompute_float8_dynamic_scale_for_fsdp(model)
        model().backward()
        before = model.masters()
        change(model)
        changed = not any(torch.equal(a, b) for a, b in zip(model.masters(), before, strict=True))
        assert changed is (change is not _load_the_norm_alone), change.__name__
        model()
        model.assert_current()


def _tell_the_largest_values(rank: int, world_size: int, ahead: bool, keep_codes: bool) -> None:
    mesh = init_device_mesh("cpu", (world_size,))
    for change in _ONE_PASS:
        model = Linears("tensorwise", cache=not ahead, keep_codes=keep_codes).shard(mesh)
        precompute_float8_dynamic_scale_for_fsdp(model)
        model().backward()
        change(model)
        if ahead:
            mark_stepped(model.modules())  # as the trainer does
            is_told = change is _one_pass
            with mock.patch.object(float8, "amax", None) if is_told else contextlib.nullcontext():
                precompute_float8_dynamic_scale_for_fsdp(model)
        model()
        model.assert_current()


@pytest.mark.parametrize("keep_codes", [True, False])
@pytest.mark.parametrize(("ranks", "ahead"), [(2, False), (2, True), (3, True)])
def test_a_step_tells_the_largest_values_and_no_later_write_is_missed(
    ranks: int, ahead: bool, keep_codes: bool
) -> None:
    run_distributed(_tell_the_largest_values, ranks, ahead, keep_codes)


@pytest.mark.parametrize("keep_codes", [True, False])
@pytest.mark.parametrize(("ranks", "ahead"), [(2, False), (2, True), (3, False), (3, True)])
def test_no_stale_code_is_gathered_after_a_weight_has_changed(ranks: int, ahead: bool, keep_codes: bool) -> None:
    """Without kept codes it is a stale scale that would show, and of a tensor there is one."""
    run_distributed(_change_weights, ranks, ahead, keep_codes)


def _shard_cached(rank: int, world_size: int, convert: Callable[..., Any]) -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    convert(model, emulate=True, cache_weights=True)
    mesh = init_device_mesh("cpu", (world_size,))
    for linear in model:
        fully_shard(linear, mesh=mesh)
    if world_size == 1:
        model(torch.randn(32, 64))
        return
    with pytest.raises(RuntimeError, match=r"0\.weight: cached codes of weights .* that FSDP shards; convert with"):
        model(torch.randn(32, 64))


@pytest.mark.parametrize("convert", [convert_to_float8_training, convert_to_mxfp8_training])
def test_codes_of_whole_weights_that_fsdp_shards_are_not_kept(convert: Callable[..., Any]) -> None:
    run_distributed(_shard_cached, 2, convert)
    run_distributed(_shard_cached, 1, convert)


def _write_to_a_dtensor(rank: int, world_size: int, convert: Callable[..., Any]) -> None:
    model = nn.Sequential(nn.Linear(64, 64, bias=False))
    convert(model, emulate=True, cache_weights=True)
    mesh = init_device_mesh("cpu", (world_size,))
    model[0].weight = nn.Parameter(distribute_tensor(model[0].weight.detach(), mesh, [Replicate()]))
    x = torch.randn(32, 64)
    first = model(x)
    with torch.no_grad():
        model[0].weight.mul_(2)
    assert torch.equal(model(x), 2 * first)
    with torch.no_grad():
        model[0].weight.to_local().mul_(2)
    assert torch.equal(model(x), 4 * first)


@pytest.mark.parametrize("convert", [convert_to_float8_training, convert_to_mxfp8_training])
def test_a_write_to_a_dtensor_makes_the_codes_stale(convert: Callable[..., Any]) -> None:
    run_distributed(_write_to_a_dtensor, 1, convert)
