"""What a first pass found out is not found out again."""

import functools
import itertools
import threading
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from titan_fp8.runtime.recomputation import recalled, with_memory

CHECKPOINT = functools.partial(checkpoint, use_reentrant=False)


def asking(questions: int = 2) -> tuple[Callable[[Tensor], Tensor], list[int]]:
    """A function that multiplies by as many numbers as it asks for, and what it was told, in order."""
    told: list[int] = []
    numbers = itertools.count(2)

    def ask() -> int:
        told.append(next(numbers))
        return told[-1]

    def forward(x: Tensor) -> Tensor:
        for _ in range(questions):
            x = (x * recalled(ask)).sin()
        return x

    return forward, told


@pytest.mark.parametrize("early_stop", [False, True])
def test_recomputation_asks_nothing_and_computes_the_same(early_stop: bool) -> None:
    forward, told = asking()
    x = torch.randn(4, requires_grad=True)
    y = with_memory(functools.partial(CHECKPOINT, early_stop=early_stop), forward)(x)
    (grad,) = torch.autograd.grad(y.sum(), x)
    assert told == [2, 3]
    expected = ((x * 2).sin() * 3).sin()
    assert torch.equal(y, expected)
    assert torch.equal(grad, torch.autograd.grad(expected.sum(), x)[0])


def test_each_call_has_its_own_memory() -> None:
    forward, told = asking(1)
    checkpointed = with_memory(CHECKPOINT, forward)
    x = torch.randn(4, requires_grad=True)
    first, second = checkpointed(x), checkpointed(x)
    assert told == [2, 3]
    for y, number in ((second, 3), (first, 2)):
        assert torch.equal(torch.autograd.grad(y.sum(), x)[0], torch.autograd.grad((x * number).sin().sum(), x)[0])
    assert told == [2, 3]


def test_twice_through_one_graph() -> None:
    forward, told = asking()
    x = torch.randn(4, requires_grad=True)
    y = with_memory(CHECKPOINT, forward)(x)
    grads = [torch.autograd.grad(y.sum(), x, retain_graph=True)[0] for _ in range(2)]
    assert torch.equal(*grads)
    assert told == [2, 3]


def test_a_pass_that_asks_more_than_the_first_is_an_error() -> None:
    forward, _ = asking(2)
    passes = itertools.count(1)

    def asks_more_and_more(x: Tensor) -> Tensor:
        for _ in range(next(passes)):
            x = forward(x)
        return x

    to_the_end = functools.partial(CHECKPOINT, early_stop=False)
    y = with_memory(to_the_end, asks_more_and_more)(torch.randn(4, requires_grad=True))
    with pytest.raises(RuntimeError, match="asks more when it is recomputed"):
        y.sum().backward()


def test_recomputation_on_another_thread() -> None:
    forward, told = asking()
    x = torch.randn(4, requires_grad=True)
    y = with_memory(CHECKPOINT, forward)(x)
    thread = threading.Thread(target=lambda: y.sum().backward())
    thread.start()
    thread.join()
    assert told == [2, 3]
    assert x.grad is not None


def test_after_an_error_nothing_is_remembered() -> None:
    forward, told = asking(1)

    def fails(x: Tensor) -> Tensor:
        forward(x)
        raise KeyError

    with pytest.raises(KeyError):
        with_memory(CHECKPOINT, fails)(torch.randn(4))
    forward(torch.randn(4))
    assert told == [2, 3]


def test_outside_of_what_is_checkpointed_each_call_asks() -> None:
    forward, told = asking(1)
    forward(torch.randn(4))
    forward(torch.randn(4))
    assert told == [2, 3]
