"""Codes gathered to places of their own: what lies where, when a place may be used again, and what it waits for; with
ordinary memory of one process in the place of several GPUs'. In FSDP: tests/distributed/test_fsdp_exchange.py."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.unit.parallel.test_fsdp_exchange import CPU, Buffer, Group
from titan_fp8.parallel import gathered_codes
from titan_fp8.parallel.gathered_codes import Turn, UnitCodes
from titan_fp8.quantization.recipes import RECIPES
from titan_fp8.quantization.weight_state import Float8WeightState


class Stream:
    """Notes what it waits for."""

    def __init__(self) -> None:
        self.waits: list[Any] = []

    def wait_stream(self, stream: "Stream") -> None:
        self.waits.append(stream)


@pytest.fixture
def streams(monkeypatch: pytest.MonkeyPatch) -> list[Stream]:
    """The last is the current one."""
    current = [Stream()]
    monkeypatch.setattr(gathered_codes, "PeerBuffer", Buffer)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda *args: current[-1])
    return current


def groups(ranks: int) -> list[Group]:
    memory: dict[Any, Tensor] = {}
    return [Group(rank, ranks, memory, []) for rank in range(ranks)]


def states(count: int) -> list[Float8WeightState]:
    return [Float8WeightState(RECIPES["tensorwise"], caches=True) for _ in range(count)]


def gather(unit: UnitCodes, weights: list[Float8WeightState], codes: list[Tensor]) -> list[Tensor]:
    """What one rank's FSDP does up to the exchange: what stands for the codes, gathered."""
    stand_ins = []
    for state, each in zip(weights, codes, strict=True):
        assert state.place is not None
        stand_ins.append(state.place.send(each, torch.bfloat16).repeat(unit._turn.group.size()))
    unit.begin(CPU)
    return stand_ins


def free(tensors: list[Tensor]) -> None:
    for tensor in tensors:
        tensor.untyped_storage().resize_(0)


@pytest.mark.parametrize("count", [2, 3])
def test_every_rank_has_the_parts_of_each_weight_together_and_in_order(streams, count: int) -> None:
    ranks, shapes = groups(count), [(4, 16), (2, 3), (1, 48)]
    weights = [states(len(shapes)) for _ in ranks]
    units = [
        UnitCodes(Turn(group), dict(zip(own, (rows * columns for rows, columns in shapes), strict=True)))
        for group, own in zip(ranks, weights, strict=True)
    ]
    places: list[list[tuple[int, int]]] = []
    for _ in range(3):
        whole = [torch.randint(256, (count * rows, columns), dtype=torch.uint8) for rows, columns in shapes]
        shards = [[each.chunk(count)[rank] for each in whole] for rank in range(count)]
        stand_ins = [gather(*of_rank) for of_rank in zip(units, weights, shards, strict=True)]
        assert all(each.numel() == 8 * count and each.dtype == torch.bfloat16 for each in stand_ins[0])
        for unit in units:
            unit.fetch(CPU)
        places.append([])
        for own, stand_in in zip(weights, stand_ins, strict=True):
            found = [state.place.received(each) for state, each in zip(own, stand_in, strict=True)]
            assert all(torch.equal(a, b.view(-1)) for a, b in zip(found, whole, strict=True))
            assert all(each.data_ptr() % 16 == found[0].data_ptr() % 16 for each in found)
            places[-1] += [(each.data_ptr(), each._version) for each in found]
            free(stand_in)
    assert places[0] == places[1] == places[2], "in the same places, and autograd knows of no write"


def test_a_place_is_used_again_when_what_was_in_it_has_been_freed_and_read(streams: list[Stream]) -> None:
    (group,) = groups(1)
    turn, (first, second) = Turn(group), states(2)
    units = UnitCodes(turn, {first: 8}), UnitCodes(turn, {second: 4})
    codes = torch.arange(8, dtype=torch.uint8)

    gathered = gather(units[0], [first], [codes])
    with pytest.raises(RuntimeError, match=r"set parallelism\.fsdp_exchange to collectives"):
        gather(units[1], [second], [codes[:4]])
    assert first.place is not None
    reader = Stream()
    streams.append(reader)
    first.place.received(gathered[0])
    streams.pop()
    with pytest.raises(RuntimeError, match=r"set parallelism\.fsdp_exchange to collectives"):
        gather(units[1], [second], [codes[:4]])
    with pytest.raises(RuntimeError, match=r"set parallelism\.fsdp_exchange to collectives"):
        gather(units[0], [first], [codes])
    assert streams[0].waits == []

    free(gathered)
    gather(units[1], [second], [codes[4:]])
    assert streams[0].waits == [reader], "before it writes"
    assert turn.buffer(CPU).size == 256, "that of the larger unit"


def test_a_gather_that_nobody_waited_for_may_be_made_again(streams: list[Stream]) -> None:
    (group,) = groups(1)
    (state,) = states(1)
    unit = UnitCodes(Turn(group), {state: 4})
    gather(unit, [state], [torch.zeros(4, dtype=torch.uint8)])
    unit.fetch(CPU)
    stand_in = gather(unit, [state], [torch.full((4,), 7, dtype=torch.uint8)])
    unit.fetch(CPU)
    assert state.place is not None
    assert state.place.received(stand_in[0]).tolist() == [7] * 4


def test_codes_that_are_gathered_in_inference_mode_serve_a_training(streams: list[Stream]) -> None:
    (group,) = groups(1)
    (state,) = states(1)
    unit = UnitCodes(Turn(group), {state: 4})
    assert state.place is not None
    with torch.inference_mode():
        stand_in = gather(unit, [state], [torch.ones(4, dtype=torch.uint8)])
        unit.fetch(CPU)
        codes = state.place.received(stand_in[0])
    assert not codes.is_inference()
    assert not state.place.send(torch.ones(4, dtype=torch.uint8), torch.float32).is_inference()


def test_a_copy_of_a_weight_has_no_place(streams: list[Stream]) -> None:
    (group,) = groups(1)
    (state,) = states(1)
    UnitCodes(Turn(group), {state: 4})
    assert copy.deepcopy(state).place is None
