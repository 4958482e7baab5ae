"""FSDP2 with its units exchanged through peer memory, in processes on CPUs that share files in place of GPUs' memory.

In FSDP's own order of calls no buffer is taken twice, and a training is the one with collectives.
"""

import contextlib
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard

from tests.distributed.harness import run_distributed
from tests.distributed.test_parallel import Case, assert_same, train_on_ranks
from titan_fp8.parallel import fsdp, fsdp_exchange
from titan_fp8.parallel.gradient_sums import GradientSums

PLAIN = Case(shard=2, vocab_size=64, dims={"dim": 64, "n_heads": 2, "n_kv_heads": 2, "ffn_dim": 128, "n_layers": 3})
BF16 = replace(PLAIN, compute_dtype=torch.bfloat16)
CASES = {
    "fp32": PLAIN,
    "bf16": BF16,
    "microbatches": replace(BF16, microbatches=2),
    "kept": replace(BF16, reshard="never", microbatches=2),
    "freed": replace(PLAIN, reshard="always"),
    "full_ac": replace(BF16, activation_checkpoint={"mode": "full"}),
    "compiled": replace(BF16, compile_backend="aot_eager"),
    "codes": replace(BF16, float8_recipe="tensorwise", float8_all_gather=True, precomputed_scales=True),
    "codes_of_microbatches": replace(BF16, float8_recipe="rowwise", float8_all_gather=True, microbatches=2),
    "masters": replace(BF16, float8_recipe="tensorwise"),
    "uneven": replace(PLAIN, dims={**PLAIN.dims, "ffn_dim": 131}),
    "uneven_microbatches": replace(PLAIN, dims={**PLAIN.dims, "ffn_dim": 131}, vocab_size=67, microbatches=4),
    "microbatches_in_bf16": replace(BF16, microbatches=4, reduce_dtype=torch.bfloat16),
}
KEPT = {"microbatches", "kept", "codes_of_microbatches", "uneven_microbatches"}
"""Whose sums over microbatches lie in memory of their own: three blocks' and the output layer's. Sums in bf16 do not,
since gradients are fp32."""


BUFFERS = {"codes": 6, "codes_of_microbatches": 6, "masters": 7, "freed": 6}
"""Two of gathers and one of gradients for each size of block, of which the first may be in high precision; and one of
the output layer, or three where it is gathered twice in a row. Otherwise 4."""


class Buffer:
    """A `PeerBuffer` of files that all processes map; whoever publishes or ends a round waits for the others to."""

    made = 0

    def __init__(self, group: dist.ProcessGroup, size: int, device: torch.device) -> None:
        self.group, self.rank = group, group.rank()
        self.peers = [(self.rank + i) % group.size() for i in range(1, group.size())]
        self.round, self.step = 0, "end"
        Buffer.made += 1
        names = [f"{FOLDER[0]}/{Buffer.made}.{rank}" for rank in range(group.size())]
        self.parts = [torch.from_file(name, shared=True, size=size, dtype=torch.uint8) for name in names]
        dist.barrier(group)  # who maps a file that is not as long yet writes a zero into it

    def _after(self, step: str, *before: str) -> None:
        assert self.step in before, f"{step} after {self.step}"
        self.step = step

    def begin(self) -> Tensor:
        self._after("begin", "end")
        self.parts[self.rank].fill_(0xFF)  # NaN, where nothing is written
        return self.parts[self.rank]

    def publish(self) -> None:
        self._after("publish", "begin")
        dist.barrier(self.group)

    def read(self, peer: int, start: int, into: Tensor) -> None:
        self._after("read", "publish", "read")
        into.copy_(self.parts[peer][start : start + into.numel()])

    def end(self) -> None:
        self._after("end", "read")
        dist.barrier(self.group)


FOLDER: list[str] = []


class _Stream:
    def __getattr__(self, name: str) -> Any:
        return lambda *args: _Stream()


class Taken:
    """Notes what `GradientSums.take` returns: its place, and whether it is added to."""

    take = GradientSums.take

    def __init__(self) -> None:
        self.places: list[tuple[int, bool] | None] = []

    def __call__(self, sums: GradientSums, numel: int, dtype: torch.dtype) -> tuple[Tensor, bool] | None:
        taken = Taken.take(sums, numel, dtype)
        self.places.append(None if taken is None else (taken[0].data_ptr(), taken[1]))
        return taken


def _train(rank: int, world_size: int, case: Case, folder: str) -> tuple[Any, ...]:
    """With collectives, then through files; how many buffers that took, and where gradients were added up."""
    FOLDER[:], Buffer.made = [folder], 0
    expected = train_on_ranks(rank, world_size, case)
    taken = Taken()
    with contextlib.ExitStack() as stack:
        for target, name, value in (
            (fsdp, "_exchanges_by_peers", lambda *args: True),
            (fsdp_exchange, "PeerBuffer", Buffer),
            (torch.cuda, "current_stream", lambda *args: _Stream()),
            (torch.cuda, "stream", lambda stream: contextlib.nullcontext()),
            (Tensor, "record_stream", lambda self, stream: None),
            (GradientSums, "take", lambda *args: taken(*args)),
        ):
            stack.enter_context(mock.patch.object(target, name, value))
        return train_on_ranks(rank, world_size, case), expected, Buffer.made, taken.places


@pytest.mark.parametrize("name", CASES)
def test_a_training_is_the_one_with_collectives(name: str, tmp_path: Path) -> None:
    results = run_distributed(_train, 2, CASES[name], str(tmp_path), timeout_s=200.0)
    actual, expected, buffers, taken = results[0]
    assert actual is not None
    assert expected is not None
    assert buffers == BUFFERS.get(name, 4)
    assert_same(actual, expected, 0.0)  # two addends have one sum
    steps, units, microbatches = len(expected.losses), 4, CASES[name].microbatches
    if name in KEPT:
        adds = [place is not None and place[1] for place in taken]
        assert adds == ([False] * units + [True] * units * (microbatches - 1)) * steps
        assert taken[:units] == [(place, False) for place, _ in taken[-units:]], "in the same memory in every step"
    else:
        assert set(taken) <= {None}
        assert len(taken) == (units * microbatches * steps if microbatches > 1 else 0)


def _take(rank: int, world_size: int) -> None:
    """What `GradientSums.take` returns for gradients of all kinds."""
    mesh, fp32 = init_device_mesh("cpu", (world_size,)), torch.float32
    model = nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(5)).requires_grad_()
    frozen = nn.Linear(2, 2).requires_grad_(False)
    fully_shard(model, mesh=mesh)
    sums = GradientSums([*model, frozen])
    parameters = list(model.parameters())

    def give(memory: Tensor) -> None:
        for place, parameter in enumerate(parameters):
            shape = parameter.to_local().shape
            part = memory[place : place + shape.numel()].view(shape)
            parameter.grad = DTensor.from_local(
                part, mesh, [Shard(0)], shape=parameter.shape, stride=parameter.stride()
            )

    assert sums.take(16, fp32) is None, "it has no memory yet"
    sums.create()
    for numel, dtype in ((16, torch.bfloat16), (8, fp32)):
        assert sums.take(numel, dtype) is None
    memory, adds = sums.take(16, fp32)  # rows of all shards alike: 2 x 4, 2, 3 and 3
    assert memory.shape == (16,)
    assert not adds
    give(memory)
    again, adds = sums.take(16, fp32)
    assert again is memory
    assert adds
    assert all(parameter.grad is None for parameter in parameters)
    give(memory.clone())
    assert sums.take(16, fp32) is None, "somebody else's gradients"
    assert all(parameter.grad is not None for parameter in parameters)
    give(memory)
    parameters[1].grad = None
    assert sums.take(16, fp32) is None, "one has none yet"
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
    for modules in ([*mixed], [whole], [nn.Linear(4, 4)], []):
        sums = GradientSums(modules)
        sums.create()
        assert all(sums.take(numel, torch.float32) is None for numel in (0, 8, 16))


def test_sums_are_not_kept_for_units_of_several_dtypes_or_that_are_cut_otherwise() -> None:
    run_distributed(_create, 2)
