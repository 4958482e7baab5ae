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
from torch import Tensor

from tests.distributed.harness import run_distributed
from tests.distributed.test_parallel import Case, Trained, assert_same, train_on_ranks
from titan_fp8.parallel import fsdp, fsdp_exchange

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
}


BUFFERS = {"codes": 7, "codes_of_microbatches": 7, "masters": 9, "freed": 7}
"""Two of gathers and two of gradients for each size of block, of which the first may be in high precision; and one of
the output layer, or three where it is gathered twice in a row. Otherwise 5."""


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


def _train(rank: int, world_size: int, case: Case, folder: str) -> tuple[Trained | None, Trained | None, int]:
    """With collectives, then through files; and how many buffers that took."""
    FOLDER[:], Buffer.made = [folder], 0
    expected = train_on_ranks(rank, world_size, case)
    with contextlib.ExitStack() as stack:
        for target, name, value in (
            (fsdp, "_exchanges_by_peers", lambda *args: True),
            (fsdp_exchange, "PeerBuffer", Buffer),
            (torch.cuda, "current_stream", lambda *args: _Stream()),
            (torch.cuda, "stream", lambda stream: contextlib.nullcontext()),
            (Tensor, "record_stream", lambda self, stream: None),
        ):
            stack.enter_context(mock.patch.object(target, name, value))
        return train_on_ranks(rank, world_size, case), expected, Buffer.made


@pytest.mark.parametrize("name", CASES)
def test_a_training_is_the_one_with_collectives(name: str, tmp_path: Path) -> None:
    results = run_distributed(_train, 2, CASES[name], str(tmp_path), timeout_s=200.0)
    actual, expected, buffers = results[0]
    assert actual is not None
    assert expected is not None
    assert buffers == BUFFERS.get(name, 5)
    assert_same(actual, expected, 0.0)  # two addends have one sum
