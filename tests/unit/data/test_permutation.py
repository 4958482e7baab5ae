import itertools

import pytest

from titan_fp8.data.permutation import mix, permuted


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 15, 16, 17, 63, 64, 65, 1000])
@pytest.mark.parametrize("key", [0, 1, 2**63])
def test_the_order_contains_each_item_exactly_once(size, key):
    assert sorted(permuted(index, size, key) for index in range(size)) == list(range(size))


def test_another_key_gives_another_order():
    orders = {tuple(permuted(index, 100, mix(0, epoch)) for index in range(100)) for epoch in range(50)}
    assert len(orders) == 50


def test_neighbours_are_scattered():
    places = [permuted(index, 10_000, 3) for index in range(1000)]
    steps = [abs(b - a) for a, b in itertools.pairwise(places)]
    assert 2500 < sum(steps) / len(steps) < 4200  # two independent uniform places are 3333 apart on average


def test_items_of_an_enormous_range_are_computed_without_memory():
    assert 0 <= permuted(10**15, 10**18, 5) < 10**18


def test_the_order_never_changes_between_versions():
    assert [permuted(index, 20, 3) for index in range(6)] == [15, 0, 13, 10, 18, 5]
    assert mix(1, 2, 3) == mix(1, 2, 3) != mix(3, 2, 1)
