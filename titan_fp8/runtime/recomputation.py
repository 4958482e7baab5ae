"""What the first pass through a checkpointed function found out, for the passes that compute it again.

Recomputation repeats a function with the same inputs and the same results. Where the CPU had to wait for one of these,
or ranks had to ask each other, it need not do so again:

    forward = with_memory(checkpoint, forward)
    ...
    counts = recalled(lambda: exchange(...).tolist())      within forward: calls once, and gives the same again

Each call of the function has its own memory. The order of `recalled` within a call is that of its first pass. A choice
that a small difference can change is not made again: compiled or on another thread, the same operations need not give
the same bits. What it was, `recalled_or` tells beforehand.
"""

import functools
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any, TypeVar

import torch

Found = TypeVar("Found")


class _Memory:
    """What one call of a function found out, in order."""

    def __init__(self) -> None:
        self.found: list[Any] = []
        self.recalled = 0
        self.is_complete = False


_memory: ContextVar[_Memory | None] = ContextVar("memory", default=None)


def with_memory(checkpointed: Callable[..., Any], forward: Callable[..., Any]) -> Callable[..., Any]:
    """`checkpointed(forward, *args, **kwargs)` as a function of the rest, in whose passes through `forward`
    `recalled` gives what it gave in the first one.

    Args:
        checkpointed: calls a function now and, for the backward pass, as often again as it likes, on any thread.
        forward: what is computed; not traced by a compiler.
    """

    @functools.wraps(forward)
    def call(*args: Any, **kwargs: Any) -> Any:
        memory = _Memory()

        def one_pass(*args: Any, **kwargs: Any) -> Any:
            memory.recalled = 0
            token = _memory.set(memory)
            try:
                return forward(*args, **kwargs)
            finally:  # recomputation ends early, by an exception
                memory.is_complete = True
                _memory.reset(token)

        return checkpointed(one_pass, *args, **kwargs)

    return call


def recalled_or(otherwise: Callable[[], Found]) -> Found | None:
    """What the next `recalled` will give; in a first pass, where that is open, `otherwise()`; elsewhere None."""
    memory = None if torch.compiler.is_compiling() else _memory.get()
    if memory is None:
        return None
    return memory.found[memory.recalled] if memory.recalled < len(memory.found) else otherwise()


def recalled(find_out: Callable[[], Found]) -> Found:
    """`find_out()`; where this is a further pass through a checkpointed function, what it was in the first one.

    Raises:
        RuntimeError: the first pass asked less often.
    """
    memory = None if torch.compiler.is_compiling() else _memory.get()
    if memory is None:
        return find_out()
    if memory.recalled == len(memory.found):
        if memory.is_complete:
            raise RuntimeError("a checkpointed function asks more when it is recomputed than it did at first")
        memory.found.append(find_out())
    memory.recalled += 1
    return memory.found[memory.recalled - 1]
