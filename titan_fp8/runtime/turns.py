"""Two functions that run in turns: each goes on until it has begun something that takes its time without it, such as an
exchange between ranks, and hands over to the other one while that is under way.

    first    computes, begins a  |                     |  has a, computes, begins c  |                     |  has c, ...
    second                       |  computes, begins b |                             |  has b, computes    |

Each has a thread of its own, of which one runs at any time. What the two begin, they so begin in one order, which
depends on nothing but how often each hands over: ranks that run the same two functions begin collectives in the same
order, as a process group demands. When one of the two ends, the other one runs on alone.

Whoever hands over is whoever runs. Which thread calls does not matter: on a GPU a backward pass runs in a thread of
autograd's.
"""

import contextlib
import contextvars
import queue
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

import torch

Function = Callable[[], None]


class _AbandonedError(BaseException):
    """The other one has failed. It is no `Exception`, so that nobody on the way takes it for a failure of his own."""


class _Pair:
    """One run of two functions, 0 and 1, of which 0 begins.

    Attributes:
        failure: what the one that failed first has raised.
    """

    def __init__(self) -> None:
        self.failure: BaseException | None = None
        self._changed = threading.Condition()
        self._turn = 0
        self._running = {0, 1}

    def play(self, me: int, function: Function) -> None:
        """Run one of the two, from its first turn on. What it raises becomes `failure`."""
        failure = None
        try:
            self._wait_for_turn(me)
            function()
        except BaseException as error:
            failure = error
        with self._changed:
            self.failure = self.failure or failure
            self._running.discard(me)
            self._turn = 1 - me
            self._changed.notify_all()

    def hand_over(self) -> None:
        """Let the other one run until it hands over or ends."""
        with self._changed:
            me = self._turn
            if len(self._running) == 2:
                self._turn = 1 - me
                self._changed.notify_all()
        self._wait_for_turn(me)

    def join(self) -> None:
        """Wait until both have ended."""
        with self._changed:
            try:
                self._changed.wait_for(lambda: not self._running)
            except BaseException as error:  # someone at the keyboard
                self.failure = self.failure or error
                self._changed.wait_for(lambda: not self._running)

    def _wait_for_turn(self, me: int) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._turn == me or self.failure is not None)
            if self.failure is not None:
                raise _AbandonedError


class Turns:
    """Runs pairs of functions in turns, one pair at a time.

    Args:
        device: where both compute.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pair: _Pair | None = None
        self._jobs: queue.SimpleQueue[Function | None] | None = None

    def hand_over(self) -> None:
        """For the two to call: let the other one run until it calls this too, or ends. Where no pair runs there is
        nobody to hand over to, and nothing happens."""
        if self._pair is not None:
            self._pair.hand_over()

    def run(self, first: Function, second: Function) -> None:
        """Run both to their ends, `first` in this thread.

        The thread of `second` has, of what PyTorch keeps for each thread, what is here: device and stream, whether
        gradients are recorded, autocast, context variables (which the compiler's settings are). Not modes of dispatch
        and hooks on saved tensors.

        Raises:
            BaseException: what the one that failed first has raised. The other one is ended where it hands over.
        """
        assert self._pair is None, "pairs do not nest"
        pair, enter, context = _Pair(), _state_here(self._device), contextvars.copy_context()

        def in_this_state() -> None:
            with enter():
                second()

        self._pair = pair
        try:
            self._submit(lambda: context.run(pair.play, 1, in_this_state))
            pair.play(0, first)
            pair.join()
        finally:
            self._pair = None
        if pair.failure is not None:
            raise pair.failure

    def _submit(self, job: Function) -> None:
        """Have the thread of `second` do something. There is one for all pairs: what PyTorch makes for a thread, such
        as handles of libraries, is made once. It is not waited for when the process ends."""
        if self._jobs is None:
            self._jobs = queue.SimpleQueue()
            threading.Thread(target=_work, args=(self._jobs,), name="titan_fp8 turns", daemon=True).start()
            weakref.finalize(self, self._jobs.put, None).atexit = False
        self._jobs.put(job)


def _work(jobs: "queue.SimpleQueue[Function | None]") -> None:
    while (job := jobs.get()) is not None:
        job()
        del job  # it holds a pair, whose failure holds what was computed with


def _state_here(device: torch.device) -> Callable[[], AbstractContextManager[None]]:
    """What puts another thread into this one's state."""
    records_gradients, casts = torch.is_grad_enabled(), torch.is_autocast_enabled(device.type)
    dtype = torch.get_autocast_dtype(device.type) if casts else None
    stream = torch.cuda.current_stream(device) if device.type == "cuda" else None

    @contextlib.contextmanager
    def enter() -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            if stream is not None:
                stack.enter_context(torch.cuda.device(stream.device))
                stack.enter_context(torch.cuda.stream(stream))
            stack.enter_context(torch.set_grad_enabled(records_gradients))
            if casts:
                stack.enter_context(torch.autocast(device.type, dtype))
            yield

    return enter
