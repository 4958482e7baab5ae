"""Exchanges of FSDP through peer memory: what is copied where, in which order, and who waits for whom; with ordinary
memory of one process in the place of several GPUs'. On GPUs: tests/gpu/test_fsdp_exchange.py."""

import contextlib
import weakref
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from titan_fp8.parallel import fsdp, fsdp_exchange
from titan_fp8.parallel.config import ParallelismSection
from titan_fp8.parallel.fsdp import _exchanges_by_peers
from titan_fp8.parallel.fsdp_exchange import PeerAllGather, PeerReduceScatter, Places
from titan_fp8.runtime.errors import UserError
from titan_fp8.runtime.known_squares import take_known_squares
from titan_fp8.runtime.peer_memory import has_peer_access

CPU = torch.device("cpu")


class Group:
    """One rank's view of a group of `ranks`; all views share `memory`."""

    def __init__(self, rank: int, ranks: int, memory: dict[Any, Tensor], log: list[tuple[Any, ...]]) -> None:
        self._rank, self._ranks, self.memory, self.log = rank, ranks, memory, log
        self.made = 0

    def rank(self) -> int:
        return self._rank

    def size(self) -> int:
        return self._ranks


class Buffer:
    """A `PeerBuffer` whose peers' memory is at hand; it notes who does what in which round."""

    def __init__(self, group: Group, size: int, device: torch.device) -> None:
        self.group, self.rank, self.number = group, group.rank(), group.made
        group.made += 1
        self.size, self.round = size, 0
        self.peers = [(self.rank + i) % group.size() for i in range(1, group.size())]
        self.memory = group.memory[self.number, self.rank] = torch.full((size,), 0xAA, dtype=torch.uint8)

    def _note(self, what: str, *more: Any) -> None:
        self.group.log.append((self.rank, self.number, self.round, what, *more))

    def begin(self) -> Tensor:
        self.round += 1
        self._note("begin")
        return self.memory

    def publish(self) -> None:
        self._note("publish")

    def of(self, peer: int) -> Tensor:
        return self.group.memory[self.number, peer]

    def wait(self, peer: int) -> None:
        self._note("read", peer)

    def read(self, peer: int, start: int, into: Tensor) -> None:
        self.wait(peer)
        into.copy_(self.group.memory[self.number, peer][start : start + into.numel()])

    def end(self) -> None:
        self._note("end")


class Stream:
    """Notes nothing: events and streams that ordinary memory does not need."""

    def __getattr__(self, name: str) -> Any:
        return lambda *args: Stream()


@pytest.fixture
def ranks(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(fsdp_exchange, "PeerBuffer", Buffer)
    for name in ("current_stream", "default_stream"):
        monkeypatch.setattr(torch.cuda, name, lambda *args: Stream())
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(Tensor, "record_stream", lambda self, stream: None)

    def make(count: int) -> list[Group]:
        memory: dict[Any, Tensor] = {}
        log: list[tuple[Any, ...]] = []
        return [Group(rank, count, memory, log) for rank in range(count)]

    return make


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16, torch.float32])
def test_every_rank_gathers_all_shards_in_order(ranks, count: int, dtype: torch.dtype) -> None:
    groups = ranks(count)
    gathers = [PeerAllGather(Places(group)) for group in groups]
    for round_ in range(5):
        shards = (torch.arange(count * 4).view(count, 4) + 50 * round_).to(dtype)
        outputs = [gather.allocate((count * 4,), dtype=dtype, device=CPU) for gather in gathers]
        for rank, output in enumerate(outputs):
            output[rank * 4 : (rank + 1) * 4] = shards[rank]
        for rank, output in enumerate(outputs):
            gathers[rank](output, output[rank * 4 : (rank + 1) * 4], groups[rank])
        assert all(torch.equal(output, shards.flatten()) for output in outputs)
        del outputs
    rounds = [entry[1:3] for entry in groups[0].log if entry[0] == 0 and entry[3] == "begin"]
    assert rounds == [(0, 1), (1, 1), (0, 2), (1, 2), (0, 3)], "two buffers take turns"
    own = [entry[3:] for entry in groups[0].log if entry[:3] == (1, 0, 1)]
    reads = [("read", (1 + i) % count) for i in range(1, count)]
    assert own == [("begin",), ("publish",), *reads, ("end",)]


def test_a_buffer_that_is_still_in_use_is_not_given_out_again(ranks) -> None:
    (group,) = ranks(1)
    gather = PeerAllGather(Places(group))

    def allocate(size: int = 4) -> Tensor:
        return gather.allocate((size,), dtype=torch.uint8, device=CPU)

    first = allocate()
    allocate()  # and let go of
    with pytest.raises(RuntimeError, match=r"set parallelism\.fsdp_exchange to collectives"):
        allocate()
    first.fill_(1)
    assert allocate(8).numel() == 8, "another size has other buffers"
    del first
    for _ in range(4):
        allocate()


@pytest.mark.parametrize("at_once", [1 << 20, 3000, 1])
@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize("sum_dtype", [torch.float32, torch.bfloat16])
def test_every_rank_gets_its_part_of_the_sum_added_up_in_fp32(
    ranks, monkeypatch: pytest.MonkeyPatch, count: int, sum_dtype: torch.dtype, at_once: int
) -> None:
    monkeypatch.setattr(fsdp_exchange, "READ_AT_ONCE", at_once)
    groups = ranks(count)
    reduces = [PeerReduceScatter(Places(group), sum_dtype, squares=True) for group in groups]
    for size in (6, 6, 1000, 6):  # units of two sizes have buffers of their own
        gradients = torch.randn(count, count * size).bfloat16()
        inputs, outputs = [], []
        for reduce in reduces:
            inputs.append(reduce.allocate((count * size,), dtype=torch.bfloat16, device=CPU))
            outputs.append(reduce.allocate((size,), dtype=torch.bfloat16, device=CPU))
        for rank in range(count):
            inputs[rank].copy_(gradients[rank])
        for rank in range(count):
            assert reduces[rank](outputs[rank], inputs[rank], groups[rank], dist.ReduceOp.SUM) is None
        exact = torch.zeros(count * size)
        for part in gradients:
            exact = exact + part.float()
        assert all(output.dtype == sum_dtype for output in outputs)
        assert torch.equal(torch.cat(outputs), exact.to(sum_dtype))
        for output in outputs:
            (squares,), rest = take_known_squares(output.split([size // 3, size - size // 3]))
            assert not rest
            torch.testing.assert_close(squares.sum(), output.float().square().sum())


def test_sums_are_squared_only_if_asked(ranks) -> None:
    groups = ranks(2)
    reduces = [PeerReduceScatter(Places(group), torch.float32) for group in groups]
    inputs = [reduce.allocate((8,), dtype=torch.float32, device=CPU).fill_(1) for reduce in reduces]
    sums = reduces[0].allocate((4,), dtype=torch.float32, device=CPU)
    reduces[0](sums, inputs[0], groups[0], dist.ReduceOp.SUM)
    assert take_known_squares([sums])[0] == []


@pytest.mark.parametrize("sums_stay", [True, False])
def test_sums_that_may_go_at_any_time_belong_to_the_stream_that_computes_them(
    ranks, monkeypatch: pytest.MonkeyPatch, *, sums_stay: bool
) -> None:
    recorded: list[Tensor] = []
    monkeypatch.setattr(Tensor, "record_stream", lambda self, stream: recorded.append(self))
    (group, _) = ranks(2)
    group.memory[0, 1] = torch.zeros(8 * 4, dtype=torch.uint8)
    reduce = PeerReduceScatter(Places(group), torch.float32, squares=True, sums_stay=sums_stay)
    gradients = reduce.allocate((8,), dtype=torch.float32, device=CPU).fill_(1)
    sums = reduce.allocate((4,), dtype=torch.float32, device=CPU)
    reduce(sums, gradients, group, dist.ReduceOp.SUM)
    assert len(recorded) == (0 if sums_stay else 2), "the sums and their squares"
    assert sums_stay or recorded[0] is sums


def test_of_the_other_ranks_gradients_no_more_is_read_at_once_than_allowed(ranks, monkeypatch) -> None:
    monkeypatch.setattr(fsdp_exchange, "READ_AT_ONCE", 3 * 300 * 2)  # 300 numbers in bf16 of each of 3 ranks
    lengths = []
    monkeypatch.setattr(fsdp_exchange, "sum_parts", lambda own, others, *_, **__: lengths.append(tuple(others.shape)))
    group = ranks(4)[1]
    group.memory |= {(0, rank): torch.zeros(4 * 600 * 2, dtype=torch.uint8) for rank in range(4)}
    reduce = PeerReduceScatter(Places(group), torch.float32)
    gradients = reduce.allocate((4 * 600,), dtype=torch.bfloat16, device=CPU)
    sums = reduce.allocate((600,), dtype=torch.bfloat16, device=CPU)
    reduce(sums, gradients, group, dist.ReduceOp.SUM)
    assert lengths == [(3, 256), (3, 256), (3, 88)], "and parts begin at multiples of 128"
    done = [entry[3] for entry in group.log if entry[0] == 1]
    assert done == ["begin", "publish", *["read"] * 9, "end"], "others may write again after the last part alone"


def test_a_part_of_the_others_gradients_is_gone_before_the_next_is_read(ranks, monkeypatch) -> None:
    monkeypatch.setattr(fsdp_exchange, "READ_AT_ONCE", 128 * 2)
    parts: list[weakref.ref[Tensor]] = []
    monkeypatch.setattr(fsdp_exchange, "sum_parts", lambda own, others, *_, **__: parts.append(weakref.ref(others)))
    read, alive = fsdp_exchange._read_part, []
    monkeypatch.setattr(
        fsdp_exchange,
        "_read_part",
        lambda *args: alive.append(sum(part() is not None for part in parts)) or read(*args),
    )
    group = ranks(2)[0]
    group.memory[0, 1] = torch.zeros(2 * 512 * 2, dtype=torch.uint8)
    reduce = PeerReduceScatter(Places(group), torch.float32)
    gradients = reduce.allocate((2 * 512,), dtype=torch.bfloat16, device=CPU)
    sums = reduce.allocate((512,), dtype=torch.bfloat16, device=CPU)
    reduce(sums, gradients, group, dist.ReduceOp.SUM)
    assert alive == [0, 0, 0, 0]


def test_gathers_and_reductions_of_a_unit_take_turns_in_one_buffer(ranks) -> None:
    groups = ranks(2)
    places = [Places(group, turns=1) for group in groups]
    gathers = [PeerAllGather(each) for each in places]
    reduces = [PeerReduceScatter(each, torch.float32) for each in places]
    for round_ in range(3):
        weights = [gather.allocate((8,), dtype=torch.bfloat16, device=CPU) for gather in gathers]
        for rank in range(2):
            weights[rank][4 * rank : 4 * rank + 4] = rank + round_
        for rank in range(2):
            gathers[rank](weights[rank], weights[rank][4 * rank : 4 * rank + 4], groups[rank])
        expected = torch.tensor([0.0, 1.0]).repeat_interleave(4) + round_
        assert all(torch.equal(each.float(), expected) for each in weights)
        with pytest.raises(RuntimeError, match=r"\(1 of a size\)"):
            gathers[0].allocate((8,), dtype=torch.bfloat16, device=CPU)
        del weights
        gradients = [reduce.allocate((8,), dtype=torch.bfloat16, device=CPU) for reduce in reduces]
        with pytest.raises(RuntimeError, match=r"\(1 of a size\)"):
            gathers[0].allocate((8,), dtype=torch.bfloat16, device=CPU)
        sums = [reduce.allocate((4,), dtype=torch.bfloat16, device=CPU) for reduce in reduces]
        for rank in range(2):
            gradients[rank].copy_(torch.arange(8) + rank)
        for rank in range(2):
            reduces[rank](sums[rank], gradients[rank], groups[rank], dist.ReduceOp.SUM)
        assert torch.equal(torch.cat(sums), 2.0 * torch.arange(8) + 1)
        del gradients
    assert [group.made for group in groups] == [1, 1]


def test_other_reductions_than_sums_are_refused(ranks) -> None:
    (group,) = ranks(1)
    reduce = PeerReduceScatter(Places(group), torch.float32)
    buffer = reduce.allocate((4,), dtype=torch.float32, device=CPU)
    with pytest.raises(AssertionError):
        reduce(reduce.allocate((4,), dtype=torch.float32, device=CPU), buffer, group, dist.ReduceOp.AVG)


def mesh(shards: int, device_type: str, pipeline: int = 1) -> Any:
    group = SimpleNamespace(size=lambda: shards)
    return SimpleNamespace(
        shards=SimpleNamespace(get_group=lambda: group),
        device_mesh=SimpleNamespace(device_type=device_type),
        degrees=SimpleNamespace(pipeline=pipeline),
    )


@pytest.mark.parametrize(
    ("shards", "device_type", "choice"), [(1, "cuda", "auto"), (2, "cpu", "auto"), (2, "cuda", "collectives")]
)
def test_without_gpus_and_shards_there_are_collectives(shards: int, device_type: str, choice: str) -> None:
    assert not _exchanges_by_peers(mesh(shards, device_type), ParallelismSection(fsdp_exchange=choice))


def test_a_gather_that_nobody_waits_for_is_refused(ranks) -> None:
    (group,) = ranks(1)
    gather = PeerAllGather(Places(group))
    with pytest.raises(RuntimeError, match=r"unshard\(async_op=True\).* set parallelism\.fsdp_exchange to collectives"):
        gather(torch.zeros(2), torch.zeros(2), group, async_op=True)


@pytest.mark.parametrize("choice", ["auto", "peer_memory"])
@pytest.mark.parametrize(("here", "anywhere"), [(True, True), (False, True), (False, False)])
def test_all_ranks_take_collectives_or_end_where_one_cannot_read(
    monkeypatch: pytest.MonkeyPatch, choice: str, here: bool, anywhere: bool
) -> None:
    def check(*args: Any) -> None:
        if here:
            raise UserError("rank 0 cannot read")

    answers = []
    monkeypatch.setattr(fsdp, "check_peer_memory", check)
    monkeypatch.setattr(fsdp, "has_peer_access", lambda *args: True)
    monkeypatch.setattr(
        fsdp, "any_rank", lambda flag: answers.append(flag) or (anywhere and len(answers) > (choice == "auto"))
    )
    monkeypatch.setattr(dist, "get_process_group_ranks", lambda group: [0, 1])
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    section = ParallelismSection(fsdp_exchange=choice)
    if choice == "peer_memory" and anywhere:
        with pytest.raises(UserError, match="rank 0 cannot read" if here else "other GPUs of the job"):
            _exchanges_by_peers(mesh(2, "cuda"), section)
    else:
        assert _exchanges_by_peers(mesh(2, "cuda"), section) == (not anywhere)
    assert answers[-1] == here, "what this rank found is what it tells the others"


def test_auto_leaves_pipelines_to_collectives(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fsdp, "has_peer_access", lambda *args: True)
    monkeypatch.setattr(fsdp, "any_rank", lambda flag: flag)
    monkeypatch.setattr(dist, "get_process_group_ranks", lambda group: [0, 1])
    assert not _exchanges_by_peers(mesh(2, "cuda", pipeline=2), ParallelismSection())
    with pytest.raises(
        UserError, match=r"fsdp_exchange = peer_memory: a pipeline gathers more blocks .*; leave it out"
    ):
        _exchanges_by_peers(mesh(2, "cuda", pipeline=2), ParallelismSection(fsdp_exchange="peer_memory"))


def test_peers_are_gpus_of_one_host_with_access(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda a, b: (a, b) != (3, 0))
    assert has_peer_access([0, 1, 2], 4)
    assert has_peer_access([5, 6], 4)
    assert not has_peer_access([0, 3], 4), "one cannot read the other"
    assert not has_peer_access([3, 4], 4), "two hosts"
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)  # a process that sees its own GPU alone
    assert not has_peer_access([0, 1], 4)
