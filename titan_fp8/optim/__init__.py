"""Optimizers, the learning-rate schedule, gradient clipping."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from titan_fp8.optim.clipping import clip_grad_norm_
    from titan_fp8.optim.optimizers import OptimizersContainer, build_optimizer
    from titan_fp8.optim.schedule import LRSchedulers, build_lr_scheduler, lr_factor

_HOMES = {
    "OptimizersContainer": "optimizers",
    "build_optimizer": "optimizers",
    "LRSchedulers": "schedule",
    "build_lr_scheduler": "schedule",
    "lr_factor": "schedule",
    "clip_grad_norm_": "clipping",
}

__all__ = [
    "LRSchedulers",
    "OptimizersContainer",
    "build_lr_scheduler",
    "build_optimizer",
    "clip_grad_norm_",
    "lr_factor",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
