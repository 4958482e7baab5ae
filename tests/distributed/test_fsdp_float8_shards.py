"""FP8 all-gather of shards whose codes are made for each gather: the bits of kept ones, what is held and exchanged."""

from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.multiprocessing.reductions import StorageWeakRef

from tests.distributed.float8_linears import Linears, Wire, counted_casts
from tests.distributed.harness import run_distributed
from tests.distributed.test_fsdp_float8_training import WIDE
from tests.distributed.test_parallel import SAME_BITS, Case, Trained, assert_same, train_on_ranks
from titan_fp8.quantization import shard_cast, sharded_weight
from titan_fp8.quantization.fsdp_weight import precompute_float8_dynamic_scale_for_fsdp
from titan_fp8.quantization.recipes import RECIPES


class Watched(Linears):
    """Linears whose codes are let go of, gathered again in the backward pass.

    `storages` are those of all codes that its shards were cast to.
    """

    def __init__(self, recipe: str, mesh: Any, *, ahead: bool, **keys: Any) -> None:
        super().__init__(recipe, keep_codes=False, cache=not ahead, **keys)
        self.storages: list[StorageWeakRef] = []
        self.shard(mesh, reshard_after_forward=True)

    def step(self) -> None:
        """Forward and backward; afterwards no codes of a shard are left."""

        def watched(function: Any) -> Any:
            def call(*args: Any) -> Any:
                made = function(*args)
                codes = [made] if isinstance(made, Tensor) else [each.codes for each in made]
                self.storages += [StorageWeakRef(each.untyped_storage()) for each in codes if each is not None]
                return made

            return call

        with mock.patch.multiple(
            sharded_weight, cast_shard=watched(shard_cast.cast_shard), cast_shards=watched(shard_cast.cast_shards)
        ):
            self().backward()
        assert len(self.storages) == 2 * len(self.linears), "one gather forward and one backward"
        assert all(storage.expired() for storage in self.storages)
        assert all(state.codes is None for state in self.states)
        self.storages.clear()

    @property
    def states(self) -> list[Any]:
        return [linear.fsdp_weight_state for linear in self.linears]


def _let_go(rank: int, world_size: int, axes: tuple[int, ...], dtype: torch.dtype) -> None:
    mesh = init_device_mesh("cpu", axes, mesh_dim_names=("replicate", "shard")[-len(axes) :])
    for recipe in RECIPES:
        for ahead in (False, True):
            model = Watched(recipe, mesh, ahead=ahead, dtype=dtype)
            for _ in range(2):
                if ahead:
                    precompute_float8_dynamic_scale_for_fsdp(model)
                    assert all(state.codes is None for state in model.states)
                for _ in range(2):
                    model.step()
                    model.assert_current()
                torch.optim.SGD(model.parameters(), lr=1.0).step()


@pytest.mark.parametrize(("axes", "dtype"), [((2,), torch.float32), ((3,), torch.bfloat16), ((2, 2), torch.float32)])
def test_codes_that_are_not_kept_are_those_of_the_whole_weight_and_gone_after_each_gather(
    axes: tuple[int, ...], dtype: torch.dtype
) -> None:
    """On 3 ranks FSDP pads shards; (2, 2) is HSDP."""
    run_distributed(_let_go, axes[0] * axes[-1] if len(axes) == 2 else axes[0], axes, dtype)


def _exchanges(rank: int, world_size: int, ahead: bool) -> list[tuple[list[str], dict[str, int]]]:
    model = Watched("tensorwise", init_device_mesh("cpu", (world_size,)), ahead=ahead)
    result = []
    for _ in range(2):
        if ahead:
            precompute_float8_dynamic_scale_for_fsdp(model)
        for _ in range(2):
            with Wire() as wire, counted_casts() as counts:
                model().backward()
            result.append(([kind for kind, _ in wire.sent], dict(counts)))
        torch.optim.SGD(model.parameters(), lr=1.0).step()
    return result


@pytest.mark.parametrize("ahead", [False, True])
def test_gathers_after_the_first_of_a_step_ask_no_other_rank(ahead: bool) -> None:
    """And with precomputed scales the first asks none either."""
    weights = 3
    later = ["all_gather", "all_gather", "reduce_scatter"], {"cast": 2 * weights}
    first = later if ahead else (["all_reduce torch.int32"] * weights + later[0], {"amax": weights} | later[1])
    assert run_distributed(_exchanges, 2, ahead) == [[first, later] * 2] * 2


def _train_both_ways(rank: int, world_size: int, case: Case) -> list[Trained | None]:
    return [train_on_ranks(rank, world_size, replace(case, keep_codes=keep)) for keep in (True, False)]


def _check_both_ways(case: Case) -> None:
    kept, made_again = run_distributed(_train_both_ways, case.ranks, case)[0]
    assert_same(made_again, kept, SAME_BITS)


def _accumulating(recipe: str, ahead: bool, **keys: Any) -> Case:
    return Case(
        shard=2,
        microbatches=2,
        float8_recipe=recipe,
        float8_all_gather=True,
        precomputed_scales=ahead,
        reshard="always",
        compute_dtype=torch.bfloat16,
        **keys,
    )


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("recipe", RECIPES)
def test_training_is_the_same_whether_codes_are_kept(recipe: str, ahead: bool) -> None:
    """Three steps of two microbatches."""
    case = _accumulating(recipe, ahead, dims=WIDE if recipe == "blockwise" else {})
    _check_both_ways(case)


@pytest.mark.slow
def test_compiled_training_is_the_same_whether_codes_are_kept() -> None:
    case = _accumulating("tensorwise", True, compile_backend="aot_eager", activation_checkpoint={"mode": "full"})
    _check_both_ways(case)


def test_training_under_tensor_parallelism_is_the_same_whether_codes_are_kept() -> None:
    sizes = {"dim": 64, "n_heads": 4, "n_kv_heads": 2, "ffn_dim": 96}
    case = _accumulating("tensorwise", False, tensor=2, vocab_size=68, dims=sizes)
    _check_both_ways(case)
