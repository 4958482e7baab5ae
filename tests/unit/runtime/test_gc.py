"""Garbage collection at fixed steps."""

import gc
import weakref
from collections.abc import Iterator

import pytest
import torch

from titan_fp8.runtime.gc import GarbageCollector


class _Node:
    """An object that can refer to itself."""


def _make_cycle() -> weakref.ref:
    node = _Node()
    node.itself = node
    return weakref.ref(node)


@pytest.fixture
def collector() -> Iterator[GarbageCollector]:
    assert gc.isenabled()
    collector = GarbageCollector(freq=3)
    yield collector
    collector.close()


def test_a_cycle_lives_until_the_next_fixed_step(collector: GarbageCollector) -> None:
    assert not gc.isenabled()
    for first in (1, 4):
        cycle = _make_cycle()
        for step in (first, first + 1):
            collector.run(step)
            assert cycle() is not None
        collector.run(first + 2)
        assert cycle() is None


def test_a_cycle_that_outlived_collections_is_collected_once_it_is_dead(collector: GarbageCollector) -> None:
    node = _Node()
    node.itself = node
    cycle = weakref.ref(node)
    for step in range(1, 13):
        collector.run(step)
    del node
    for step in range(13, 16):
        collector.run(step)
    assert cycle() is None


def test_closing_gives_the_collector_back() -> None:
    collector = GarbageCollector(freq=5)
    assert gc.get_freeze_count() > 0
    collector.close()
    assert gc.isenabled()
    assert gc.get_freeze_count() == 0


def test_a_collector_that_was_off_stays_off() -> None:
    gc.disable()
    try:
        GarbageCollector(freq=5).close()
        assert not gc.isenabled()
    finally:
        gc.enable()


def test_debug_names_the_tensors_that_only_a_cycle_held(log_messages: list[str]) -> None:
    while gc.collect():
        pass  # what earlier tests left, and what its finalizers leave
    collector = GarbageCollector(freq=100, debug=True)
    try:
        collector.run(1)
        assert log_messages == []
        node = _Node()
        node.itself, node.tensor = node, torch.zeros(256, 1024)
        cycle = weakref.ref(node)
        del node
        collector.run(2)
        (message,) = log_messages
        assert "step 2: 1 tensors (1.00 MiB) were held by reference cycles only" in message
        assert cycle() is None
        assert gc.garbage == []
    finally:
        collector.close()


def test_a_frequency_of_zero_is_refused() -> None:
    with pytest.raises(ValueError, match=r"training\.gc_freq = 0"):
        GarbageCollector(freq=0)
