"""Methods whose signature is known before anybody asks.

`inspect.signature` of a method takes it apart anew each time, in some 20 us. FSDP asks for that of
`fsdp_pre_all_gather` before each gather of each weight, and in a forward pass the host may need longer for a block than
the device.
"""

import inspect
from collections.abc import Callable
from typing import Any


class told_signature:
    """A method of a class, which tells `inspect.signature` its parameters without `self`."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function
        self._signature = inspect.signature(function.__get__(object()))
        self.__doc__ = function.__doc__

    def __get__(self, instance: Any, owner: type | None = None) -> "told_signature | _Bound":
        return self if instance is None else _Bound(self._function, instance, self._signature)


class _Bound:
    """The method of one instance. No `functools.partial`, whose signature is made from its function's."""

    __slots__ = ("__signature__", "_function", "_instance")

    def __init__(self, function: Callable[..., Any], instance: Any, signature: inspect.Signature) -> None:
        self._function, self._instance, self.__signature__ = function, instance, signature

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._function(self._instance, *args, **kwargs)
