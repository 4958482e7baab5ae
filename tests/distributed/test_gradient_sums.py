"""Sums of gradients over microbatches in memory of their own: when they are kept, and trainings that keep them."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard

from tests.distributed.harness import run_distributed
from tests.distributed.test_expert_parallel import MODEL
from tests.distributed.test_fsdp_exchange import through_files
from tests.distributed.trainings import Mesh, train
from titan_fp8.parallel.gradient_sums import GradientSums


def _take(rank: int, world_size: int) -> None:
    """What `GradientSums.take` returns for gradients of all kinds."""
    mesh = init_device_mesh("cpu", (world_size,))
    model = nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(5)).requires_grad_()
    frozen = nn.Linear(2, 2).requires_grad_(False)
    fully_shard(model, mesh=mesh)
    sums = GradientSums([*model, frozen], torch.float32)
    parameters = list(model.parameters())

    def give(memory: Tensor) -> None:
        for place, parameter in enumerate(parameters):
            shape = parameter.to_local().shape
            part = memory[place : place + shape.numel()].view(shape)
            parameter.grad = DTensor.from_local(
                part, mesh, [Shard(0)], shape=parameter.shape, stride=parameter.stride()
            )

    assert sums.take(16) is None, "it has no memory yet"
    sums.create()
    assert sums.take(8) is None, "not all have gradients"
    memory, adds = sums.take(16)  # rows of all shards alike: 2 x 4, 2, 3 and 3
    assert memory.shape == (16,)
    assert not adds
    give(memory)
    again, adds = sums.take(16)
    assert again is memory
    assert adds
    assert all(parameter.grad is None for parameter in parameters)
    give(memory.clone())
    assert sums.take(16) is None, "somebody else's gradients"
    assert all(parameter.grad is not None for parameter in parameters)
    give(memory)
    parameters[1].grad = None
    assert sums.take(16) is None, "one has none yet"
    assert parameters[0].grad is not None


def test_sums_are_kept_for_whole_units_with_gradients_of_their_own() -> None:
    run_distributed(_take, 2)


def _create(rank: int, world_size: int) -> None:
    """Units whose sums are not kept."""
    mesh = init_device_mesh("cpu", (world_size,))
    mixed = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False, dtype=torch.bfloat16))
    whole = nn.Linear(4, 4, bias=False)
    replicated = DTensor.from_local(torch.zeros(4, 4), mesh, [Replicate()])
    whole.weight = nn.Parameter(replicated)
    fully_shard(mixed, mesh=mesh)
    half = fully_shard(nn.Linear(4, 4, bias=False), mesh=mesh)
    for modules, dtype in (([*mixed], torch.float32), ([whole], torch.float32), ([nn.Linear(4, 4)], torch.float32),
                           ([half], torch.bfloat16), ([], torch.float32)):  # fmt: skip
        sums = GradientSums(modules, dtype)
        sums.create()
        assert sums._sums is None
        assert all(sums.take(numel) is None for numel in (0, 8, 10, 16, 20))


def test_sums_are_not_kept_for_units_of_several_dtypes_or_that_are_cut_otherwise() -> None:
    run_distributed(_create, 2)


def _train(rank: int, world_size: int, options: Any, folder: str) -> tuple[Any, ...]:
    """A training of a model with experts with collectives and through files; how often sums were begun, added to, and
    left to FSDP."""
    expected = train(rank, world_size, options, f"{folder}/collectives", STEPS)
    with through_files(f"{folder}/files") as taken:
        actual = train(rank, world_size, options, f"{folder}/peers", STEPS)
    used = [place and place[1] for place in taken.places]
    return actual, expected, (used.count(False), used.count(True), used.count(None))


STEPS, MICROBATCHES = 3, 4
BF16 = {"training.mixed_precision_param": "bfloat16", "training.mixed_precision_reduce": "bfloat16"}
NO_AUX = {"model.overrides.aux_loss_weight": "0"}
TRAININGS: dict[str, tuple[str, dict[str, str], str]] = {
    "experts_sharded": ("fsdp2", {}, "kept"),
    "experts_that_are_cut": ("fsdp2", {"model.overrides.n_experts": "3"}, "kept"),
    "experts_apart": ("fsdp2 ep2", {}, "kept"),
    "all_recomputed": (
        "fsdp2",
        {"parallelism.fsdp_reshard_after_forward": "always", "activation_checkpoint.mode": "full"},
        "kept",
    ),
    "sums_in_bf16": ("fsdp2", BF16, "by FSDP"),
    "copies": ("rep2 fsdp2", {}, ""),
    "divided": ("fsdp2 tp2", NO_AUX, "by FSDP"),
}
"""Axes, options, and what becomes of the sums: kept in their memory, left to FSDP as they come, or never looked at."""


@pytest.mark.parametrize("name", TRAININGS)
def test_trainings_with_kept_sums_are_those_with_collectives(name: str, tmp_path: Path) -> None:
    axes, options, kept = TRAININGS[name]
    for folder in ("collectives", "peers", "files"):
        (tmp_path / folder).mkdir()
    mesh = Mesh(axes, tuple({**MODEL, **options}.items()))
    batch = MICROBATCHES * mesh.degrees.get("fsdp", 1) * mesh.degrees.get("rep", 1)
    mesh = Mesh(axes, (*mesh.options, ("training.local_batch_size", "1"), ("training.global_batch_size", str(batch))))
    results = run_distributed(_train, mesh.ranks, mesh.arguments(), str(tmp_path), timeout_s=150.0)
    actual, expected, used = results[0]
    assert actual.losses == expected.losses
    assert actual.grads.keys() == expected.grads.keys()
    for parameter, grad in expected.grads.items():
        assert torch.equal(actual.grads[parameter], grad), parameter
    blocks = {name.split(".")[1] for name in expected.grads if name.startswith("layers.")}
    first = (len(blocks) + 1) * STEPS  # the output layer is a unit too
    later = first * (MICROBATCHES - 1)
    assert used == {"kept": (first, later, 0), "by FSDP": (0, 0, first + later), "": (0, 0, 0)}[kept]
