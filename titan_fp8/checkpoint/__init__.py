"""Checkpoints: complete or not there, on any number of ranks, in the background if asked."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from titan_fp8.checkpoint.checkpointer import Checkpointer

__all__ = ["Checkpointer"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.checkpointer"), name)
