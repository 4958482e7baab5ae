"""A method that tells its signature is, for all else, the method."""

import inspect
from typing import Any

import torch

from titan_fp8.quantization.mx_sharded import ShardableMXWeight
from titan_fp8.quantization.sharded_weight import ShardableFloat8Weight
from titan_fp8.runtime.told_signature import told_signature


class Sum:
    def __init__(self, start: int) -> None:
        self.start = start

    def plain(self, a: int, *more: int, factor: int = 1) -> int:
        """Adds up."""
        return factor * (self.start + a + sum(more))

    told = told_signature(plain)


class Doubled(Sum):
    def __init__(self, start: int) -> None:
        super().__init__(2 * start)


def test_it_computes_what_the_method_does_on_each_instance() -> None:
    for instance in (Sum(1), Sum(5), Doubled(1)):
        assert instance.told(1) == instance.plain(1)
        assert instance.told(1, 2, 3, factor=2) == instance.plain(1, 2, 3, factor=2)


def test_its_signature_is_that_of_the_bound_method() -> None:
    assert inspect.signature(Sum(1).told) == inspect.signature(Sum(1).plain)
    assert Sum.told.__doc__ == Sum.plain.__doc__


def test_it_is_not_taken_apart_again(monkeypatch) -> None:
    made: list[Any] = []
    create = inspect.Signature.__init__
    monkeypatch.setattr(inspect.Signature, "__init__", lambda *a, **k: made.append(a) or create(*a, **k))
    inspect.signature(Sum(1).told)
    assert made == []
    inspect.signature(Sum(1).plain)
    assert made != []


def test_fsdp_finds_the_five_parameters_of_weights_that_are_gathered_as_codes() -> None:
    for kind in (ShardableFloat8Weight, ShardableMXWeight):
        state: Any = None
        weight: Any = kind(torch.zeros(32, 32), state)
        assert hasattr(weight, "fsdp_pre_all_gather")
        parameters = inspect.signature(weight.fsdp_pre_all_gather).parameters
        assert list(parameters) == ["mesh", "outer_size", "outer_stride", "module", "mp_policy"]
