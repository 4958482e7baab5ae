"""Results of operators that a checkpointed function keeps, and gives again when it is computed again.

`torch.utils.checkpoint.create_selective_checkpoint_contexts` does this for all operators of PyTorch, by dispatch modes:
Python sees every operation of both passes. In eager mode that may take the CPU longer than the GPU needs for a block.
Where all operators whose results are kept tell of themselves (`operators.py`; `told` for those of PyTorch), none of the
others need be looked at:

    contexts = functools.partial(keeping_contexts, lambda: policy)
    checkpoint(function, *args, use_reentrant=False, context_fn=contexts)

Both passes call the same operators in the same order, and so each kept result is the next one; that the call is the
same, as far as operator and shapes tell, is checked.
"""

from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from titan_fp8.runtime.operators import visited, visitor

Policy = Callable[[Any, tuple[Any, ...]], bool]
"""Whether the result of a call of an operator with these arguments is kept. One serves one pass."""


def keeping_contexts(new_policy: Callable[[], Policy]) -> tuple[AbstractContextManager[None], AbstractContextManager]:
    """What a checkpointed function's first pass runs in, and what its recomputation does, for one call of it."""
    kept = _Kept()
    return _Pass(kept.keep, new_policy), _Pass(kept.give, new_policy)


def told(function: Callable[..., Any], operators: frozenset[Any]) -> Callable[..., Any]:
    """`function`, whose calls of `operators`, PyTorch's, are told of where somebody listens."""

    def call(*args: Any, **kwargs: Any) -> Any:
        visit = None if torch.compiler.is_compiling() else visitor()
        if visit is None:
            return function(*args, **kwargs)
        with _Tells(visit, operators):
            return function(*args, **kwargs)

    return call


class _Kept:
    """Results of one call, in order, each with what was called and its version when it was kept."""

    def __init__(self) -> None:
        self._results: deque[tuple[Any, Any, Any]] = deque()

    def keep(self, called: Any, compute: Callable[[], Any]) -> Any:
        """Compute and keep. Not the tensor itself: autograd makes it the result of what it is computed in."""
        result = compute()
        kept = tree_map_only(Tensor, Tensor.detach, result)
        self._results.append((called, kept, tree_map_only(Tensor, _version, kept)))
        return result

    def give(self, called: Any, compute: Callable[[], Any]) -> Any:
        """The next result, of which nothing is kept any more."""
        if not self._results:
            raise RuntimeError(
                "a block that keeps results of some operators (selective_ac_option = op) can be computed again once: "
                "backward has been through it before, or it calls more of them than it did at first"
            )
        before, kept, versions = self._results.popleft()
        if called != before:
            raise RuntimeError(
                "a block that keeps results of some operators (selective_ac_option = op) calls others when it is "
                f"computed again: {_text(called)}, where it was {_text(before)}"
            )
        if tree_map_only(Tensor, _version, kept) != versions:
            raise RuntimeError("a result that was kept for the backward pass has been written to since")
        return kept


class _Pass(AbstractContextManager[None]):
    """One pass, each time it is entered."""

    def __init__(self, serve: Callable[[Any, Callable[[], Any]], Any], new_policy: Callable[[], Policy]) -> None:
        self._serve = serve
        self._new_policy = new_policy
        self._within: AbstractContextManager[None] | None = None

    def __enter__(self) -> None:
        keeps, serve = self._new_policy(), self._serve

        def visit(
            op: OpOverload, implementation: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
        ) -> Any:
            if keeps(op, args):
                return serve(_called(op, args), lambda: implementation(*args, **kwargs))
            return implementation(*args, **kwargs)

        self._within = visited(visit)
        self._within.__enter__()

    def __exit__(self, *error: Any) -> None:
        assert self._within is not None
        self._within.__exit__(*error)


class _Tells(TorchDispatchMode):
    """Tells `visit` of calls of some of PyTorch's operators."""

    def __init__(self, visit: Any, operators: frozenset[Any]) -> None:
        super().__init__()
        self._visit, self._operators = visit, operators

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        return self._visit(func, func, args, kwargs) if func in self._operators else func(*args, **kwargs)


def _called(op: Any, args: tuple[Any, ...]) -> Any:
    return op, [arg.shape for arg in args if isinstance(arg, Tensor)]


def _text(called: Any) -> str:
    op, shapes = called
    return f"{op} of {', '.join(str(list(shape)) for shape in shapes)}"


def _version(tensor: Tensor) -> int:
    return tensor._version
