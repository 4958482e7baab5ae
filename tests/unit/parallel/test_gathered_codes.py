"""Codes gathered in buffers of their own: what lies where, when a buffer may be used again, and what it waits for; with
ordinary memory of one process in the place of several GPUs'. In FSDP: tests/distributed/test_fsdp_exchange.py."""

import copy
from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.multiprocessing.reductions import StorageWeakRef

from tests.unit.parallel.test_fsdp_exchange import CPU, Buffer, Group
from titan_fp8.parallel import gathered_codes
from titan_fp8.parallel.gathered_codes import CodeBuffer, UnitCodes, codes_of
from titan_fp8.quantization.recipes import RECIPES
from titan_fp8.quantization.weight_state import Float8WeightState

IN_USE = r"more blocks are gathered .* parallelism\.fsdp_exchange to collectives"


class Stream:
    """Notes what it waits for, and tells `watch`."""

    def __init__(self) -> None:
        self.waits: list[Any] = []
        self.watch: Callable[[], None] = lambda: None

    def wait_stream(self, stream: "Stream") -> None:
        self.watch()
        self.waits.append(stream)

    wait_event = wait_stream

    def record_event(self) -> Any:
        return self, "event"


@pytest.fixture
def streams(monkeypatch: pytest.MonkeyPatch) -> list[Stream]:
    """The last is the current one."""
    current = [Stream()]
    monkeypatch.setattr(gathered_codes, "PeerBuffer", Buffer)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda *args: current[-1])
    return current


def code_buffers(ranks: int) -> list[CodeBuffer]:
    memory: dict[Any, Tensor] = {}
    groups: list[Any] = [Group(rank, ranks, memory, []) for rank in range(ranks)]
    return [CodeBuffer(group) for group in groups]


def states(count: int) -> list[Float8WeightState]:
    return [Float8WeightState(RECIPES["tensorwise"], caches=True) for _ in range(count)]


def begin(unit: UnitCodes, weights: list[Float8WeightState], codes: list[Tensor]) -> list[Tensor]:
    """What FSDP gathers, when it has allocated it and copied to it: for each weight, of all ranks."""
    sent = []
    for state, each in zip(weights, codes, strict=True):
        assert state.exchange is not None
        sent.append(state.exchange.send(each, torch.bfloat16))
    unit.begin(CPU)
    outputs = [each.repeat(unit._buffer.group.size()) for each in sent]
    unit.awaited(outputs[0])
    return outputs


def received(state: Float8WeightState, output: Tensor) -> Tensor:
    assert state.exchange is not None
    return state.exchange.received(output)


def free(tensors: list[Tensor]) -> None:
    for tensor in tensors:
        tensor.untyped_storage().resize_(0)


def some(size: int, value: int = 1) -> Tensor:
    return torch.full((size,), value, dtype=torch.uint8)


@pytest.mark.parametrize("count", [2, 3])
def test_every_rank_has_the_parts_of_each_weight_together_and_in_order(streams, count: int) -> None:
    shapes = [(4, 16), (2, 24), (1, 48)]
    buffers, weights = code_buffers(count), [states(len(shapes)) for _ in range(count)]
    units = [
        UnitCodes(buffer, dict(zip(own, (rows * columns for rows, columns in shapes), strict=True)))
        for buffer, own in zip(buffers, weights, strict=True)
    ]
    for buffer in buffers:
        buffer.peers(CPU)
    places: list[list[tuple[int, int]]] = []
    for _ in range(3):
        whole = [torch.randint(256, (count * rows, columns), dtype=torch.uint8) for rows, columns in shapes]
        shards = [[each.chunk(count)[rank] for each in whole] for rank in range(count)]
        outputs = [begin(*of_rank) for of_rank in zip(units, weights, shards, strict=True)]
        assert all(each.numel() == 8 * count and each.dtype == torch.bfloat16 for each in outputs[0])
        for unit in units:
            unit.fetch(CPU)
        places.append([])
        for own, output in zip(weights, outputs, strict=True):
            found = [received(*each) for each in zip(own, output, strict=True)]
            assert all(torch.equal(a, b.view(-1)) for a, b in zip(found, whole, strict=True))
            assert {(each.data_ptr() - found[0].data_ptr()) % 256 for each in found} == {0}
            places[-1] += [(each.data_ptr(), each._version) for each in found]
            free(output)
    assert places[0] == places[1] == places[2], "in the same places, and autograd knows of no write"
    for rank, buffer in enumerate(buffers):
        done = [entry[3:] for entry in cast(Any, buffer.group).log]
        others = [("read", (rank + i) % count) for i in range(1, count)]
        assert done == [("begin",), ("publish",), *others, ("end",)] * 3, "it waits for each before it reads"


def test_a_buffer_is_used_again_when_what_was_in_it_has_been_freed_and_read(streams: list[Stream]) -> None:
    (buffer,), (first, second) = code_buffers(1), states(2)
    units = UnitCodes(buffer, {first: 32}), UnitCodes(buffer, {second: 16})
    for round_, reader in enumerate((Stream(), Stream())):  # each unit is read on whatever stream is current then
        outputs = begin(units[0], [first], [some(32, 1 + round_)])
        with pytest.raises(RuntimeError, match=IN_USE):
            begin(units[1], [second], [some(16)])
        units[0].fetch(CPU)
        with pytest.raises(RuntimeError, match=IN_USE):
            begin(units[1], [second], [some(16)])
        streams.append(reader)
        codes = received(first, outputs[0])
        streams.pop()
        for unit, state, size in ((units[1], second, 16), (units[0], first, 32)):
            with pytest.raises(RuntimeError, match=IN_USE):
                begin(unit, [state], [some(size)])
        free(outputs)

        streams[0].waits.clear()
        seen: list[int] = []
        streams[0].watch = lambda codes=codes, seen=seen: seen.append(int(codes[0]))
        outputs = begin(units[1], [second], [some(16, 9)])
        assert streams[0].waits == [reader]
        assert (seen, int(codes[0])) == ([1 + round_], 9), "it waits before it writes"
        units[1].fetch(CPU)
        streams.append(reader)
        received(second, outputs[0])
        streams.pop()
        free(outputs)
    assert cast(Any, buffer.peers(CPU)).size == 256, "that of the larger unit"


def test_a_gather_that_comes_to_nothing_leaves_the_buffer_to_others(streams: list[Stream]) -> None:
    (buffer,), (first, second) = code_buffers(1), states(2)
    units = UnitCodes(buffer, {first: 32}), UnitCodes(buffer, {second: 16})
    outputs = begin(units[0], [first], [some(32)])
    gathers = Stream()
    streams.append(gathers)
    units[0].fetch(CPU)
    streams.pop()
    with pytest.raises(RuntimeError, match=IN_USE):
        begin(units[1], [second], [some(16)])
    del outputs
    outputs = begin(units[1], [second], [some(16, 7)])
    assert streams[0].waits == [(gathers, "event")], "which may still be at it"
    units[1].fetch(CPU)
    assert received(second, outputs[0]).tolist() == [7] * 16


def test_a_backward_pass_without_the_codes_of_its_weight_is_an_error(streams: list[Stream]) -> None:
    (buffer,), (first, second) = code_buffers(1), states(2)
    units = {state: UnitCodes(buffer, {state: 16}) for state in (first, second)}

    def gather(state: Float8WeightState, value: int) -> tuple[Tensor, list[Tensor]]:
        outputs = begin(units[state], [state], [some(16, value)])
        units[state].fetch(CPU)
        return received(state, outputs[0]), outputs

    codes, outputs = gather(first, 3)
    given = torch.ones(16, requires_grad=True)
    result = (given * codes.view(4, 4).view(-1)).sum()  # what is kept is a view, as of a weight
    free(outputs)
    free(gather(second, 5)[1])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        result.backward(retain_graph=True)
    gather(first, 3)
    result.backward()
    assert given.grad is not None
    assert given.grad.tolist() == [3] * 16


def test_codes_that_are_gathered_in_inference_mode_serve_a_training(streams: list[Stream]) -> None:
    (buffer,), (state,) = code_buffers(1), states(1)
    unit = UnitCodes(buffer, {state: 16})
    with torch.inference_mode():
        outputs = begin(unit, [state], [some(16)])
        unit.fetch(CPU)
        codes = received(state, outputs[0])
    assert not codes.is_inference()
    stand_in = cast(Any, state.exchange)._stand_in
    assert not stand_in.is_inference(), "it is sent in trainings, too"


def test_codes_that_are_not_kept_are_let_go_of(streams: list[Stream]) -> None:
    (buffer,), (state,) = code_buffers(1), states(1)
    codes = some(16)
    gone = StorageWeakRef(codes.untyped_storage())
    outputs = begin(UnitCodes(buffer, {state: 16}), [state], [codes])
    del codes
    assert gone.expired()
    assert outputs[0].numel() == 8


def test_a_copy_of_a_weight_travels_as_any_other(streams: list[Stream]) -> None:
    (buffer,), (state,) = code_buffers(1), states(1)
    UnitCodes(buffer, {state: 16})
    assert copy.deepcopy(state).exchange is None


class _Weight(DTensor):
    """What is asked of one."""

    @staticmethod
    def __new__(cls, shape: tuple[int, ...], *placements: Any, ranks: int = 2) -> Any:
        self = torch.Tensor._make_subclass(cls, torch.empty(shape, device="meta"))
        self._of = placements, ranks
        return self

    placements = property(lambda self: self._of[0])
    device_mesh = property(lambda self: type("Mesh", (), {"size": lambda mesh: self._of[1]})())


@pytest.mark.parametrize(
    ("weight", "size"),
    [
        (_Weight((64, 32), Shard(0)), 1024),
        (_Weight((3, 32), Shard(0), ranks=3), 32),
        (_Weight((4, 8, 32), Shard(0)), 512),
        (_Weight((4, 8, 32), Shard(1)), None),
        (_Weight((63, 32), Shard(0)), None),
        (_Weight((2, 24), Shard(0)), None),
        (_Weight((64, 32), Replicate(), Shard(0)), None),
        (_Weight((64, 32), Shard(0), Shard(0)), None),
        (_Weight((64, 32), Partial()), None),
        (torch.empty(64, 32), None),
    ],
)
def test_weights_that_are_not_cut_evenly_along_one_axis_travel_as_any_tensor(weight: Tensor, size: int | None) -> None:
    (buffer,), (state,) = code_buffers(2)[:1], states(1)
    module: Any = nn.Module()
    module.__dict__ |= {"weight": weight, "fsdp_weight_state": state}
    unit = codes_of([nn.Module(), module], buffer)
    assert (unit is None) == (state.exchange is None) == (size is None)
    if unit is not None:
        assert unit._places == [(0, size)]
