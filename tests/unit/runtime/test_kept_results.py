"""Results that a checkpointed function keeps: which, whose, and until when; calls of operators that are visited."""

import functools
import gc
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from titan_fp8.quantization import ops
from titan_fp8.runtime.kept_results import keeping_contexts, told
from titan_fp8.runtime.operators import unseen, visited, visitor


class _Count:
    """Counts the calls that are carried out, and holds on to their results weakly."""

    def __init__(self) -> None:
        self.ops: list[Any] = []
        self.results: list[weakref.ref[Tensor]] = []

    def __call__(self, op: Any, implementation: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        self.ops.append(op)
        result = implementation(*args, **kwargs)
        self.results.append(weakref.ref(result))
        return result


class _Amax(torch.autograd.Function):
    """x `[M, N]` -> the bits of its largest |x|, as a number; its gradient is x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        bits = ops.amax(x)
        ctx.save_for_backward(x, bits)
        return bits.to(torch.float32) * 1.0

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        x, bits = ctx.saved_tensors
        return x * grad * bits.to(torch.float32)


class _EverySecond:
    def __init__(self) -> None:
        self.seen = 0

    def __call__(self, op: Any, args: Any) -> bool:
        self.seen += 1
        return self.seen % 2 == 1


def _two(x: Tensor) -> Tensor:
    return _Amax.apply(x.sin()) + _Amax.apply(x.cos())


def _keeping(policy: Callable[[], Any], function: Callable[..., Tensor] = _two, *args: Any) -> Tensor:
    return checkpoint(function, *args, use_reentrant=False, context_fn=functools.partial(keeping_contexts, policy))


@pytest.mark.parametrize(
    ("policy", "again"), [(_EverySecond, 1), (lambda: lambda *_: True, 0), (lambda: lambda *_: False, 2)]
)
def test_what_is_kept_is_not_computed_again_and_changes_no_bit(policy: Any, again: int) -> None:
    x = torch.randn(3, 5, requires_grad=True)
    (expected,) = torch.autograd.grad(_two(x), x)
    with visited(count := _Count()):
        loss = _keeping(policy, _two, x)
        assert count.ops == [ops.amax] * 2
        (found,) = torch.autograd.grad(loss, x)
    assert torch.equal(found, expected)
    assert count.ops == [ops.amax] * (2 + again)
    assert visitor() is None


def test_each_call_of_a_function_keeps_its_own_results() -> None:
    xs = [torch.randn(3, 5, requires_grad=True) for _ in range(3)]
    expected = [torch.autograd.grad(_two(x), x)[0] for x in xs]
    losses = [_keeping(lambda: lambda *_: True, _two, x) for x in xs]
    found = [torch.autograd.grad(loss, x)[0] for loss, x in reversed(list(zip(losses, xs, strict=True)))][::-1]
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_nothing_is_kept_after_the_backward_pass_and_a_second_one_is_an_error() -> None:
    x = torch.randn(3, 5, requires_grad=True)
    loss = _keeping(lambda: lambda *_: True, _two, x)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="can be computed again once"):
        loss.backward()


class _Sum(torch.autograd.Function):
    """x `[M, N]` -> its sum by rows, as the operator gives it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return ops.sum_rows(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad.expand_as(*ctx.saved_tensors)


def test_a_pass_that_is_given_up_keeps_nothing() -> None:
    x = torch.randn(3, 5, requires_grad=True)
    gc.disable()
    try:
        with visited(count := _Count()):
            loss = _keeping(lambda: lambda *_: True, lambda x: _Sum.apply(x.sin()), x)
        assert loss.requires_grad
        del loss
        assert [result() for result in count.results] == [None]
    finally:
        gc.enable()


def test_a_kept_result_that_was_written_to_is_an_error() -> None:
    results: list[Tensor] = []

    def function(x: Tensor) -> Tensor:
        results.append(ops.amax(x.detach()))
        return _Amax.apply(x) * results[0].to(torch.float32)

    x = torch.randn(3, 5, requires_grad=True)
    loss = _keeping(lambda: lambda *_: True, function, x)
    results[0].add_(1)
    with pytest.raises(RuntimeError, match="has been written to since"):
        loss.backward()


@pytest.mark.parametrize(("first", "second"), [("amax", "cast"), ("cast", "amax"), ("amax", "amax of fewer")])
def test_another_call_than_the_first_time_is_an_error_and_gets_no_result(first: str, second: str) -> None:
    calls = {
        "amax": lambda x: ops.amax(x),
        "amax of fewer": lambda x: ops.amax(x[:1]),
        "cast": lambda x: ops.cast_tensor(x, torch.ones(1, dtype=torch.int32), torch.float8_e4m3fn),
    }
    x = torch.randn(4, 4)
    keeping, giving = keeping_contexts(lambda: lambda op, args: True)
    with keeping:
        calls[first](x)
    with giving, pytest.raises(RuntimeError, match=r"calls others when it is computed again: titan_fp8\..* of \["):
        calls[second](x)


def test_what_nobody_shall_see_is_seen_by_no_visitor() -> None:
    count, x = _Count(), torch.randn(4, 4)
    with visited(count):
        with unseen():
            ops.amax(x)
        assert count.ops == []
        ops.amax(x)
        assert len(count.ops) == 1


def test_operators_of_pytorch_are_told_of_where_somebody_listens() -> None:
    operators = frozenset({torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default})
    attend = told(F.scaled_dot_product_attention, operators)
    q, k, v = (torch.randn(1, 2, 8, 16, requires_grad=True) for _ in range(3))
    expected = torch.autograd.grad(F.scaled_dot_product_attention(q, k, v, is_causal=True).sum(), (q, k, v))
    seen: list[Any] = []

    def count(op: Any, implementation: Any, args: Any, kwargs: Any) -> Any:
        seen.append(op)
        return implementation(*args, **kwargs)

    attend(q, k, v, is_causal=True)
    with visited(count):
        loss = _keeping(lambda: lambda *_: True, lambda q, k, v: attend(q, k, v, is_causal=True).sum(), q, k, v)
        found = torch.autograd.grad(loss, (q, k, v))
    assert seen == list(operators), "once: not in the recomputation"
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_other_threads_are_not_visited() -> None:
    seen: list[Any] = []
    with visited(_Count()):
        thread = threading.Thread(target=lambda: seen.append(visitor()))
        thread.start()
        thread.join()
        assert visitor() is not None
    assert seen == [None]


def test_an_error_within_leaves_no_visitor() -> None:
    with pytest.raises(ZeroDivisionError), visited(_Count()):
        raise ZeroDivisionError
    assert visitor() is None
