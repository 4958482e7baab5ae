"""Two functions in turns: in which order they run, how they end, and what PyTorch keeps for a thread."""

import _thread
import contextvars
import gc
import signal
import threading
import time
import weakref
from collections.abc import Callable

import pytest
import torch

from titan_fp8.runtime.turns import Turns

pytestmark = pytest.mark.timeout(20)  # what hangs, hangs here


def in_turns(turns: Turns, first: str, second: str, log: list[str]) -> None:
    """Run both: each letter is logged, each `|` hands over, `!` raises."""

    def play(text: str) -> Callable[[], None]:
        def run() -> None:
            for letter in text:
                if letter == "!":
                    raise ValueError(text)
                turns.hand_over() if letter == "|" else log.append(letter)

        return run

    turns.run(play(first), play(second))


def order(first: str, second: str) -> str:
    log: list[str] = []
    in_turns(Turns(torch.device("cpu")), first, second, log)
    return "".join(log)


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ("a|b|c", "x|y|z", "axbycz"),
        ("ab", "xy", "abxy"),
        ("a|b|c|d", "x", "axbcd"),
        ("a", "x|y|z", "axyz"),
        ("|a||b", "x|y|z", "xayzb"),
        ("", "", ""),
    ],
)
def test_they_take_turns_and_the_longer_one_goes_on_alone(first: str, second: str, expected: str) -> None:
    assert order(first, second) == expected


def test_outside_of_a_pair_there_is_nobody_to_hand_over_to() -> None:
    turns = Turns(torch.device("cpu"))
    turns.hand_over()
    log: list[str] = []
    for _ in range(3):
        in_turns(turns, "a|b", "x|y", log)
        turns.hand_over()
    assert "".join(log) == "axby" * 3


@pytest.mark.parametrize(
    ("first", "second", "failure", "done"),
    [
        ("a!", "x", "a!", "a"),
        ("a|b!", "x|y", "a|b!", "axb"),
        ("a|b|c", "x!", "x!", "ax"),
        ("a|b|c", "x|y!", "x|y!", "axby"),
        ("a", "x|y!", "x|y!", "axy"),
        ("a|b!", "x|y!", "a|b!", "axb"),
    ],
)
def test_what_fails_first_is_raised_and_the_other_one_is_ended(
    first: str, second: str, failure: str, done: str
) -> None:
    turns, log = Turns(torch.device("cpu")), []
    with pytest.raises(ValueError, match="^" + failure.replace("|", r"\|") + "$"):
        in_turns(turns, first, second, log)
    assert "".join(log) == done
    in_turns(turns, "1|2", "3|4", log)
    assert "".join(log) == done + "1324", "the next pair runs as if nothing had been"


@pytest.mark.skipif(threading.current_thread() is not threading.main_thread(), reason="signals come to the main thread")
def test_someone_at_the_keyboard_interrupts_both() -> None:
    # A process that was started in the background ignores this signal from the beginning.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    turns, log = Turns(torch.device("cpu")), []

    def second() -> None:
        _thread.interrupt_main()
        time.sleep(0.1)
        log.append("still has its turn")
        turns.hand_over()
        log.append("goes on")

    try:
        with pytest.raises(KeyboardInterrupt):
            turns.run(turns.hand_over, second)
    finally:
        signal.signal(signal.SIGINT, before)
    assert log == ["still has its turn"]


def test_what_cleans_up_as_it_is_ended_may_hand_over_once_more() -> None:
    turns, log = Turns(torch.device("cpu")), []

    def first() -> None:
        try:
            turns.hand_over()
        finally:
            log.append("ended")
            turns.hand_over()

    def second() -> None:
        raise ValueError("second")

    with pytest.raises(ValueError, match="second"):
        turns.run(first, second)
    assert log == ["ended"]


def test_an_exception_that_somebody_turns_into_another_is_no_cause() -> None:
    """The engine of pipelines puts one of its own around whatever a stage raises."""
    turns = Turns(torch.device("cpu"))

    def first() -> None:
        try:
            turns.hand_over()
        except BaseException as error:
            raise RuntimeError("stage failed") from error

    with pytest.raises(ValueError, match="cause"):
        turns.run(first, lambda: (_ for _ in ()).throw(ValueError("cause")))


def test_backward_in_the_other_thread_may_hand_over_from_within_autograd() -> None:
    turns, log = Turns(torch.device("cpu")), []
    x = torch.ones(3, requires_grad=True)
    y = x * 2
    y.register_hook(lambda grad: (log.append("inside"), turns.hand_over(), log.append("again"))[0])

    def first() -> None:
        turns.hand_over()
        log.append("first")

    turns.run(first, lambda: (y * 3).sum().backward())
    assert log == ["inside", "first", "again"]
    assert x.grad is not None
    assert x.grad.tolist() == [6.0] * 3


def test_any_thread_may_hand_over_for_the_one_that_has_its_turn() -> None:
    """As autograd's threads do, while whoever called it waits."""
    turns, log = Turns(torch.device("cpu")), []

    def second() -> None:
        def inside() -> None:
            log.append("x")
            turns.hand_over()
            log.append("y")

        thread = threading.Thread(target=inside)
        thread.start()
        thread.join()

    def first() -> None:
        log.append("a")
        turns.hand_over()
        log.append("b")

    turns.run(first, second)
    assert "".join(log) == "axby"


SETTING = contextvars.ContextVar("setting", default="default")


def state() -> tuple[bool, bool, torch.dtype, str]:
    cast = torch.is_autocast_enabled("cpu")
    return torch.is_grad_enabled(), cast, torch.get_autocast_dtype("cpu") if cast else torch.float32, SETTING.get()


def test_the_other_thread_has_the_state_of_this_one_and_keeps_none_of_it() -> None:
    turns, seen, threads = Turns(torch.device("cpu")), [], set()

    def look() -> None:
        seen.append(state())
        threads.add(threading.get_ident())
        torch.set_grad_enabled(False)
        SETTING.set("changed")

    for cast in (True, False):
        SETTING.set(f"set {cast}")
        with torch.set_grad_enabled(not cast), torch.autocast("cpu", torch.bfloat16, enabled=cast):
            expected = state()
            turns.run(lambda: None, look)
            assert seen.pop() == expected
            assert state() == expected
    assert len(threads) == 1, "one thread for all pairs"
    assert threading.get_ident() not in threads


def test_compiler_settings_of_this_thread_are_seen() -> None:
    with torch._dynamo.config.patch(cache_size_limit=77):
        seen = []
        Turns(torch.device("cpu")).run(lambda: None, lambda: seen.append(torch._dynamo.config.cache_size_limit))
    assert seen == [77]


def test_nothing_of_a_pair_is_kept() -> None:
    turns = Turns(torch.device("cpu"))

    class Large:
        pass

    def make() -> weakref.ref[Large]:
        large = Large()

        def fail() -> None:
            assert large is None

        with pytest.raises(AssertionError):
            turns.run(lambda: None, fail)
        return weakref.ref(large)

    reference = make()
    in_turns(turns, "", "", [])
    gc.collect()
    assert reference() is None


def test_the_thread_ends_with_its_turns() -> None:
    turns = Turns(torch.device("cpu"))
    threads: list[threading.Thread] = []
    turns.run(lambda: None, lambda: threads.append(threading.current_thread()))
    assert threads[0].is_alive()
    del turns
    gc.collect()
    threads[0].join(5)
    assert not threads[0].is_alive()
