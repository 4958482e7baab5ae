"""Registration of the custom operators `torch.ops.titan_fp8.*`, which the compiler does not look into.

The low-level `torch.library.Library` is used, whose calls cost a quarter of `custom_op`'s.

Who wants to see the calls of these operators, and to answer some of them, need not see all of PyTorch's, as a dispatch
mode does, at some 20 us each:

    with visited(visit): ...        on this thread, `visit(op, implementation, args, kwargs)` stands for each call
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from functools import partial
from typing import Any

import torch
from torch._ops import OpOverload
from torch.utils._python_dispatch import _disable_current_modes, _get_current_dispatch_mode_stack

_LIBRARY = torch.library.Library("titan_fp8", "DEF")
Visit = Callable[[OpOverload, Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]
_visit: ContextVar[Visit | None] = ContextVar("visit", default=None)


def register_operator(schema: str, implementation: Callable[..., Any], fake: Callable[..., Any]) -> OpOverload:
    """A new operator for CPU and CUDA tensors, without a derivative.

    Args:
        schema: PyTorch's, without the namespace: `scale(Tensor x, float by) -> Tensor`.
        implementation: what it computes.
        fake: shapes, dtypes and strides of its result, for the compiler.
    """
    name = schema.partition("(")[0]
    _LIBRARY.define(schema)
    operator: OpOverload = getattr(torch.ops.titan_fp8, name).default

    def call(*args: Any, **kwargs: Any) -> Any:
        visit = _visit.get()
        return implementation(*args, **kwargs) if visit is None else visit(operator, implementation, args, kwargs)

    for key in ("CPU", "CUDA"):
        _LIBRARY.impl(name, call, key)
    # Without this each call would pass through autograd's "not implemented" kernel first.
    _LIBRARY.impl(name, torch.library.fallthrough_kernel, "Autograd")
    torch.library.register_fake(f"titan_fp8::{name}", fake, lib=_LIBRARY)
    return operator


@contextmanager
def visited(visit: Visit) -> Iterator[None]:
    """Within, on this thread, `visit` stands for the calls of the operators, those that compiled code makes included.
    Who has visited around it sees the calls that it makes in turn."""
    outer = _visit.get()
    token = _visit.set(visit if outer is None else partial(_nested, visit, outer))
    try:
        yield
    finally:
        _visit.reset(token)


def _nested(
    visit: Visit,
    outer: Visit,
    op: OpOverload,
    implementation: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    return visit(op, lambda *args, **kwargs: outer(op, implementation, args, kwargs), args, kwargs)


@contextmanager
def unseen() -> Iterator[None]:
    """Within, on this thread, no visitor sees calls of operators, and nor do the dispatch modes of selective
    checkpointing.

    For what belongs to no pass, such as a cast that is made once and kept: a function that is computed again, and keeps
    results of the operators that it calls, may find it made the first time and not the second, or the other way round.
    """
    modes = _get_current_dispatch_mode_stack()
    are_of_checkpoints = any(type(mode).__module__ == "torch.utils.checkpoint" for mode in modes)
    token = _visit.set(None)
    try:
        with _disable_current_modes() if are_of_checkpoints else nullcontext():
            yield
    finally:
        _visit.reset(token)


def visitor() -> Visit | None:
    """What stands for the operators' calls here."""
    return _visit.get()
